"""What a recipe may say, and which of its settings go together."""
