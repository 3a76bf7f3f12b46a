"""The arms of the learning benchmark as data: recipes, their freedoms, and what tuning chooses from.

A **form** is what an arm is with one of the freedoms that our own leader has: one random step per update, and
completions at stride 2. Every arm that can take a freedom gets it, by the same rule, and its tuning chooses.
With both freedoms some arms are ours by another name, so each also stands as an arm that is `…, published`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from comfy_g2rpo.recipes import FIELDS, RECIPES, Recipe, recipe

SMALL = {"num_steps": 8, "shift": 3.0, "group_size": 8}
SHARED = {"max_grad_norm": 3e-5}
"""What all arms share: gradients, whose norms are about 1e-3 and differ between steps and arms, are scaled
to one norm.
"""
OWN = "own"
WEIGHED = ("on_policy", "clip")
"""Objectives that weigh steps."""
RATES = (2.5e-4, 3.5e-4, 5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3)
WEIGHTS, PROMPTS, AVERAGES = (OWN, "balanced"), (1, 2, 4), (0.0, 0.9)
Changes = Mapping[str, Any]
"""Fields of the recipe by name; those of other sections as `section.name`."""


class Setting(NamedTuple):
    """What tuning chooses: a learning rate, the step weights, a number of prompts per update, the decay of
    the adapter's moving average (0 is none), and the arm's form.
    """

    rate: float
    weights: str
    prompts: int
    average: float
    form: str = OWN


START = Setting(1.5e-3, OWN, 2, 0.9)
"""Where tuning starts, unless an earlier one has chosen: what most arms had chosen in `refined_tune`."""


@dataclass(frozen=True)
class Arm:
    """A recipe as it enters the comparison."""

    method: Changes
    """The recipe's name, and the fields that make the arm what it is."""
    ours: bool = False
    free: bool = True
    """Whether it gets the freedoms as forms."""
    fixed: tuple[str, ...] = ()
    """Coordinates of the setting that stay as the recipe has them."""
    forms: Mapping[str, Changes] = field(default_factory=dict)
    """Forms of its own beside those of the rule."""
    listed: bool = True
    """Whether it runs unless others are named."""


ONE_STEP = {"name": "g2rpo", "pick": "random", "pick_size": 1}
AS_PUBLISHED = {
    "name": "g2rpo",
    "granularities": [1, 2],
    "terminal": "published",
    "objective": "clip",
    "update": "per_step",
    "max_grad_norm": 1.0,
}


def one_step(granularities: Sequence[int], listed: bool = True, **more: Any) -> Arm:
    """Make one of our arms with one random step per update."""
    method = {**ONE_STEP, "granularities": list(granularities), **more}
    return Arm(method, ours=True, free=False, listed=listed)


OFTEN = 2
"""Updates until a sliding window moves: 12 places in 300 published updates, or the 30 of 12 CPU seconds."""

ARMS: dict[str, Arm] = {
    "g2rpo, published": Arm(AS_PUBLISHED, free=False, fixed=("weights", "average")),
    "g2rpo {2}": one_step([2]),
    "g2rpo {2,4}": one_step([2, 4]),
    "g2rpo {2}, replay": one_step([2], objective="clip", replay=4),
    "flow_grpo": Arm({"name": "flow_grpo"}),
    "flow_grpo_fast": Arm({"name": "flow_grpo_fast"}),
    "dance_grpo": Arm({"name": "dance_grpo"}),
    "mix_grpo": Arm({"name": "mix_grpo", "slide_every": OFTEN}),
    "tempflow_grpo": Arm({"name": "tempflow_grpo", "group_size": 4}),
    "flow_cps": Arm({"name": "flow_cps"}),
    "grpo_guard": Arm({"name": "grpo_guard"}, forms={"two epochs": {"epochs": 2}}),
    "dense_grpo": Arm({"name": "dense_grpo"}),
    "branch_grpo": Arm({"name": "branch_grpo", "branch_at": [0, 2, 4]}),
    "tree_grpo": Arm({"name": "tree_grpo", "pick_size": 3, "slide_every": OFTEN}),
    "pro_grpo": Arm({"name": "pro_grpo"}),
    "ada_grpo": Arm({"name": "ada_grpo"}),
    "diffusion_nft": Arm({"name": "diffusion_nft"}),
    "awm": Arm({"name": "awm"}),
    "g2rpo {2}, every step": Arm(
        {"name": "g2rpo", "granularities": [2]}, ours=True, free=False, listed=False
    ),
    "g2rpo {1}": one_step([1], listed=False),
    "g2rpo {1,2}": one_step([1, 2], listed=False),
    "g2rpo {1,3}": one_step([1, 3], listed=False),
}

PUBLISHED = ", published"

for _name, _arm in list(ARMS.items()):
    if _arm.free:
        ARMS[_name + PUBLISHED] = replace(_arm, free=False, forms={}, listed=False)


def make(changes: Changes) -> Recipe | None:
    """Make a recipe of the benchmark's size; None where this version lacks or refuses something of it."""
    fields = {**SMALL, **{name: value for name, value in changes.items() if "." not in name}}
    name = fields.pop("name")
    if name not in RECIPES or set(fields) - set(FIELDS):
        return None
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    try:
        return recipe(name, **tuples)
    except ValueError:
        return None


def arms_here() -> tuple[list[str], list[str]]:
    """Return the arms whose recipes this version has, and those that it lacks."""
    here = [name for name, arm in ARMS.items() if make(arm.method)]
    return here, [name for name in ARMS if name not in here]


RANDOM_STEP = {"steps": "first_half", "pick": "random", "pick_size": 1}
FORWARD, ONE_LEVEL = ("nft", "awm"), {"train_share": 0.01}
"""Objectives without a random step, and what one step is for them: one noise level for each image."""
COARSE_TAIL = {"speed.tail_stride": 2, "speed.guard_rank": 0.0, "speed.guard_every": 1_000_000}
"""Stride 2 for trajectories, whose rest is no completion of its own: MixGRPO-Flash's second-order tail."""


def forms(arm: str) -> dict[str, Changes]:
    """List an arm's forms: as published first, then each freedom that it can take.

    With one epoch the ratio is 1 and the clip idle: a clipped arm's gradient is the exact one, and as many
    forwards; what the clip still costs per image, the forms with one step save.
    """
    found, method, own = {OWN: {}}, ARMS[arm].method, make(ARMS[arm].method)
    if own is None or not ARMS[arm].free:
        return found
    wanted: dict[str, Changes] = {}
    if own.objective in FORWARD:
        wanted |= {"one level": ONE_LEVEL, "one level, stride 2": {**ONE_LEVEL, **COARSE_TAIL}}
        wanted |= {"one level, stride 2, no KL": {**ONE_LEVEL, **COARSE_TAIL, "kl": 0.0}}
    elif own.tree in ("singular", "independent"):
        exact = {"objective": "on_policy"} if own.objective == "clip" else {}
        step = {**RANDOM_STEP, **exact} if make({**method, **exact}) else RANDOM_STEP
        single = {**step, "granularities": [2]}
        coarse = single if make({**method, **single}) else {**step, **COARSE_TAIL}
        wanted |= {"one step": step, "one step, stride 2": coarse}
        wanted |= {"one step, stride 2, no KL": {**coarse, "kl": 0.0}} if own.kl else {}
    wanted |= ARMS[arm].forms
    return found | {name: changes for name, changes in wanted.items() if make({**method, **changes})}


def method_of(arm: str, setting: Setting) -> dict[str, Any]:
    """Return the fields of the recipe that an arm has at a setting."""
    changes = {name: value for name, value in forms(arm)[setting.form].items() if "." not in name}
    return {
        **SHARED,
        **ARMS[arm].method,
        **changes,
        **({} if setting.weights == OWN else {"step_weight": setting.weights}),
        **({"ema": setting.average} if setting.average and "average" not in ARMS[arm].fixed else {}),
    }


def describe(arm: str, setting: Setting, **common: Any) -> dict[str, Any]:
    """Describe a run of an arm at a setting."""
    sections = {name: value for name, value in forms(arm)[setting.form].items() if "." in name}
    found = {"arm": arm, "method": method_of(arm, setting), "lr": setting.rate, "weights": setting.weights}
    return {**found, "prompts": setting.prompts, "form": setting.form, "set": sections, **common}


def bare(run: Mapping[str, Any]) -> tuple[Recipe | Changes, Changes]:
    """Return a run's recipe without what tuning chose beside the form, and its other sections."""
    changes = {**run["method"], "ema": 0.0, "step_weight": "uniform"}
    return make(changes) or changes, run.get("set", {})


def setting_of(run: Mapping[str, Any]) -> Setting:
    """Read a run's setting."""
    average = run["method"].get("ema", 0.0)
    return Setting(run["lr"], run.get("weights", OWN), run["prompts"], average, run.get("form", OWN))


def weighted(arm: str, form: str = OWN) -> bool:
    """Say whether step weights can matter: not where an update has one stochastic step, or none."""
    made = make({**ARMS[arm].method, **forms(arm)[form]})
    return made is not None and made.objective in WEIGHED and (made.pick == "every" or made.pick_size > 1)


def start(arm: str) -> Setting:
    """Return where an arm's tuning starts."""
    return START._replace(average=0.0) if "average" in ARMS[arm].fixed else START


def neighbours(arm: str, setting: Setting) -> list[Setting]:
    """List a setting's neighbours, in the order in which they are tried: other forms, half the prompts, the
    next rates, other averages, other step weights where they matter, more prompts.
    """
    place = RATES.index(setting.rate)
    near = [
        setting._replace(form=form, weights=setting.weights if weighted(arm, form) else OWN)
        for form in forms(arm)
    ]
    near += [setting._replace(prompts=setting.prompts // 2)]
    near += [setting._replace(rate=RATES[i]) for i in (place + 1, place - 1) if 0 <= i < len(RATES)]
    near += [setting._replace(average=average) for average in AVERAGES]
    near += [setting._replace(weights=weights) for weights in WEIGHTS]
    near += [setting._replace(prompts=setting.prompts * 2)]
    return [other for other in near if other != setting and allowed(arm, other, setting)]


def allowed(arm: str, other: Setting, setting: Setting) -> bool:
    """Say whether a neighbour is a setting of the arm that is not another one by a new name."""
    if any(getattr(other, name) != getattr(setting, name) for name in ARMS[arm].fixed):
        return False
    if other.weights != OWN and not weighted(arm, other.form):
        return False
    return other.prompts in PROMPTS and make(method_of(arm, other)) is not None
