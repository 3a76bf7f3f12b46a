"""Named methods as data: G²RPO and its relatives are settings on five axes, not classes.

Kernel · which steps are stochastic · shape of the tree · advantage · objective. The command line's help, the
configuration's bounds and the graph blocks' tooltips are made from the fields.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .options import MIXES, check_fields, nearest, option

if TYPE_CHECKING:
    from .plan import Plan

PRODIGYS_LEAST = 0.1
KERNELS = ("flow_sde", "dance_sde", "cps")


@dataclass(frozen=True)
class Recipe:
    """How one iteration explores, judges and updates."""

    num_steps: int = option(
        16, "Sampling steps of an image. More look finer and cost in proportion.", 1, 1000
    )
    shift: float = option(3.0, "Time shift: above 1, more steps go to high noise; 1 is linear.", 0.01, 100)
    kernel: str = option("flow_sde", "How noise is added when exploring. Keep flow_sde.", choices=KERNELS)
    eta: float = option(
        0.7,
        "How far branches stray. Too low: they look alike and teach little; too high: broken images.",
        0,
        10,
    )

    steps: str = option(
        "first_half",
        "Steps that may explore. Early steps decide what is in the image, late ones its texture.",
        choices=("first_half", "all", "all_but_last"),
    )
    pick: str = option(
        "every",
        "Which of them an iteration takes: every one, some next to each other, or single ones at random. "
        "Fewer are cheaper and noisier.",
        choices=("every", "random_window", "sliding_window", "random"),
    )
    pick_size: int = option(1, "How many steps a window or a random choice takes.", 1, 1000)
    slide_every: int = option(25, "Iterations until a sliding window moves on by one step.", 1, 100000)
    train_share: float = option(
        1.0, "Share of the exploring steps that is trained; less is quicker and noisier.", 0.01, 1
    )

    tree: str = option(
        "singular",
        "Branches that leave one image at a single step, or whole images of their own (the older methods).",
        choices=("singular", "independent"),
    )
    group_size: int = option(
        12, "Images that are compared with one another. Below 6 is noisy; more costs in proportion.", 2, 1024
    )
    starts: int = option(1, "Start noises per prompt. More see more variety and cost in proportion.", 1, 64)
    shared_start: bool = option(
        False, "Start a prompt's independent images from one noise, to compare alike."
    )
    granularities: tuple[int, ...] = option(
        (1, 2),
        "Strides at which a branch is finished: 1 takes every step, 2 every second. Each gives a score; more "
        "make scores surer and cost more.",
        1,
        1000,
    )
    terminal: str = option(
        "exact",
        "Where a stride misses the end: one short step more, or the jump of the published code.",
        choices=("exact", "published"),
    )
    antithetic: bool = option(False, "Draw the branches' noise in opposite pairs, which evens out chance.")

    mix: str = option(
        "zscore",
        "How several rewards become one: z-scores added, raw scores added, the worst z-score, or ranks "
        "multiplied. zscore suits rewards of different scales.",
        choices=MIXES,
    )
    std: str = option(
        "group",
        "What scores are divided by: the spread of their own group, or of all prompts.",
        choices=("group", "global"),
    )
    std_floor: float = option(
        1e-8,
        "Smallest spread of a group that teaches, in the reward's units. Raise it for noisy rewards.",
        0,
        1e6,
    )
    clamp: float = option(5.0, "Largest advantage of one image, so that no outlier rules a step.", 0.01, 1000)
    diversity_weight: float = option(
        0.0,
        "Reward for looking unlike the group, against collapse; 1 pulls like a reward, 0 is off.",
        0,
        1000,
    )
    diversity_by: str = option(
        "auto",
        "What likeness is measured by: pixels, a reward model's view (embed), or that where there is one.",
        choices=("auto", "pixels", "embed"),
    )
    step_weight: str = option(
        "uniform",
        "How much each exploring step counts: alike, by its noise, or so that all pull equally hard.",
        choices=("uniform", "std", "balanced"),
    )

    objective: str = option(
        "on_policy",
        "The exact gradient for one update per rollout, or the clipped ratio, which allows several.",
        choices=("on_policy", "clip"),
    )
    clip: float = option(1e-4, "How far a clipped update may go. Small, for likelihoods are means.", 0, 1)
    epochs: int = option(1, "Updates from one rollout. Needs objective clip; more can overshoot.", 1, 100)
    update: str = option(
        "accumulate",
        "One optimizer step per rollout, or one per exploring step, as the published code does.",
        choices=("accumulate", "per_step"),
    )
    kl: float = option(
        0.0, "Pull back to the reference model, against drift and reward hacking. Costs a forward.", 0, 1000
    )
    kl_reference: str = option(
        "base", "Pull back to the model without this LoRA, or to the run's start.", choices=("base", "start")
    )

    optimizer: str = option(
        "adamw",
        "adamw; adamw_8bit, which saves memory; or prodigy, which finds its own rate (set learning_rate: 1). "
        "The last two run headless only.",
        choices=("adamw", "adamw_8bit", "prodigy"),
    )
    learning_rate: float = option(
        1e-4, "How fast it learns. Too high collapses images within few steps; halve it then.", 0, 1
    )
    lr_schedule: str = option(
        "constant",
        "Whether the learning rate stays, or falls to nothing over the run's steps: linear or cosine. A fall "
        "calms the end of a run.",
        choices=("constant", "linear", "cosine"),
    )
    warmup_steps: int = option(
        0,
        "Steps over which the learning rate rises to its value; a guard against a rough start.",
        0,
        1_000_000,
    )
    weight_decay: float = option(1e-4, "Pull of the LoRA's weights towards zero.", 0, 1)
    max_grad_norm: float = option(
        1.0, "Longest gradient that an update follows; a guard against jumps.", 0, 1e9
    )
    ema: float = option(
        0.0,
        "Save a moving average of the LoRA, which is calmer; 0.9 looks back ten steps, 0 is off.",
        0,
        0.99999,
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
        known = ", ".join(RECIPES)
        raise ValueError(f"recipe {name!r} is unknown{nearest(name, RECIPES)}; there are: {known}")
    return check(dataclasses.replace(RECIPES[name], **changes))


def check(made: Recipe) -> Recipe:
    """Raise ValueError that names the first field out of its bounds; return the recipe otherwise."""
    check_fields(made)
    if made.tree == "independent" and made.granularities != (1,):
        remedy = "independent trajectories have no completions, so it must be (1,)"
        raise ValueError(f"granularities is {made.granularities}; {remedy}")
    if made.objective == "on_policy" and (made.epochs > 1 or made.update == "per_step"):
        leaving = "epochs above 1 and update per_step leave the rollout's policy"
        raise ValueError(f"{leaving}; choose objective: clip")
    if made.optimizer == "prodigy" and made.learning_rate < PRODIGYS_LEAST:
        remedy = "prodigy finds its own and takes this for a factor: set it to 1"
        raise ValueError(f"learning_rate is {made.learning_rate:g}; {remedy}")
    return made


def candidate_steps(made: Recipe) -> list[int]:
    """List the steps that may be stochastic."""
    steps = made.num_steps
    count = {"first_half": max(steps // 2, 1), "all": steps, "all_but_last": max(steps - 1, 1)}
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
    """Build the iteration's plan; `coarsest` > 1 approximates its completions.

    The random choices depend on (seed, iteration) alone.
    """
    from .plan import independent, singular

    rng = random.Random(f"plan {seed} {iteration}")
    steps = chosen_steps(made, iteration, rng)
    every = {"kernel": made.kernel, "eta": made.eta, "coarsest": coarsest}
    if made.tree == "independent":
        every["trained_steps"] = sorted(rng.sample(steps, max(round(made.train_share * len(steps)), 1)))
        return independent(made.num_steps, steps, made.group_size, shared_start=made.shared_start, **every)
    # A window moves as one: its branches leave the anchor once, at its first step.
    windowed = made.pick in ("random_window", "sliding_window")
    return singular(
        made.num_steps,
        steps[:1] if windowed else steps,
        made.group_size,
        made.granularities,
        terminal=made.terminal,
        window=len(steps) if windowed else 1,
        starts=made.starts,
        antithetic=made.antithetic,
        **every,
    )
