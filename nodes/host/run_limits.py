"""What is typed into blocks that train, how much such a run may be, and how its prompts are read: the same
for a run here and for a job that is handed over. Nothing here needs ComfyUI.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...comfy_g2rpo import recipes
from ...comfy_g2rpo.blocks.block_settings import HELDOUT_SHARE, sets_aside
from ...comfy_g2rpo.blocks.train_presets import AS_TYPED
from ...comfy_g2rpo.curriculum.prompt_choice import choice_cost
from ...comfy_g2rpo.objectives import OBJECTIVES
from ...comfy_g2rpo.prompts import Prompts, prompts_of, refuse_common, split
from ...comfy_g2rpo.recipes import Recipe, build_plan
from ...comfy_g2rpo.run.evaluation import price as look_price
from ...comfy_g2rpo.run.pace import Pace

MAX_WORK = 10**14  # forwards × pixels of a run
MAX_STATES = 1_000_000  # of one prompt's tree
MAX_PROMPTS = 4096  # their encodings are kept


@dataclass(frozen=True, kw_only=True)
class Typed:
    """The widgets of a block that trains, by name."""

    recipe: str
    steps: int
    prompts: str
    heldout_prompts: str
    negative: str
    guidance: float
    width: int
    height: int
    learning_rate: float
    rank: int
    alpha: float
    targets: str
    prompts_per_step: int
    slots: int
    eval_every: int
    seed: int
    changes: str
    preset: str = AS_TYPED


def check_recipe(made: Recipe) -> None:
    """Refuse what learns from no reward, and a tree that is too large to be built."""
    if OBJECTIVES[made.objective].stored:
        rather = ", ".join(name for name, one in OBJECTIVES.items() if not one.stored)
        raise ValueError(
            f"changes: objective is {made.objective}, which learns from kept votes; use the node Update LoRA "
            f"on Kept Votes, or choose one that learns from a reward: {rather}"
        )
    # A bound before anything is built: what is typed into a line or two could fill the memory.
    branches = made.group_size * len(recipes.candidate_steps(made)) * made.starts
    states = branches * made.num_steps * len(made.granularities)
    if states > MAX_STATES:
        raise ValueError(
            f"changes: a tree of up to {states} states is above the limit of {MAX_STATES}; lower "
            "group_size, num_steps or starts"
        )


def read_prompts(trained: str, heldout: str, seed: int) -> Prompts:
    """Read both prompt fields; without held-out prompts, set a fifth aside where there are enough."""
    found = _read(trained, heldout, seed)
    if (count := len(found.train) + len(found.heldout)) > MAX_PROMPTS:
        raise ValueError(
            f"prompts: there are {count}; at most {MAX_PROMPTS} are allowed, because their encodings "
            "are kept in memory"
        )
    return found


def _read(trained: str, heldout: str, seed: int) -> Prompts:
    """Read both prompt fields."""
    prompts, repeated = prompts_of(trained.splitlines(), "prompts")
    notes = (f"{repeated} repeated prompts were dropped",) if repeated else ()
    if heldout.strip():
        held, _ = prompts_of(heldout.splitlines(), "heldout_prompts")
        refuse_common(prompts, held, "heldout_prompts")
        return Prompts(tuple(prompts), tuple(held), notes)
    if not sets_aside(len(prompts)):
        return Prompts(tuple(prompts), (), (*notes, "too few prompts to set some aside: nothing is held out"))
    return split(prompts, HELDOUT_SHARE, seed, "prompts", notes)


def price(recipe: Recipe, pace: Pace, heldout: int, size: tuple[int, int], made: int = 0) -> str:
    """Return what a run will cost after the steps that are made, in words; `size` is width and height.

    Raises ValueError where it is far too much.
    """
    width, height = size
    plan, steps = build_plan(recipe, 0, pace.seed), pace.steps - made
    groups = steps * pace.prompts_per_step
    # A forward and backward is worth three forwards; old forks have theirs, too.
    more, seen_first = choice_cost(recipe)
    forwards = groups * (plan.forwards + more + 3 * plan.rows * (1 + recipe.replay))
    looks = 2 + (steps // pace.eval_every if pace.eval_every else 0)
    parts = look_parts(recipe, pace, heldout)
    seen = sum(count for name, (count, _) in parts.items() if name != "preview") * width * height
    seen += parts.get("preview", (0, 0))[0] * pace.preview_width * pace.preview_height
    work = forwards * width * height + looks * seen
    if work > MAX_WORK:
        limit = f"{work:.1e} forwards × pixels are above the limit of {MAX_WORK:.0e}"
        raise ValueError(f"steps: {limit}; lower steps, prompts_per_step or the size")
    pictures = f"{groups * (plan.pictures + seen_first)} pictures of {width}×{height}"
    begun = f"{made} of {pace.steps} steps are made; " if made else ""
    cost = "step costs" if steps == 1 else "steps cost"
    return f"{begun}{steps} {'more ' if made else ''}{cost} {forwards} forwards and {pictures}"


def look_parts(recipe: Recipe, pace: Pace, heldout: int) -> dict[str, tuple[int, int]]:
    """Count forwards and pictures of one evaluation of so many held-out prompts, by part."""
    return look_price(recipe, pace, heldout, bool(pace.preview_width and pace.preview_height))
