"""How much noise exploring takes, and what it costs."""
