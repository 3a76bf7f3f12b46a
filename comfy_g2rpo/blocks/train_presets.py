"""Train LoRA's presets: the numbers that they put in place of the typed ones, as data.

They are those of the bundled recipes for the command line (recipes/*.yaml), by the model's size; what a
preset changes of them, and why, stands beside it.
"""

from __future__ import annotations

from typing import Any

AS_TYPED = "as typed"
WIDGETS = ("steps", "learning_rate", "rank", "alpha", "prompts_per_step", "slots", "eval_every")
"""Train LoRA's widgets that do not count while a preset is chosen."""
TREE = ("group_size", "granularities", "pick", "pick_size")
"""Fields of the exploration tree: recipes other than g2rpo keep their own, which are what makes them."""

MEDIUM_FROM, LARGE_FROM = 0.2e9, 3.5e9  # parameters of the diffusion model
SIZES: dict[str, dict[str, Any]] = {
    # recipes/demo.yaml: the bundled tiny model.
    "small": {
        "steps": 240,
        "learning_rate": 1e-3,
        "rank": 16,
        "alpha": 16.0,
        "prompts_per_step": 2,
        "slots": 128,
        "decode_batch": 64,
        "micro_batch": 64,
        "eval_every": 60,
        "num_steps": 8,
        "group_size": 8,
        "granularities": (2,),
    },
    # recipes/sd35_medium.yaml, with the batches of its 16gb preset.
    "medium": {
        "steps": 300,
        "learning_rate": 1e-4,
        "rank": 32,
        "alpha": 64.0,
        "prompts_per_step": 4,
        "slots": 16,
        "decode_batch": 4,
        "micro_batch": 1,
        "eval_every": 25,
        "num_steps": 16,
        "group_size": 12,
        "granularities": (1, 2),
    },
    # recipes/flux_dev.yaml; rank and alpha are those of the method's authors.
    "large": {
        "steps": 300,
        "learning_rate": 1e-4,
        "rank": 64,
        "alpha": 128.0,
        "prompts_per_step": 4,
        "slots": 8,
        "decode_batch": 4,
        "micro_batch": 1,
        "eval_every": 25,
        "num_steps": 16,
        "group_size": 12,
        "granularities": (1, 2),
    },
}
"""What every preset starts from."""
PRESETS: dict[str, dict[str, Any]] = {
    AS_TYPED: {},
    # One exploring step at random and completions at stride 2: what gained most in 12 CPU seconds
    # (benchmarks/RESULTS.md), and less than a hundredth of a standard run's forwards.
    "quick look": {
        "steps": 40,
        "prompts_per_step": 2,
        "eval_every": 10,
        "eval_prompts": 8,
        "num_steps": 8,
        "group_size": 8,
        "granularities": (2,),
        "pick": "random",
        "pick_size": 1,
    },
    # The published tree: what replaces it was measured on the bundled model alone (benchmarks/RESULTS.md).
    "standard": {},
    # The batches of docs/memory.md's smallest settings; a quarter of a large model's LoRA and its optimizer.
    "low memory": {"rank": 16, "slots": 2, "decode_batch": 1, "micro_batch": 1},
    # Twice the prompts per step, and twice the branches rather than the paper's three granularities, which
    # cost more and tell less (benchmarks/RESULTS.md, the study of granularity).
    "best quality": {"prompts_per_step": 8, "group_size": 24, "granularities": (2,)},
}


def preset_numbers(preset: str, parameters: int, recipe: str) -> dict[str, Any]:
    """Return a preset's numbers by field, for a model of so many parameters; nothing for AS_TYPED."""
    if preset == AS_TYPED:
        return {}
    size = SIZES["small" if parameters < MEDIUM_FROM else "medium" if parameters < LARGE_FROM else "large"]
    numbers = {**size, **PRESETS[preset]}
    # A LoRA works at alpha / rank: a smaller one at the same strength.
    numbers["alpha"] = size["alpha"] * numbers["rank"] / size["rank"]
    return {name: value for name, value in numbers.items() if recipe == "g2rpo" or name not in TREE}
