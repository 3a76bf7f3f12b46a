"""Shapes of a rollout beside the two in `plan.py`."""
