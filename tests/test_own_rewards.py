"""Rewards from a configuration: your own file, references, columns, gates.

What is refused, and what a run records of them.
"""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from program import leave

from comfy_g2rpo import lora
from comfy_g2rpo import rewards as built_in
from comfy_g2rpo.files.safe import RunError
from comfy_g2rpo.prompts import Prompt, PromptError, columns_of, read
from comfy_g2rpo.rewards import RewardError, check_prompts, checked
from comfy_g2rpo.rewards.models.installed import load_installed
from comfy_g2rpo.run import settings
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer import run as training
from g2rpo_trainer.config import reading
from g2rpo_trainer.config.reading import ConfigError
from g2rpo_trainer.config.reward_checks import check_reward
from g2rpo_trainer.config.sections import RewardSection
from g2rpo_trainer.reports.progress import Silent
from g2rpo_trainer.rewards.build import build, build_all

ROOT = Path(__file__).parent.parent

TEN_LINES = '''\
"""Prefer the colour that the prompt's row names."""

from comfy_g2rpo.prompts import columns_of


def redness(images, prompts):
    """Score images [B, H, W, 3] in [0, 1] by prompts [B]: [B], higher is better, None where it cannot judge."""
    excess = images[..., 0].mean((1, 2)) - images.mean((1, 2, 3))
    return [None if columns_of(p).get("skip") else float(score) for score, p in zip(excess, prompts)]
'''  # noqa: E501

AS_AN_OBJECT = """\
class Blue:
    name, licence, compares_across_prompts, note = "blue", "MIT", True, "ends in blue"

    def score(self, images, prompts):
        return images[..., 2].mean((1, 2))

blue, Bluer = Blue(), Blue
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Write a recipe for the bundled model with a reward file, prompts with columns, and a gate."""
    (tmp_path / "my_rewards.py").write_text(TEN_LINES)
    rows = [
        {"prompt": "a red circle", "why": "plain"},
        {"prompt": "some things", "target_count": 2, "colour": "red"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"prompt": "a blue square", "skip": True}) + "\n")
    tree = {
        "model": {"path": "models/tiny", "width": 64, "height": 64, "max_sequence_length": 0},
        "lora": {"rank": 2},
        "method": {"num_steps": 2, "group_size": 2, "mix": "rank_product", "granularities": [1]},
        "rewards": [
            {"name": "redness", "path": "my_rewards.py:redness", "weight": 2},
            {"name": "agreement", "weight": 0, "gate": 0.01},
        ],
        "heldout_rewards": ["exposure", {"name": "palette", "palette": ["#dc2828"]}],
        "prompts": {"train": "train.jsonl", "heldout": "heldout.jsonl"},
        "train": {"steps": 1, "prompts_per_step": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "recipe.yaml"


def test_ten_lines_of_your_own_train_from_the_recipe(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(TEN_LINES.splitlines()) <= 10
    out = recipe.parent / "run"
    summary = training.train(reading.load(recipe), out, progress=Silent())
    rows = RunFolder.open(out).metrics()
    assert summary["steps"] == 1
    assert lora.read(out / summary["lora"]).metadata["g2rpo.rewards"] == "2 redness, 0 agreement (gate 0.01)"
    step = next(row for row in rows if "nfe" in row)
    assert step["reward/redness/mean"] is not None and step["reward/agreement/mean"] is not None
    # The held-out prompt's row tells the reward to skip it: its columns arrived.
    assert rows[0]["heldout/redness/mean"] is None and rows[0]["heldout/palette/mean"] is not None

    monkeypatch.chdir(recipe.parent.parent)
    saved = RunFolder.open(out).config()
    assert saved["config"]["rewards"][0]["path"] == f"{recipe.parent / 'my_rewards.py'}:redness"
    assert (saved["config"]["rewards"][1]["gate"], saved["recipe"]["mix"]) == (0.01, "rank_product")
    again = reading.from_dict(saved["config"])
    RunFolder.reopen(out, reading.dump(again))


CHANGED = {
    "rewards.0.path=other.py:redness": "rewards.0.path",
    "rewards.0.weight=1": "rewards.0.weight",
    "rewards.1.gate=0.02": "rewards.1.gate",
    "rewards.0={name: judge, url: 'http://127.0.0.1:1', protocol: rating, question: q}": "rewards.0.name",
    "rewards=[{name: redness, path: 'my_rewards.py:redness', weight: 2}]": "rewards.1.name",
    "heldout_rewards.1.palette=['#000000']": "heldout_rewards.1.palette",
    "method.mix=sum": "method.mix",
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_reward_is_not_resumed(recipe: Path, change: str) -> None:
    (recipe.parent / "other.py").write_text(TEN_LINES)
    RunFolder.create(recipe.parent / "run", reading.dump(reading.load(recipe)))
    says = rf"was made with {CHANGED[change]} = .*; continue with that, or start another run"
    with pytest.raises(RunError, match=says):
        RunFolder.reopen(recipe.parent / "run", reading.dump(reading.load(recipe, [change])))


def test_how_a_judge_is_asked_may_change(recipe: Path) -> None:
    judge = "rewards=[{name: judge, url: 'http://127.0.0.1:1/v1', protocol: rating, model: m}]"
    RunFolder.create(recipe.parent / "run", reading.dump(reading.load(recipe, [judge])))

    def reopen(*changes: str) -> None:
        again = reading.load(recipe, [judge, *(f"rewards.0.{change}" for change in changes)])
        RunFolder.reopen(recipe.parent / "run", reading.dump(again))

    reopen("timeout=5", "retries=9", "concurrency=2", "batch=4", "device=cpu")
    for change in ("url=http://127.0.0.1:2/v1", "model=n", "question=Is it?", "protocol=yes_no"):
        with pytest.raises(RunError, match=r"was made with rewards\.0"):
            reopen(change)


def test_reading_a_recipe_runs_and_loads_nothing_of_yours(recipe: Path) -> None:
    (recipe.parent / "my_rewards.py").write_text("raise SystemExit(3)")
    assert reading.load(recipe).rewards[0].name == "redness"


MISTAKES = {
    "rewards.0.path=my_rewards.py": (
        "path is 'my_rewards.py'; write it as my_rewards.py:function or package.module:object"
    ),
    "rewards.0.path=nowhere.py:redness": (
        "path of reward 'redness' is 'nowhere.py', which does not exist; looked beside the recipe"
    ),
    "rewards.0.path=no_such_package.rewards:redness": (
        "path names the module 'no_such_package.rewards', which is not installed"
    ),
    "rewards.0.path='../x:redness'": "path names the module '../x', which is not installed",
    "rewards.0.url=http://localhost:8": "reward 'redness' has a path and a url; give one of them",
    "rewards.0.name=jpeg": "reward 'jpeg' is built in; give your own another name",
    "rewards.0.name='a/b'": "reward 'a/b': its name must be 1 to 64 letters, digits and _ . + -",
    "rewards.0.device=gpu": "device is 'gpu'; choose auto, cpu, cuda",
    "rewards.0.reference=my_rewards.py": (
        "reward 'redness' takes no reference; leave it out, it is for phash, histogram, ssim"
    ),
    "rewards.1.palette=['#000000']": "reward 'agreement' takes no palette; leave it out, it is for palette",
    "heldout_rewards.1.palette=[red]": "palette has the colour 'red'; write it as #ff8800",
    "rewards.0={name: judge, url: 'ftp://host'}": "url is 'ftp://host'; write it as http://host:port/",
    "rewards.0={name: judge, url: 'http://host:99999'}": "url is 'http://host:99999'; write it",
    "rewards.0={name: judge, url: 'http://me:secret@host/'}": (
        "url holds a user, password, query or fragment; leave them out"
    ),
    "rewards.0={name: judge, url: 'http://host/?key=secret'}": (
        "url holds a user, password, query or fragment; leave them out"
    ),
    "rewards=[{name: agreement, weight: 0, gate: 1}]": (
        "rewards are gates alone; give at least one of them a weight"
    ),
    "rewards.1.gate=null": "rewards has a weight of 0; list that reward under heldout_rewards",
    "heldout_rewards=[exposure, exposure]": (
        "heldout_rewards names 'exposure' twice; remove one, or name it differently"
    ),
    "heldout_rewards=[{name: redness, path: 'other.py:redness'}]": (
        "heldout_rewards describes 'redness', which is trained on and measured"
    ),
    "rewards.0.gate=high": "rewards.0.gate is 'high'; it must be a number",
    "method.mix=max": "method.mix is 'max'; choose one of: zscore, sum, minimum, rank_product",
}


@pytest.mark.parametrize("setting", MISTAKES)
def test_a_mistake_in_a_reward_is_named_with_its_remedy(recipe: Path, setting: str) -> None:
    (recipe.parent / "other.py").write_text(TEN_LINES)
    with pytest.raises((ConfigError, RewardError)) as error:
        reading.load(recipe, [setting])
    assert MISTAKES[setting] in str(error.value) and "\n" not in str(error.value)
    if "secret" in setting:
        assert "secret" not in str(error.value)


def test_a_held_out_name_that_is_trained_on_is_the_same_reward(recipe: Path) -> None:
    made = reading.load(recipe, ["heldout_rewards=[redness, agreement, jpeg]"])
    trained, judges = build_all(made.rewards, made.heldout_rewards)
    assert [reward.name for reward in judges] == ["redness", "agreement", "jpeg"] and judges[:2] == trained


def own(folder: Path, source: str, attribute: str, name: str) -> built_in.Reward:
    """Load a reward of one's own from source text."""
    (folder / "own.py").write_text(source)
    section = RewardSection(name=name, path=f"{folder / 'own.py'}:{attribute}")
    check_reward(section)
    return build(section)


IMAGES = torch.rand(2, 8, 8, 3, generator=torch.Generator().manual_seed(0))


def test_your_own_may_be_an_object_or_lie_in_an_installed_module(tmp_path: Path) -> None:
    blue = own(tmp_path, AS_AN_OBJECT, "blue", "blue")
    assert (blue.licence, blue.note) == ("MIT", "ends in blue")
    assert torch.equal(checked(blue, IMAGES, ["", ""]), IMAGES[..., 2].mean((1, 2)))
    section = RewardSection(name="saturation", path="comfy_g2rpo.rewards.pixels:colourfulness")
    check_reward(section)
    theirs = built_in.load("colourfulness").score(IMAGES, ["", ""])
    assert torch.equal(build(section).score(IMAGES, ["", ""]), theirs)


MEAN = "images.mean((1, 2, 3))"
ANSWERS = [MEAN, f"{MEAN}.numpy()", f"{MEAN}.tolist()", "images.double().mean((1, 2, 3))"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_your_own_may_answer_in_any_form(tmp_path: Path, answer: str) -> None:
    mine = own(tmp_path, f"def mean(images, prompts):\n    return {answer}\n", "mean", "mine")
    assert torch.allclose(checked(mine, IMAGES, ["", ""]), IMAGES.mean((1, 2, 3)))


def test_your_own_may_count_and_may_be_unable_to_judge(tmp_path: Path) -> None:
    mine = own(tmp_path, "def count(images, prompts):\n    return [3, None]\n", "count", "mine")
    assert checked(mine, IMAGES, ["", ""])[0] == 3 and checked(mine, IMAGES, ["", ""])[1].isnan()
    source = "def count(images, prompts):\n    return (images > 0.5).sum((1, 2, 3))\n"
    ints = own(tmp_path, source, "count", "mine")
    assert checked(ints, IMAGES, ["", ""]).dtype == torch.float32


def test_the_line_that_fails_is_named(tmp_path: Path) -> None:
    mine = own(tmp_path, "def f(images, prompts):\n    images + 1\n    return prompts[7]\n", "f", "mine")
    says = r"reward 'mine' failed with IndexError in .*own\.py, line 3: list index out of range"
    with pytest.raises(RewardError, match=says):
        checked(mine, IMAGES, ["", ""])


NOT_THERE = "cannot import .*own.py: ModuleNotFoundError: No module named 'no_such_thing'"
UNUSABLE = [
    ("import no_such_thing", "f", NOT_THERE),
    ("def f(:", "f", "cannot import .*own.py: SyntaxError: .*line 1"),
    ("g = 1", "f", "has no 'f'; check the end of path"),
    ("f = 1", "f", "is no function and lacks name, licence, compares_across_prompts, score"),
    (AS_AN_OBJECT, "Bluer", "is a class; make an object of it in that file"),
    (AS_AN_OBJECT, "blue", "calls itself 'blue'; write that under name"),
]


@pytest.mark.parametrize(("source", "attribute", "words"), UNUSABLE)
def test_a_file_of_yours_that_cannot_be_used_is_named(
    tmp_path: Path, source: str, attribute: str, words: str
) -> None:
    with pytest.raises(RewardError, match=words):
        own(tmp_path, source, attribute, "mine")


def test_a_file_of_yours_hides_no_module(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("def f(images, prompts):\n    return images.mean((1, 2, 3))\n")
    build(RewardSection(name="mine", path=f"{tmp_path / 'torch.py'}:f"))
    assert sys.modules["torch"] is torch


LOADERS = {"importlib", "imp", "runpy", "pkgutil", "zipimport", "code", "codeop"}


def test_no_node_can_reach_a_file_of_python() -> None:
    """The pack has nothing that imports by name or runs source, and no wire, widget or setting that names
    your file.
    """
    sources = [ROOT / "__init__.py", *(ROOT / "comfy_g2rpo").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]
    assert len(sources) > 30
    for path in sources:
        tree = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imports = [alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names]
        imports += [str(node.module) for node in tree if isinstance(node, ast.ImportFrom) and not node.level]
        calls = [node.func for node in tree if isinstance(node, ast.Call)]
        called = {func.attr for func in calls if isinstance(func, ast.Attribute)}
        assert not {name.partition(".")[0] for name in imports} & LOADERS, path
        assert not called & {"import_module", "exec_module", "run_path", "run_module"}, path


@pytest.mark.parametrize(
    "line", ["path = own.py:redness", "rewards.0.path = own.py:redness", "url = http://host", "gate = 1"]
)
def test_the_settings_of_a_node_know_no_path(line: str) -> None:
    with pytest.raises(ValueError, match="is unknown"):
        settings.parse(line)


@pytest.mark.parametrize(
    "name", ["my_rewards.py:redness", "comfy_g2rpo.rewards.pixels:jpeg", "../my_rewards"]
)
def test_the_names_that_nodes_load_are_no_paths(tmp_path: Path, name: str) -> None:
    (tmp_path / "my_rewards.py").write_text(TEN_LINES)
    with pytest.raises(RewardError, match="unknown"):
        built_in.load(name)
    with pytest.raises(RewardError):
        load_installed(tmp_path, name)


def picture(path: Path, colour: tuple[int, int, int]) -> Path:
    """Save a picture of one colour."""
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (32, 32), colour).save(path)
    return path


RED, BLUE = torch.tensor([1.0, 0, 0]).expand(1, 32, 32, 3), torch.tensor([0, 0, 1.0]).expand(1, 32, 32, 3)


def test_a_reference_comes_from_the_recipe_or_from_the_prompt_s_row(tmp_path: Path) -> None:
    picture(tmp_path / "red.png", (255, 0, 0))
    picture(tmp_path / "pictures" / "blue.png", (0, 0, 255))
    rows = ['{"prompt": "sea", "reference": "pictures/blue.png"}', '{"prompt": "fire"}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    sea, fire = read(tmp_path / "prompts.jsonl")[0]
    both = build(RewardSection(name="histogram", reference=str(tmp_path / "red.png")))
    check_prompts([both], [sea, fire])
    assert checked(both, torch.cat([RED, RED, BLUE, BLUE]), [sea, fire, sea, fire]).tolist() == [0, 1, 1, 0]
    by_row = checked(build(RewardSection(name="histogram")), torch.cat([BLUE, BLUE]), [sea, fire])
    assert by_row[0] == 1 and by_row[1].isnan()


def test_a_palette_comes_from_the_prompt_s_row() -> None:
    reward = build(RewardSection(name="palette"))
    prompts = [Prompt("sea", {"palette": ["#0000ff"]}), Prompt("fire", {"palette": ["#ff0000", "#0000ff"]})]
    assert checked(reward, torch.cat([BLUE, BLUE]), prompts).tolist() == pytest.approx([1, 0.5])


NOTHING = (
    "reward 'ssim' has nothing to compare with; give it a reference, or the prompts a column of that name"
)
NO_REFERENCE = [
    ("ssim", {}, NOTHING),
    ("palette", {}, "reward 'palette' has nothing to compare with; give it a palette"),
    ("ssim", {"reference": 3}, "column reference of 'sea' is '3'; write the path of a picture"),
    ("palette", {"palette": "#0000ff"}, "column palette of 'sea' is '#0000ff'; write a list of colours"),
    ("palette", {"palette": ["blue"]}, "palette has the colour 'blue'"),
    ("phash", {"reference": "nowhere.png"}, "cannot read nowhere.png"),
]


@pytest.mark.parametrize(("name", "columns", "words"), NO_REFERENCE)
def test_a_reference_that_is_not_there_is_named_before_anything_runs(
    name: str, columns: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check_prompts([build(RewardSection(name=name))], [Prompt("sea", columns)])


def test_pictures_on_disk_are_judged_by_the_columns_of_their_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "a.png", (255, 0, 0))
    picture(tmp_path / "b.png", (255, 0, 0))

    def scores(*rows: dict[str, object]) -> list[float] | str:
        asked = tmp_path / "list.jsonl"
        asked.write_text("\n".join(json.dumps({"prompt": "the sea"} | row) for row in rows))
        words = ["--reward", "palette", "--prompts", str(asked), "--json", "--quiet", "--sort", "file"]
        command = ["score", str(tmp_path), *words, "--out", str(tmp_path / "out")]
        _, printed, _ = leave(capsys, *command)
        found = json.loads(printed)
        return found["error"] if "error" in found else [row["scores"]["palette"] for row in found]

    red, both = {"palette": ["#ff0000"]}, {"palette": ["#ff0000", "#0000ff"]}
    assert scores({"file": "a.png"} | red, {"file": "b.png"} | both) == pytest.approx([1, 0.5])
    # The journal keeps what was asked for apart, so that no old score answers a new question.
    assert scores({"file": "a.png"} | both, {"file": "b.png"} | red) == pytest.approx([0.5, 1])
    wrong = scores({"file": "a.png", "palette": ["blue"]}, {"file": "b.png"} | red)
    assert "palette has the colour 'blue'" in wrong


def test_a_recipe_s_reference_lies_beside_it(recipe: Path) -> None:
    picture(recipe.parent / "red.png", (255, 0, 0))
    loaded = reading.load(recipe, ["heldout_rewards=[{name: ssim, reference: red.png}]"])
    assert loaded.heldout_rewards[0].reference == str(recipe.parent / "red.png")
    with pytest.raises(ConfigError, match=r"reference of reward 'ssim' is 'blue\.png', which does not exist"):
        reading.load(recipe, ["heldout_rewards=[{name: ssim, reference: blue.png}]"])


def test_a_prompt_with_columns_is_its_text() -> None:
    prompt = Prompt("a fox", {"target_count": 2})
    assert prompt == "a fox" and hash(prompt) == hash("a fox")
    assert json.dumps([prompt]) == '["a fox"]' and repr(prompt) == "'a fox'"
    assert columns_of(prompt) == {"target_count": 2} and columns_of("a fox") == {}
    with pytest.raises(TypeError):
        columns_of(prompt)["target_count"] = 3


def rows_of(folder: Path, *rows: str) -> list[str]:
    """Read prompts from JSON lines."""
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return read(folder / "rows.jsonl")[0]


def test_the_other_keys_of_a_row_become_columns(tmp_path: Path) -> None:
    columns = {"target_count": 3, "colour": "red", "share": 0.5, "wild": True}
    columns["palette"] = ["#ff8800", "#000000"]
    (prompt,) = rows_of(tmp_path, json.dumps({"prompt": " a fox ", **columns}))
    assert prompt == "a fox" and columns_of(prompt) == columns


def test_a_row_that_comes_twice_is_one_and_one_that_differs_is_an_error(tmp_path: Path) -> None:
    assert len(rows_of(tmp_path, '{"prompt": "a", "n": 1}', '{"n": 1, "prompt": "a"}')) == 1
    says = "lines 1 and 3 have the same prompt but different columns; remove one of them or reword it"
    with pytest.raises(PromptError, match=says):
        rows_of(tmp_path, '{"prompt": "a", "n": 1}', '{"prompt": "b"}', '{"prompt": "a", "n": 2}')


@pytest.mark.parametrize(
    "value",
    ["null", "NaN", "1e400", '{"a": 1}', "[[1]]", "[null]", f'"{"x" * 2001}"', str([0] * 65), "1" * 400],
)
def test_a_column_of_another_kind_is_named(tmp_path: Path, value: str) -> None:
    says = r"line 1, column 'n' is .*; write a text of at most 2000 characters, a number"
    with pytest.raises(PromptError, match=says) as error:
        rows_of(tmp_path, f'{{"prompt": "a", "n": {value}}}')
    assert len(str(error.value)) < 500


def test_too_many_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="at most 32 columns with names of 64 characters"):
        rows_of(tmp_path, json.dumps({"prompt": "a"} | {f"c{i}": i for i in range(33)}))
    with pytest.raises(PromptError, match="at most 32 columns with names of 64 characters"):
        rows_of(tmp_path, json.dumps({"prompt": "a", "c" * 65: 1}))
