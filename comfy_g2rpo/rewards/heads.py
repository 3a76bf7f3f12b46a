"""The head that ImageReward and the aesthetic predictors share: five linear layers without anything between them."""

from collections.abc import Sequence

from torch import nn

WIDTHS = (1024, 128, 64, 16, 1)


def mlp(width: int, widths: Sequence[int] = WIDTHS) -> nn.Sequential:
    """Stack linear layers; the originals' dropouts do nothing when judging, and there is no activation in them."""
    return nn.Sequential(*(nn.Linear(before, after) for before, after in zip((width, *widths), widths, strict=False)))
