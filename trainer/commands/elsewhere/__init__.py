"""Commands of training elsewhere: beside ComfyUI, on another machine, and of ComfyUI's own workflows."""
