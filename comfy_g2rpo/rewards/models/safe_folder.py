"""A reward's folder, read without trust: bounded JSON, safetensors alone, nothing outside of it."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...files.safe import FileError, read_header
from ..protocol import RewardError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
JSON_BYTES = 2**20
TOKENIZER_BYTES = 32 * 2**20
WEIGHTS = "model.safetensors"
SHOWN = 3
# Between transformers' versions the towers of CLIP and SigLIP gained and lost one level of this name.
TWICE = re.compile(r"^(vision_model|text_model)\.\1\.")
LIMITS = {
    "hidden_size": 8192,
    "intermediate_size": 65536,
    "num_hidden_layers": 128,
    "num_attention_heads": 128,
    "image_size": 2048,
    "patch_size": 256,
    "projection_dim": 8192,
    "vocab_size": 1_000_000,
    "max_position_embeddings": 4096,
    "encoder_hidden_size": 8192,
}
ACTIVATIONS = ("gelu", "quick_gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")


@dataclass(frozen=True)
class Folder:
    """A reward's folder."""

    path: Path

    @classmethod
    def of(cls, root: Path, name: str) -> Folder:
        """Find a reward's folder under a root, and see that it truly lies there, links followed."""
        base = os.path.realpath(root)
        place = os.path.realpath(os.path.join(base, name))
        if not NAME.fullmatch(name) or os.path.dirname(place) != base:
            raise RewardError(
                f"reward {name[:80]!a} is no name of a folder in {base}; use letters, digits, dots, "
                "dashes and underscores"
            )
        return cls(Path(place))

    def file(self, name: str, most: float = math.inf) -> Path:
        """Return a regular file of the folder, of at most `most` bytes; links out of it are refused."""
        place = os.path.realpath(self.path / name)
        if os.path.dirname(place) != str(self.path):
            raise RewardError(
                f"{self.path / name} is a link that leads out of its folder; put the file itself there"
            )
        try:
            status = os.stat(place)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise RewardError(f"cannot read {self.path / name}: {reason}; fetch the reward again") from error
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise RewardError(
                f"{self.path / name} is refused: it must be a file of at most {most:.0f} bytes; fetch "
                "the reward again"
            )
        return Path(place)

    def json(self, name: str) -> dict[str, Any]:
        """Read a table from a JSON file."""
        try:
            content = json.loads(self.file(name, JSON_BYTES).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            if isinstance(error, RewardError):
                raise
            raise RewardError(
                f"{self.path / name} is damaged: it is not JSON; fetch the reward again"
            ) from error
        if not isinstance(content, dict):
            raise RewardError(f"{self.path / name} is damaged: it holds no table; fetch the reward again")
        return content

    def tokenizer(self, *names: str) -> str:
        """Check a tokenizer's files and the folder's texts, and return it for transformers' reader."""
        for name in {
            *names,
            *(entry.name for entry in self.path.iterdir() if entry.suffix in (".json", ".txt", ".jinja")),
        }:
            self.file(name, TOKENIZER_BYTES)
        return str(self.path)


def table(config: Mapping[str, Any], section: str, place: Path) -> dict[str, Any]:
    """Take from a configuration what shapes a model, within bounds, and ignore the rest."""
    values = config.get(section, {})
    if not isinstance(values, dict):
        raise RewardError(f"{place}: {section} must be a table; fetch the reward again")
    found: dict[str, Any] = {}
    for name, most in LIMITS.items():
        if name in values:
            if type(values[name]) is not int or not 1 <= values[name] <= most:
                raise RewardError(
                    f"{place}: {section}.{name} is {str(values[name])[:40]!a}; it must be a whole "
                    f"number from 1 to {most}"
                )
            found[name] = values[name]
    if "hidden_act" in values:
        if values["hidden_act"] not in ACTIVATIONS:
            raise RewardError(
                f"{place}: {section}.hidden_act is {str(values['hidden_act'])[:40]!a}; known are "
                f"{', '.join(ACTIVATIONS)}"
            )
        found["hidden_act"] = values["hidden_act"]
    if "layer_norm_eps" in values:
        if type(values["layer_norm_eps"]) is not float or not 0 < values["layer_norm_eps"] < 1:
            raise RewardError(
                f"{place}: {section}.layer_norm_eps must be a number between 0 and 1; fetch the reward again"
            )
        found["layer_norm_eps"] = values["layer_norm_eps"]
    return found


def fill(make: Callable[[], nn.Module], path: Path) -> nn.Module:
    """Make a module and fill it with a file's tensors in float32; what is missing, surplus, misshapen or not
    finite is an error.

    The module is made without memory, so that a configuration costs nothing before the file is seen to fit
    it.
    """
    try:
        with torch.device("meta"):
            module = make()
    # transformers' versions refuse a configuration by errors of their own kinds.
    except Exception as error:
        raise RewardError(
            f"{path.parent / 'config.json'} describes no model: {line(error)}; fetch the reward again"
        ) from error
    module.eval().requires_grad_(False)
    wanted = {TWICE.sub(r"\1.", key): key for key in module.state_dict()}
    shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
    header = read_header(path)
    _compare(path, {wanted[key]: key for key in wanted}, shapes, header)
    try:
        with safe_open(path, framework="pt") as file:
            filled = {own: _sound(path, key, file.get_tensor(key)) for key, own in wanted.items()}
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path} is damaged: {error}; fetch the reward again") from error
    module.load_state_dict(filled, assign=True)
    for parent in module.modules():
        for name, buffer in parent.named_buffers(recurse=False):
            if buffer.is_meta and name == "position_ids":
                parent.register_buffer(
                    name, torch.arange(buffer.shape[-1]).expand(buffer.shape), persistent=False
                )
    return module.requires_grad_(False)


def read_tokenizer(folder: Folder, reader: Any, names: Sequence[str]) -> Any:
    """Read a tokenizer by transformers' own class, from files of the folder alone."""
    place = folder.tokenizer(*names)
    try:
        return reader.from_pretrained(place, local_files_only=True)
    # The tokenizers library raises a bare Exception for what it cannot read.
    except Exception as error:
        raise RewardError(
            f"{place}: the tokenizer's files ({', '.join(names)}) are damaged: {line(error)}; fetch it again"
        ) from error


def check_tokenizer(tokenizer: Any, config: Any, context: int, place: Path) -> None:
    """Refuse a tokenizer that counts further than the model's tables, which would end a GPU process."""
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= config.vocab_size or config.max_position_embeddings < context:
        limits = f"{config.vocab_size} words at {config.max_position_embeddings} places"
        raise RewardError(
            f"{place}: the tokenizer has words up to {highest} at {context} places, the model only "
            f"{limits}; fetch it again"
        )


def _compare(
    path: Path, wanted: Mapping[str, str], shapes: Mapping[str, torch.Size], header: Mapping[str, Any]
) -> None:
    """Refuse a file whose header does not name just the tensors of the model, with their shapes."""
    keys = [key for key in header if key != "__metadata__" and not key.endswith("position_ids")]
    missing = [key for key in wanted.values() if key not in header]
    surplus = sorted(set(keys) - set(wanted.values()))
    if missing or surplus:
        said = [
            f"{some(names)} {word}" for names, word in ((missing, "missing"), (surplus, "too many")) if names
        ]
        raise RewardError(
            f"{path} is of another architecture than its config.json: {'; '.join(said)}; fetch the "
            "reward again"
        )
    for own, key in wanted.items():
        entry = header[key]
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if shape != list(shapes[own]):
            raise RewardError(
                f"{path} is of another architecture than its config.json: {key} is {shape}, not "
                f"{list(shapes[own])}"
            )


def _sound(path: Path, key: str, tensor: Tensor) -> Tensor:
    """Return a tensor of finite numbers as float32, in memory of its own."""
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise RewardError(
            f"{path}: {key} holds NaN, infinite or non-float values; the file is damaged, fetch the "
            "reward again"
        )
    return tensor.to(torch.float32, copy=True)


def line(error: Exception) -> str:
    """Put an error's words into one line of bounded length."""
    return " ".join(str(error).split())[:200]


def some(names: list[str]) -> str:
    """Name the first few of many."""
    return ", ".join(name[:120] for name in names[:SHOWN]) + (
        f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    )
