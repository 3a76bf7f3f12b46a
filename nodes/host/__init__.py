"""What the blocks need of ComfyUI around them."""
