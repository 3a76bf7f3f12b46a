"""What people prefer: their ballots, and the strengths that follow from them."""
