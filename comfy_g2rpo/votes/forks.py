"""The forks of a ballot: the states at which its pictures part, kept so that votes can teach again.

    ballots/<name>/forks.safetensors     F forks, M branches of them, E links of a picture to its branches
        x, velocity [F, …]               the state, and the velocity that drew the branches
        sigma, v_coef, std [F], step [F] noise level, c and s of the stochastic step, schedule index
        fork, noise [M]                  the fork of every branch, and the number of its noise
        origin [E, 2]                    picture (its place in ballot.json) and branch
        metadata                         schema, prompt, base (what tells the model from others), seed

A branch's noise is drawn again from the seed, so that a fork costs two latents, however many branches it has.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.safe import FileError, RunError, read_header, read_tensors, sound, write_tensors
from ..plan import ROOT, Plan
from ..rollout import Rollout, seeded_noise
from .ballots import Ballot, read_ballot

SCHEMA = "g2rpo-forks/1"
FILE = "forks.safetensors"
MAX_FORKS, MAX_BRANCHES, MAX_LINKS, MAX_BYTES = 4096, 2**16, 2**18, 2**31
MAX_SEED = 2**64
LATENTS, NUMBERS, COUNTS = ("x", "velocity"), ("sigma", "v_coef", "std"), ("step", "fork", "noise", "origin")
BYTES = {"F32": 4, "I64": 8}


@dataclass(frozen=True)
class Forks:
    """What a ballot keeps of the rollout that drew its pictures."""

    x: Tensor
    velocity: Tensor
    sigma: Tensor
    v_coef: Tensor
    std: Tensor
    step: Tensor
    fork: Tensor
    noise: Tensor
    origin: Tensor
    prompt: str
    base: str
    seed: int

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def branches(self) -> tuple[dict[int, int], ...]:
        """Name every fork's branches by their places in it."""
        found: list[dict[int, int]] = [{} for _ in range(len(self))]
        for branch, fork in enumerate(self.fork.tolist()):
            found[fork][branch] = len(found[fork])
        return tuple(found)

    @cached_property
    def ways(self) -> dict[int, dict[int, int]]:
        """Name by picture the branch that it took at every fork on its way."""
        found: dict[int, dict[int, int]] = {}
        for picture, branch in self.origin.tolist():
            fork = int(self.fork[branch])
            found.setdefault(picture, {})[fork] = self.branches[fork][branch]
        return found

    def parted(self, one: int, other: int) -> tuple[int, int, int] | None:
        """Return the fork at which two pictures part, and their branches there; None where there is none."""
        mine, theirs = self.ways.get(one, {}), self.ways.get(other, {})
        places = [fork for fork in mine if fork in theirs and mine[fork] != theirs[fork]]
        return (places[0], mine[places[0]], theirs[places[0]]) if places else None

    def draws(self, fork: int) -> Tensor:
        """Draw the noises [G, …] of a fork's branches again."""
        numbers = [int(self.noise[branch]) for branch in self.branches[fork]]
        shape = self.x.shape[1:]
        drawn = [seeded_noise(shape, "rollout", self.seed, abs(each)) for each in numbers]
        return torch.stack([one if each > 0 else -one for one, each in zip(drawn, numbers, strict=True)])


def forks_of(rollout: Rollout, prompt: int, images: Mapping[int, int], text: str, base: str) -> Forks | None:
    """Return the forks of pictures, given by their places as {picture: image of the plan}; None where no two
    of them part at a fork, as with whole images of their own.
    """
    plan, c = rollout.plan, rollout.coefficients
    ways = {picture: trained_edges(plan, plan.images[image]) for picture, image in images.items()}
    taken: dict[int, list[int]] = {}
    for state in dict.fromkeys(state for way in ways.values() for state in way):
        taken.setdefault(plan.states[state].parent, []).append(state)
    shared = sorted(fork for fork, children in taken.items() if len(children) > 1)
    if not shared:
        return None
    branches = [state for fork in shared for state in taken[fork]]
    number = {state: branch for branch, state in enumerate(branches)}
    rows, first = [plan.forks.index(fork) for fork in shared], [taken[fork][0] for fork in shared]
    links = [[p, number[state]] for p, way in ways.items() for state in way if state in number]
    return Forks(
        x=rollout.x[prompt, rows].detach().float().cpu(),
        velocity=rollout.velocity[prompt, rows].detach().float().cpu(),
        sigma=c.sigma[shared],
        v_coef=c.v_coef[first],
        std=c.std[first],
        step=torch.tensor([plan.states[fork].index for fork in shared]),
        fork=torch.tensor([shared.index(plan.states[state].parent) for state in branches]),
        noise=torch.tensor([plan.states[state].noise for state in branches]),
        origin=torch.tensor(links),
        prompt=text,
        base=base,
        seed=rollout.seeds[prompt],
    )


def trained_edges(plan: Plan, state: int) -> list[int]:
    """List the states on the way to one that a trained stochastic edge leads to."""
    found = []
    while state != ROOT:
        if plan.states[state].trained and plan.states[state].parent != ROOT:
            found.append(state)
        state = plan.states[state].parent
    return found


def keep_forks(
    place: Path, keys: Sequence[str], rollout: Rollout, prompt: int, images: Sequence[int], base: str
) -> None:
    """Write the forks of the ballot in a folder, unless they are there, or its pictures are others.

    `keys` are those of some images of the rollout's prompt, given by their places in the plan.
    """
    ballot = read_ballot(place)
    known = dict(zip(reversed(keys), reversed(images), strict=True))
    if (place / FILE).exists() or not known.keys() >= ballot.files.keys():
        return
    shown = {picture: known[key] for picture, key in enumerate(ballot.files)}
    if found := forks_of(rollout, prompt, shown, ballot.prompt, base):
        tensors = {name: getattr(found, name) for name in (*LATENTS, *NUMBERS, *COUNTS)}
        notes = {"schema": SCHEMA, "prompt": found.prompt, "base": base, "seed": str(found.seed)}
        write_tensors(place / FILE, tensors, notes)


def read_forks(ballot: Ballot) -> Forks | None:
    """Read and check what a ballot keeps of its forks; None for one that keeps none.

    Raises RunError where the file is not exactly that.
    """
    place = ballot.path / FILE
    if not os.path.lexists(place):
        return None
    try:
        header = read_header(place)
        if wrong := header_complaint(header):
            raise FileError(wrong)
        tensors, notes = read_tensors(place)
        made = Forks(**tensors, prompt=notes["prompt"], base=notes["base"], seed=int(notes["seed"]))
        if wrong := complaint(made, ballot):
            raise FileError(wrong)
    except (FileError, ValueError) as error:
        words = str(error).replace(f"{place} ", "").partition(";")[0]
        remedy = "remove it, and its ballot is as one that keeps no forks"
        raise RunError(f"{place} is damaged ({words}); {remedy}") from error
    return made


def header_complaint(header: Mapping[str, Any]) -> str:
    """Return what is wrong with a file before its tensors are read; nothing where all is well."""
    names, notes = set(header) - {"__metadata__"}, header["__metadata__"]
    if names != {*LATENTS, *NUMBERS, *COUNTS}:
        return "it holds other tensors than forks do"
    if not isinstance(notes, dict) or notes.get("schema") != SCHEMA:
        return f"it names no {SCHEMA}"
    if set(notes) - {"format"} != {
        "schema",
        *(field.name for field in fields(Forks) if field.type != "Tensor"),
    }:
        return "its metadata are others"
    total = 0
    for name in names:
        rule = header[name] if isinstance(header[name], dict) else {}
        kind, shape = rule.get("dtype"), rule.get("shape")
        if kind != ("I64" if name in COUNTS else "F32"):
            return f"{name} is {str(kind)[:20]}"
        if (
            not isinstance(shape, list)
            or not 0 < len(shape) <= 6
            or not all(type(n) is int and n > 0 for n in shape)
        ):
            return f"{name} has no shape"
        total += BYTES[kind] * math.prod(shape)
    return f"it claims {total} bytes" if total > MAX_BYTES else ""


def complaint(made: Forks, ballot: Ballot) -> str:
    """Return what is wrong with the forks of a ballot; nothing where all is well."""
    count, branches = len(made.x), len(made.fork)
    shapes = {name: (count,) for name in (*NUMBERS, "step")} | {"noise": (branches,), "fork": (branches,)}
    shapes |= {"velocity": tuple(made.x.shape), "origin": (len(made.origin), 2)}
    if made.x.ndim < 3 or any(tuple(getattr(made, name).shape) != shape for name, shape in shapes.items()):
        return "its tensors do not fit one another"
    if count > MAX_FORKS or branches > MAX_BRANCHES or len(made.origin) > MAX_LINKS:
        return f"it has more than {MAX_FORKS} forks, {MAX_BRANCHES} branches or {MAX_LINKS} links"
    if not all(sound(getattr(made, name)) for name in (*LATENTS, *NUMBERS)):
        return "it holds NaN or infinite values"
    if not ((made.sigma > 0) & (made.sigma <= 1 + 1e-4) & (made.std > 0)).all() or (made.step < 0).any():
        return "its steps are no stochastic steps"
    inside = [(made.fork, count), (made.origin[:, 0], len(ballot.files)), (made.origin[:, 1], branches)]
    if any((at < 0).any() or (at >= limit).any() for at, limit in inside) or (made.noise == 0).any():
        return "it names branches or pictures that are not there"
    if made.prompt != ballot.prompt or not 0 <= made.seed < MAX_SEED:
        return "its prompt or seed is not the ballot's"
    return ""
