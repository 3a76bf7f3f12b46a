"""Draw pictures or clips, for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfy_g2rpo.sampling.base_tail import draw_with_tail

from .. import families
from ..config.reading import Config, make_recipe


def device() -> torch.device:
    """Choose the fastest device of this machine."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def note_of(config: Config, prompt: str, seed: int, lora: Path | None, tail: float) -> dict[str, Any]:
    """Return what a drawn picture's file says about how it was made."""
    return {
        "prompt": prompt,
        "negative": config.model.negative_prompt,
        "seed": seed,
        # Not the whole path: pictures are shared.
        "lora": "/".join(lora.parts[-4:]) if lora else None,
        "steps": make_recipe(config).num_steps,
        "guidance": config.model.guidance,
        "tail": tail,
        "model": Path(config.model.transformer or config.model.path).name,
    }


def draw(
    config: Config, prompts: Sequence[str], seed: int, lora_file: Path | None, tail: float = 0.0
) -> list[Tensor]:
    """Draw a picture [H, W, 3] or a clip [F, H, W, 3] per prompt without exploration; every prompt starts
    from the noise of `seed`.

    The last `tail` share of the steps runs without the LoRA.
    """
    from ..run import load_policy

    policy, recipe = load_policy(config, device(), prompts), make_recipe(config)
    if lora_file:
        policy.load_lora(lora_file)
    shape = policy.latent_shape(config.model.width, config.model.height)
    sigmas = families.sigmas(policy, config.model.schedule, recipe, shape)
    conds, seeds = policy.encode(prompts), [seed] * len(prompts)
    latents = draw_with_tail(
        policy, sigmas, conds, seeds, shape, tail, slots=config.train.slots, device=policy.device
    )
    return [
        picture for part in latents.split(config.train.decode_batch) for picture in policy.decode(part).cpu()
    ]
