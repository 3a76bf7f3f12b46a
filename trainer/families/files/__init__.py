"""A model's parts from folders, files and checkpoints."""
