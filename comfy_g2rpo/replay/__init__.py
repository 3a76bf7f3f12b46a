"""Old forks that updates learn from once more: what is kept of them, which are chosen, how they come back."""
