"""Every command of README and docs: run on the tiny model, or parsed to the last option and named with the
reason why it cannot run here.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from drawn_pictures import colourful
from program import call
from reward_folders import EMBED, HEAD, aesthetic_folder, clip_folder, clip_model, head_weights
from safetensors.torch import save_file
from test_run import LAUNCH
from test_vote_command import save_votes

from comfy_g2rpo import lora
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer import cli
from g2rpo_trainer.commands.train_here import WAITING
from g2rpo_trainer.config.reading import load
from g2rpo_trainer.cost.presets import preset_settings

pytestmark = pytest.mark.xdist_group("commands")

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONG = ("options.md", "searching.md", "votes.md")
RUN = [pytest.param(page, marks=pytest.mark.long if page.name in LONG else ()) for page in PAGES]
PROGRAMS = ("g2rpo", "make", "pip", "hf", "cd", "git", "export", "accelerate", "tensorboard", "vllm")
SMALL = {
    "model.path": "models/tiny",
    "train.steps": 1,
    "train.prompts_per_step": 1,
    "train.eval_prompts": 2,
    "train.eval_noises": 1,
    "method.num_steps": 4,
}
RECIPE = """
model: {width: 64, height: 64, max_sequence_length: 0, path: models/tiny}
rewards: [{name: REWARD}]
heldout_rewards: [jpeg]
prompts: {train: prompts/shapes_train.txt, heldout: prompts/shapes_heldout.txt}
"""
WAITS = {"g2rpo train taste.yaml --out runs/taste": WAITING}
"""Exit codes other than 0: a run of votes stops until somebody has voted."""

FLUX, NETWORK = "needs a large model", "opens a connection"
NOT_RUN = {
    "make demo": ".ci/run does",
    "make test": ".ci/run does",
    "cd ComfyUI/custom_nodes": "tests/test_pack.py links the checkout there",
    "git clone": NETWORK,
    "pip install": NETWORK,
    "hf auth login": NETWORK,
    "hf download": NETWORK,
    "export ": "is the shell's",
    "accelerate launch --multi_gpu": "tests/test_run.py does, with the words of LAUNCH",
    "g2rpo plan flux_dev": FLUX,
    "g2rpo plan z_image": FLUX,
    "g2rpo train flux_dev": FLUX,
    "g2rpo train z_image": FLUX,
    "g2rpo sample runs/flux_dev": FLUX,
    "g2rpo run my_graph.json": FLUX,
    "g2rpo rewards fetch": NETWORK,
    "g2rpo train demo --ray": "needs Ray: tests/test_ray_runs.py",
    "g2rpo resume runs/shared": "the same",
    "g2rpo report runs/shared": "the same",
    "g2rpo worker": "works until it is stopped: tests/test_worker.py",
    "g2rpo rewards serve": "serves until it is stopped: tests/test_judges_server.py",
    "g2rpo serve": "serves until it is stopped: tests/test_remote.py",
    "g2rpo remote": "speaks to such a service: tests/test_remote.py",
    "judges.md: g2rpo train mine.yaml": "asks the judge of the line above: tests/test_judges_run.py",
}


def commands_of(page: Path) -> list[str]:
    """List the commands in a page's blocks of code, in order; a shell's block must hold nothing else."""
    found: list[str] = []
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            text = line.removeprefix("$ ")
            if text.split(" ")[0] not in PROGRAMS:
                assert kind != "bash" or not line.strip(), f"{page.name}: unknown program in {line!r}"
                continue
            words = shlex.split(text, comments=True)
            while "&&" in words:
                end = words.index("&&")
                found.append(shlex.join(words[:end]))
                words = words[end + 1 :]
            found.append(shlex.join(words))
    return found


def inline_commands(page: Path) -> list[str]:
    """List what a page sets as a command of this program within its lines."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(each.split()) for each in re.findall(r"`(g2rpo [^`]*)`", text)]


def why_not(page: Path, command: str) -> str:
    """Return why a command is not run; nothing for one that is."""
    texts = (command, f"{page.name}: {command}")
    return next((reason for start, reason in NOT_RUN.items() if any(t.startswith(start) for t in texts)), "")


def verb_of(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command of the program that words name, and what follows it."""
    command: Any = typer.main.get_command(cli.app)
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    return command, words


def parse(words: list[str]) -> None:
    """See that the program knows a command with all of its options, and a recipe's settings."""
    command, rest = verb_of(words)
    assert not hasattr(command, "commands"), f"{words[0]} is no command"
    given = command.make_context(words[0], rest).params
    if "recipe" in given and not str(given["recipe"]).startswith("runs/"):
        load(given["recipe"], preset_settings(given["recipe"], given.get("preset"), given["settings"] or []))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Prepare a folder with all that the pages take for granted, around one short run."""
    place = tmp_path_factory.mktemp("commands")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("HOME", str(place))
        patch.setenv("G2RPO_REWARDS", str(place / "reward_models"))
        for name, kind, act in (("pickscore", "pickscore", "gelu"), ("clipscore", "clipscore", "quick_gelu")):
            clip_folder(place / "reward_models", name, kind, clip_model(act))
        clip_folder(place, "DFN5B", "clipscore", clip_model("quick_gelu")).joinpath("reward.json").unlink()
        head = head_weights(EMBED, "layers.{}")
        aesthetic_folder(place / "reward_models", "aesthetic", clip_model("quick_gelu"), head, HEAD)
        for folder in ("my_images", "my_pictures", "before", "after", "Downloads"):
            (place / folder).mkdir()
            for i in range(3):
                colourful(40 + 40 * i, (64, 64), i).save(place / folder / f"{i}.png")
        (place / "models").symlink_to(ROOT / "models")
        (place / "PATH").symlink_to(ROOT / "models/tiny")
        (place / "mine.txt").write_text("a red circle\ntwo blue squares\n")
        (place / "mine.yaml").write_text(RECIPE.replace("REWARD", "agreement"))
        (place / "taste.yaml").write_text(RECIPE.replace("REWARD", "votes"))
        assert call("train", "demo", "--quiet", "--out", "runs/demo", *small()) == 0
        newest = RunFolder(place / "runs/demo").latest()
        for name in ("one", "other"):
            shutil.copytree(place / "runs/demo", place / f"runs/{name}")
        shutil.copytree(newest, place / "runs/z/checkpoints/000025")
        pairs = lora.read(newest / "lora.safetensors").pairs
        save_file(
            {
                f"base_model.model.{name}.lora_{letter}.weight": part.contiguous()
                for name, both in pairs.items()
                for letter, part in zip("AB", both, strict=True)
            },
            place / "adapter_model.safetensors",
        )
        yield place


def small() -> list[str]:
    """Return the settings that make a run of the tiny model short."""
    return [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]


SHORT = {
    "train": ["--quiet"],
    "run": ["--quiet"],
    "search": ["--quiet", "--budgets", "16"],
    "prior": ["--quiet", "--set", "train.eval_every=1", "--set", "method.group_size=2"],
    "calibrate": ["--set", "method.group_size=2"],
}
"""What makes commands short, whose last option of a name counts."""


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(
    page: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(shutil.copytree(prepared, tmp_path / "place", symlinks=True))
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("G2RPO_REWARDS", str(place / "reward_models"))
    for command in commands_of(page):
        words = shlex.split(command, comments=True)
        if why_not(page, command):
            if words[0] == "g2rpo":
                parse(words[1:])
            continue
        assert words[0] == "g2rpo", f"{page.name}: run {command!r} here, or name why not in NOT_RUN"
        if "--take" in words:
            assert save_votes(place / words[2], place / "Downloads/votes.json")
        given = [word.replace("~", str(place)) if word.startswith("~") else word for word in words[1:]]
        more = [*SHORT[words[1]], *small()] if words[1] in SHORT else []
        assert call(*given, *more) == WAITS.get(command, 0), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_program_knows_what_a_page_names_within_its_lines(page: Path) -> None:
    for text in inline_commands(page):
        command, rest = verb_of(shlex.split(text.replace("…", "x"))[1:])
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        assert not hasattr(command, "commands"), text
        assert {word for word in rest if word.startswith("--")} <= known, text


def test_every_reason_not_to_run_a_command_is_still_needed() -> None:
    used = [(page, command) for page in PAGES for command in commands_of(page)]
    for start, reason in NOT_RUN.items():
        assert any(
            why_not(page, command) == reason and start in f"{page.name}: {command}" for page, command in used
        )


def test_processes_are_started_as_the_page_says() -> None:
    (command,) = (
        text for text in commands_of(ROOT / "docs/first_real_run.md") if text.startswith("accelerate")
    )
    assert command.startswith(shlex.join(["accelerate", *LAUNCH, "train"]))
    parse(shlex.split(command)[1 + len(LAUNCH) :])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("g2rpo train demo --bogus 1", "--bogus"),
        ("g2rpo nothing", "nothing is no command"),
        ("rm -rf runs", "unknown program"),
        ("g2rpo train demo --set method.etta=1", "method.etta is unknown"),
    ],
)
def test_a_new_command_that_does_not_work_is_noticed(line: str, says: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```bash\n{line}   # does something\n```\n")
    with pytest.raises(Exception, match=says):
        for command in commands_of(page):
            assert not why_not(page, command)
            parse(shlex.split(command)[1:])
