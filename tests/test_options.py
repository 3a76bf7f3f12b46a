"""The options of a recipe, as the command line and docs/options.md list them, and how they are written."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from program import leave

from comfy_g2rpo import prompts
from comfy_g2rpo.prompts import PromptError, columns_of
from comfy_g2rpo.recipes import FIELDS, Recipe
from g2rpo_trainer.config import reading
from g2rpo_trainer.config.bundled import bundled_recipes
from g2rpo_trainer.config.reading import ConfigError
from g2rpo_trainer.config.recipe_fields import options, spelt
from g2rpo_trainer.cost.presets import preset_named
from g2rpo_trainer.families.files import diffusers_folder

ROOT = Path(__file__).parent.parent


def test_every_option_says_kind_default_limits_and_sentence() -> None:
    known = {option.name: option for option in options()}
    assert len(known) > 100
    assert known["method.granularities"].line() == (
        "method.granularities = [1, 2]  (list of whole numbers, 1 to 1000)"
    )
    assert known["model.dtype"].line() == "model.dtype = fp32  (one of: fp32, bf16)"
    assert known["prompts.train"].line() == "prompts.train = required  (text)"
    assert known["train.minutes"].line() == "train.minutes = none  (number, 0.0001 to 100000)"
    for name, field in FIELDS.items():
        option = known[f"method.{name}"]
        assert (option.default, option.sentence) == (spelt(getattr(Recipe(), name)), field.metadata["help"])
        assert option.limits or option.kind == "true or false"


@pytest.mark.parametrize(
    ("pattern", "name", "other"),
    [
        ("lora.*", "lora.rank", "model.lora.0.path"),
        ("GRANUL", "method.granularities", "method.eta"),
        ("reward hacking", "train.watch", "train.steps"),
        ("*.weight", "heldout_rewards.0.weight", "method.diversity_weight"),
    ],
)
def test_a_pattern_picks_options(pattern: str, name: str, other: str) -> None:
    found = {option.name for option in options(pattern)}
    assert name in found
    assert other not in found


def test_options_are_printed_and_a_misspelt_pattern_names_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, text, _ = leave(capsys, "options", "train.slots")
    assert (code, text.splitlines()[0]) == (0, "train.slots = 64  (whole number, 1 to 65536)")
    assert text.splitlines()[1].startswith("    Images in one forward")
    code, _, error = leave(capsys, "options", "learnig_rate")
    assert code == 2
    assert "did you mean method.learning_rate" in error


QUICK = {
    "version": ["version"],
    "--version": ["--version"],
    "help": ["--help"],
    "help of train": ["train", "-h"],
    "options": ["options"],
    "options of a section": ["options", "method.*"],
}


@pytest.mark.parametrize("name", QUICK)
def test_what_needs_no_model_loads_no_torch(name: str) -> None:
    run = (
        "import sys\nfrom g2rpo_trainer import cli\n"
        f"try:\n    cli.main({QUICK[name]!r})\nexcept SystemExit as left:\n    assert not left.code\n"
        "print(sorted({'torch', 'numpy', 'scipy', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.splitlines()[-1] == "[]"
    assert len(ran.stdout) > 5


def test_the_parts_of_the_method_are_there_when_asked_for() -> None:
    probe = (
        "import sys, comfy_g2rpo\nassert 'torch' not in sys.modules\n"
        "print(*(getattr(comfy_g2rpo, name).__name__ for name in comfy_g2rpo.__all__))\n"
        "print(hasattr(comfy_g2rpo, 'nothing'))"
    )
    ran = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    names = ["advantages", "kernels", "lora", "plan", "recipes", "schedule", "update"]
    assert ran.stdout.split() == [*(f"comfy_g2rpo.{name}" for name in names), "False"]


def test_the_help_names_every_bundled_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = leave(capsys, "-h")
    assert code == 0
    assert [name for name in bundled_recipes() if name not in text] == []


def test_the_page_of_options_is_up_to_date() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import make_options

    text = make_options.PAGE.read_text("utf-8")
    assert make_options.page(text) == text, "run tools/make_options.py"
    # What people wrote by hand stays: README links to these.
    assert {"## Methods", "## What a run leaves"} <= set(text.splitlines())


REPEATED = {
    "a section": ("train: {}\nout: a\ntrain: {seed: 4}\n", "'train' stands twice, in lines 1 and 3"),
    "a field": ("model:\n  path: a\n\n  path: b\n", "'path' stands twice, in lines 2 and 4"),
    "in a list": ("rewards:\n- jpeg\n- name: x\n  name: y\n", "'name' stands twice, in lines 3 and 4"),
    "by quotes": ('"out": a\nout: b\n', "'out' stands twice, in lines 1 and 2"),
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_key_that_stands_twice_is_named_with_both_lines(tmp_path: Path, name: str) -> None:
    text, words = REPEATED[name]
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        reading.read_yaml(tmp_path / "recipe.yaml")
    assert str(error.value) == f"{tmp_path / 'recipe.yaml'}: the key {words}; make them one"


def test_a_setting_may_not_say_a_key_twice_either() -> None:
    with pytest.raises(ConfigError, match="'steps' stands twice"):
        reading.apply_overrides({}, ["train={steps: 1, steps: 2}"])


def test_a_merged_mapping_may_be_changed(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &base {steps: 1, seed: 2}\ntrain:\n  <<: *base\n  steps: 3\n")
    assert reading.read_yaml(tmp_path / "a.yaml")["train"] == {"steps": 3, "seed": 2}


@pytest.mark.parametrize("part", ["rewards", "heldout_rewards"])
def test_a_reward_may_be_its_name_alone(part: str) -> None:
    names = ["jpeg", "sharpness"]
    loaded = reading.load("demo", [f"{part}=[{', '.join(names)}]", f"{part}.1.weight=2"])
    assert [(each.name, each.weight) for each in getattr(loaded, part)] == [("jpeg", 1), ("sharpness", 2)]


LISTS = {
    "method.granularities=3": "method.granularities is 3; it must be a list; write [3]",
    "method.granularities=1,2": "method.granularities is '1,2'; it must be a list; write [1, 2]",
    "rewards=agreement": "rewards is 'agreement'; it must be a list; write [agreement]",
    "rewards={name: jpeg}": "rewards is {'name': 'jpeg'}; it must be a list; write [{name: jpeg}]",
    "model.text_encoders=a.safetensors": (
        "model.text_encoders is 'a.safetensors'; it must be a list; write [a.safetensors]"
    ),
    "heldout_rewards=null": "heldout_rewards is None; it must be a list; write its items in [ ]",
    "rewards.0.palette='a: b'": "rewards.0.palette is 'a: b'; it must be a list; write [a: b]",
}


@pytest.mark.parametrize("setting", LISTS)
def test_what_should_be_a_list_is_shown_as_one(setting: str) -> None:
    with pytest.raises(ConfigError) as error:
        reading.load("demo", [setting])
    assert str(error.value) == LISTS[setting]


@pytest.mark.parametrize("given", ["24gb", "24GB", "24 GB", "24", "24GiB", "24g"])
def test_a_preset_may_be_written_as_people_do(given: str) -> None:
    assert preset_named(given) == "24gb"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("10gb", "a card of 10 GB takes 8gb"),
        ("11 GB", "a card of 11 GB takes 8gb"),
        ("32gb", "a card of 32 GB takes 24gb"),
        ("40", "a card of 40 GB takes 24gb"),
        ("100GB", "a card of 100 GB takes 80gb"),
        ("6gb", "the smallest is 8gb"),
        ("big", "choose one of: 8gb"),
    ],
)
def test_another_size_names_the_preset_that_fits_it(given: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        preset_named(given)
    assert words in str(error.value)
    assert "did you mean" not in str(error.value)


def comfyui(root: Path) -> Path:
    """Make the folders of a ComfyUI."""
    for name in ("checkpoints", "diffusion_models", "text_encoders", "vae"):
        (root / "ComfyUI/models" / name).mkdir(parents=True)
    return root / "ComfyUI"


def diffusers(root: Path) -> Path:
    """Make what tells a diffusers folder."""
    (root / "transformer").mkdir(parents=True)
    (root / "model_index.json").write_text(yaml.safe_dump({"_class_name": "StableDiffusion3Pipeline"}))
    return root


FOLDERS = {
    "ComfyUI": (lambda root: comfyui(root), "this is a folder of ComfyUI"),
    "its models": (lambda root: comfyui(root) / "models", "this is a folder of ComfyUI"),
    "its checkpoints": (lambda root: comfyui(root) / "models/checkpoints", "this is a folder of ComfyUI"),
    "the hub's cache": (
        lambda root: diffusers(root / "models--a--b/snapshots/c0ffee").parent.parent,
        "give {root}/models--a--b/snapshots/c0ffee",
    ),
    "one level up": (lambda root: diffusers(root / "sd3").parent, "did you mean the folder {root}/sd3?"),
    "a component": (lambda root: diffusers(root) / "transformer", "give {root}"),
    "files": (lambda root: ((root / "my.safetensors").write_bytes(b""), root)[1], "give the file itself"),
    "anything": (lambda root: root, "give the folder of a diffusers Stable Diffusion 3"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_no_model_is_told_for_what_it_is(tmp_path: Path, name: str) -> None:
    make, words = FOLDERS[name]
    with pytest.raises(FileNotFoundError) as error:
        diffusers_folder.components(make(tmp_path), "StableDiffusion3Pipeline")
    assert words.format(root=tmp_path) in str(error.value)


TABLES = {
    "comma.csv": 'prompt,style\na cat,oil\n"a dog, wet",ink\n',
    "tab.tsv": "style\tPrompt\noil\ta cat\nink\ta dog, wet\n",
    "windows.CSV": '\ufeffstyle,prompt\r\noil,a cat\r\n\r\nink,"a dog, wet"\r\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_prompts_is_read_by_its_header(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(TABLES[name].encode())
    found, notes = prompts.read(tmp_path / name)
    assert (found, notes) == (["a cat", "a dog, wet"], [])
    assert [columns_of(prompt)["style"] for prompt in found] == ["oil", "ink"]


BAD_TABLES = {
    "no header.csv": ("a cat,sitting\n", "line 1 is 'a cat,sitting'; a table needs a first line that names"),
    "twice.csv": ("prompt,prompt\na,b\n", "names its columns, each once"),
    "unquoted.csv": ("prompt\na cat, sitting\n", "line 2 has 2 cells for 1 columns; put it into quotes"),
    "empty.csv": ("", "line 1 is ''"),
    "rows gone.tsv": ("prompt\tstyle\n", "holds no prompt"),
    "huge.csv": (f'prompt\n"{"x" * 200_000}"\n', "is not a table: field larger"),
    "list.json": ("[]", "is .json; write .txt"),
    "sheet.xlsx": ("PK", "is .xlsx; write .txt"),
    "list.yaml": ("- a", "is .yaml; write .txt"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_header_or_another_format_is_never_taken_for_prompts(tmp_path: Path, name: str) -> None:
    text, words = BAD_TABLES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(PromptError) as error:
        prompts.read(tmp_path / name)
    assert words in str(error.value)
