"""Rewards: what training makes more of. A new one is a `Reward`, or a function in a `Rule`, listed here."""

from difflib import get_close_matches

from .mixing import MixedReward, mix
from .pixels import colourfulness, exposure, jpeg, sharpness, symmetry, webp
from .protocol import Reward, RewardError, Rule, check_prompts, checked, none_judged, score_all
from .shapes.agreement import agreement, strict
from .shapes.vocabulary import check_columns

SHAPES = 'coloured shapes in the prompt, such as "two red circles"'

REWARDS: dict[str, Reward] = {
    reward.name: reward
    for reward in (
        Rule("agreement", agreement, compares_across_prompts=True, needs=SHAPES, check=check_columns),
        Rule("strict", strict, compares_across_prompts=True, needs=SHAPES, check=check_columns),
        Rule("jpeg", jpeg, compares_across_prompts=False, note="ends in blank pictures"),
        Rule("webp", webp, compares_across_prompts=False, note="ends in blank pictures"),
        Rule("sharpness", sharpness, compares_across_prompts=False, note="ends in grain and checkerboards"),
        Rule(
            "colourfulness", colourfulness, compares_across_prompts=False, note="ends in saturated blotches"
        ),
        Rule("exposure", exposure, compares_across_prompts=False, note="ends in flat mid grey"),
        Rule(
            "symmetry",
            symmetry,
            compares_across_prompts=False,
            note="ends in kaleidoscopes and horizontal stripes",
        ),
    )
}


def load(name: str) -> Reward:
    """Look a reward up by name."""
    if name not in REWARDS:
        nearest = "".join(f", did you mean '{near}'?" for near in get_close_matches(name, REWARDS, 1))
        raise RewardError(f"reward {name[:80]!a} is unknown{nearest or ';'} known: {', '.join(REWARDS)}")
    return REWARDS[name]


__all__ = [
    "REWARDS",
    "MixedReward",
    "Reward",
    "RewardError",
    "Rule",
    "check_prompts",
    "checked",
    "load",
    "mix",
    "none_judged",
    "score_all",
]
