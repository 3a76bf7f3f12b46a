"""Poisoned run folders, for comfy_child_hostile.py: damaged, foreign and lying files, and links that lead
outside.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comfy_hostile_tools import Court
from safetensors.torch import load, save

Poison = Callable[[Path], None]
Case = tuple[str, Poison, str]
"""What it is, what is done to a run folder, and who must refuse it: (T)rain LoRA, LoRA (P)olicy, Run
(M)onitor, (S)ave LoRA.
"""

DEEP = "[" * 100_000
STATE, LORA = "checkpoints/000001/state.safetensors", "checkpoints/000001/lora.safetensors"
HEADERS: dict[str, bytes] = {
    "an oversized header": struct.pack("<Q", 2**40) + b"{}",
    "a header of 9 MiB of nothing": struct.pack("<Q", 9 * 2**20) + b" " * (9 * 2**20),
    "a header that is no JSON": struct.pack("<Q", 8) + b"{nothing",
    "a deep header": struct.pack("<Q", len(DEEP)) + DEEP.encode(),
    "a header that is a list": struct.pack("<Q", 2) + b"[]",
    "nothing in it": b"",
    "a pickle in it": b"\x80\x04\x95" + b"x" * 100,
}


def nan(tensor: torch.Tensor) -> torch.Tensor:
    """Return as many NaN."""
    return tensor * torch.nan


def written(name: str, content: str | bytes) -> Poison:
    """Replace a file's content."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda run: (run / name).write_bytes(data) and None


def tensors(name: str, change: Mapping[str, Any], drop: str = "") -> Poison:
    """Change some tensors of a file; a value may be a function of the old tensor."""

    made: dict[bytes, bytes] = {}

    def poison(run: Path) -> None:
        sound = (run / name).read_bytes()
        if sound not in made:
            old = load(sound)
            new = {key: value(old[key]) if callable(value) else value for key, value in change.items()}
            made[sound] = save({key: t for key, t in {**old, **new}.items() if not (drop and drop in key)})
        (run / name).write_bytes(made[sound])

    return poison


def every_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Poison:
    """Change all tensors of a file."""
    return lambda run: (
        (run / name).write_bytes(save({key: change(t) for key, t in load((run / name).read_bytes()).items()}))
        and None
    )


def linked(name: str, target: str) -> Poison:
    """Move a file or folder of the run outside (or only point there) and leave a link."""

    def poison(run: Path) -> None:
        outside = run.parents[2] / "outside" / target
        if not (run / name).exists():
            (run / name).mkdir()
        if not outside.exists() and target != "nowhere":
            shutil.move(run / name, outside)
        elif (run / name).is_dir():
            shutil.rmtree(run / name)
        else:
            (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside)

    return poison


def replaced(run: Path) -> None:
    """Put a file in the run's place."""
    shutil.rmtree(run)
    run.write_text("a file")


def emptied(run: Path) -> None:
    """Leave nothing in the run."""
    shutil.rmtree(run)
    run.mkdir()


def foreign(run: Path) -> None:
    """Leave somebody else's file in the run."""
    emptied(run)
    (run / "x").write_text("x")


def folder_for(name: str) -> Poison:
    """Put a folder in a file's place."""

    def poison(run: Path) -> None:
        (run / name).unlink()
        (run / name).mkdir()

    return poison


def edited(name: str, change: Callable[[Any], Any]) -> Poison:
    """Change a JSON file."""
    return lambda run: (
        (run / name).write_text(json.dumps(change(json.loads((run / name).read_text("utf-8"))))) and None
    )


def row(text: str) -> Poison:
    """Add a line to the metrics."""

    def poison(run: Path) -> None:
        with open(run / "metrics.jsonl", "ab") as file:
            file.write(text.encode("utf-8", "surrogatepass"))

    return poison


def checkpoint_named(name: str) -> Poison:
    """Copy the checkpoint under another name."""
    return lambda run: shutil.copytree(run / "checkpoints/000001", run / "checkpoints" / name) and None


def cut(name: str) -> Poison:
    """Take a file's end away."""
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:-100]) and None


def state_tensors() -> dict[str, Poison]:
    """List poisoned optimizer states and weights."""
    first = "optimizer/0/exp_avg"
    changes: dict[str, dict[str, Any]] = {
        "NaN weights": {"parameter/1": nan},
        "whole numbers": {"parameter/1": lambda t: t.long()},
        "another shape": {"parameter/1": torch.zeros(2, 2)},
        "NaN in the optimizer": {first: nan},
        "a negative square": {"optimizer/0/exp_avg_sq": lambda t: t - 1},
        "an optimizer of another shape": {first: torch.zeros(2)},
        "a lone number for a moment": {first: torch.tensor(0.0)},
        "a step that is none": {"optimizer/0/step": torch.tensor(-5.0)},
    }
    for key in ("x/exp_avg", "0/exp_avg/y", "999/exp_avg", "0/foreign", "-1/exp_avg"):
        changes[f"the key optimizer/{key}"] = {f"optimizer/{key}": torch.zeros(1)}
    made = {what: tensors(STATE, change) for what, change in changes.items()}
    made["no parameters"] = tensors(STATE, {}, "parameter/1")
    made["half an optimizer"] = tensors(STATE, {}, "exp_avg_sq")
    return made


def checkpoints() -> list[Case]:
    """List poisoned checkpoints."""
    cases: list[Case] = []
    many = {f"x{i}": torch.zeros(1) for i in range(20_001)}
    for file, who in ((STATE, "TP"), (LORA, "S")):
        name = Path(file).name
        cases += [(f"{name}: {what}", written(file, content), who) for what, content in HEADERS.items()]
        cases += [(f"{file}: 20 001 tensors", tensors(file, many), who), (f"{file}: cut", cut(file), who)]
        cases.append((f"{file}: gone", lambda run, f=file: (run / f).unlink(), ""))
    cases += [(f"state.safetensors: {what}", poison, "TP") for what, poison in state_tensors().items()]
    foreign_key = tensors(STATE, {"foreign": torch.zeros(1)})
    texts = [
        "{",
        "[]",
        "null",
        "7",
        "{}",
        '{"step": "1"}',
        '{"step": -1}',
        '{"step": 1e999}',
        '{"step": true}',
    ]
    texts += ['{"step": 2}', DEEP, "\ud800"]
    broken = {text: written("checkpoints/000001/state.json", text) for text in texts}
    names = ["12abc", "1²", "9" * 200, "000001.bak", ".DS_Store"]
    return [
        *cases,
        ("state.safetensors: the key foreign", foreign_key, ""),
        ("lora.safetensors: NaN weights", every_tensor(LORA, nan), "S"),
        ("lora.safetensors: foreign keys", tensors(LORA, {"../../x": torch.zeros(1)}), "S"),
        *((f"state.json: {text!a:.20}", poison, "TP") for text, poison in broken.items()),
        *((f"checkpoints: one named {name:.12}", checkpoint_named(name), "") for name in names),
    ]


def configurations() -> list[Case]:
    """List poisoned configurations."""
    broken = ["{", "[]", "null", "7", '"x"', '{"config": []}', '{"config": {"lora": 7}}', '{"config": null}']
    cases: list[Case] = [
        (f"config.json: {text!a:.30}", written("config.json", text), "TP")
        for text in (*broken, DEEP, "\ud800", "")
    ]

    def other_model(content: Any) -> Any:
        content["config"]["model"]["fingerprint"] = "x" * 10**5
        return content

    cases.append(("config.json: another model's", edited("config.json", other_model), "TP"))
    for steps in ("a", -1, 1e308, [1], {}, True, 10**30):

        def change(content: Any, steps: Any = steps) -> Any:
            train = {**content["config"].get("train", {}), "steps": steps}
            return {**content, "config": {**content["config"], "train": train}}

        cases.append((f"config.json: {steps!r:.20} steps", edited("config.json", change), ""))
    return cases


def documents() -> list[Case]:
    """List poisoned metrics and summaries."""
    summaries = ("{", "[]", DEEP, '{"a": "\\ud800"}', "x" * 2**21)
    rows = [
        "[]",
        "7",
        "null",
        "{",
        DEEP,
        '{"step": "x"}',
        '{"step": 1e400, "reward/a/mean": NaN}',
        '{"step": null}',
    ]
    rows += ['{"step": 1, "reward/<script>alert(1)</script>/mean": 1e308}']
    rows += ['{"step": 1, "reward/\\ud800/mean": 1, "a\\u0000": -1e308}']
    rows += [json.dumps({"step": 1, f"reward/{'x' * 10**5}/mean": 0.5})]
    rows += ['{"step": 99999999999999999999999, "heldout/a/mean": 1}']
    rows += ['{"step": -1, "reward/a/mean": 1}\n{"step": 1e300, "reward/a/mean": -1}']
    lines = [*(f"{line}\n" for line in rows), '{"step": 1, "reward/torn']
    first = ["", "{}\n", DEEP[:4000] + "\n", '{"schema": "other/1"}\n', "[]\n", "\ud800\n"]
    return [
        *configurations(),
        *((f"summary.json: {text!a:.20}", written("summary.json", text), "") for text in summaries),
        *((f"metrics.jsonl: {text!a:.30}", row(text), "") for text in lines),
        *((f"metrics.jsonl begins {text!a:.20}", written("metrics.jsonl", text), "TPMS") for text in first),
    ]


def places() -> list[Case]:
    """List runs that lie elsewhere."""
    cases: list[Case] = [
        ("a link for the run", linked("", "moved"), "TPMS"),
        ("a file for the run", replaced, "TPMS"),
        ("a link to nowhere for the run", linked("", "nowhere"), "TPMS"),
        ("an empty folder", emptied, "MS"),
        ("a foreign folder", foreign, "TPMS"),
    ]
    for name in ("metrics.jsonl", "config.json", "checkpoints", "checkpoints/000001", "images", LORA, STATE):
        cases.append((f"a link for {name}", linked(name, f"moved-{name.replace('/', '-')}"), "TP"))
    cases.append(("a link to a secret for config.json", linked("config.json", "secret.txt"), "TP"))
    cases.append(("a link to a secret for summary.json", linked("summary.json", "secret.txt"), "TP"))
    for name in ("metrics.jsonl", "config.json"):
        cases.append((f"a folder for {name}", folder_for(name), "TPMS"))
    return cases


def attack_files(
    court: Court,
    real: Mapping[str, Mapping[str, Any]],
    execute: Callable[[str, Mapping[str, Any]], Any],
    runs: Path,
) -> None:
    """Make a run of each kind, and poison copies of it for every block that opens one."""
    outside = runs.parents[1] / "outside"
    trained = runs / "trained"
    execute("TrainLoRA", {**real["TrainLoRA"], "run": trained.name})
    begun = execute("LoRAPolicy", {**real["LoRAPolicy"], "run": "graph"}).args[0]
    execute("UpdateLoRA", {**real["UpdateLoRA"], "policy": begun})
    for number, (what, poison, who) in enumerate([*checkpoints(), *documents(), *places()]):
        for letter, block, source in (
            ("T", "TrainLoRA", trained),
            ("P", "LoRAPolicy", runs / "graph"),
            ("M", "RunMonitor", trained),
            ("S", "SaveLoRA", trained),
        ):
            run = runs / f"poison-{number}-{letter}"
            shutil.copytree(source, run)
            without_sums(run)
            # Nothing sound to fall back to: what is poisoned must be refused.
            shutil.rmtree(run / "checkpoints/000000", ignore_errors=True)
            kept = {path.name for path in outside.iterdir()}
            poison(run)
            before = contents(outside)
            # Others would start another run, or show the one that is wired.
            changed: dict[str, Any] = {"run": run.name}
            changed |= {"T": {"steps": 2, "if_settings_changed": "ask"}, "M": {"run_name": None}}.get(
                letter, {}
            )
            files = ("config.json", "metrics.jsonl", "state.json", "lora.safetensors")
            names = ["run", "checkpoint", *(name for name in files if name in what)]
            act = partial(execute, block, {**real[block], **changed})
            court.attack(block, f"run: {what}", names, act, True if letter in who else None)
            if contents(outside) != before:
                court.faults.append(f"{block}, run: {what}: files outside were changed")
            remove(run)
            for path in outside.iterdir():
                if path.name not in kept:
                    remove(path)


def without_sums(run: Path) -> None:
    """Take the sums out of a run's checkpoints: who poisons a file can do that too."""
    for path in run.glob("checkpoints/*/state.json"):
        state = json.loads(path.read_text("utf-8"))
        state.pop("sha256")
        path.write_text(json.dumps(state), "utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files of a folder."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def remove(path: Path) -> None:
    """Remove a file, a link or a folder."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
