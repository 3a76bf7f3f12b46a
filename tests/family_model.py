"""What the tests of the model families share: LoRAs that have moved, prompts on disk, short runs, and the
checks that every family must pass.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from program import call
from torch import Tensor, nn

from comfy_g2rpo.rollout import seeded_noise
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer.config.reading import from_dict
from g2rpo_trainer.model import prompt_cache
from g2rpo_trainer.model.inference import draw
from g2rpo_trainer.reports.progress import Silent
from g2rpo_trainer.run import train

SHORT, LONG = "a cat", "a red circle left of two blue squares, in the rain"
SIGMA = (1.0, 0.6, 0.123)
Batch = tuple[Tensor, Tensor, list[Any]]


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    """Say whether values are equal but for rounding."""
    return torch.allclose(one, other, rtol=0, atol=tolerance)


def moved(policy: Any, rank: int = 4, alpha: float = 8, feed_forward: bool = True, size: float = 0.02) -> Any:
    """Give a policy a LoRA that has moved away from zero."""
    policy.add_lora(rank, alpha, 0, feed_forward)
    with torch.no_grad():
        for name, (_, up) in policy.pairs().items():
            up.copy_(size * seeded_noise(up.shape, "up", name))
    return policy


def given_to(module: nn.Module) -> list[Tensor]:
    """Collect what a module is given from now on."""
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    return seen


def keep_prompts(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep prompts on disk although the encoders are small."""
    monkeypatch.setenv("G2RPO_PROMPTS", str(place / "prompts"))
    monkeypatch.setattr(prompt_cache, "SMALL", 0)
    return place / "prompts"


def same_features(first: list[Any], again: list[Any]) -> bool:
    """Say whether texts are encoded alike, bit for bit."""
    return all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))


def check_rows(policy: Any, batch: Batch, expected: Callable[[int], Tensor], alone: bool = True) -> None:
    """See that every row of a batch has the velocity that it has by itself."""
    x, sigma, cond = batch
    with torch.no_grad():
        together = policy.velocity(x, sigma, cond)
        for row in range(len(x)):
            wanted = expected(row)
            assert close(together[row], wanted)
            assert not alone or close(policy.velocity(x[[row]], sigma[[row]], [cond[row]])[0], wanted)


def check_reference(policy: Any, base: Any, batch: Batch) -> None:
    """See that a policy's reference is the model without adapter."""
    with torch.no_grad():
        with policy.reference():
            assert close(policy.velocity(*batch), base.velocity(*batch), 1e-6)
        assert not torch.allclose(policy.velocity(*batch), base.velocity(*batch), atol=1e-3)


def check_dropped(policy: Any, fresh: Any, batch: Batch) -> None:
    """See that guidance needs no text encoder once it is dropped."""
    expected = policy.velocity(*batch)
    fresh.drop_text_encoders()
    assert fresh.pipeline.text_encoder is None and torch.equal(fresh.velocity(*batch), expected)


def check_effect(
    changed: Tensor, theirs: Callable[[int], Tensor], untrained: Tensor, least: float = 0.0
) -> None:
    """See that diffusers makes of a LoRA what we make of it, row by row, and that it does something."""
    with torch.no_grad():
        for row in range(len(changed)):
            assert close(theirs(row), changed[row])
    assert not torch.allclose(changed, untrained, rtol=1e-5 if least else 0, atol=least)


def one_step(place: Path, model: dict[str, Any], **changes: Any) -> tuple[dict[str, Any], Path]:
    """Train one whole step with the model's own schedule and all targets, and look at a held-out prompt.

    Return the configuration and the run.
    """
    (place / "train.txt").write_text(f"{SHORT}\n{LONG}\n")
    (place / "heldout.txt").write_text("a dog\n")
    tree = {
        "model": {"schedule": "pipeline"} | model,
        "lora": {"rank": 4, "alpha": 8, "targets": "attention+feed_forward"},
        "method": {"name": "g2rpo", "num_steps": 4, "group_size": 3, "learning_rate": 1e-2},
        "rewards": [{"name": "colourfulness"}],
        "prompts": {"train": str(place / "train.txt"), "heldout": str(place / "heldout.txt")},
        "train": {"steps": 1, "prompts_per_step": 2, "eval_noises": 1, "checkpoint_every": 1},
    } | changes
    train(from_dict(tree), place / "run", progress=Silent())
    return tree, place / "run"


def train_recipe(recipe: str, folder: Path, out: Path, *settings: str) -> int:
    """Train by a bundled recipe on a tiny model, one step unless the settings say otherwise."""
    small = ("model.dtype=fp32", "method.num_steps=4", "method.group_size=3", "train.prompts_per_step=1")
    short = ("train.steps=1", "train.eval_every=0", "train.eval_prompts=1", "prompts.heldout_share=0.1")
    quick = ("lora.rank=4", "lora.alpha=8", "method.learning_rate=0.01", "train.slots=16")
    rules = ("rewards.0.name=colourfulness", "heldout_rewards=[sharpness]")  # need no weights
    changes = (f"model.path={folder}", *small, *short, *quick, *rules, *settings)
    return call(
        "train", recipe, "--out", out, "--quiet", *(word for each in changes for word in ("--set", each))
    )


def learnt(run: Path) -> bool:
    """Say whether a run had something to learn from."""
    return any(row.get("grad_norm", 0) > 0 for row in RunFolder.open(run).metrics())


def lora_of(run: Path) -> Path:
    """Return a run's newest LoRA file."""
    return RunFolder.open(run).latest() / "lora.safetensors"


def check_drawing(tree: dict[str, Any], run: Path, height: int, width: int) -> None:
    """See that pictures can be drawn with the LoRA of a run."""
    (with_lora,), (without,) = (draw(from_dict(tree), [LONG], 1, given) for given in (lora_of(run), None))
    assert with_lora.shape == (height, width, 3) and not torch.equal(with_lora, without)


def modules_in(keys: Any) -> set[str]:
    """Name the modules of a LoRA file with native names."""
    assert all(key.startswith("diffusion_model.") for key in keys)
    return {
        key.removeprefix("diffusion_model.").rsplit(".lora_", 1)[0].removesuffix(".alpha") for key in keys
    }
