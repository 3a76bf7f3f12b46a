"""G²RPO in pure PyTorch: granular group relative policy optimisation for flow models (arXiv 2510.01982)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import advantages, kernels, lora, plan, recipes, schedule, update

__version__ = "0.1.0"
__all__ = ["advantages", "kernels", "lora", "plan", "recipes", "schedule", "update"]


def __getattr__(name: str) -> Any:
    """Import the method when a part of it is first asked for: version and options need no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # `from . import …` would ask for the attribute again; importing from a module makes that an attribute.
    from .advantages import FLOOR  # noqa: F401
    from .lora import check  # noqa: F401
    from .recipes import build_plan  # noqa: F401
    from .update import update  # noqa: F401

    return globals()[name]
