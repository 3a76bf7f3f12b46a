"""What a run is made from and does not keep (prompts, rewards, LoRAs, weights), and whether it changed."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from comfy_g2rpo.files.safe import RunError, digest_of
from comfy_g2rpo.prompts import Prompts, columns_of, is_text

from .reading import Config, model_folder
from .reward_checks import rewards_root

INPUTS = "inputs"
"""Key of config.json: the digest of each input by the name of its field."""
WHOLE_BYTES, BLOCK, BLOCKS = 2**28, 2**16, 256
"""Larger files are told apart by their size, their ends and blocks at even spaces: a fine-tuned model differs
in all of them, and reading 24 GB takes a minute or more.
"""
MAY_MOVE = ("prompts.train", "prompts.heldout", "model.path", "model.transformer", "model.vae", "lora.init")
"""Fields whose path may differ on resume where the content does not."""
READ = {".safetensors", ".json", ".txt", ".model", ".jinja"}
"""Files of a model's folder that are loaded."""


def input_digests(config: Config, prompts: Prompts) -> dict[str, str]:
    """Return the digest of everything that a run reads and does not keep, by field."""
    found = {"prompts.train": digest_of_prompts(prompts.train)}
    if prompts.heldout:
        found["prompts.heldout"] = digest_of_prompts(prompts.heldout)
    return found | {field: digest_of_place(place) for field, place in places(config)}


def model_digest(content: Mapping[str, Any]) -> str:
    """Return what tells the model of a run from others, by its config.json: files, LoRAs, guidance.

    Blank where an earlier version wrote down no digests.
    """
    inputs, model = content.get(INPUTS), content["config"]["model"]
    files = {field: digest for field, digest in (inputs or {}).items() if field.startswith("model.")}
    if not files:
        return ""
    kept = {name: model.get(name) for name in ("family", "guidance", "negative_prompt")}
    kept["strengths"] = [each["strength"] for each in model.get("lora", ())]
    return hashlib.sha256(json.dumps([files, kept], sort_keys=True).encode()).hexdigest()


def places(config: Config) -> Iterator[tuple[str, Path]]:
    """List the files and folders of a configuration, by field."""
    model = config.model
    given: list[tuple[str, str | Path | None]] = [
        ("model.path", model_folder(model.path, bool(model.transformer))),
        ("model.transformer", model.transformer),
        ("model.vae", model.vae),
        ("model.tokenizers", model.tokenizers),
        *((f"model.text_encoders.{i}", path) for i, path in enumerate(model.text_encoders)),
        *((f"model.lora.{i}.path", each.path) for i, each in enumerate(model.lora)),
        ("lora.init", config.lora.init),
    ]
    for i, run in enumerate(config.pairs.runs):
        given += [(f"pairs.runs.{i} {name}", Path(run) / name) for name in ("ballots", "votes.jsonl")]
    for part in ("rewards", "heldout_rewards"):
        for i, reward in enumerate(getattr(config, part)):
            given.append((f"{part}.{i}.path", source_of(reward.path)))
            given.append((f"{part}.{i}.reference", reward.reference))
            if not reward.path and not reward.url:
                given.append((f"{part}.{i}.name", rewards_root() / reward.name))
    yield from ((field, Path(place)) for field, place in given if place and Path(place).exists())


def source_of(path: str | None) -> str | None:
    """Return the file of your own reward; of a dotted module, that of the module as it was imported."""
    place = (path or "").rpartition(":")[0]
    if place.endswith(".py"):
        return place
    return getattr(sys.modules.get(place), "__file__", None)


def digest_of_prompts(prompts: Sequence[str]) -> str:
    """Digest prompts with their columns; files that columns name count by what is in them."""
    rows = [
        [str(prompt), {name: column_digest(value) for name, value in columns_of(prompt).items()}]
        for prompt in prompts
    ]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def column_digest(value: Any) -> Any:
    """Return a column's value, or the digest of the file that it names."""
    if isinstance(value, str) and Path(value).is_absolute() and Path(value).is_file():
        return digest_of(Path(value))
    return value


def digest_of_place(place: Path) -> str:
    """Digest a file, or the files of a folder that are loaded with their names."""
    if place.is_file():
        return digest_of_file(place)
    files = sorted(path for path in place.rglob("*") if path.suffix in READ and path.is_file())
    rows = [[path.relative_to(place).as_posix(), digest_of_file(path)] for path in files]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """Digest a file: whole, or a large one by its size and a sample of it."""
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        return digest_of(path)
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(BLOCKS):
            file.seek(i * (size - BLOCK) // (BLOCKS - 1))
            found.update(file.read(BLOCK))
    return f"sampled {found.hexdigest()}"


def compare_inputs(
    run: Path, content: Mapping[str, Any], now: Mapping[str, str], config: Config, changed_inputs: bool
) -> tuple[list[str], list[str]]:
    """Refuse, by RunError, to go on with inputs that changed since config.json had that content.

    With `changed_inputs` they are said instead. Return what is to be said, and the fields whose files are as
    they were, wherever they lie now. A run of an earlier version knows nothing of its inputs.
    """
    before = content.get(INPUTS)
    before = before if isinstance(before, dict) else {}
    changed = [field for field, digest in now.items() if before.get(field, digest) != digest]
    same = [field for field in MAY_MOVE if field in now and before.get(field) == now[field]]
    if not changed:
        return [], same
    prompts = {f"prompts.{name}": getattr(config.prompts, name) for name in ("train", "heldout")}
    named = dict(places(config)) | {field: text for field, text in prompts.items() if not is_text(text)}
    which = ", ".join(f"{field} ({named[field]})" if named.get(field) else field for field in changed)
    if not changed_inputs:
        raise RunError(
            f"{which} changed since {run} was made; bring the former content back, go on with what is there "
            "(--changed-inputs), or start another run"
        )
    return [f"going on with what changed since the run was made: {which}"], same
