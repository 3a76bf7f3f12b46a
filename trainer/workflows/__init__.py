"""ComfyUI's workflows: read as recipes, and written from them. Nothing of a file is imported or run."""
