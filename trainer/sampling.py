"""Draw single pictures and judge files, for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from comfy_g2rpo import lora, rewards
from comfy_g2rpo.plan import deterministic
from comfy_g2rpo.rollout import roll_out
from comfy_g2rpo.runs import finite
from comfy_g2rpo.schedule import shifted_sigmas

from .config import Config, RewardSection, make_recipe
from .rewards import build, check_reward


class ImageError(ValueError):
    """A picture that cannot be judged, in one line."""


def device() -> torch.device:
    """Choose the fastest device of this machine."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def draw(config: Config, prompts: Sequence[str], seed: int, lora_file: Path | None) -> list[Tensor]:
    """Draw a picture [H, W, 3] per prompt without exploration; every prompt starts from the noise of `seed`."""
    from .run import load_policy

    policy, recipe = load_policy(config, device()), make_recipe(config)
    if lora_file:
        lora.check(lora_file, [name for name, _ in policy.transformer.named_modules()])
        policy.pipeline.load_lora_weights(lora.read(lora_file).state_dict())
    shape = policy.latent_shape(config.model.width, config.model.height)
    rollout = roll_out(
        policy,
        deterministic(recipe.num_steps),
        shifted_sigmas(recipe.num_steps, recipe.shift),
        policy.encode(prompts),
        [seed] * len(prompts),
        shape,
        slots=config.train.slots,
        device=policy.device,
    )
    finished = rollout.latents[:, 0].split(config.train.decode_batch)
    return [picture for part in finished for picture in policy.decode(part).cpu()]


def judge(names: Sequence[str], files: Sequence[Path], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Score pictures by rewards; the first reward orders them, best first, those it cannot judge last."""
    judges = [named(name.strip()) for name in names]
    rows = []
    for file, prompt in zip(files, prompts, strict=True):
        scores = rewards.score_all(judges, read_image(file)[None], [prompt])[:, 0].tolist()
        named = {reward.name: finite(score) for reward, score in zip(judges, scores, strict=True)}
        rows.append({"image": str(file), "prompt": prompt, "scores": named})
    first = judges[0].name
    return sorted(rows, key=lambda row: -np.inf if row["scores"][first] is None else row["scores"][first], reverse=True)


def named(name: str) -> rewards.Reward:
    """Load a built-in or installed reward by name."""
    section = RewardSection(name=name)
    check_reward(section)
    return build(section, device())


def read_image(path: Path) -> Tensor:
    """Read a picture as [H, W, 3] in [0, 1]."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} is not a picture that can be read; save it as PNG or JPEG") from error
    except OSError as error:
        raise ImageError(f"cannot read {path}: {(error.strerror or str(error)).lower()}; check the path") from error
