"""Blocks that make a reward: a rule or an installed model, a mix of several, a picture to be like."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from comfy_api.latest import io
from torch import Tensor

from ..comfy_g2rpo.blocks.reward_mix import MAX_WEIGHT, PALETTE, Mix, Part, colours_of, mixed, parse_gates
from ..comfy_g2rpo.options import MIXES
from ..comfy_g2rpo.rewards import Reward
from ..comfy_g2rpo.rewards.likeness import KINDS, Likeness, reference_reward
from .host.reward_models import DTYPES, check, choices, chosen, find, how_to_get_more, stamp, unknown
from .inputs.checks import check_inputs
from .inputs.finding import offered
from .inputs.judging import MAX_REWARDS, checked_images, describe, rounded
from .inputs.widgets import output, show
from .types import SCORING, RewardSet, RewardWire

MAX_BATCH = 256
MAX_REFERENCE = 2**24  # pixels
MIX_TIP = (
    "How they become one, in training within a group, in Score Images within the images given. zscore: sum "
    "of their z-scores, so that no unit dominates. sum: of the scores themselves. minimum: the least "
    "z-score. rank_product: the product of their ranks."
)
GATES_TIP = (
    "Lowest score to pass, one 'reward = score' a line, such as: sharpness = 50. What does not pass "
    "counts as the worst, whatever the "
    "others say. For a reward of negative weight it is the highest score. Blank: no gates."
)


def reward_outputs(about: str) -> list[io.Output]:
    """Declare the outputs of a block that makes one reward."""
    tip = "For Score Images, Score Rollout, Mix Rewards and Train LoRA."
    return [output(RewardWire, "loaded", tip, shown="reward"), output(io.String, "about", about)]


def one_reward(block: type[io.ComfyNode], found: Reward, *more: str) -> io.NodeOutput:
    """Return one reward and its description, which the node shows."""
    text = "\n\n".join(filter(None, (describe(found), *more)))
    return io.NodeOutput(RewardSet((found,), (1.0,)), text, ui=show(block, text))


class LoadReward(io.ComfyNode):
    """One reward: a built-in rule, or an installed model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_LoadReward",
            display_name="Load Reward",
            category=SCORING,
            description="Choose what makes an image good: a built-in rule, or a reward model that lies in "
            "models/g2rpo_rewards. Choose one that is not installed, and Run says how to get it.",
            inputs=[
                io.Combo.Input(
                    "reward",
                    options=choices(),
                    tooltip="What scores images: built-in rules, then reward models, with size and licence "
                    "where they are not installed. 'about' says what it measures and how to get more.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(DTYPES),
                    default="fp32",
                    optional=True,
                    tooltip="Of a reward model's trunk; its head always computes in fp32. bf16 takes half "
                    "the memory. Rules ignore it.",
                ),
                io.Int.Input(
                    "batch",
                    default=16,
                    min=1,
                    max=MAX_BATCH,
                    optional=True,
                    tooltip="Images that a reward model judges at once; lower it where memory runs out. "
                    "Scores do not depend on it.",
                ),
            ],
            outputs=reward_outputs(
                "What it measures, its licence, how it fails as a target, and how to get more rewards."
            ),
            hidden=[io.Hidden.unique_id],
        )
        return offered(
            schema,
            "rlhf, reward model, preference model, aesthetic score, pickscore, hps, imagereward, clip score, "
            "ocr, judge, quality",
            rare="precision, batch",
        )

    @classmethod
    def validate_inputs(cls, reward: str | None = None) -> bool | str:
        """Allow what the page's list may not have: a bare name, or a reward that was just fetched.

        One that is not installed is named when it runs: newer pages show no words of a validation.
        """
        # A reward that comes over a link is not there yet.
        return True if reward is None else unknown(reward) or True

    @classmethod
    def fingerprint_inputs(cls, reward: str, precision: str = "fp32", batch: int = 16) -> str:
        """Return what changes when the reward is fetched again."""
        name = chosen(reward)
        return f"{name} {precision} {batch} {stamp(name)}"

    @classmethod
    def execute(cls, reward: str, precision: str = "fp32", batch: int = 16) -> io.NodeOutput:
        """Load the reward; the schema lists those that are there now."""
        check(reward)
        check_inputs(cls, {**locals(), "reward": chosen(reward)})
        found = find(chosen(reward), precision or "fp32", batch or 16)
        return one_reward(cls, found, how_to_get_more())


class MixRewards(io.ComfyNode):
    """Several rewards with weights and gates."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        inputs: list[io.Input] = []
        for i in range(1, MAX_REWARDS + 1):
            tip = f"Reward number {i}{'; a mix may be mixed again' if i > 2 else ''}."
            inputs.append(RewardWire.Input(f"reward_{i}", optional=i > 2, tooltip=tip))
        for i in range(1, MAX_REWARDS + 1):
            tip = f"Weight of reward {i}; a negative one punishes, 0 leaves its gate alone."
            bounds = {"min": -MAX_WEIGHT, "max": MAX_WEIGHT, "step": 0.05}
            inputs.append(io.Float.Input(f"weight_{i}", default=1.0, optional=i > 2, tooltip=tip, **bounds))
        inputs += [
            io.Combo.Input("mix", options=list(MIXES), default="zscore", optional=True, tooltip=MIX_TIP),
            io.String.Input("gates", default="", multiline=True, optional=True, tooltip=GATES_TIP),
        ]
        schema = io.Schema(
            node_id="G2RPO_MixRewards",
            display_name="Mix Rewards",
            category=SCORING,
            description="Judge by several rewards at once. A reward that comes twice counts once, with the "
            "sum of its weights.",
            inputs=inputs,
            outputs=[
                output(
                    RewardWire,
                    "mixed",
                    "All of them, for Score Images, Score Rollout and Train LoRA.",
                    shown="reward",
                ),
                output(
                    io.String,
                    "about",
                    "The parts with their weights, licences and whether scores compare across prompts.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return offered(schema, "combine rewards, weighted reward, several rewards, judge")

    @classmethod
    def execute(
        cls,
        reward_1: RewardSet,
        reward_2: RewardSet,
        weight_1: float,
        weight_2: float,
        reward_3: RewardSet | None = None,
        reward_4: RewardSet | None = None,
        reward_5: RewardSet | None = None,
        reward_6: RewardSet | None = None,
        weight_3: float = 1.0,
        weight_4: float = 1.0,
        weight_5: float = 1.0,
        weight_6: float = 1.0,
        mix: str = "zscore",
        gates: str = "",
    ) -> io.NodeOutput:
        """Make one set of all the rewards."""
        check_inputs(cls, locals())
        sets = (reward_1, reward_2, reward_3, reward_4, reward_5, reward_6)
        weights = (weight_1, weight_2, weight_3, weight_4, weight_5, weight_6)
        mixed = flattened(sets, weights, mix or "zscore", parse_gates(gates or ""))
        lines = zip(mixed.rewards, mixed.weights, mixed.all_gates, strict=True)
        parts = [
            f"{weight:g} × {describe(reward)}{gate_text(weight, gate)}" for reward, weight, gate in lines
        ]
        text = "\n\n".join([f"Mix: {mixed.mix}", *parts])
        return io.NodeOutput(mixed, text, ui=show(cls, text))


def flattened(
    sets: tuple[RewardSet | None, ...], weights: tuple[float, ...], mix: str, gates: dict[str, float]
) -> RewardSet:
    """Make one set of several: weights multiply, a reward that comes twice counts once, gates stay."""
    rewards = {reward.name: reward for part in sets if part for reward in part.rewards}
    numbered = enumerate(zip(sets, weights, strict=True), 1)
    made = mixed(((i, as_mix(part), weight) for i, (part, weight) in numbered if part), mix, gates)
    found = tuple(part.gate for part in made.parts)
    return RewardSet(
        tuple(rewards[part.name] for part in made.parts),
        tuple(part.weight for part in made.parts),
        mix,
        found if any(gate is not None for gate in found) else (),
    )


def as_mix(part: RewardSet) -> Mix:
    """Return a set of rewards by their names."""
    lines = zip(part.rewards, part.weights, part.all_gates, strict=True)
    return Mix(tuple(Part(reward.name, weight, gate) for reward, weight, gate in lines), part.mix)


def gate_text(weight: float, gate: float | None) -> str:
    """Describe a gate."""
    if gate is None:
        return ""
    return f"\nPasses at most {gate:g}." if weight < 0 else f"\nPasses from {gate:g} on."


@dataclass(frozen=True)
class Like(Reward):
    """Judge by the likeness to one reference; its digest is in the name, so that each is its own reward."""

    likeness: Likeness
    digest: str
    licence: str = "Apache-2.0"
    compares_across_prompts: bool = True
    reads_prompt = False

    @property
    def name(self) -> str:
        """Name the kind and the reference."""
        return f"{self.likeness.name}-{self.digest}"

    @property
    def note(self) -> str:
        """Return how it fails as a target."""
        return self.likeness.note

    @property
    def about(self) -> str:
        """Return what it likes, in words for users."""
        return self.likeness.about

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, H, W, 3] by prompts [B]: [B]."""
        return self.likeness.score(images, prompts)


class ReferenceReward(io.ComfyNode):
    """Likeness to a picture or a palette."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_ReferenceReward",
            display_name="Reference Reward",
            category=SCORING,
            description="Judge by how like a picture of yours, or a palette, an image is. No model, no "
            "prompt.",
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    tooltip="phash: the same layout of light and dark. histogram: the same colours, "
                    "wherever. ssim: the same structure pixel by pixel (needs scikit-image). palette: the "
                    "colours below in equal shares.",
                ),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="The picture to be like, of any size; palette needs none.",
                ),
                io.String.Input(
                    "colours",
                    default="",
                    optional=True,
                    tooltip="For palette: up to 16 colours separated by commas or spaces, such as #ff8800, "
                    "#002244.",
                ),
            ],
            outputs=reward_outputs("What it measures and how it fails as a target."),
            hidden=[io.Hidden.unique_id],
        )
        return offered(schema, "similarity, ssim, histogram, palette, look like, judge")

    @classmethod
    def execute(cls, kind: str, reference: Tensor | None = None, colours: str = "") -> io.NodeOutput:
        """Keep what is compared with."""
        check_inputs(cls, locals())
        if kind == PALETTE:
            wanted = colours_of(colours or "")
            if not wanted:
                raise ValueError("colours is empty; write colours such as #ff8800, #002244")
            seen = " ".join(wanted).lower().encode()
        else:
            wanted = reference_picture(reference)
            seen = wanted.mul(255).round().byte().numpy().tobytes()
        found = Like(reference_reward(kind, wanted), hashlib.sha256(seen).hexdigest()[:8])
        return one_reward(cls, found)


def reference_picture(reference: Tensor | None) -> Tensor:
    """Return the one picture [H, W, 3] to be like."""
    if reference is None:
        raise ValueError("reference is not connected; connect an image, or choose the kind palette")
    images = checked_images([reference], "reference")
    if len(images) != 1 or images[0].shape[0] * images[0].shape[1] > MAX_REFERENCE:
        raise ValueError(
            f"reference holds {len(images)} images; connect one of at most {MAX_REFERENCE // 10**6} "
            "megapixels"
        )
    made = rounded(images[0][None], 0, "reference")[0].cpu()
    if not made.isfinite().all():
        raise ValueError("reference is a broken image (NaN); connect another one")
    return made


NODES: list[type[io.ComfyNode]] = [LoadReward, MixRewards, ReferenceReward]
