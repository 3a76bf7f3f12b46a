"""Make recipes/presets/<family>.yaml: for every size of card, the first of some settings, from quick to
thrifty, that fits by estimate.

    python tools/make_presets.py [family …]

The estimate is that of `g2rpo plan`, for the family's bundled recipe; no weights are needed.
"""

from __future__ import annotations

import sys
from typing import Any

from g2rpo_trainer.config.bundled import bundled_folder
from g2rpo_trainer.config.family_names import FAMILIES
from g2rpo_trainer.config.reading import load
from g2rpo_trainer.cost.card_memory import GIB, sized
from g2rpo_trainer.cost.count_model import footprint as foresee
from g2rpo_trainer.cost.meta_model import build, look
from g2rpo_trainer.cost.presets import SIZES, Card, with_preset
from g2rpo_trainer.model.stored_linear import blocks_of

RECIPES = {name: family.recipe for name, family in sorted(FAMILIES.items())}
FREE = 0.97
"""Share of a card that is free when a run begins."""


def rungs(blocks: int) -> list[dict[str, Any]]:
    """List settings from quick to thrifty; the last ones fetch every block anew for every forward."""
    plain = {
        "memory.quantization": "none",
        "memory.block_swap": 0,
        "memory.gradient_checkpointing": False,
        "memory.vae_tiling": False,
    }
    checked = plain | {"memory.gradient_checkpointing": True, "train.micro_batch": 1}
    fp8, nf4 = checked | {"memory.quantization": "fp8"}, checked | {"memory.quantization": "nf4"}
    thrifty = nf4 | {"method.optimizer": "adamw_8bit", "train.decode_batch": 1}
    return [
        plain | {"train.slots": 64, "train.decode_batch": 16, "train.micro_batch": 16},
        plain | {"train.slots": 64, "train.decode_batch": 16, "train.micro_batch": 8},
        plain | {"train.slots": 32, "train.decode_batch": 8, "train.micro_batch": 4},
        plain | {"train.slots": 32, "train.decode_batch": 8, "train.micro_batch": 2},
        plain | {"train.slots": 16, "train.decode_batch": 4, "train.micro_batch": 1},
        checked | {"train.slots": 16, "train.decode_batch": 4, "train.micro_batch": 4},
        checked | {"train.slots": 16, "train.decode_batch": 4},
        checked | {"train.slots": 8, "train.decode_batch": 2},
        fp8 | {"train.slots": 8, "train.decode_batch": 2},
        fp8 | {"train.slots": 4, "train.decode_batch": 1},
        *(
            fp8 | {"train.slots": 4, "train.decode_batch": 1, "memory.block_swap": blocks * eighths // 8}
            for eighths in (1, 2, 3, 4)
        ),
        nf4 | {"train.slots": 4, "train.decode_batch": 1},
        thrifty | {"train.slots": 2, "memory.block_swap": blocks // 2},
        thrifty | {"train.slots": 2, "memory.block_swap": blocks},
        thrifty | {"train.slots": 1, "memory.block_swap": blocks, "memory.vae_tiling": True},
    ]


def make(family: str) -> str:
    """Write a family's presets as YAML."""
    recipe = RECIPES[family]
    config = load(recipe)
    sketch = look(config.model)
    ladder, lines = rungs(len(blocks_of(build(config, sketch).transformer))), []
    place = 0
    for name, size in sorted(SIZES.items(), key=lambda item: -item[1]):
        card = Card(name, int(FREE * size * GIB))
        turns = size <= 16
        while True:
            changes = ladder[place] | {"memory.text_encoders": "device", "memory.rewards_in_turn": turns}
            foreseen = foresee(with_preset(config, changes), sketch)
            if card.need(foreseen) > card.free and foreseen.phase == "encode":
                changes["memory.text_encoders"] = "cpu"
                foreseen = foresee(with_preset(config, changes), sketch)
            if card.fits(foreseen) or (place == len(ladder) - 1 and turns):
                break
            # Rewards that take turns cost time at every batch: not before the same settings fail without.
            place, turns = (place + 1, size <= 16) if turns else (place, True)
        if not card.fits(foreseen):
            print(f"{family} {name}: nothing fits, needs {sized(card.need(foreseen))}", flush=True)
            break
        print(f"{family} {name}: {place}, needs {sized(card.need(foreseen))}, {foreseen.phase}", flush=True)
        body = "".join(
            f"  {key}: {str(value).lower() if isinstance(value, bool) else value}\n"
            for key, value in changes.items()
        )
        lines.insert(
            0,
            (
                f"{name}:  # {recipe} needs ≈ {sized(card.need(foreseen))} by estimate, most in "
                f"{foreseen.phase}\n{body}"
            ),
        )
    return "".join(
        [
            (
                "# Made by tools/make_presets.py; g2rpo train RECIPE --preset SIZE. What --set gives goes "
                "before these.\n"
            ),
            *lines,
        ]
    )


def main() -> None:
    """Write the files of the families that are named, or of all."""
    for family in sys.argv[1:] or RECIPES:
        text = make(family)
        (bundled_folder("recipes") / "presets" / f"{family}.yaml").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
