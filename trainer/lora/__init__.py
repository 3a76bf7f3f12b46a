"""LoRA files of the headless trainer."""
