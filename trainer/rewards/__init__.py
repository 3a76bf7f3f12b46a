"""Rewards of the headless trainer."""
