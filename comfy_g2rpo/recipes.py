"""Named methods as data: G²RPO and its relatives are settings on five axes, not classes.

The axes are the fields in `methods/recipe_options.py`.
"""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Any

from .methods.recipe_checks import FORWARD, check
from .methods.recipe_options import FIELDS, Recipe
from .methods.step_choice import candidate_steps, drawn_steps
from .options import nearest

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ["FIELDS", "RECIPES", "Recipe", "build_plan", "candidate_steps", "check", "chosen_steps", "recipe"]

RECIPES: dict[str, Recipe] = {
    # arXiv 2510.01982: each step of the first half branches by itself; Λ as in the published scripts.
    "g2rpo": Recipe(),
    # The same without multi-granularity: the paper's ablation.
    "g2rpo_single": Recipe(granularities=(1,)),
    # arXiv 2505.05470.
    "flow_grpo": Recipe(
        steps="all_but_last",
        tree="independent",
        granularities=(1,),
        std="global",
        objective="clip",
        kl=0.01,
        kl_form="published",
    ),
    # The same authors' later variant: a random window of two steps, branches of one anchor.
    "flow_grpo_fast": Recipe(pick="random_window", pick_size=2, granularities=(1,), objective="clip"),
    # arXiv 2505.07818: noise everywhere but at the last step, whose prediction is the image; a random 60 % of
    # these steps trained.
    "dance_grpo": Recipe(
        kernel="dance_sde",
        eta=0.3,
        steps="all_but_last",
        train_share=0.6,
        tree="independent",
        shared_start=True,
        granularities=(1,),
        objective="clip",
    ),
    # arXiv 2507.21802.
    "mix_grpo": Recipe(
        steps="all_but_last",
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
    # arXiv 2509.05952: Flow-GRPO's tree; noise that keeps its level, weighted as by −‖x′ − mean‖².
    "flow_cps": Recipe(
        kernel="cps",
        eta=0.8,
        steps="all_but_last",
        tree="independent",
        granularities=(1,),
        std="global",
        step_weight="variance",
        objective="clip",
        kl=0.01,
        kl_form="step",
    ),
    # arXiv 2512.15347 on Flow-GRPO's trajectories: 32 begin, 8 are finished; judged as published, at steps 30
    # and 40 of 50.
    "pro_grpo": Recipe(
        steps="all_but_last",
        tree="independent",
        group_size=8,
        expand=4.0,
        prune_at=(0.6, 0.8),
        granularities=(1,),
        objective="clip",
        kl=0.01,
        kl_form="published",
    ),
    # arXiv 2601.20218: Flow-GRPO's chains, every state of them finished; z of what each step gained. `g2rpo
    # calibrate` finds the etas.
    "dense_grpo": Recipe(
        num_steps=10,
        steps="all_but_last",
        tree="independent",
        granularities=(1,),
        credit="gain",
        objective="clip",
        kl=0.01,
        kl_form="published",
    ),
    # arXiv 2509.16117: images by the ODE, brought back to nine in ten of the levels; settings of its code.
    "diffusion_nft": Recipe(
        steps="all",
        train_share=0.9,
        tree="independent",
        granularities=(1,),
        std="global",
        objective="nft",
        old_decay=0.5,
        kl=1e-4,
    ),
    # arXiv 2509.25050: the same by six levels of fourteen, and clipped; settings of its code.
    "awm": Recipe(
        steps="all_but_last",
        train_share=0.43,
        tree="independent",
        granularities=(1,),
        std="global",
        objective="awm",
        clip=1.0,
        kl=1e-3,
    ),
    # arXiv 2606.06828: G²RPO's tree with one stride, a curriculum of prompts and a running baseline.
    "ada_grpo": Recipe(granularities=(1,), prompt_choice="curriculum", global_advantage=1.0),
    # arXiv 2509.06040: a binary tree; every branch splits at four steps and keeps DanceGRPO's noise between.
    "branch_grpo": Recipe(
        kernel="dance_sde",
        eta=0.3,
        steps="all_but_last",
        tree="branching",
        branch_at=(0, 3, 6, 9),
        group_size=16,
        granularities=(1,),
        objective="clip",
        clip=1e-3,
    ),
    # arXiv 2512.08153: splits at each step of a window that moves on; deterministic outside of it.
    "tree_grpo": Recipe(
        steps="all_but_last",
        pick="sliding_window",
        pick_size=4,
        slide_every=50,
        tree="branching",
        group_size=16,
        granularities=(1,),
        std="tree",
        objective="clip",
    ),
    # arXiv 2510.22319: Flow-GRPO's images, its ratio re-centred, its steps balanced; no KL.
    "grpo_guard": Recipe(
        steps="all_but_last",
        tree="independent",
        granularities=(1,),
        std="global",
        objective="clip",
        ratio_norm="guard",
        clip=2e-6,
    ),
}


def recipe(name: str, **changes: Any) -> Recipe:
    """Return a named recipe with some fields changed, checked against their bounds."""
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise ValueError(f"recipe {name!r} is unknown{nearest(name, RECIPES)}; there are: {known}")
    return check(dataclasses.replace(RECIPES[name], **changes))


def chosen_steps(made: Recipe, iteration: int, rng: random.Random) -> list[int]:
    """List the steps that are stochastic in this iteration."""
    steps = candidate_steps(made)
    size = min(made.pick_size, len(steps))
    if made.pick == "random_window":
        start = rng.randrange(len(steps) - size + 1)
    elif made.pick == "sliding_window":
        start = (iteration // made.slide_every) % (len(steps) - size + 1)
    elif made.pick == "random":
        return drawn_steps(steps, size, made.step_share, rng)
    else:
        return steps
    return steps[start : start + size]


def build_plan(made: Recipe, iteration: int = 0, seed: int = 0, coarsest: int = 1) -> Plan:
    """Build the iteration's plan; `coarsest` > 1 approximates its completions.

    The random choices depend on (seed, iteration) alone.
    """
    from .plan import independent, singular
    from .trees.branching import branching
    from .trees.dense_chains import dense, probed
    from .trees.pruned import pruned
    from .trees.whole_images import whole_images

    if made.expand > 1:
        begun = dataclasses.replace(made, expand=1.0, group_size=round(made.expand * made.group_size))
        whole = build_plan(begun, iteration, seed, coarsest)
        return pruned(whole, made.granularities, made.group_size, made.prune_by, made.prune_at)
    rng = random.Random(f"plan {seed} {iteration}")
    steps = chosen_steps(made, iteration, rng)
    if made.objective in FORWARD:
        draws = max(round(made.train_share * len(steps)), 1)
        return whole_images(made.num_steps, made.group_size, steps, draws, coarsest)
    every = {"kernel": made.kernel, "eta": made.etas or made.eta, "coarsest": coarsest}
    chains: dict[str, Any] = {"starts": made.starts, "shared_start": True}
    if made.tree == "independent":
        trained = sorted(rng.sample(steps, max(round(made.train_share * len(steps)), 1)))
        chains = {"trained_steps": trained, "shared_start": made.shared_start}
    finish = made.granularities[0], made.terminal
    if made.credit == "gain":
        return dense(made.num_steps, steps, made.group_size, *finish, **chains, **every)
    if made.tree == "independent":
        return independent(made.num_steps, steps, made.group_size, **chains, **every)
    if made.tree == "branching":
        splits = steps if made.branch_at is None else made.branch_at
        steps = sorted({*steps, *splits})
        every["trained_steps"] = sorted(rng.sample(steps, max(round(made.train_share * len(steps)), 1)))
        return branching(made.num_steps, steps, splits, made.group_size, starts=made.starts, **every)
    # A window moves as one: its branches leave the anchor once, at its first step.
    windowed = made.pick in ("random_window", "sliding_window")
    plan = singular(
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
    return probed(plan, {*plan.forks, *plan.transitions}, *finish, coarsest) if made.anchor_image else plan
