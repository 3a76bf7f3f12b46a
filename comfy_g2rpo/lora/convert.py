"""A LoRA under other names, of another rank, or out of a fine-tuned weight. Pairs here have their scale in
the up matrix.

Fusing q, k, v: the downs are stacked, the ups stand along a diagonal, and the rank is the sum; parts that
share one down keep its rank. Splitting: every part takes its rows of up and shares down; ranks that
contribute nothing to a part leave it. Both are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from . import LoraError, Pairs
from .key_names import FAMILIES, NAMINGS, Family, Link, Size, candidates

Pair = tuple[Tensor, Tensor]


def shapes(pairs: Pairs) -> dict[str, Size]:
    """Return the (rows, columns) of every module that pairs change."""
    return {module: (len(up), math.prod(down.shape[1:])) for module, (down, up) in pairs.items()}


def family_of(sizes: Mapping[str, Size | None], path: object, named: str | None = None) -> Family:
    """Find the family of the layers that a LoRA changes: (rows, columns), None where nobody knows.

    `named` is what the user or the file says.
    """
    if named is not None:
        if named not in FAMILIES:
            raise LoraError(f"family is {named!r}; choose one of: {', '.join(FAMILIES)}")
        family = FAMILIES[named]
        if strange := next((module for module in sizes if family.find(module) is None), None):
            raise LoraError(f"{path}: {strange} is no module of {family.title}; choose another --family")
        return family
    fitting = candidates(sizes)
    if not fitting:
        lone = {module: size for module, size in sizes.items() if not candidates({module: size})}
        strange = next(iter(lone or sizes))
        raise LoraError(
            f"{path}: {strange} is no module of a family that is known ({', '.join(FAMILIES)}) or does "
            "not go with the others"
        )
    if len(fitting) > 1:
        raise LoraError(
            f"{path} fits {' and '.join(family.name for family in fitting)}; say which with --family"
        )
    return fitting[0]


def renamed(family: Family, pairs: Pairs, naming: str) -> dict[str, Pair]:
    """Rename pairs of either naming to `native` or `diffusers`; every change of weight stays what it was."""
    if naming not in NAMINGS:
        raise LoraError(f"naming is {naming!r}; choose one of: {', '.join(NAMINGS)}")
    made: dict[str, Pair] = {}
    parts: dict[Link, dict[int, Pair]] = {}
    for module, pair in pairs.items():
        link = family.find(module)
        if link is None:
            raise LoraError(f"{module} is no module of {family.title}; choose a LoRA that was made for it")
        native = module == link.native
        if native and naming == "diffusers":
            _add(made, split(link, swapped(link, pair)))
        elif native or naming == "diffusers":
            _add(made, {module: pair})
        else:
            parts.setdefault(link, {})[link.diffusers.index(module)] = pair
    for link, found in parts.items():
        _add(made, {link.native: swapped(link, fused(link, found))})
    return made


def _add(made: dict[str, Pair], more: Mapping[str, Pair]) -> None:
    """Add pairs under names that are still free."""
    if taken := made.keys() & more.keys():
        raise LoraError(f"{min(taken)} comes twice, by its native and its diffusers name; remove one of them")
    made.update(more)


def swapped(link: Link, pair: Pair) -> Pair:
    """Let shift and scale change places where the link says so and the layer has but these two."""
    down, up = pair
    if not link.swaps or len(up) != 2 * math.prod(down.shape[1:]):
        return pair
    return down, torch.cat(up.chunk(2)[::-1])


def fused(link: Link, parts: Mapping[int, Pair]) -> Pair:
    """Join the pairs of a native module's parts, by place; a part that is missing changes nothing."""
    if len(link.diffusers) == 1:
        return parts[0]
    units = {len(up) / link.shares[place] for place, (_, up) in parts.items()}
    columns = {down.shape[1:] for down, _ in parts.values()}
    if len(units) > 1 or len(columns) > 1:
        raise LoraError(
            f"{link.native}: its parts {', '.join(link.diffusers)} have sizes that do not go together"
        )
    unit, first = units.pop(), next(iter(parts.values()))
    rows = [round(unit * share) for share in link.shares]
    shared = all(torch.equal(first[0], down) for down, _ in parts.values())
    ranks = {place: len(down) for place, (down, _) in parts.items()}
    width = len(first[0]) if shared else sum(ranks.values())
    up = first[1].new_zeros(
        sum(rows), width, *first[1].shape[2:], dtype=_widest(up for _, up in parts.values())
    )
    column = 0
    for place in sorted(parts):
        row = sum(rows[:place])
        up[row : row + rows[place], column : column + ranks[place]] = parts[place][1]
        column += 0 if shared else ranks[place]
    return first[0] if shared else torch.cat([parts[place][0] for place in sorted(parts)]), up


def split(link: Link, pair: Pair) -> dict[str, Pair]:
    """Cut a native module's pair into those of its parts; a part that nothing changes is left out."""
    down, up = pair
    if len(link.diffusers) == 1:
        return {link.diffusers[0]: pair}
    if len(up) % sum(link.shares):
        raise LoraError(
            f"{link.native} has {len(up)} rows, which cannot be cut into {', '.join(link.diffusers)}"
        )
    unit = len(up) // sum(link.shares)
    rows = up.split([unit * share for share in link.shares])
    if not up.any():
        return {name: (down, part) for name, part in zip(link.diffusers, rows, strict=True)}
    made = {}
    for name, part in zip(link.diffusers, rows, strict=True):
        used = part.flatten(2).any(-1).any(0) if part.ndim > 2 else part.any(0)
        if used.any():
            made[name] = (down[used].contiguous(), part[:, used].contiguous())
    return made


def _widest(tensors: object) -> torch.dtype:
    """Return a dtype that holds all of them."""
    dtype = None
    for tensor in tensors:
        dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def scaled(pairs: Pairs, alphas: Mapping[str, float]) -> dict[str, Pair]:
    """Multiply every scale alpha/rank into up, in float32 where a 16-bit product would be rounded."""
    made = {}
    for module, (down, up) in pairs.items():
        scale = alphas[module] / len(down)
        exact = scale == 0 or math.frexp(abs(scale))[0] == 0.5
        wide = up if exact or up.dtype in (torch.float32, torch.float64) else up.float()
        made[module] = (down, wide * scale)
    return made


def resized(pairs: Pairs, rank: int) -> tuple[dict[str, Pair], float]:
    """Cut pairs to at most a rank by SVD; return the relative error of all changes (Frobenius norm)."""
    made, lost, whole = {}, 0.0, 0.0
    for module, (down, up) in pairs.items():
        q_up, r_up = torch.linalg.qr(up.flatten(1).double())
        q_down, r_down = torch.linalg.qr(down.flatten(1).double().T)
        left, values, right = torch.linalg.svd(r_up @ r_down.T)
        whole += float(values.square().sum())
        if len(down) <= rank:
            made[module] = (down, up)
            continue
        lost += float(values[rank:].square().sum())
        root = values[:rank].sqrt()
        new_up, new_down = q_up @ left[:, :rank] * root, root[:, None] * (right[:rank] @ q_down.T)
        made[module] = (
            new_down.to(down.dtype).view(-1, *down.shape[1:]),
            new_up.to(up.dtype).view(len(up), -1, *up.shape[2:]),
        )
    return made, math.sqrt(lost / whole) if whole else 0.0


EXACT = 1024  # below this side a full SVD takes less than a second


def extracted(change: Tensor, rank: int) -> tuple[Pair, float, float]:
    """Approximate a change [out, in …] by a pair; return it, its squared error and the change's norm²."""
    flat = change.flatten(1).float()
    rank = min(rank, *flat.shape)
    if min(flat.shape) <= EXACT:
        left, values, right = torch.linalg.svd(flat, full_matrices=False)
    else:
        # Seeded: the same two models give the same file.
        with torch.random.fork_rng(devices=[flat.device] if flat.is_cuda else []):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(flat, min(rank + 16, *flat.shape), niter=4)
            right = right.T
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    missed = float((flat - up @ down).double().square().sum())
    pair = (
        down.contiguous().view(-1, *change.shape[1:]),
        up.contiguous().view(len(up), -1, *[1] * (change.ndim - 2)),
    )
    return pair, missed, float(flat.double().square().sum())
