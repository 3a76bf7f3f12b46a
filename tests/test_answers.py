"""`--json` on every command: one document on the output, or lines of them, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from program import call, leave
from test_cli import SMALL

from g2rpo_trainer.cli import app
from g2rpo_trainer.commands.answers import Verb, plain

pytestmark = pytest.mark.xdist_group("answers")  # one process makes what they share


def verbs(command: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """List the commands of the program, and those below them."""
    command = command or typer.main.get_command(app)
    if not hasattr(command, "commands"):
        yield name, command
        return
    for word, below in command.commands.items():
        yield from verbs(below, f"{name} {word}".strip())


ROOT = Path(__file__).parent.parent
VERBS = dict(verbs())
LORA = "checkpoints/000002/lora.safetensors"
WORDS: dict[str, list[str]] = {
    "train": ["train", "demo", "--out", "OUT/run", *SMALL],
    "resume": ["resume", "RUN", "--set", "train.steps=3"],
    "pairs": ["pairs", "RUN"],
    "plan": ["plan", "demo", *SMALL],
    "sample": ["sample", "demo", "--prompt", "a red circle", "--out", "OUT/a.png"],
    "report": ["report", "RUN"],
    "calibrate": ["calibrate", "demo", *SMALL, "--prompts", "1", "--rounds", "1", "--out", "OUT/c.png"],
    "search": ["search", "demo", *SMALL, "--budgets", "8", "--prompts", "1", "--out", "OUT/found"],
    "prior": ["prior", "demo", *SMALL, "--set", "train.steps=1", "--out", "OUT/prior.safetensors"],
    "score": ["score", "OUT/p.png", "--reward", "jpeg"],
    "compare": ["compare", "RUN", "--out", "OUT/compare.html"],
    "vote": ["vote", "RUN"],
    "export": ["export", f"RUN/{LORA}", "--out", "OUT/new.safetensors"],
    "check-lora": ["check-lora", f"RUN/{LORA}"],
    "doctor": ["doctor", "demo"],
    "options": ["options", "train.steps"],
    "version": ["version"],
    "run": ["run", str(ROOT / "workflows/Train a LoRA on a reward - tiny demo.json"), "--print"],
    "workflow": ["workflow", "demo", "--out", "OUT/w.json"],
    "worker": ["worker", "--comfyui", "OUT/comfyui", "--once"],
    "serve": ["serve", "--print-openapi"],
    "remote submit": ["remote", "submit", "demo"],
    "remote watch": ["remote", "watch", "one"],
    "remote fetch": ["remote", "fetch", "one"],
    "remote cancel": ["remote", "cancel", "one"],
    "remote list": ["remote", "list"],
    "rewards list": ["rewards", "list"],
    "rewards fetch": ["rewards", "fetch", "nothing"],
    "rewards check": ["rewards", "check", "nothing"],
    "rewards add": ["rewards", "add", "mine", "OUT"],
    "rewards serve": ["rewards", "serve", "nothing"],
}
"""A call of every command, by what it is called; one without a call here fails, whoever adds it."""
KEYS: dict[str, set[str]] = {
    "train": {"run", "lora", "summary"},
    "resume": {"run", "lora", "summary"},
    "plan": {"steps", "forwards", "pictures", "memory", "seconds", "rows", "remarks"},
    "sample": {"files", "prompts", "seed", "lora"},
    "report": {"run", "files", "seconds", "summary"},
    "calibrate": {"etas", "rounds", "file"},
    "search": {"folder", "searches"},
    "prior": {"file", "steps", "gains", "verdict"},
    "compare": {"before", "after", "changes", "notes", "file"},
    "vote": {"waiting", "added", "file"},
    "export": {"file", "family", "form", "modules", "ranks"},
    "check-lora": {"file", "loads", "found", "troubles"},
    "doctor": {"ok", "checks"},
    "options": {"options"},
    "version": {"version"},
    "run": {"recipe", "notes"},
    "workflow": {"file", "notes"},
    "worker": {"jobs"},
    "serve": {"openapi", "paths"},
    "rewards list": {"folder", "rules", "models", "yours"},
}
"""What docs/backend.md promises of an answer; what is not here ends with an error in its call."""
LINES = ("train", "resume", "pairs")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a short run, a picture, and a folder for what comes."""
    made = tmp_path_factory.mktemp("answers")
    assert call("train", "demo", "--out", made / "RUN", "--quiet", *SMALL) == 0
    for folder in ("OUT", "OUT/comfyui/models", "OUT/comfyui/output"):
        (made / folder).mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(made / "OUT/p.png")
    return made


def test_every_command_takes_json() -> None:
    assert {name for name, command in VERBS.items() if not isinstance(command, Verb)} == set()


@pytest.mark.parametrize("name", VERBS)
def test_what_a_command_prints_is_json(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("G2RPO_REWARDS", str(place / "rewards"))
    words = [word.replace("RUN", f"{place}/RUN").replace("OUT", f"{place}/OUT") for word in WORDS[name]]
    code, printed, _ = leave(capsys, *words, "--json")
    found = [json.loads(line) for line in printed.splitlines()]
    assert len(found) == 1 or (name in LINES and len(found) > 1)
    if name in KEYS or name == "score":
        assert code in (0, 1) and set(found[-1] if name in KEYS else found[-1][0]) >= KEYS.get(name, set())
    else:
        assert code == 2 and [*found[-1]] == ["error"]


MISTAKES = {
    "of the command": (["train", "dmeo"], 2),
    "of the words": (["train"], 2),
    "of an option": (["plan", "demo", "--bogus"], 2),
    "of the program": (["nothing"], 2),
    "nothing found": (["options", "xyzzyx"], 2),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_error_is_json_with_the_same_exit_code(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, wanted = MISTAKES[name]
    code, _, _ = leave(capsys, *words)
    with_json, printed, _ = leave(capsys, *words, "--json")
    assert with_json == code == wanted and [*json.loads(printed)] == ["error"]


def test_rows_come_one_by_one_and_the_summary_last(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, printed, _ = leave(capsys, "train", "demo", "--out", place / "OUT/rows", *SMALL, "--json")
    *rows, last = map(json.loads, printed.splitlines())
    written = (place / "OUT/rows/metrics.jsonl").read_text().splitlines()[1:]
    assert rows == [json.loads(line) for line in written]
    assert last["summary"] == json.loads((place / "OUT/rows/summary.json").read_text())


def test_what_json_cannot_hold_is_text_or_null() -> None:
    assert plain({"a": float("nan"), 1: (Path("x"), True, None)}) == {"a": None, "1": ["x", True, None]}
