"""Named methods as data: G²RPO and its relatives are settings on five axes, not classes.

Kernel · which steps are stochastic · shape of the tree · advantage · objective. Every field's metadata is its
documentation: the command line's help, the configuration's bounds and the graph blocks' tooltips are made
from it.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

from .advantages import MIXES
from .options import nearest, option
from .plan import Plan, independent, singular

PRODIGYS_LEAST = 0.1
KERNELS = ("flow_sde", "dance_sde", "cps")


@dataclass(frozen=True)
class Recipe:
    """How one iteration explores, judges and updates."""

    num_steps: int = option(16, "Steps of a trajectory (T).", 1, 1000)
    shift: float = option(3.0, "Time shift of the noise schedule; 1 is linear.", 0.01, 100)
    kernel: str = option("flow_sde", "Stochastic step.", choices=KERNELS)
    eta: float = option(0.7, "Exploration strength η of a stochastic step.", 0, 10)

    steps: str = option(
        "first_half",
        "Steps that may be stochastic: the first half, all, or all but the last.",
        choices=("first_half", "all", "all_but_last"),
    )
    pick: str = option(
        "every",
        (
            "Which of them an iteration takes: every one, a random window, a sliding window, or a random "
            "choice of `pick_size` single steps."
        ),
        choices=("every", "random_window", "sliding_window", "random"),
    )
    pick_size: int = option(1, "Size of the window or of the random choice, in steps.", 1, 1000)
    slide_every: int = option(25, "Iterations after which a sliding window moves on by one step.", 1, 100000)
    train_share: float = option(
        1.0,
        "Share of the stochastic steps of independent trajectories that is trained, chosen at random.",
        0.01,
        1,
    )

    tree: str = option(
        "singular",
        "Branches of one anchor, or independent trajectories.",
        choices=("singular", "independent"),
    )
    group_size: int = option(
        12, "Samples that are compared with one another (G); fewer than 6 are noisy.", 2, 1024
    )
    starts: int = option(1, "Start noises, each with its own anchor, per prompt (singular tree).", 1, 64)
    shared_start: bool = option(False, "Start all independent trajectories from one noise.")
    granularities: tuple[int, ...] = option(
        (1, 2), "Strides of the deterministic completions (Λ); each gives a reward of its own.", 1, 1000
    )
    terminal: str = option(
        "exact",
        "What a stride that misses the end does: one short step more, or a jump.",
        choices=("exact", "published"),
    )
    antithetic: bool = option(False, "Draw the branches' noise in mirrored pairs.")

    mix: str = option(
        "zscore",
        "How several rewards become one: the sum of their z-scores, the sum of the scores themselves, the "
        "least z-score, or the product of their ranks in the group.",
        choices=MIXES,
    )
    std: str = option(
        "group",
        "Standard deviation that scales the advantage: the group's, or that of all prompts.",
        choices=("group", "global"),
    )
    std_floor: float = option(
        1e-8,
        "Added to that deviation, in units of the reward; a group that spreads less teaches nothing.",
        0,
        1e6,
    )
    clamp: float = option(5.0, "Bound on the absolute advantage.", 0.01, 1000)
    diversity_weight: float = option(
        0.0,
        "Weight of being unlike the rest of the group, against 1 for a reward (SetPO); 0 turns it off.",
        0,
        1000,
    )
    diversity_by: str = option(
        "auto",
        (
            "What pictures are compared by: pixels, the embedding of a reward model, or that one where a "
            "reward has it."
        ),
        choices=("auto", "pixels", "embed"),
    )
    step_weight: str = option(
        "uniform",
        "Weight of a step: uniform, by its noise level, or such that every step's gradient has one scale.",
        choices=("uniform", "std", "balanced"),
    )

    objective: str = option(
        "on_policy",
        "Exact gradient of one update per rollout, or the clipped ratio.",
        choices=("on_policy", "clip"),
    )
    clip: float = option(
        1e-4,
        "Clip range of the ratio (log-probabilities are means over elements, hence the small numbers).",
        0,
        1,
    )
    epochs: int = option(1, "Passes over one rollout (clipped objective).", 1, 100)
    update: str = option(
        "accumulate",
        "Optimizer steps: one per rollout, or one per branch step.",
        choices=("accumulate", "per_step"),
    )
    kl: float = option(
        0.0, "Weight β of the velocity KL, to the model without adapter where nothing else is named.", 0, 1000
    )
    kl_reference: str = option(
        "base",
        (
            "What the velocity KL is measured against: the model without this adapter, or with the adapter "
            "that the run began with."
        ),
        choices=("base", "start"),
    )

    optimizer: str = option(
        "adamw",
        (
            "AdamW; AdamW with 8-bit moments (headless, by bitsandbytes); or Prodigy (headless, by "
            "prodigyopt), whose learning_rate is 1."
        ),
        choices=("adamw", "adamw_8bit", "prodigy"),
    )
    learning_rate: float = option(1e-4, "AdamW's learning rate.", 0, 1)
    weight_decay: float = option(1e-4, "AdamW's weight decay.", 0, 1)
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.", 0, 1e9)
    ema: float = option(
        0.0, "Decay of the adapter's moving average, which is then what is saved; 0 turns it off.", 0, 0.99999
    )


FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}

RECIPES: dict[str, Recipe] = {
    # arXiv 2510.01982: each step of the first half branches by itself; Λ as in the published scripts.
    "g2rpo": Recipe(),
    # The same without multi-granularity: the paper's ablation.
    "g2rpo_single": Recipe(granularities=(1,)),
    # arXiv 2505.05470.
    "flow_grpo": Recipe(
        steps="all_but_last", tree="independent", granularities=(1,), std="global", objective="clip", kl=0.01
    ),
    # The same authors' later variant: a random window of two steps, branches of one anchor.
    "flow_grpo_fast": Recipe(pick="random_window", pick_size=2, granularities=(1,), objective="clip"),
    # arXiv 2505.07818: noise everywhere, a random 60 % of the steps trained.
    "dance_grpo": Recipe(
        kernel="dance_sde",
        eta=0.3,
        steps="all",
        train_share=0.6,
        tree="independent",
        shared_start=True,
        granularities=(1,),
        objective="clip",
    ),
    # arXiv 2507.21802.
    "mix_grpo": Recipe(
        steps="all",
        pick="sliding_window",
        pick_size=4,
        tree="independent",
        shared_start=True,
        granularities=(1,),
        objective="clip",
    ),
    # arXiv 2508.04324: several seeds, each branching at every step; steps weighted by their noise.
    "tempflow_grpo": Recipe(
        steps="all_but_last", starts=2, group_size=6, granularities=(1,), step_weight="std", objective="clip"
    ),
}


def recipe(name: str, **changes: Any) -> Recipe:
    """Return a named recipe with some fields changed, checked against their bounds."""
    if name not in RECIPES:
        raise ValueError(
            f"recipe {name!r} is unknown{nearest(name, RECIPES)}; there are: {', '.join(RECIPES)}"
        )
    return check(dataclasses.replace(RECIPES[name], **changes))


def check(made: Recipe) -> Recipe:
    """Raise ValueError that names the first field out of its bounds; return the recipe otherwise."""
    for name, field in FIELDS.items():
        value, rule = getattr(made, name), field.metadata
        if rule["choices"] and value not in rule["choices"]:
            raise ValueError(
                f"{name} is {value!r}{nearest(str(value), rule['choices'])}; choose one of: "
                f"{', '.join(rule['choices'])}"
            )
        if rule["low"] is not None:
            values = value if isinstance(value, tuple) else (value,)
            if not values or not all(rule["low"] <= v <= rule["high"] for v in values):
                raise ValueError(f"{name} is {value}; it must lie between {rule['low']} and {rule['high']}")
    if made.tree == "independent" and made.granularities != (1,):
        raise ValueError(
            f"granularities is {made.granularities}; independent trajectories have no completions, so "
            "it must be (1,)"
        )
    if made.objective == "on_policy" and (made.epochs > 1 or made.update == "per_step"):
        raise ValueError(
            "epochs above 1 and update per_step leave the rollout's policy; choose objective: clip"
        )
    if made.optimizer == "prodigy" and made.learning_rate < PRODIGYS_LEAST:
        raise ValueError(
            f"learning_rate is {made.learning_rate:g}; prodigy finds its own and takes this for a "
            "factor: set it to 1"
        )
    return made


def candidate_steps(made: Recipe) -> list[int]:
    """List the steps that may be stochastic."""
    count = {
        "first_half": max(made.num_steps // 2, 1),
        "all": made.num_steps,
        "all_but_last": max(made.num_steps - 1, 1),
    }
    return list(range(count[made.steps]))


def chosen_steps(made: Recipe, iteration: int, rng: random.Random) -> list[int]:
    """List the steps that are stochastic in this iteration."""
    steps = candidate_steps(made)
    size = min(made.pick_size, len(steps))
    if made.pick == "random_window":
        start = rng.randrange(len(steps) - size + 1)
    elif made.pick == "sliding_window":
        start = (iteration // made.slide_every) % (len(steps) - size + 1)
    elif made.pick == "random":
        return sorted(rng.sample(steps, size))
    else:
        return steps
    return steps[start : start + size]


def build_plan(made: Recipe, iteration: int = 0, seed: int = 0, coarsest: int = 1) -> Plan:
    """Build the iteration's plan; the random choices depend on (seed, iteration) alone.

    `coarsest` > 1 approximates its completions.
    """
    rng = random.Random(f"plan {seed} {iteration}")
    steps = chosen_steps(made, iteration, rng)
    if made.tree == "independent":
        trained = sorted(rng.sample(steps, max(round(made.train_share * len(steps)), 1)))
        return independent(
            made.num_steps,
            steps,
            made.group_size,
            kernel=made.kernel,
            eta=made.eta,
            trained_steps=trained,
            shared_start=made.shared_start,
            coarsest=coarsest,
        )
    # A window moves as one: its branches leave the anchor once, at its first step.
    windowed = made.pick in ("random_window", "sliding_window")
    return singular(
        made.num_steps,
        steps[:1] if windowed else steps,
        made.group_size,
        made.granularities,
        kernel=made.kernel,
        eta=made.eta,
        terminal=made.terminal,
        window=len(steps) if windowed else 1,
        starts=made.starts,
        antithetic=made.antithetic,
        coarsest=coarsest,
    )
