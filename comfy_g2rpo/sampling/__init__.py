"""Sampling with a model as it is."""
