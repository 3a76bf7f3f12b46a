"""The service for a remote GPU: its guard, what it takes, its jobs, and its client."""
