"""Which prompts a step takes by what was seen before, and what a run remembers for that."""
