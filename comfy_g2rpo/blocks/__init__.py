"""What the block Train LoRA means: shared by ComfyUI's node and by the command line that reads graphs."""
