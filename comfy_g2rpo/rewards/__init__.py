"""Rewards: what training makes more of. A new one is an object with the members of `Reward`, or a function in a `Rule`, listed here."""

from difflib import get_close_matches

from .judge import agreement, strict
from .pixels import colourfulness, jpeg, sharpness
from .protocol import MixedReward, Reward, RewardError, Rule, checked, mix, score_all

REWARDS: dict[str, Reward] = {
    reward.name: reward
    for reward in (
        Rule("agreement", agreement, compares_across_prompts=True),
        Rule("strict", strict, compares_across_prompts=True),
        Rule("jpeg", jpeg, compares_across_prompts=False),
        Rule("sharpness", sharpness, compares_across_prompts=False),
        Rule("colourfulness", colourfulness, compares_across_prompts=False),
    )
}


def load(name: str) -> Reward:
    """Look a reward up by name."""
    if name not in REWARDS:
        nearest = "".join(f", did you mean '{near}'?" for near in get_close_matches(name, REWARDS, 1))
        raise RewardError(f"reward {name[:80]!a} is unknown{nearest or ';'} known: {', '.join(REWARDS)}")
    return REWARDS[name]


__all__ = ["REWARDS", "MixedReward", "Reward", "RewardError", "Rule", "checked", "load", "mix", "score_all"]
