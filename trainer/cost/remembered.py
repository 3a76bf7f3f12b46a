"""What has been counted or measured before, so that it is not done again: bundled recipes' counts come with
the program, others are kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from comfy_g2rpo.files.safe import FileError, read_json, write_json

from ..config.file_checks import read_prompts
from ..config.reading import Config, ConfigError, model_folder
from ..model.quiet_libraries import quieten_libraries
from .card_memory import ModelCounts

SHIPPED = Path(__file__).parent.parent / "families/facts/counted.json"
FORMAT = 2
"""Goes up when counting changes, so that what was kept is counted anew."""


def cache_root() -> Path:
    """Return where results are kept: $G2RPO_PLANS, or the user's cache; it may be deleted at any time."""
    return Path(os.environ.get("G2RPO_PLANS") or Path.home() / ".cache" / "g2rpo" / "plans").expanduser()


@lru_cache(maxsize=1)
def shipped() -> dict[str, dict[str, Any]]:
    """Read the counts that come with the program, by key."""
    return json.loads(SHIPPED.read_text("utf-8"))


def key_of(content: Mapping[str, Any]) -> str:
    """Return the name of what was found for some content."""
    return hashlib.sha256(json.dumps([FORMAT, content], sort_keys=True).encode()).hexdigest()[:32]


def recall(key: str) -> dict[str, Any] | None:
    """Return what was kept under a name; nothing where that is damaged."""
    try:
        found = read_json(cache_root() / f"{key}.json")
    except (FileError, OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def keep(key: str, content: Mapping[str, Any]) -> None:
    """Keep what was found, if the cache can be written."""
    try:
        cache_root().mkdir(parents=True, exist_ok=True)
        write_json(cache_root() / f"{key}.json", dict(content))
    except (FileError, OSError):
        return


def counts_of(config: Config) -> ModelCounts:
    """Return what is counted on a configuration's model, from memory where it has been counted before."""
    key = counts_key(config)
    for known in (shipped().get(key), recall(key)):
        if known is not None and set(known) == set(ModelCounts.__dataclass_fields__):
            return ModelCounts(**known)
    quieten_libraries()
    from .count_model import count_model

    counted = count_model(config)
    keep(key, asdict(counted))
    return counted


def counts_key(config: Config) -> str:
    """Name all that the counts depend on: the model's sizes, the adapter, how it is kept, batches, text."""
    model, train = config.model, config.train
    prompts = read_prompts(config)
    # Fields at their defaults are left out, so that a new one changes no name.
    left_out = {"lora", "tokenizers", "schedule", "guidance"}
    sizes = model.model_dump(mode="json", exclude=left_out, exclude_defaults=True)
    for name in ("path", "transformer", "vae"):
        sizes[name] = contents(getattr(model, name), bool(model.transformer))
    sizes["text_encoders"] = [contents(file) for file in model.text_encoders]
    return key_of(
        {
            "model": sizes | {"guided": model.guidance > 1},
            "lora": [config.lora.rank, config.lora.targets],
            "memory": config.memory.model_dump(mode="json", exclude={"text_encoders", "rewards_in_turn"}),
            "batches": [train.slots, train.decode_batch, train.micro_batch],
            "text": max(len(text.encode()) for text in (*prompts.train, *prompts.heldout)),
        }
    )


def contents(given: str | None, files: bool = False) -> Any:
    """Say which sizes a file or folder has, wherever it lies; a model that is not here by its name."""
    if given is None:
        return None
    try:
        place = model_folder(given, files)
    except ConfigError:
        return given
    if place is None or place.is_file():
        return place and place.stat().st_size
    weights = sorted(place.rglob("*.safetensors"))
    texts = sorted(place.glob("*/config.json"))
    return [
        [[str(file.relative_to(place)), file.stat().st_size] for file in weights],
        [hashlib.sha256(file.read_bytes()).hexdigest() for file in texts],
    ]
