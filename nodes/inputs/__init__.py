"""Inputs of the blocks: widgets and their checks."""
