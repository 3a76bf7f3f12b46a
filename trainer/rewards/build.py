"""Make the rewards of a configuration: your own by path, a judge by address, a built-in or an installed
one by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from comfy_g2rpo.rewards import REWARDS, Reward, RewardError
from comfy_g2rpo.rewards.clips import DEFAULT, OfFrames
from comfy_g2rpo.rewards.likeness import KINDS
from comfy_g2rpo.rewards.protocol import needs_group

from .references import compared

if TYPE_CHECKING:
    from ..config.reading import Config
    from ..config.sections import RewardSection
from ..config.reward_checks import VOTES, rewards_root
from .own import custom


def build_all(
    config: Config, device: torch.device | str = "cpu", run: Path | None = None
) -> tuple[tuple[Reward, ...], tuple[Reward, ...]]:
    """Load a configuration's rewards: those that are trained on.

    And all that judge, which are these and the held-out ones.
    """
    trained = {section.name: build(section, device, run) for section in config.rewards}
    heldout = {
        section.name: build(section, device, run)
        for section in config.heldout_rewards
        if section.name not in trained
    }
    if comparing := [name for name, reward in heldout.items() if needs_group(reward)]:
        raise RewardError(
            f"heldout_rewards names {comparing[0]!r}, which only compares the pictures of one group; "
            "name another to measure"
        )
    # A place in its group says nothing about a single held-out picture.
    measuring = [reward for reward in trained.values() if not needs_group(reward)]
    return tuple(trained.values()), (*measuring, *heldout.values())


def build(section: RewardSection, device: torch.device | str = "cpu", run: Path | None = None) -> Reward:
    """Load one reward.

    `device` is what `auto` means, `run` the run folder for rewards that keep something there.
    """
    reward = found(section, device, run)
    return reward if section.frames == DEFAULT else OfFrames(reward, section.frames)


def found(section: RewardSection, device: torch.device | str, run: Path | None) -> Reward:
    """Load what a section names."""
    if section.path:
        return custom(section.name, section.path)
    if section.url:
        from .judges import connect

        return connect(section)
    if section.name in REWARDS:
        return REWARDS[section.name]
    if section.name in KINDS:
        return compared(section)
    if section.name == VOTES:
        from .vote_reward import VoteReward

        if run is None:
            raise RewardError("votes belong to a run, and there is none here; train with them")
        return VoteReward(run)
    from comfy_g2rpo.rewards.models.installed import load_installed

    where = str(device) if section.device == "auto" else section.device
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[section.dtype]
    return load_installed(rewards_root(), section.name, device=where, dtype=dtype, batch=section.batch)
