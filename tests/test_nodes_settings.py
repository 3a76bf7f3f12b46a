"""A named run that is asked for with other settings, in a real ComfyUI: it starts a numbered one, goes on, or
asks; what the blocks say; presets.
"""

import ast
import json
import re
import runpy
from pathlib import Path

import pytest
import yaml
from comfy_host import NEWEST, Answer, make_base, run_script
from test_nodes_continuing import SHORT
from test_nodes_training import TRAIN

from comfy_g2rpo.recipes import FIELDS as RECIPE
from comfy_g2rpo.recipes import RECIPES, build_plan, recipe
from comfy_g2rpo.run.pace import FIELDS

pytestmark = [pytest.mark.comfyui, pytest.mark.long, pytest.mark.xdist_group("training in comfyui")]

ROOT = Path(__file__).parent.parent
BLOCKS = json.loads((Path(__file__).parent / "snapshots" / "nodes.json").read_text("utf-8"))
CHILD = Path(__file__).with_name("comfy_child_settings.py")
CHANGES = SHORT["changes"]
ASK, ON = {"if_settings_changed": "ask"}, {"if_settings_changed": "continue"}
TWICE = {"learning_rate": 2e-3}
LONG = "x" * 63
STORIES = {
    "base": [{}],
    "rate": [{}, TWICE, TWICE, {**TWICE, "steps": 2}, {"learning_rate": 3e-3}, {"steps": 2}],
    "goes-on": [
        {},
        {**TWICE, **ON, "steps": 2},
        {**TWICE, "steps": 3},
        {"steps": 4, "changes": f"{CHANGES}\neta = 0.5\nkl = 0.1", **ON},
    ],
    "finished": [{}, {**TWICE, **ON}],
    "asks": [{}, {**TWICE, **ASK}, {"steps": 2, **ASK}],
    "hand": [{"run": "hand-2", "rank": 4}, {}, TWICE, {"run": "hand-2", "rank": 4}],
    LONG: [{}, TWICE],
    "forward": [
        {"recipe": "diffusion_nft"},
        {"recipe": "diffusion_nft", "steps": 2},
        {"recipe": "diffusion_nft", "steps": 3, "changes": f"{CHANGES}\nold_decay = 0.2", **ON},
        {"recipe": "diffusion_nft", "steps": 3, "changes": f"{CHANGES}\nnft_beta = 0.5", **ON},
    ],
    "typed": [
        {"changes": f"{CHANGES}\nobjective = awm"},
        {"changes": f"{CHANGES}\nobjective = awm\ntree = independent\nclip = 1"},
    ],
}
WAYS = {
    "learning_rate": ({"learning_rate": 5e-4}, "learning_rate: 0.001 → 0.0005"),
    "rank": ({"rank": 4}, "rank: 2 → 4"),
    "targets": ({"targets": "attention+feed_forward"}, "targets: attention → attention+feed_forward"),
    "recipe": ({"recipe": "flow_grpo"}, "recipe: g2rpo → flow_grpo"),
    "negative": ({"negative": "blurred, " * 20}, "negative: 180 characters, the run has 0"),
    "prompts": ({"prompts": "a red circle"}, "prompts: 1 line, the run has 4"),
    "other prompts": ({"prompts": TRAIN["prompts"] + "s"}, "prompts: 1 of 4 lines changed"),
    "heldout_prompts": ({"heldout_prompts": "a b\na c\na d"}, "heldout_prompts: 3 lines, the run has 2"),
    "width": ({"width": 32}, "width: 64 → 32"),
    "guidance": ({"guidance": 2.5}, "guidance: 1 → 2.5"),
    "seed": ({"seed": 5}, "seed: 0 → 5"),
    "num_steps": ({"changes": CHANGES.replace("num_steps = 2", "num_steps = 3")}, "num_steps: 2 → 3"),
    "granularities": ({"changes": CHANGES.replace("ties = 1", "ties = 1, 2")}, "granularities: 1 → 1, 2"),
    "antithetic": ({"changes": f"{CHANGES}\nantithetic = true"}, "antithetic: false → true"),
    "ema": ({"changes": f"{CHANGES}\nema = 0.9"}, "ema: 0 → 0.9"),
    "reward": ({"reward": ["jpeg", 0]}, "reward: 1 agreement → 1 jpeg"),
    "heldout_reward": ({"heldout_reward": ["jpeg", 0]}, "heldout_reward: agreement → agreement, jpeg"),
    "model": ({"model": ["lora", 0]}, "model: with LoRAs or merges that the run's has not"),
}
FIXED = [
    "rank",
    "targets",
    "negative",
    "heldout_prompts",
    "width",
    "guidance",
    "seed",
    "num_steps",
    "ema",
    "reward",
    "heldout_reward",
    "model",
]
DAMAGED = {
    "LoRAPolicy, config": "config.json",
    "LoRAPolicy, state": "state.json",
    "SaveLoRA, lora": "lora.safetensors",
    "SaveLoRA, summary": "summary.json",
    "RunMonitor, summary": "summary.json",
    "VoteRollout, votes": "votes.jsonl",
}
REFUSED = {
    "LoRAPolicy, rank": "run: loop was made with other settings (rank: 4 → 2); give another name, or",
    "LoRAPolicy, LoRA": "(model: with LoRAs or merges that the run's has not)",
    "LoRAPolicy, config": "run: loop: config.json is damaged (not JSON); restore it or give another name",
    "LoRAPolicy, state": "run: loop: checkpoints/000001/state.json is damaged",
    "SaveLoRA, lora": "run: loop: checkpoints/000001/lora.safetensors is",
    "SaveLoRA, summary": "run: loop: summary.json is damaged",
    "RunMonitor, summary": "run: loop: summary.json is damaged",
    "VoteRollout, votes": "run: loop: ",
    "TrainLoRA, state": "run: asks: checkpoint 000002 is damaged (state.json)",
    "TrainLoRA, a folder": "run: mine exists and is not a run of this program; give another name",
    "LoRAPolicy, a folder": "run: mine exists and is not a run of this program; give another name",
}
TINY = (
    "train.steps = 1\nnum_steps = 2\ngroup_size = 2\nprompts_per_step = 1\neval_prompts = 2\neval_every = 0"
)
PRESETS = {
    "as typed": {"preset": "as typed"},
    "without": {},
    "quick look": {"preset": "quick look", "run": "quick", "changes": TINY},
    "low memory": {"preset": "low memory", "changes": f"{TINY}\ngranularities = 1"},
    "best quality": {"preset": "best quality", "recipe": "flow_grpo", "changes": TINY},
    "standard": {"preset": "standard", "run": "quick", "changes": TINY, **ASK},
}
SHORTER = {**TRAIN, **SHORT}
DATA = {
    "train": SHORTER,
    "lora": "g2rpo/base.safetensors",
    "stories": {name: [{"run": name, **press} for press in story] for name, story in STORIES.items()},
    "changes": {name: changes for name, (changes, _) in WAYS.items()},
    "fixed": {name: WAYS[name][0] for name in FIXED},
    "damaged": DAMAGED,
    "presets": PRESETS,
}


@pytest.fixture(scope="module", params=NEWEST)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Name a ComfyUI, and make its base directory."""
    return request.param, make_base(tmp_path_factory.mktemp(request.param.name))


@pytest.fixture(scope="module")
def done(base: tuple[Path, Path]) -> Answer:
    """Run the child script once."""
    return run_script(base[0], CHILD, base[1], DATA)


def test_a_changed_rate_starts_a_numbered_run_and_pressed_again_goes_on_with_it(done: Answer) -> None:
    story = done.data["stories"]["rate"]
    assert [(press["run"], press["steps"]) for press in story] == [
        ("rate", [0, 1, 1]),
        ("rate-2", [0, 1, 1]),
        ("rate-2", [0, 1, 1]),
        ("rate-2", [0, 1, 1, 2, 2]),
        ("rate-3", [0, 1, 1]),
        ("rate", [0, 1, 1, 2, 2]),
    ]
    why = "because rate has other settings: learning_rate: 0.001 → 0.002"
    assert story[1]["said"][0] == f"run rate-2 starts, {why}"
    assert story[2]["said"][0] == story[3]["said"][0] == f"run rate-2 goes on, {why}"
    assert not any("other settings" in text for text in story[0]["said"] + story[5]["said"])
    assert all(press["logged"] for press in story)


def test_a_numbered_run_takes_the_first_free_number_or_the_one_with_its_settings(done: Answer) -> None:
    runs = [press["run"] for press in done.data["stories"]["hand"]]
    assert runs == ["hand-2", "hand", "hand-3", "hand-2"]
    assert done.data["beside a damaged one"] == "rate-5"
    first, second = done.data["stories"][LONG]
    assert first["run"] == LONG and f"{LONG} is too long to number; shorten it" in second["run"]


def test_a_run_goes_on_under_other_numbers_where_that_is_asked_for(done: Answer) -> None:
    story = done.data["stories"]["goes-on"]
    assert [press["run"] for press in story] == ["goes-on"] * 4
    assert story[-1]["steps"] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert story[1]["said"][0] == "run goes-on goes on with other settings: learning_rate: 0.001 → 0.002"
    assert not any("settings" in text for text in story[2]["said"])
    assert done.data["rates"] == pytest.approx([1e-3, 2e-3, 2e-3, 1e-3])
    written = done.data["written"]["goes-on"]
    assert (written["config"]["method"]["eta"], written["config"]["train"]["steps"]) == (0.5, 4)
    first, second = written["changed"]
    assert first == {"step": 1, "settings": {"method.learning_rate": "0.001 → 0.002"}}
    assert second["step"] == 3
    assert second["settings"] == {
        "method.eta": "0.7 → 0.5",
        "method.kl": "0 → 0.1",
        "method.learning_rate": "0.002 → 0.001",
    }


def test_a_run_that_goes_on_under_other_numbers_keeps_its_one_file(
    base: tuple[Path, Path], done: Answer
) -> None:
    assert done.data["stories"]["goes-on"]
    found = {file.name for file in (base[1] / "models" / "loras" / "g2rpo").glob("goes-on*")}
    assert found == {"goes-on.safetensors", "goes-on.preview.png"}


def test_objectives_on_finished_images_train_in_the_graph_by_recipe_or_by_changes(done: Answer) -> None:
    first, longer, other, bolder = done.data["stories"]["forward"]
    assert (first["run"], first["steps"], longer["steps"]) == ("forward", [0, 1, 1], [0, 1, 1, 2, 2])
    # The average that draws is part of what a run is; how the loss is weighed is not.
    assert "old_decay: 0.5 → 0.2" in other["run"] and other["steps"] == longer["steps"]
    assert bolder["run"] == "forward" and bolder["steps"][-1] == 3
    refused, typed = done.data["stories"]["typed"]
    assert "tree is singular" in refused["run"] and "choose tree: independent" in refused["run"]
    assert (typed["run"], typed["steps"]) == ("typed", [0, 1, 1])


def test_a_finished_run_with_nothing_left_keeps_what_it_was_made_with(done: Answer) -> None:
    press = done.data["stories"]["finished"][1]
    assert press["run"] == "finished" and press["steps"] == [0, 1, 1]
    assert press["said"][-1].startswith("nothing left to do")
    written = done.data["written"]["finished"]
    assert written["config"]["method"]["learning_rate"] == 1e-3 and "changed" not in written


def test_ask_refuses_other_settings_and_longer_runs_are_none(done: Answer) -> None:
    _, refused, longer = done.data["stories"]["asks"]
    assert refused["run"].endswith(
        "ValueError: run: asks was made with other settings (learning_rate: 0.001 → 0.002); give another "
        "name, or put back learning_rate"
    )
    assert (longer["run"], longer["steps"]) == ("asks", [0, 1, 1, 2, 2])


@pytest.mark.parametrize("name", WAYS)
def test_a_refusal_names_the_widget_and_both_ways_out(name: str, done: Answer) -> None:
    said, text = done.data["asked"][name], WAYS[name][1]
    widget = text.partition(":")[0]
    refusal = f"run: base was made with other settings ({text}); give another name, or put back {widget}"
    assert said == f"ValueError: {refusal}" and done.data["base"] == [0, 1, 1]


@pytest.mark.parametrize("name", FIXED)
def test_a_run_cannot_go_on_as_another_lora_or_measured_otherwise(name: str, done: Answer) -> None:
    text = WAYS[name][1]
    why = f"run: base cannot go on with other settings of this kind ({text})"
    assert why in done.data["continued"][name]


@pytest.mark.parametrize(
    "block", ["TrainLoRA", "TrainLoRA, other case", "LoRAPolicy", "VoteRollout", "SaveLoRA"]
)
def test_no_run_is_called_newest(block: str, done: Answer) -> None:
    assert "stands for the newest run in Run Monitor; give another name" in done.data["newest"][block]


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_with_a_run_is_told_without_its_path(
    case: str, done: Answer, base: tuple[Path, Path]
) -> None:
    said = done.data["refused"][case]
    assert said.startswith("ValueError: run: ") and REFUSED[case] in said
    assert not [part for part in (str(base[1]), "(--", "resume", "[", "\n") if part in said]


def test_a_run_on_a_wire_goes_before_the_list(done: Answer) -> None:
    error, shown, run = done.data["wired"]
    assert (error, shown, run) == ("", ["base"], "base")
    assert done.data["stale"] == ["base"]
    assert "there is no run named 'gone'; choose one of the list" in done.data["gone"]
    assert "run_name is '../x'; use 1 to 64 letters" in done.data["no name"]


def test_a_preset_puts_its_numbers_in_place_of_the_typed_ones(done: Answer) -> None:
    found, numbers = done.data["presets"], done.data["numbers"]
    assert found["as typed"]["run"] == found["without"]["run"]
    assert not any("preset" in text for text in found["without"]["said"])
    quick = numbers["quick look"]
    assert quick["lora"] == {"rank": 16, "alpha": 16, "targets": "attention"}
    method = {name: quick["method"][name] for name in ("learning_rate", "granularities", "pick", "num_steps")}
    # The demo's rate and stride, one step at random; what is written into changes wins.
    assert method == {"learning_rate": 1e-3, "granularities": [2], "pick": "random", "num_steps": 2}
    assert quick["train"]["slots"] == 128 and quick["train"]["steps"] == 1
    assert found["quick look"]["said"][0] == (
        "preset quick look: steps 1, learning_rate 0.001, rank 16, alpha 16, prompts_per_step 1, slots 128, "
        "eval_every 0, num_steps 2, group_size 2, granularities 2, pick random"
    )
    low = numbers["low memory"]["train"]
    assert (low["slots"], low["decode_batch"], low["micro_batch"]) == (2, 1, 1)
    assert numbers["low memory"]["method"]["granularities"] == [1]
    # Another recipe keeps the tree that makes it what it is.
    assert tuple(numbers["best quality"]["method"]["granularities"]) == RECIPES["flow_grpo"].granularities


def test_a_field_of_a_preset_is_put_back_by_the_preset(done: Answer) -> None:
    said = done.data["presets"]["standard"]["run"]
    assert "(preset: pick random → every)" in said and said.endswith("put back preset")


def test_history_names_the_lora_the_run_and_its_scores(done: Answer) -> None:
    run, (result,) = done.data["result"]
    assert run == ["base"] and (result["run"], result["steps"], result["lora_step"]) == ("base", 1, 1)
    assert (result["lora"], result["stopped_by"]) == (DATA["lora"], "steps")
    for name in ("reward_before", "reward_after", "heldout_before", "heldout_after"):
        assert 0 <= result[name]["agreement"] <= 1


@pytest.mark.parametrize(
    ("size", "bundle", "card"),
    [("small", "demo", None), ("medium", "sd35_medium", "sd3"), ("large", "flux_dev", None)],
)
def test_presets_start_from_the_bundled_recipes(size: str, bundle: str, card: str | None) -> None:
    numbers = dict(runpy.run_path(str(ROOT / "comfy_g2rpo/blocks/train_presets.py"))["SIZES"][size])
    bundled = yaml.safe_load((ROOT / f"recipes/{bundle}.yaml").read_text("utf-8"))
    pace = {name: field.default for name, field in FIELDS.items()} | bundled["train"]
    if card:
        settings = yaml.safe_load((ROOT / f"recipes/presets/{card}.yaml").read_text("utf-8"))["16gb"]
        pace |= {name.removeprefix("train."): value for name, value in settings.items()}
    numbers["granularities"] = list(numbers["granularities"])
    assert numbers == {name: {**pace, **bundled["lora"], **bundled["method"]}[name] for name in numbers}


def test_a_quick_look_costs_a_hundredth_of_a_standard_run() -> None:
    data = runpy.run_path(str(ROOT / "comfy_g2rpo/blocks/train_presets.py"))
    costs = {}
    for preset in ("quick look", "standard"):
        numbers = data["preset_numbers"](preset, 2_500_000_000, "g2rpo")
        made = recipe(
            "g2rpo", **{name: numbers[name] for name in numbers if name in RECIPE and name != "steps"}
        )
        costs[preset] = numbers["steps"] * numbers["prompts_per_step"] * build_plan(made).forwards
    assert 0 < costs["quick look"] < costs["standard"] / 100


def test_the_widgets_of_presets_are_told_to_the_page() -> None:
    data = runpy.run_path(str(ROOT / "comfy_g2rpo/blocks/train_presets.py"))
    widgets = [entry["id"] for entry in BLOCKS["G2RPO_TrainLoRA"]["inputs"]]
    numbers = {name for part in (*data["SIZES"].values(), *data["PRESETS"].values()) for name in part}
    assert set(data["WIDGETS"]) == numbers & set(widgets)


def test_what_blocks_say_instead_of_the_command_lines_advice_is_still_advised() -> None:
    source = "".join(path.read_text("utf-8") for path in (ROOT / "comfy_g2rpo").rglob("*.py"))
    whole = re.sub(r'"\s*\n\s*f?"', "", source)
    opening = (ROOT / "nodes/host/open_run.py").read_text("utf-8")
    (table,) = re.findall(r"^HEADLESS = (\{.*?^\})", opening, re.MULTILINE | re.DOTALL)
    advised = ast.literal_eval(table)
    assert len(advised) > 5 and [words for words in advised if words not in whole] == []
