"""Old forks in a checkpoint: one safetensors file, with the prompts' texts in its metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..files.safe import RunError, read_tensors, write_tensors
from ..prompts import identity
from .old_forks import Fork

NAME = "replay.safetensors"
NUMBERS = ("sigma", "v_coef", "std", "weight", "dt", "pull")
COUNTS = ("step", "made", "seed")
KINDS = {
    "x": torch.float32,
    "velocity": torch.float32,
    "members": torch.float64,
    "numbers": torch.float64,
    "counts": torch.int64,
    "shape": torch.int64,
    "prompt": torch.int64,
}


def write_forks(folder: Path, forks: Sequence[Fork]) -> None:
    """Write forks into a checkpoint's folder."""
    texts = {identity(fork.prompt): None for fork in forks}
    place = {text: i for i, text in enumerate(texts)}
    members = [fork.members for fork in forks]
    made = {
        "x": torch.cat([fork.x.flatten() for fork in forks]),
        "velocity": torch.cat([fork.velocity.flatten() for fork in forks]),
        "members": torch.cat(members, 1),
        "numbers": torch.tensor([[getattr(f, name) for name in NUMBERS] for f in forks], dtype=torch.float64),
        "counts": torch.tensor([[getattr(f, name) for name in COUNTS] for f in forks]),
        "shape": torch.tensor(
            [[each.shape[1], *fork.x.shape] for each, fork in zip(members, forks, strict=True)]
        ),
        "prompt": torch.tensor([place[identity(fork.prompt)] for fork in forks]),
    }
    write_tensors(folder / NAME, made, {"prompts": json.dumps(list(texts), ensure_ascii=False)})


def read_forks(folder: Path, prompts: Iterable[str]) -> list[Fork]:
    """Read the forks of a checkpoint, those of other prompts than the given ones left out; none without a
    file.

    RunError where they are not what `write_forks` writes.
    """
    path = folder / NAME
    if not path.is_file():
        return []
    tensors, notes = read_tensors(path)
    known = {identity(prompt): prompt for prompt in prompts}
    try:
        texts = [tuple(text) for text in json.loads(notes["prompts"])]
        return parsed(tensors, [known.get(text) for text in texts])
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise RunError(f"{path} is damaged: it holds no old forks; remove this checkpoint") from error


def parsed(tensors: dict[str, Tensor], prompts: Sequence[str | None]) -> list[Fork]:
    """Return forks from their tensors and the prompts that their texts stand for; ValueError where they do
    not fit.
    """
    if tensors.keys() != KINDS.keys() or any(tensors[name].dtype != kind for name, kind in KINDS.items()):
        raise ValueError
    shapes = [tuple(shape) for shape in tensors["shape"].tolist()]
    if any(min(shape) < 1 for shape in shapes):
        raise ValueError
    sizes, members = [math.prod(shape[1:]) for shape in shapes], [shape[0] for shape in shapes]
    latents = zip(tensors["x"].split(sizes), tensors["velocity"].split(sizes), shapes, strict=True)
    rows = zip(latents, tensors["members"].split(members, 1), tensors["numbers"].tolist(), strict=True)
    places = zip(tensors["counts"].tolist(), tensors["prompt"].tolist(), strict=True)
    found = []
    for ((x, velocity, shape), table, numbers), (counts, place) in zip(rows, places, strict=True):
        if (
            not (x.isfinite().all() and velocity.isfinite().all() and all(map(math.isfinite, numbers)))
            or place < 0
        ):
            raise ValueError
        if (prompt := prompts[place]) is not None:
            given = dict(zip((*NUMBERS, *COUNTS), (*numbers, *counts), strict=True))
            x, velocity = (each.reshape(shape[1:]).clone() for each in (x, velocity))
            found.append(Fork(x, velocity, table.clone(), prompt=prompt, **given))
    return found
