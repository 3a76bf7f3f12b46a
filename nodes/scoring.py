"""Blocks that judge pictures, of a rollout or any others; a score belongs to one image, never to a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..comfy_g2rpo.blocks.reward_mix import MAX_SCORE, within
from ..comfy_g2rpo.prompts import MAX_CHARACTERS
from ..comfy_g2rpo.rollout import stream
from ..comfy_g2rpo.run.scorer import Scorer, comparison_groups
from ..comfy_g2rpo.sampling.budgeted import drawn
from .inputs import widgets
from .inputs.checks import check_inputs, check_number, check_value
from .inputs.finding import offered
from .inputs.judging import (
    MAX_IMAGES,
    best_first,
    bounded,
    check_count,
    checked_images,
    checked_latents,
    checked_prompt,
    decode,
    harmless,
    judge,
    judgement_notes,
    names_for,
    one,
    overall,
    parse_votes,
    prompts_for,
    score_table,
    scored_images,
)
from .inputs.widgets import int_input, linked_text, output, show, text_area
from .types import SCORING, RewardSet, RolloutData, RolloutWire, ScoresData, ScoresWire
from .views.drawing import number
from .views.ranked_sheet import Tile, ranked_grid

DECODE_BATCH = 8  # completions between two looks at the stop button


WHOLE = "The whole list is the output table"


def table_output() -> io.Output:
    """Declare the output of a ranking as text."""
    tip = "The whole ranking as text, with each reward's own score; the block shows the five best."
    return output(io.String, "table", tip)


def optional_prompt() -> io.Input:
    """Declare the input of prompts, for rewards that read one."""
    made = text_area(
        "prompt",
        "What the images should show, if the reward reads prompts: one for all, a list with one per image, "
        f"or one per line if there are as many lines as images. At most {MAX_CHARACTERS} characters each.",
    )
    made.optional = True
    return made


class ScoreImages(io.ComfyNode):
    """Scores of any images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_ScoreImages",
            display_name="Score and Rank Images",
            category=SCORING,
            description="Score every image by a reward and rank them: any images, no training needed. Images "
            "in a list may differ in size.",
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip=f"Images to judge, up to {MAX_IMAGES}. Alpha is ignored; a broken image (NaN) "
                    "gets the score nan.",
                ),
                widgets.reward_input(),
                optional_prompt(),
                linked_text(
                    "names", "One name per image for sheet and table, as Load Image Folder gives them."
                ),
            ],
            outputs=[
                output(
                    io.Float,
                    "scores",
                    "One score per image, in the order of the images; nan where it could not be judged.",
                    many=True,
                ),
                output(
                    io.Int, "best_first", "Positions of the images (from 0), the best one first.", many=True
                ),
                output(
                    io.Image,
                    "ranked",
                    "A sheet of the images from best to worst with their scores; of more than ten, the five "
                    "best and the five worst.",
                ),
                table_output(),
                output(
                    ScoresWire,
                    "details",
                    "Every reward's own scores and the prompts, for Save Scored Images.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return offered(
            schema,
            "rank images, aesthetic score, preference score, rate images, quality, best of n, pickscore, "
            "hps, clip score",
        )

    @classmethod
    def execute(
        cls,
        images: list[Tensor],
        reward: list[RewardSet],
        prompt: list[str] | None = None,
        names: list[str] | None = None,
    ) -> io.NodeOutput:
        """Judge and rank."""
        check_inputs(cls, locals())
        rewards, pictures = one("reward", reward), checked_images(images)
        count = len(pictures)
        titles = [f"image {i}" for i in range(count)] if names is None else names_for(names, count)
        titles = [harmless(title) for title in titles]
        prompts, notes = prompts_for(prompt or [""], count)
        notes = notes if any(each.reads_prompt for each in rewards.rewards) else []
        channels = {picture.shape[-1] for picture in pictures}
        notes += ["alpha was ignored"] if 4 in channels else []
        notes += ["grey images were judged as grey RGB"] if 1 in channels else []
        if len(set(prompts)) > 1:
            relative = [each.name for each in rewards.rewards if not each.compares_across_prompts]
            if relative:
                notes.append(
                    f"the prompts differ, and {', '.join(relative)} compares only images of one prompt"
                )
        if len(rewards.rewards) > 1 and rewards.mix != "sum":
            notes.append(
                f"a mix by {rewards.mix} says how an image stands among these ones, not how good it is "
                "by itself"
            )
        scores = judge(rewards, pictures, prompts)
        notes = [*judgement_notes(rewards, scores, prompts), *notes]
        mixed = overall(rewards, scores)
        shown = zip(pictures, mixed, titles, strict=True)
        tiles = [Tile(picture, score, lines=(title,)) for picture, score, title in shown]
        text, brief = (
            score_table(rewards, scores, notes, "images", titles, elsewhere)
            for elsewhere in ("", f"{WHOLE}; Save Scored Images writes it as a CSV file")
        )
        grid = ranked_grid(tiles, "Images from best to worst")
        judges = tuple(each.name for each in rewards.rewards)
        details = ScoresData(
            judges, rewards.weights, scores, mix=rewards.mix, gates=rewards.gates, prompts=tuple(prompts)
        )
        return io.NodeOutput(mixed, best_first(mixed), grid, text, details, ui=show(cls, brief))


def draw_inputs() -> list[io.Input]:
    """Make the inputs of Select Best's draw; workflows from before it lack them."""
    return [
        io.Combo.Input(
            "how",
            options=["best", "draw"],
            default="best",
            optional=True,
            tooltip="best keeps the highest scores. draw lets chance keep others too, high scores more "
            "often: more variety, lower scores.",
        ),
        io.Float.Input(
            "temperature",
            default=0.1,
            min=1e-4,
            max=1e6,
            step=0.01,
            optional=True,
            tooltip="For draw: the difference in score that matters, in the reward's own units. Lower is "
            "nearer to best, higher nearer to pure chance.",
        ),
        widgets.seed_input("For draw: another number draws others.", optional=True),
    ]


class SelectBest(io.ComfyNode):
    """The best of some images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_SelectBest",
            display_name="Select Best",
            category=SCORING,
            description="Keep the images with the best scores, best first, of all or of every prompt. Images "
            "without a score are dropped.",
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="The images that were scored."),
                widgets.scores_input("Score Images"),
                int_input("k", 1, 1, MAX_IMAGES, "Keep at most so many images."),
                io.Boolean.Input(
                    "use_threshold",
                    default=False,
                    tooltip="Also drop images whose score lies below the threshold.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=-MAX_SCORE,
                    max=MAX_SCORE,
                    step=0.01,
                    tooltip="Lowest score to keep, in the reward's own units; counts only with "
                    "use_threshold.",
                ),
                linked_text(
                    "prompts",
                    "One prompt per image, as Load Image Folder gives them: then k images of every "
                    "prompt are kept.",
                ),
                *draw_inputs(),
            ],
            outputs=[
                output(
                    io.Image,
                    "best",
                    "What was kept, best first, as one batch: all of one size.",
                    shown="images",
                ),
                output(io.Int, "kept", "Positions (from 0) of the kept images, best first.", many=True),
                output(io.Image, "image_list", "What was kept one by one: of any sizes.", many=True),
                output(io.Float, "kept_scores", "The scores of what was kept.", many=True),
            ],
        )
        return offered(
            schema,
            "best of n, top k, rank images, filter by score, pick the best",
            rare="use_threshold, threshold, how, temperature, seed",
        )

    @classmethod
    def execute(
        cls,
        images: list[Tensor],
        scores: list[float],
        k: list[int],
        use_threshold: list[bool],
        threshold: list[float],
        prompts: list[str] | None = None,
        how: Sequence[str] = ("best",),
        temperature: Sequence[float] = (0.1,),
        seed: Sequence[int] = (0,),
    ) -> io.NodeOutput:
        """Select and sort."""
        check_inputs(cls, locals())
        pictures, values = scored_images(images, scores)
        check_number("k", one("k", k), 1, MAX_IMAGES, whole=True)
        order = [i for i in best_first(values) if not math.isnan(values[i])]
        if not order:
            raise ValueError(
                "scores are all nan: nothing could be judged; check the prompt and the images of Score Images"
            )
        if one("use_threshold", use_threshold):
            lowest = within("threshold", one("threshold", threshold), -MAX_SCORE, MAX_SCORE)
            if values[order[0]] < lowest:
                raise ValueError(
                    f"threshold {lowest:g} is above the best score {number(values[order[0]])}; lower it"
                )
            order = [i for i in order if values[i] >= lowest]
        check_count("prompts", prompts, len(pictures), "texts")
        groups = prompts or [""] * len(pictures)
        for declared, given in zip(draw_inputs(), (how, temperature, seed), strict=True):
            check_value(declared, one(declared.id, given))
        if how[0] == "draw":
            kept = drawn_of_each(order, values, groups, k[0], temperature[0], seed[0])
        else:
            kept = best_of_each(order, groups, k[0])
        chosen = [pictures[i] for i in kept]
        singles, best_scores = [image[None] for image in chosen], [values[i] for i in kept]
        return io.NodeOutput(one_batch(chosen), kept, singles, best_scores)


def best_of_each(order: Sequence[int], groups: Sequence[str], count: int) -> list[int]:
    """Keep the first `count` of every group of an order."""
    seen: dict[str, int] = {}
    kept = []
    for i in order:
        seen[groups[i]] = seen.get(groups[i], 0) + 1
        if seen[groups[i]] <= count:
            kept.append(i)
    return kept


def drawn_of_each(
    order: Sequence[int], values: Sequence[float], groups: Sequence[str], count: int, heat: float, seed: int
) -> list[int]:
    """Draw `count` of every group of an order by their scores; keep the order."""
    kept = set()
    for place, group in enumerate(dict.fromkeys(groups)):
        members = [i for i in order if groups[i] == group]
        if members:
            scores = [values[i] for i in members]
            kept |= {members[i] for i in drawn(scores, count, heat, stream("select", seed, place))}
    return [i for i in order if i in kept]


def one_batch(images: Sequence[Tensor]) -> Tensor | ExecutionBlocker:
    """Put images of one size into a batch; images of several sizes block the blocks that want one."""
    sizes = sorted({tuple(image.shape) for image in images})
    if len(sizes) > 1:
        return ExecutionBlocker(
            f"images to keep differ in size ({sizes[0]}, {sizes[1]}); use image_list, or set k to 1"
        )
    return torch.stack(list(images))


class ScoreRollout(io.ComfyNode):
    """Scores of a rollout's pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_ScoreRollout",
            display_name="Score Rollout",
            category=SCORING,
            description="Decode a rollout's completions and score each of them.",
            inputs=[
                RolloutWire.Input("rollout", tooltip="From Rollout."),
                io.Vae.Input("vae", tooltip="The VAE of the model that made the rollout."),
                widgets.reward_input(),
                widgets.rollout_prompt_input("rewards read it", multiline=True),
            ],
            outputs=[
                output(ScoresWire, "scores", "For Advantages."),
                output(io.Image, "pictures", "The decoded completions, in the order of the rollout."),
                table_output(),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return offered(schema, "grpo, reward, rank")

    @classmethod
    def execute(cls, rollout: RolloutData, vae: Any, reward: RewardSet, prompt: str) -> io.NodeOutput:
        """Decode and judge in batches."""
        check_inputs(cls, locals())
        latents, text = checked_latents(rollout, vae), checked_prompt(prompt)
        scorer = Scorer(
            lambda part: decode(rollout, vae, part),
            reward.rewards,
            [text],
            len(latents),
            DECODE_BATCH,
            keep=(0,),
            check=throw_exception_if_processing_interrupted,
            groups=comparison_groups(rollout.rollout.plan),
        )
        scorer([0] * len(latents), list(range(len(latents))), latents)
        pictures = torch.stack([scorer.pictures[0, i] for i in range(len(latents))])
        names, shown = tuple(each.name for each in reward.rewards), pictures.nan_to_num(0.0)
        mixed = {"mix": reward.mix, "gates": reward.gates}
        noise = tuple(each.noise() for each in reward.rewards)
        scores = ScoresData(names, reward.weights, scorer.scores[:, 0], text, shown, noise=noise, **mixed)
        notes = judgement_notes(reward, scores.values, [text])
        table, brief = (
            score_table(reward, scores.values, notes, "completions", elsewhere=elsewhere)
            for elsewhere in ("", WHOLE)
        )
        return io.NodeOutput(scores, scores.pictures, table, ui=show(cls, brief))


class ScoresFromValues(io.ComfyNode):
    """Anybody's judgement of a rollout."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_ScoresFromValues",
            display_name="Scores From Values",
            category=SCORING,
            description="Let any graph, or your own votes, judge a rollout: one number per completion, "
            "higher is better.",
            is_input_list=True,
            inputs=[
                RolloutWire.Input("rollout", tooltip="The rollout that is judged."),
                text_area(
                    "votes",
                    "One number per completion in the order of the rollout, separated by commas, spaces or "
                    "new lines; nan where you have no opinion. Leave empty if values are connected.",
                ),
                io.Float.Input(
                    "values",
                    optional=True,
                    force_input=True,
                    min=-MAX_SCORE,
                    max=MAX_SCORE,
                    tooltip="The same numbers as a list from any other block, such as Score Images.",
                ),
                io.Image.Input(
                    "pictures",
                    optional=True,
                    tooltip="The decoded completions, if the ranked grid is to show them, or diversity of "
                    "Advantages to compare them.",
                ),
            ],
            outputs=[output(ScoresWire, "made", "For Advantages.", shown="scores")],
        )
        return offered(schema, "custom reward, own scores, human feedback, votes, numbers to scores")

    @classmethod
    def execute(
        cls,
        rollout: list[RolloutData],
        votes: list[str],
        values: list[float] | None = None,
        pictures: list[Tensor] | None = None,
    ) -> io.NodeOutput:
        """Check the numbers."""
        check_inputs(cls, locals())
        count, text = len(one("rollout", rollout).rollout.plan.images), one("votes", votes)
        if values is not None and text.strip():
            raise ValueError("votes and values are both given; empty votes or disconnect values")
        name = "votes" if values is None else "values"
        found = parse_votes(text) if values is None else [bounded("values", value) for value in values]
        if len(found) != count:
            raise ValueError(
                f"{name} holds {len(found)} numbers and the rollout {count} completions; give one "
                "number for each"
            )
        images = None if pictures is None else checked_images(pictures, "pictures")
        if images is not None and (len(images) != count or len({image.shape for image in images}) > 1):
            raise ValueError(
                f"pictures holds {len(images)} images, the rollout {count} completions; connect the "
                "decoded completions, or nothing"
            )
        shown = None if images is None else torch.stack(images)[..., :3].float().expand(-1, -1, -1, 3)
        table = torch.tensor([found], dtype=torch.float32)
        return io.NodeOutput(ScoresData((name,), (1.0,), table, "", shown))


NODES: list[type[io.ComfyNode]] = [ScoreImages, SelectBest, ScoreRollout, ScoresFromValues]
