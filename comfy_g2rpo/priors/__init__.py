"""Noise priors: networks that move start noise by the prompt, and their training."""
