"""Blocks that find better images from a model as it is, without training."""
