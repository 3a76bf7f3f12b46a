"""How long a run lasts, how much it does at once and how often it looks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..options import option


@dataclass(frozen=True)
class Pace:
    """How long, how much at once, how often to look."""

    steps: int = option(
        100, "Training steps. Each draws images, scores them and updates the LoRA.", 1, 1_000_000
    )
    minutes: float | None = option(
        None, "Stop after so many minutes of training, even if steps are left.", 0.0001, 100_000
    )
    prompts_per_step: int = option(
        4, "Prompts per step. More learn more evenly and cost in proportion.", 1, 4096
    )
    seed: int = option(0, "Seed of every random draw: the same seed makes the same run.", 0, 2**31 - 1)
    slots: int = option(
        64,
        "Images in one forward while exploring. Lower it where memory runs out; only speed changes.",
        1,
        65536,
    )
    prompts_at_once: int = option(
        0,
        "Prompts of a step that are drawn together; 0 draws all. --ray hands out this many at a time.",
        0,
        4096,
    )
    decode_batch: int = option(
        64,
        "Images that the VAE decodes at once. Lower it where memory runs out; only speed changes.",
        1,
        65536,
    )
    micro_batch: int = option(
        16, "Images in one forward and backward of the update. Lower it where memory runs out.", 1, 65536
    )
    eval_every: int = option(
        0,
        "Steps between evaluations on held-out prompts; 0 evaluates at the start and the end only.",
        0,
        1_000_000,
    )
    eval_prompts: int = option(0, "Held-out prompts per evaluation; 0 takes all.", 0, 1_000_000)
    eval_noises: int = option(1, "Images per held-out prompt, from the same noises every time.", 1, 1000)
    checkpoint_every: int = option(
        50, "Steps between checkpoints. A crash loses what came after the last one.", 1, 1_000_000
    )
    keep_checkpoints: int = option(
        2, "Newest checkpoints that stay on disk, at least 2, beside the best one; 0 keeps all.", 0, 1_000_000
    )
    watch: str = option(
        "stop",
        "What happens when held-out scores, diversity or drift show reward hacking: stop, warn, or off.",
        choices=("stop", "warn", "off"),
    )
    patience: int = option(
        2, "Evaluations in a row that must show the same sign before it is an alarm.", 1, 1000
    )
    min_fall: float = option(
        0.1, "Fall of a held-out reward that counts, in spreads of the untrained model's scores.", 0, 100
    )
    min_diversity: float = option(
        0.5, "Share of the untrained model's diversity below which images count as collapsed; 0 never.", 0, 1
    )
    max_dropped: float = option(
        0.2, "Share of a step's images that a reward may fail to judge. More stops the run, resumable.", 0, 1
    )
    preview_width: int = option(
        0, "Width of a second size that evaluations draw too, which shows grids early; 0 draws none.", 0, 4096
    )
    preview_height: int = option(0, "Height of that second size.", 0, 4096)


FIELDS = {field.name: field for field in dataclasses.fields(Pace)}
