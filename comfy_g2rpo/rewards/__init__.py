"""Rewards: what training makes more of. A new one is a `Reward`, or a function in a `Rule`, listed here."""

from difflib import get_close_matches

from . import smooth_pixels
from .mixing import MixedReward, mix
from .pixels import colourfulness, exposure, jpeg, sharpness, symmetry, webp
from .protocol import Reward, RewardError, Rule, check_prompts, checked, none_judged, score_all
from .shapes.agreement import agreement, strict
from .shapes.vocabulary import check_columns, readable

SHAPES = 'coloured shapes in the prompt, such as "two red circles"'

REWARDS: dict[str, Reward] = {
    reward.name: reward
    for reward in (
        Rule(
            "agreement",
            agreement,
            compares_across_prompts=True,
            needs=SHAPES,
            check=check_columns,
            reads=readable,
            about="likes coloured shapes as the prompt asks for: how much is right, from 0 to 1",
        ),
        Rule(
            "strict",
            strict,
            compares_across_prompts=True,
            needs=SHAPES,
            check=check_columns,
            reads=readable,
            about="likes coloured shapes as the prompt asks for, all or nothing: 1 or 0",
        ),
        Rule(
            "jpeg",
            jpeg,
            compares_across_prompts=False,
            reads_prompt=False,
            note="ends in blank pictures",
            about="likes pictures that make small JPEG files: minus the size in kilobytes",
        ),
        Rule(
            "webp",
            webp,
            compares_across_prompts=False,
            reads_prompt=False,
            note="ends in blank pictures",
            about="likes pictures that make small WebP files: minus the size in kilobytes",
        ),
        Rule(
            "sharpness",
            sharpness,
            compares_across_prompts=False,
            reads_prompt=False,
            smooth=smooth_pixels.sharpness,
            note="ends in grain and checkerboards",
            about="likes fine detail and hard edges: 0 for a blank picture, without an upper end",
        ),
        Rule(
            "colourfulness",
            colourfulness,
            compares_across_prompts=False,
            reads_prompt=False,
            smooth=smooth_pixels.colourfulness,
            note="ends in saturated blotches",
            about="likes strong, varied colours: 0 for a grey picture, about 80 for a highly colourful one",
        ),
        Rule(
            "exposure",
            exposure,
            compares_across_prompts=False,
            reads_prompt=False,
            smooth=smooth_pixels.exposure,
            note="ends in flat mid grey",
            about="likes pictures that are neither too dark nor too bright: from 0 to 1",
        ),
        Rule(
            "symmetry",
            symmetry,
            compares_across_prompts=False,
            reads_prompt=False,
            smooth=smooth_pixels.symmetry,
            note="ends in kaleidoscopes and horizontal stripes",
            about="likes a left half that mirrors the right half: from −1 to 1",
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
