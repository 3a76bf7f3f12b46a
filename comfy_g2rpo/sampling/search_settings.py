"""The settings of searches: one class for all of them, and which method reads which."""

from __future__ import annotations

from dataclasses import dataclass

from ..methods.recipe_options import KERNELS
from ..options import check_fields, option

NOISY = ("kernel", "eta")
READS: dict[str, tuple[str, ...]] = {
    "best_of_n": (),
    "coarse_first": ("stride", "score"),
    "branch_search": (*NOISY, "steps", "group", "stride"),
    "particles": (*NOISY, "strength", "judge_at"),
    "funnel": (*NOISY, "strength", "judge_at", "stride"),
    "particle_gibbs": (*NOISY, "strength", "judge_at", "iterations"),
    "noise_search": ("mutation",),
    "ensemble": ("pull",),
}
"""The searches by name, and the settings that each reads."""


@dataclass(frozen=True)
class SearchSettings:
    """How `g2rpo search` goes about it; a method reads some of these, and training none."""

    steps: tuple[int, ...] = option(
        (0, 1, 2, 3),
        "For branch search: the steps that may change; 0 is the first. Early ones decide what is in the "
        "image.",
        0,
        999,
    )
    eta: float = option(
        0.7,
        "For branches and particles: how far noise lets them stray. 0 is not at all; too high breaks images.",
        0,
        10,
    )
    kernel: str = option(
        "ddim", "For branches and particles: how that noise is added. Keep ddim.", choices=KERNELS
    )
    group: int = option(
        0, "For branch search: branches that every step tries; 0 takes what the budget allows.", 0, 1000
    )
    stride: int = option(
        2,
        "For coarse first, branch search and funnel: steps that a rough look takes at once. More are cheaper "
        "and look rougher; 1 is exact.",
        1,
        100,
    )
    strength: float = option(
        20.0,
        "For particles: how much a better score counts, about 2 over the spread of the scores. 0 is ordinary "
        "sampling.",
        0,
        1e6,
    )
    judge_at: tuple[int, ...] = option(
        (3, 4, 5),
        "For particles: steps at which the poor are replaced, by what each will look like. Early looks say "
        "little.",
        0,
        999,
    )
    iterations: int = option(
        2,
        "For particle gibbs: how often it goes through all steps. More refine one image, with fewer "
        "particles.",
        1,
        1000,
    )
    mutation: float = option(
        0.5,
        "For noise search: the share of a noise that is exchanged at first. It halves where nothing gets "
        "better.",
        0,
        1,
    )
    pull: float = option(
        0.3, "For the ensemble: how far its members move at a step. Too far, and they become alike.", 0, 10
    )
    score: str = option(
        "reward",
        "For coarse first: what rough looks are ranked by. guidance_gap is how far guidance moves them: none "
        "is decoded or judged, which is cheaper and chooses worse. It needs guidance above 1.",
        choices=("reward", "guidance_gap"),
    )

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, method: str, guided: bool) -> None:
        """Raise ValueError where a search would read guidance that is not there."""
        if self.score == "guidance_gap" and "score" in READS[method] and not guided:
            raise ValueError(
                "score is guidance_gap, which needs guidance above 1 with a negative prompt (CFGGuider in "
                "ComfyUI, model.guidance in a recipe); raise it, or set score to reward"
            )
