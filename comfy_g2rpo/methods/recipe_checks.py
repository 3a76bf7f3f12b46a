"""Which settings of a recipe go together."""

from __future__ import annotations

from ..options import check_fields
from .recipe_options import Recipe

PRODIGYS_LEAST = 0.1
EXPLORING = (
    *("kernel", "eta", "steps", "pick", "pick_size", "slide_every", "train_share", "tree", "group_size"),
    *("starts", "shared_start", "granularities", "terminal", "antithetic", "step_weight"),
    *("diversity_weight", "epochs", "update"),
)
"""Fields that say how a rollout explores and is learned from, which stored forks have behind them."""


def check(made: Recipe) -> Recipe:
    """Raise ValueError that names the first field out of its bounds; return the recipe otherwise."""
    check_fields(made)
    if made.tree == "independent" and made.granularities != (1,):
        remedy = "independent trajectories have no completions, so it must be (1,)"
        raise ValueError(f"granularities is {made.granularities}; {remedy}")
    if made.expand > 1:
        check_pruning(made)
    if made.objective == "on_policy" and (made.epochs > 1 or made.update == "per_step"):
        leaving = "epochs above 1 and update per_step leave the rollout's policy"
        raise ValueError(f"{leaving}; choose objective: clip")
    if made.objective == "pairs":
        plain = Recipe()
        for name in EXPLORING:
            if getattr(made, name) != getattr(plain, name):
                remedy = "objective pairs learns from kept forks and explores nothing; leave it out"
                raise ValueError(f"{name} is {getattr(made, name)}; {remedy}")
    if made.optimizer == "prodigy" and made.learning_rate < PRODIGYS_LEAST:
        remedy = "prodigy finds its own and takes this for a factor: set it to 1"
        raise ValueError(f"learning_rate is {made.learning_rate:g}; {remedy}")
    return made


def check_pruning(made: Recipe) -> None:
    """Raise ValueError unless the recipe's branches can be judged on the way."""
    if made.tree not in ("singular", "independent"):
        remedy = "branches that split again cannot be dropped: choose tree singular or independent"
        raise ValueError(f"expand is {made.expand:g}; {remedy}, or set it to 1")
    if made.prune_by == "coarsest" and len(set(made.granularities)) < 2:
        remedy = "the largest stride only judges, so list a smaller one too, such as 1, 2"
        raise ValueError(f"granularities is {made.granularities}; {remedy}, or choose prune_by: prediction")
