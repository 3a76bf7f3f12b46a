"""The block that turns scores into advantages and shows where they come from."""

from __future__ import annotations

import math

import torch
from comfy_api.latest import io
from torch import Tensor

from ..comfy_g2rpo.advantages import least_spread, moments, rank_agreement, zero_std_share
from ..comfy_g2rpo.blocks.reward_mix import within
from ..comfy_g2rpo.plan import Plan
from ..comfy_g2rpo.recipes import FIELDS
from ..comfy_g2rpo.rewards.mixing import mixed_advantages, ranking_scores
from ..comfy_g2rpo.run.diversity import pixel_features, shaping
from .inputs.checks import check_inputs
from .inputs.finding import offered
from .inputs.widgets import output, recipe_input, show
from .types import TRAINING, AdvantagesData, AdvantagesWire, RolloutData, RolloutWire, ScoresData, ScoresWire
from .views.drawing import stride_words
from .views.ranked_sheet import Tile, ranked_grid
from .views.tables import Table, heatmap

WITHOUT_CLAMP = 1e9
NOTHING = 1e-6  # advantages below this are rounding
MISLEADING = 0.5  # rank agreement below which a coarse completion is worth a warning
MOST_DIVERSITY = 10.0


def checked_rewards(rollout: RolloutData, scores: ScoresData) -> Tensor:
    """Return scores [R, images] as [R, K, G, L], by the plan; raise ValueError where they do not fit it."""
    plan, values = rollout.rollout.plan, scores.values
    if values.ndim != 2 or values.shape[0] != len(scores.weights) or values.shape[1] != len(plan.images):
        found = f"{values.shape[-1]} images" if values.ndim else "no images"
        raise ValueError(
            f"scores holds {found} and the rollout {len(plan.images)}; connect scores of this very rollout"
        )
    if not plan.transitions:
        raise ValueError(
            "rollout has no branches, so nothing can be compared; name at least one branch step in Rollout"
        )
    if values.isinf().any():
        raise ValueError("scores holds an infinite score; use nan for an image that cannot be judged")
    if values.isnan().all():
        raise ValueError(
            "scores are all nan: nothing could be judged; check the prompt and the reward of Score Rollout"
        )
    return plan.values(values.detach().float().cpu())


def diversity_credit(
    rollout: RolloutData, scores: ScoresData, rewards: Tensor, weight: float, clamp: float
) -> Tensor:
    """Return what unlikeness by pixels adds to the advantages [K, G], from the pictures that were judged.

    Rewards: [R, K, G, L]. Raise ValueError where scores do not hold a picture of every image.
    """
    plan, pictures = rollout.rollout.plan, scores.pictures
    if pictures is None:
        remedy = "connect pictures in Scores From Values, or set diversity to 0"
        raise ValueError(f"diversity is {weight:g}, but scores hold no pictures to compare; {remedy}")
    if len(pictures) != len(plan.images):
        raise ValueError(
            f"diversity compares all {len(plan.images)} pictures of the rollout, and scores hold "
            f"{len(pictures)}; connect the pictures of this very rollout, or set diversity to 0"
        )
    features = plan.values(pixel_features(pictures[..., :3]).cpu().T).movedim(0, -1)
    return shaping(features, rewards, weight, clamp)


def make_table(
    rollout: RolloutData, scores: ScoresData, rewards: Tensor, advantages: Tensor, std_floor: float
) -> Table:
    """Collect what the heat map shows."""
    levels = rewards.unbind(3)
    alone = [
        mixed_advantages(
            [level[..., None]],
            scores.weights,
            scores.mix,
            scores.gates,
            WITHOUT_CLAMP,
            std_floor,
            noise=scores.noise,
        )[0]
        for level in levels
    ]
    z = torch.stack(alone, 2)
    missing = rewards.isnan().all(0)
    std = moments(rewards)[1][:, :, 0]
    places = branch_places(rollout.rollout.plan)
    return Table(
        advantage=advantages.numpy(),
        z=torch.where(missing, torch.nan, z).numpy(),
        tied=(
            (std <= least_spread(rewards, std_floor, scores.noise)[:, :, 0]).all(0) & ~missing.all(1)
        ).numpy(),
        spread=std[0].numpy() if len(std) == 1 else None,
        steps=tuple(step for step, _ in places),
        sigmas=tuple(float(rollout.rollout.coefficients.sigma[state]) for _, state in places),
        strides=rollout.granularities,
    )


def branch_places(plan: Plan) -> list[tuple[int, int]]:
    """List every comparison group's branch step and the state that its branches leave."""
    forks = {plan.states[i].group: plan.states[i].parent for i in plan.transitions}
    return [(plan.states[forks[group]].index, forks[group]) for group in range(plan.shape[0])]


def make_tiles(rollout: RolloutData, scores: ScoresData, advantages: Tensor) -> list[Tile]:
    """Label every completion with its branch, the steps it took and the advantage of its branch."""
    plan = rollout.rollout.plan
    strides: dict[int, list[int]] = {}
    for leaf in plan.leaves:
        strides.setdefault(leaf.state, []).append(rollout.granularities[leaf.granularity])
    places = branch_places(plan)
    overall = ranking_scores(scores.values.cpu().float(), scores.weights, scores.mix, scores.gates).tolist()
    known = scores.pictures is not None and len(scores.pictures) == len(plan.images)
    pictures = scores.pictures if known else [None] * len(plan.images)
    tiles = []
    for image, (state, picture, score) in enumerate(zip(plan.images, pictures, overall, strict=True)):
        at = state
        while at >= 0 and not plan.states[at].trained:
            at = plan.states[at].parent
        if at < 0:
            tiles.append(Tile(picture, score, None, (f"image {image}", "the anchor")))
            continue
        branch = plan.states[at]
        where = f"step {places[branch.group][0]}, branch {branch.member}"
        said = (where, ", ".join(map(stride_words, strides[state])), f"image {image}")
        tiles.append(Tile(picture, score, float(advantages[branch.group, branch.member]), said))
    return tiles


def summary(
    rollout: RolloutData,
    rewards: Tensor,
    advantages: Tensor,
    scores: ScoresData,
    std_floor: float,
    credit: Tensor | None = None,
) -> str:
    """Describe how much there is to learn, whether coarse completions mislead, and what diversity adds."""
    steps, branches = advantages.shape
    equal = zero_std_share(rewards, std_floor, scores.noise)
    lines = [
        f"{steps} branch steps × {branches} branches, mean |advantage| {advantages.abs().mean():.2f}",
        f"zero_std_share {equal:.0%}: groups whose rewards are all equal, but for noise, which teach nothing",
    ]
    if credit is not None:
        lines.append(f"diversity moves a branch's advantage by {credit.abs().mean():.2f} on average")
    for name, row, noise in zip(scores.names, rewards, scores.noise or [0.0] * len(rewards), strict=True):
        agreement = rank_agreement(row[None], [noise])
        for stride, value in list(zip(rollout.granularities, agreement.tolist(), strict=True))[1:]:
            said = "no group to compare" if math.isnan(value) else f"{value:.2f}"
            coarse, fine = stride_words(stride), stride_words(rollout.granularities[0])
            lines.append(f"rank_agreement of {coarse} with {fine}, {name}: {said}")
            if value < MISLEADING:
                lines.append(
                    f"Warning: completions by {coarse} order the branches differently and may mislead"
                )
    if advantages.abs().max() < NOTHING:
        lines.append("Warning: every advantage is 0; an update with these scores changes nothing")
    return "\n".join(lines)


class Advantages(io.ComfyNode):
    """Advantages of a rollout's branches."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_Advantages",
            display_name="Advantages",
            category=TRAINING,
            description="Compare every branch with its group: which were better, by how much, and why.",
            inputs=[
                RolloutWire.Input("rollout", tooltip="From Rollout."),
                ScoresWire.Input(
                    "scores", tooltip="Scores of this very rollout, from Score Rollout or Scores From Values."
                ),
                recipe_input("clamp"),
                recipe_input("std_floor", step=1e-8),
                io.Boolean.Input(
                    "per_branch",
                    default=False,
                    tooltip="Heat map with a row per branch instead of one row per granularity.",
                ),
                io.Float.Input(
                    "diversity",
                    default=0.0,
                    min=0.0,
                    max=MOST_DIVERSITY,
                    step=0.05,
                    optional=True,
                    tooltip="Credit for pictures that look unlike their group (by pixels), against sameness: "
                    "1 pulls like one reward, 0 is off. Begin with 0.1 to 0.3. SetPO's paper only centres "
                    "this credit; here it is scaled as well, as rewards are.",
                ),
            ],
            outputs=[
                output(AdvantagesWire, "advantages", "For Update LoRA."),
                output(
                    io.Image,
                    "heatmap",
                    "Z-score of each step's winner (the branch with the highest advantage) by "
                    "granularity and branch step: positive where the granularity likes the winner too, "
                    "negative where it was outvoted, hatched where all rewards tie.",
                ),
                output(
                    io.Image,
                    "ranked",
                    "Completions from best to worst with score and advantage, of more than ten the five at "
                    "both ends; the frame says up or down.",
                ),
                output(
                    io.String,
                    "summary",
                    "How much there is to learn, and whether coarse completions agree with fine ones.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return offered(
            schema,
            "grpo, reinforcement learning, z-score, group relative",
            rare="clamp, std_floor, per_branch, diversity",
        )

    @classmethod
    def execute(
        cls,
        rollout: RolloutData,
        scores: ScoresData,
        clamp: float,
        std_floor: float,
        per_branch: bool,
        diversity: float = 0.0,
    ) -> io.NodeOutput:
        """Compute the advantages and draw them."""
        check_inputs(cls, locals())
        for name, value in (("clamp", clamp), ("std_floor", std_floor)):
            within(name, value, FIELDS[name].metadata["low"], FIELDS[name].metadata["high"])
        rewards = checked_rewards(rollout, scores)
        how = scores.weights, scores.mix, scores.gates, clamp, std_floor
        [advantages] = mixed_advantages([rewards], *how, noise=scores.noise)
        credit = diversity_credit(rollout, scores, rewards, diversity, clamp) if diversity else None
        advantages = advantages if credit is None else advantages + credit
        table = make_table(rollout, scores, rewards, advantages, std_floor)
        text = summary(rollout, rewards, advantages, scores, std_floor, credit)
        # Made outside the executor's inference mode, so that a learner can use them.
        with torch.inference_mode(False):
            given = scores.names, scores.noise, std_floor
            made = AdvantagesData(rollout, advantages.clone(), rewards.clone(), *given)
        ranked = ranked_grid(make_tiles(rollout, scores, advantages), "Completions from best to worst")
        return io.NodeOutput(made, heatmap(table, per_branch), ranked, text, ui=show(cls, text))


NODES: list[type[io.ComfyNode]] = [Advantages]
