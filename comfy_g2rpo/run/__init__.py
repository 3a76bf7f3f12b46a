"""A run: its settings, its iterations, its folder."""
