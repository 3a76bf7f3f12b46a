"""The price of a run, before it runs."""
