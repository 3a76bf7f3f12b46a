"""Every recipe and objective through Train LoRA in a real ComfyUI: typed, trained, continued bit for bit, or
refused in the words of the block.
"""

import re
from pathlib import Path

import pytest
from comfy_host import EVERY, Answer, newest_comfyui, run_script  # noqa: F401
from test_nodes_training import TRAIN

from comfy_g2rpo.objectives import OBJECTIVES
from comfy_g2rpo.recipes import RECIPES

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("methods in comfyui")]

CHILD = Path(__file__).with_name("comfy_child_methods.py")
TINY = "num_steps = 4\ngroup_size = 4\neval_noises = 1\neval_prompts = 1\nshift = 3\nwatch = off"
SPLITS = {"branch_grpo": "\nbranch_at = 0, 2", "tree_grpo": "\npick_size = 2"}
"""What makes four images of four steps."""
FEW = ("g2rpo", "flow_grpo", "dense_grpo", "branch_grpo", "pro_grpo", "diffusion_nft", "awm")
"""A recipe of each kind of tree and objective: what a person's run of the tests takes; all else runs
where every ComfyUI does.
"""
SOME = [name for name in RECIPES if EVERY or name in FEW]
WAYS = {f"recipe {name}": {"recipe": name, "changes": TINY + SPLITS.get(name, "")} for name in SOME}
TYPED = {
    "kernel ddim": "kernel = ddim",
    "kernel cps": "kernel = cps",
    "step_weight variance": "step_weight = variance",
    "objective clip": "objective = clip\nepochs = 2",
    "etas": "etas = 0.1, 0.5, 0.9, 0.3",
    "gain of a window": "credit = gain\npick = random_window\npick_size = 2\ngranularities = 1",
    "gaps": "anchor_image = true",
    "pruning": "expand = 2",
    "halving": "expand = 2\nprune_by = coarsest",
    "diversity": "diversity_weight = 0.2",
    "objective vargrad": "objective: vargrad\nreplay: 1",
}
WAYS |= {name.replace(" ", "-"): {"changes": f"{TINY}\n{lines}"} for name, lines in TYPED.items()}
LARGER = {f"recipe {name}" for name in SOME if name == "branch_grpo" or name not in FEW} | {"etas"}
"""What is not known to learn from the smallest images, where the scores of a group may be equal."""
for name in LARGER:
    WAYS[name] |= {"width": 64, "height": 64}
REFUSED = {
    "etas of another length": ("etas = 0.1, 0.2", "etas has 2 values for 4 steps"),
    "gain of one step": ("credit = gain\ngranularities = 1", "credit is 'gain'"),
    "gain at two strides": ("credit = gain", "granularities is (1, 2)"),
    "pruning that splits": ("expand = 2\ncredit = gain\ngranularities = 1", "credit is 'gain'"),
    "halving at one stride": ("expand = 2\nprune_by = coarsest\ngranularities = 1", "granularities is (1,)"),
    "epochs without a ratio": ("epochs = 2", "epochs above 1"),
    "pairs with a tree": ("objective = pairs", "objective pairs learns from kept forks"),
    "an objective's typo": ("objective = clipp", "did you mean 'clip'"),
    "a kernel's typo": ("kernel: ddm", "did you mean 'ddim'"),
    "beyond bounds": ("expand = 1000", "changes, line 7: expand is"),
}
GOES_ON = {
    "objective": "objective: clip",
    "kernel": "kernel = ddim",
    "etas": "etas = 0.2, 0.4, 0.6, 0.8",
    "step_weight": "step_weight = variance",
    "credit": "credit = gain\npick = random_window\npick_size = 2\ngranularities = 1",
    "expand": "expand = 2",
    "anchor_image": "anchor_image = true",
    "diversity_weight": "diversity_weight = 0.1",
    "vargrad": "objective: vargrad\nvargrad_tau: 0.2",
    "back": "eta = 0.7",
}
STAYS = {"num_steps": "num_steps = 5", "shift": "shift = 2", "ema": "ema = 0.5"}
STAYS["old_decay"] = "objective = nft\ntree = independent\ngranularities = 1\nold_decay = 0.5"
COMMAND_LINE = re.compile(r"--\w|\bg2rpo \w|\.ya?ml\b|command line", re.IGNORECASE)
SHORT = {**TRAIN, "changes": TINY, "eval_every": 0, "slots": 8, "rank": 2, "prompts_per_step": 1}
SHORT |= {"width": 32, "height": 32}
DATA = {
    "train": SHORT,
    "ways": {name.replace(" ", "-"): changes for name, changes in WAYS.items()},
    "refused": {name: {"changes": f"{TINY}\n{line}"} for name, (line, _) in REFUSED.items()},
    "goes on": GOES_ON,
    "stays": STAYS,
}


@pytest.fixture(scope="module")
def done(comfyui: Path, base: Path) -> Answer:
    """Run the child script once."""
    return run_script(comfyui, CHILD, base, DATA)


@pytest.mark.parametrize("name", DATA["ways"])
def test_a_run_that_is_continued_learns_bit_for_bit_what_one_at_once_learns(done: Answer, name: str) -> None:
    found = done.data["ways"][name]
    assert found.get("said") is None
    assert found["equal"] and found["learned"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_the_words_of_the_block(done: Answer, name: str) -> None:
    said = done.data["refused"][name]
    assert REFUSED[name][1] in said and "\n" not in said
    assert not COMMAND_LINE.search(said)


def test_what_is_refused_begins_no_run(done: Answer) -> None:
    assert not done.data["begun"]


def test_a_going_run_takes_another_way_to_learn_if_asked_to(done: Answer) -> None:
    assert done.data["base"] == "going"
    expected = {name: ["going", step] for step, name in enumerate(GOES_ON, start=2)}
    assert done.data["goes on"] == expected


@pytest.mark.parametrize("name", STAYS)
def test_what_its_checkpoint_depends_on_a_going_run_keeps(done: Answer, name: str) -> None:
    said = done.data["stays"][name]
    assert "run: going cannot go on" in said and f"({name}: " in said and not COMMAND_LINE.search(said)


def test_every_objective_and_every_new_field_is_trained_with_here() -> None:
    typed = "\n".join([*TYPED.values(), *GOES_ON.values()])
    trained = {RECIPES[name].objective for name in SOME} | set(re.findall(r"objective\W+(\w+)", typed))
    assert set(OBJECTIVES) - {"pairs"} <= trained
