"""A loaded model: where its weights are, how its forward is made cheaper, and drawing with it."""
