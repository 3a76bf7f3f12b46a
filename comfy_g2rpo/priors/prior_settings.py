"""The settings of noise priors: how `g2rpo prior` goes about it."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import check_fields, option

ESTIMATORS = ("policy", "value")


@dataclass(frozen=True)
class PriorSettings:
    """How `g2rpo prior` learns to move start noise; training a LoRA reads none of these."""

    estimator: str = option(
        "policy",
        "How it learns: policy from the scores themselves, value from a network that predicts them, as the "
        "paper has it.",
        choices=ESTIMATORS,
    )
    rank: int = option(
        16, "Size of the network. More can tell more prompts apart, and learns by heart sooner.", 1, 256
    )
    alpha: float = option(
        0.1,
        "How hard the shift is held back: it becomes no longer than about 1 over this. More is safer and "
        "gains less.",
        0,
        1000,
    )
    learning_rate: float = option(
        0.03, "Step size of the network's optimizer. It is no LoRA's: the recipe's own is not read.", 1e-7, 1
    )

    def __post_init__(self) -> None:
        check_fields(self)
