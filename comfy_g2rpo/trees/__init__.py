"""Shapes of plans beyond the paper's tree."""
