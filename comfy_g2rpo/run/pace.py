"""How long a run lasts, how much it does at once and how often it looks.

Like a recipe's, every field's metadata is its documentation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..options import option


@dataclass(frozen=True)
class Pace:
    """How long, how much at once, how often to look."""

    steps: int = option(100, "Iterations; each is a rollout, its scores and an update.", 1, 1_000_000)
    minutes: float | None = option(
        None, "Stop after so many minutes, even if steps are left.", 0.0001, 100_000
    )
    prompts_per_step: int = option(4, "Prompts per iteration.", 1, 4096)
    seed: int = option(0, "Seed of every random draw.", 0, 2**31 - 1)
    slots: int = option(64, "Latents in one forward of the rollout; bounds its memory.", 1, 65536)
    decode_batch: int = option(64, "Pictures that are decoded at once.", 1, 65536)
    micro_batch: int = option(
        16, "Latents in one forward and backward of the update; bounds its memory.", 1, 65536
    )
    eval_every: int = option(
        0, "Iterations between evaluations; 0 evaluates at the start and the end only.", 0, 1_000_000
    )
    eval_prompts: int = option(0, "Held-out prompts per evaluation; 0 takes all.", 0, 1_000_000)
    eval_noises: int = option(1, "Fixed start noises per held-out prompt.", 1, 1000)
    checkpoint_every: int = option(
        50, "Iterations between checkpoints; the end has one anyway.", 1, 1_000_000
    )
    keep_checkpoints: int = option(
        2, "Newest checkpoints that are kept, beside the best by held-out rewards; 0 keeps all.", 0, 1_000_000
    )
    watch: str = option(
        "stop",
        "Watch on reward hacking at every evaluation: stop the run on an alarm, warn only, or off.",
        choices=("stop", "warn", "off"),
    )
    patience: int = option(
        2, "Evaluations in a row that must show the same sign of hacking before it is an alarm.", 1, 1000
    )
    min_fall: float = option(
        0.1,
        (
            "Fall of a held-out reward that counts, in standard deviations of the untrained model's scores "
            "over prompts."
        ),
        0,
        100,
    )
    min_diversity: float = option(
        0.5,
        "Share of the untrained model's diversity below which pictures count as collapsed; 0 never.",
        0,
        1,
    )
    max_dropped: float = option(
        0.2, "Share of a step's pictures that rewards may fail to judge; more stops the run, resumable.", 0, 1
    )
    preview_width: int = option(
        0,
        "Width of previews that evaluations draw at a second size, which shows grids; 0 draws none.",
        0,
        4096,
    )
    preview_height: int = option(0, "Height of those previews.", 0, 4096)


FIELDS = {field.name: field for field in dataclasses.fields(Pace)}
