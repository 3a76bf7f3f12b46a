"""The field's reward models, loaded from folders of safetensors."""
