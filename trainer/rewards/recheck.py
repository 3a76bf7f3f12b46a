"""See that an installed reward is what it was, and that it judges as is published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from comfy_g2rpo.rewards.fetching.fetch import changed
from comfy_g2rpo.rewards.fetching.prepare import EXAMPLES, Example
from comfy_g2rpo.rewards.models.clip import ModelReward
from comfy_g2rpo.rewards.models.installed import installed, load_installed
from comfy_g2rpo.rewards.protocol import checked

PROMPT = "a photo of a red cube"


def check(root: Path, name: str, device: torch.device | str, say: Callable[[str], None]) -> bool:
    """Check files, loading and scores of an installed reward; say what is found and whether all is well."""
    differing = changed(root, name) if name in installed(root) else []
    if differing:
        say(f"files: changed since they were installed: {', '.join(differing)}")
    reward = load_installed(root, name, device=device)
    if not differing:
        say("files: as installed")
    say(
        f"weights: {sum(parameter.numel() for parameter in reward.module.parameters()) / 1e6:.1f} "
        "million, all finite"
    )
    steady = _steady(reward, say)
    examples = [example for example in EXAMPLES.get(name, ()) if picture_of(root, name, example).is_file()]
    if not examples:
        say(
            "published example scores: none are known for this reward, or their pictures are not in "
            "its folder"
        )
    return all(
        [
            not differing,
            steady,
            *(_as_published(reward, picture_of(root, name, example), example, say) for example in examples),
        ]
    )


def picture_of(root: Path, name: str, example: Example) -> Path:
    """Return where fetching leaves an example's picture."""
    return root / name / "examples" / Path(example.picture.path).name


def read_picture(path: Path) -> Tensor:
    """Read a picture: [1, H, W, 3] in [0, 1]."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255)[None]


def _steady(reward: ModelReward, say: Callable[[str], None]) -> bool:
    """Score drawn pictures together and alone."""
    noise = torch.rand(3, 96, 128, 3, generator=torch.Generator().manual_seed(0))
    noise[0], noise[1] = 0.5, noise[1].mean(-1, keepdim=True)
    together = checked(reward, noise, [PROMPT] * 3)
    alone = torch.cat([checked(reward, noise[i : i + 1], [PROMPT]) for i in range(3)])
    say(f"grey, grey noise, noise for '{PROMPT}': {', '.join(f'{score:.4f}' for score in together.tolist())}")
    steady = bool(together.isfinite().all()) and torch.allclose(together, alone, atol=1e-3, rtol=1e-3)
    if not steady:
        say(
            "scores depend on their batch: alone they are "
            f"{', '.join(f'{score:.4f}' for score in alone.tolist())}"
        )
    return steady


def _as_published(reward: ModelReward, picture: Path, example: Example, say: Callable[[str], None]) -> bool:
    """Compare one example's score with what is published."""
    score = checked(reward, read_picture(picture), [example.prompt]).item()
    near = abs(score - example.score) <= example.near
    say(
        f"published example {picture.name}: {score:.4f}, {example.whose} {example.score:.4f}: "
        f"{'well' if near else 'NOT the same'}"
    )
    return near
