"""Forwards that are faster on a CPU."""
