"""A step shared out: its prompts in parts, parts as bytes, and workers that explore ahead of the learner."""
