"""Which settings of a recipe go together."""

from __future__ import annotations

from ..options import check_fields
from .recipe_options import Recipe
from .step_choice import candidate_steps, split_count, split_factor

PRODIGYS_LEAST = 0.1
EXPLORING = (
    *("kernel", "eta", "steps", "pick", "pick_size", "slide_every", "train_share", "tree", "group_size"),
    *("starts", "shared_start", "granularities", "terminal", "antithetic", "step_weight"),
    *("etas", "credit", "anchor_image", "diversity_weight", "epochs", "update"),
    *("expand", "prune_by", "prune_at", "step_share", "prompt_choice", "candidates", "global_advantage"),
    *("baseline_decay", "kl_form", "branch_at"),
)
"""Fields that say how a rollout explores and is learned from, which stored forks have behind them."""
WINDOWS = ("random_window", "sliding_window")
FORWARD = ("nft", "awm")
"""Objectives that learn from finished images, and not from the noise of steps."""
REPLAYING = ("clip", "vargrad")
"""Objectives that can learn from branches of an older policy."""


def check(made: Recipe) -> Recipe:
    """Raise ValueError that names the first field out of its bounds; return the recipe otherwise."""
    check_fields(made)
    if made.etas and len(made.etas) != made.num_steps:
        count = f"{len(made.etas)} {'value' if len(made.etas) == 1 else 'values'}"
        raise ValueError(f"etas has {count} for {made.num_steps} steps; give one per step, or none")
    check_forward(made)
    if made.credit == "gain":
        check_gain(made)
    elif made.tree == "independent" and made.granularities != (1,):
        remedy = "independent trajectories have no completions, so it must be (1,)"
        raise ValueError(f"granularities is {made.granularities}; {remedy}")
    if made.step_share is not None:
        check_shares(made)
    if made.expand > 1:
        check_pruning(made)
    if made.global_advantage and made.credit == "gain":
        remedy = "whose average is no baseline of scores; choose credit: final"
        raise ValueError(f"global_advantage is {made.global_advantage:g}, but credit is 'gain', {remedy}")
    if made.anchor_image and (made.tree != "singular" or made.pick in WINDOWS):
        remedy = "only branches of single steps leave one; credit: gain logs the gaps of other trees"
        raise ValueError(f"anchor_image is for tree: singular without a window; {remedy}")
    if made.tree == "branching":
        check_branching(made)
    if made.ratio_norm != "none" and made.objective != "clip":
        raise ValueError(f"ratio_norm is {made.ratio_norm}, but there is no ratio; choose objective: clip")
    if made.objective == "on_policy" and (made.epochs > 1 or made.update == "per_step"):
        leaving = "epochs above 1 and update per_step leave the rollout's policy"
        raise ValueError(f"{leaving}; choose objective: clip")
    if made.objective == "pairs":
        plain = Recipe()
        for name in EXPLORING:
            if getattr(made, name) != getattr(plain, name):
                remedy = "objective pairs learns from kept forks and explores nothing; leave it out"
                raise ValueError(f"{name} is {getattr(made, name)}; {remedy}")
    if made.replay and made.objective not in REPLAYING:
        needs = f"{made.objective} cannot learn from branches of an older policy"
        raise ValueError(
            f"replay is {made.replay}, but objective {needs}; choose objective: clip, or replay: 0"
        )
    if made.objective == "vargrad":
        check_vargrad(made)
    if made.optimizer == "prodigy" and made.learning_rate < PRODIGYS_LEAST:
        remedy = "prodigy finds its own and takes this for a factor: set it to 1"
        raise ValueError(f"learning_rate is {made.learning_rate:g}; {remedy}")
    return made


def check_pruning(made: Recipe) -> None:
    """Raise ValueError unless the recipe's branches can be judged on the way."""
    if made.tree not in ("singular", "independent"):
        remedy = "branches that split again cannot be dropped: choose tree singular or independent"
        raise ValueError(f"expand is {made.expand:g}; {remedy}, or set it to 1")
    if made.credit == "gain":
        raise ValueError(
            "credit is 'gain', which judges every state; choose credit: final, or set expand to 1"
        )
    if made.anchor_image:
        raise ValueError("anchor_image logs gaps over all branches; leave it out, or set expand to 1")
    if made.prune_by == "coarsest" and len(set(made.granularities)) < 2:
        remedy = "the largest stride only judges, so list a smaller one too, such as 1, 2"
        raise ValueError(f"granularities is {made.granularities}; {remedy}, or choose prune_by: prediction")


def check_gain(made: Recipe) -> None:
    """Refuse a gain that would mix strides, or take the same from every member and so change nothing."""
    if len(made.granularities) > 1:
        remedy = "credit: gain compares a state with the one before, so it must be a single stride"
        raise ValueError(f"granularities is {made.granularities}; {remedy}")
    window = made.tree == "singular" and made.pick in WINDOWS and made.pick_size > 1
    one_step = made.pick != "every" and made.pick_size == 1
    if not window and (made.tree != "independent" or (made.shared_start and one_step)):
        same = "changes nothing where a group leaves one state by one step"
        remedy = (
            "choose tree: independent with several steps, or pick: random_window with pick_size 2 or more"
        )
        raise ValueError(f"credit is 'gain', which {same}; {remedy}")


def check_forward(made: Recipe) -> None:
    """Raise ValueError unless the rollout gives forward-process objectives what they need."""
    if made.objective not in FORWARD:
        if made.old_decay:
            remedy = "choose objective: nft or awm, or old_decay: 0"
            raise ValueError(
                f"old_decay is {made.old_decay:g}, which objective {made.objective} lacks; {remedy}"
            )
        return
    wrong = {
        "tree": (made.tree != "independent", "it learns from whole images; choose tree: independent"),
        "shared_start": (
            made.shared_start,
            "it draws without noise on the way, so all images would be one; choose shared_start: false",
        ),
        "credit": (made.credit != "final", "no step is credited; choose credit: final"),
        "std": (made.std == "tree", "its images share no tree; choose std: group or global"),
        "expand": (made.expand != 1, "nothing is judged on the way; choose expand: 1"),
        "step_weight": (made.step_weight != "uniform", "no step has noise; choose step_weight: uniform"),
        "kl_form": (made.kl_form != "velocity", "no step has noise; choose kl_form: velocity"),
    }
    for name, (is_wrong, why) in wrong.items():
        if is_wrong:
            value = str(getattr(made, name)).lower()
            raise ValueError(f"{name} is {value}, but of objective {made.objective}: {why}")


def check_vargrad(made: Recipe) -> None:
    """Raise ValueError where an update could not compare branches of one state by their rewards alone."""
    alike = "objective vargrad compares branches of one state"
    if made.tree != "singular":
        raise ValueError(f"tree is {made.tree}, but {alike}; choose tree: singular")
    if made.pick in ("random_window", "sliding_window") and made.pick_size > 1:
        raise ValueError(f"pick_size is {made.pick_size} steps in a row, but {alike}; choose pick: random")
    if made.mix not in ("zscore", "sum"):
        raise ValueError(f"mix is {made.mix}, but objective vargrad adds raw rewards; choose mix: sum")
    for name in ("diversity_weight", "global_advantage"):
        if getattr(made, name):
            unit = "objective vargrad learns from rewards in their own units"
            raise ValueError(f"{name} is {getattr(made, name):g}, but {unit}; set it to 0")


def check_shares(made: Recipe) -> None:
    """Raise ValueError unless the recipe can draw its steps by their shares."""
    if made.pick != "random":
        remedy = "shares are for single steps drawn at random: choose pick: random, or step_share: none"
        raise ValueError(f"step_share is given, but pick is {made.pick}; {remedy}")
    count, used = len(candidate_steps(made)), sum(share > 0 for share in made.step_share)
    if len(made.step_share) != count:
        given = f"step_share has {len(made.step_share)} numbers for {count} steps that may explore"
        raise ValueError(f"{given} (0 to {count - 1}); give one for each")
    if used < min(made.pick_size, count):
        raise ValueError(f"step_share has {used} numbers above 0; pick_size takes {made.pick_size} steps")


def check_branching(made: Recipe) -> None:
    """Raise ValueError unless the recipe's branching tree can be grown."""
    if made.granularities != (1,):
        remedy = "branches that split again are finished step by step, so it must be (1,)"
        raise ValueError(f"granularities is {made.granularities}; {remedy}")
    if made.branch_at is not None and max(made.branch_at) >= made.num_steps:
        last = f"the last of {made.num_steps} steps is {made.num_steps - 1}"
        raise ValueError(f"branch_at is {made.branch_at}; {last}: list earlier ones, or raise num_steps")
    split_factor(made.group_size, split_count(made))
