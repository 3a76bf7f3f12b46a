"""Train LoRA's presets: numbers that fit a model's size, as data."""

AS_TYPED = "as typed"
PRESETS = (AS_TYPED, "quick look", "standard", "low memory", "best quality")
