"""Shapes in images: what prompts ask for, what is seen, and how far the two agree."""
