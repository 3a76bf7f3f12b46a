"""Model families: one module each, that loads a model as a policy with its text encoding and its decoder."""
