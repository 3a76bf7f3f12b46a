"""Rewards of a configuration: your own by path, a judge by address, others by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from comfy_g2rpo.rewards import REWARDS, Reward, RewardError
from comfy_g2rpo.rewards.clips import DEFAULT, OfFrames
from comfy_g2rpo.rewards.likeness import KINDS

from ..config.reward_checks import VOTES, rewards_root
from . import ocr
from .own import custom
from .references import compared
from .time_limit import DEFAULT_SECONDS

if TYPE_CHECKING:
    from ..config.sections import RewardSection


def build_all(
    rewards: Sequence[RewardSection],
    heldout_rewards: Sequence[RewardSection],
    device: torch.device | str = "cpu",
    run: Path | None = None,
) -> tuple[tuple[Reward, ...], tuple[Reward, ...]]:
    """Load the rewards that are trained on; and all that judge, which are these and the held-out ones."""
    trained = {section.name: build(section, device, run) for section in rewards}
    only_held = [section for section in heldout_rewards if section.name not in trained]
    heldout = {section.name: build(section, device, run) for section in only_held}
    if comparing := [name for name, reward in heldout.items() if reward.needs_group]:
        raise RewardError(
            f"heldout_rewards names {comparing[0]!r}, which only compares the pictures of one group; "
            "name another to measure"
        )
    # A place in its group says nothing about a single held-out picture.
    measuring = [reward for reward in trained.values() if not reward.needs_group]
    return tuple(trained.values()), (*measuring, *heldout.values())


def build(section: RewardSection, device: torch.device | str = "cpu", run: Path | None = None) -> Reward:
    """Load one reward; `device` is what `auto` means, `run` keeps what belongs to a run."""
    reward = found(section, device, run)
    return reward if section.frames == DEFAULT else OfFrames(reward, section.frames)


def found(section: RewardSection, device: torch.device | str, run: Path | None) -> Reward:
    """Load what a section names."""
    if section.path:
        seconds = DEFAULT_SECONDS if section.timeout is None else section.timeout
        return custom(section.name, section.path, seconds)
    if section.url:
        from .judges import connect

        return connect(section)
    if section.name in REWARDS:
        return REWARDS[section.name]
    if section.name in KINDS:
        return compared(section)
    if section.name == ocr.NAME:
        return ocr.OcrReward()
    if section.name == VOTES:
        from .vote_reward import VoteReward

        if run is None:
            raise RewardError("votes belong to a run, and there is none here; train with them")
        return VoteReward(run)
    from comfy_g2rpo.rewards.models.installed import load_installed

    where = str(device) if section.device == "auto" else section.device
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[section.dtype]
    return load_installed(rewards_root(), section.name, device=where, dtype=dtype, batch=section.batch)
