"""G²RPO in pure PyTorch: granular group relative policy optimisation for flow models (arXiv 2510.01982)."""

from . import advantages, kernels, lora, plan, recipes, schedule, update

__version__ = "0.1.0"
__all__ = ["advantages", "kernels", "lora", "plan", "recipes", "schedule", "update"]
