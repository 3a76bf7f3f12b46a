"""Training beyond one machine: workers of a Ray cluster explore, this process learns."""
