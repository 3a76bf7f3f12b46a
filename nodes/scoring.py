"""Blocks that judge pictures: scores of any images, scores of a rollout.

A score belongs to one image, never to a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from server import PromptServer
from torch import Tensor

from ..comfy_g2rpo.prompts import MAX_CHARACTERS
from ..comfy_g2rpo.rewards.protocol import embedder
from ..comfy_g2rpo.run.scorer import Scorer
from .inputs.checks import check_inputs, check_number
from .inputs.judging import (
    MAX_IMAGES,
    MAX_SCORE,
    best_first,
    bounded,
    checked_images,
    checked_latents,
    checked_prompt,
    decode,
    harmless,
    judge,
    one,
    overall,
    parse_votes,
    prompts_for,
    score_table,
    within,
)
from .inputs.widgets import node_id
from .types import SCORING, RewardSet, RewardWire, RolloutData, RolloutWire, ScoresData, ScoresWire
from .views.drawing import number
from .views.tables import Tile, ranked_grid

DECODE_BATCH = 8  # completions between two looks at the stop button


def show(cls: type[io.ComfyNode], text: str) -> ui.PreviewText:
    """Show a text in the node while it runs, and keep it among the run's outputs."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id(cls) is not None:
        server.send_progress_text(text, node_id(cls))
    return ui.PreviewText(text)


class ScoreImages(io.ComfyNode):
    """Scores of any images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        return io.Schema(
            node_id="G2RPO_ScoreImages",
            display_name="Score Images",
            category=SCORING,
            description=(
                "Score every image by a reward and rank them: any images, no training needed. Images in a "
                "list may differ in size."
            ),
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip=(
                        f"Images to judge, up to {MAX_IMAGES}. Alpha is ignored; a broken image (NaN) gets "
                        "the score nan."
                    ),
                ),
                RewardWire.Input("reward", tooltip="From Load Reward, or several from Mix Rewards."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="What the images should show: one prompt for all, a list with one per image, or "
                    "one per line if there are as "
                    f"many lines as images. At most {MAX_CHARACTERS} characters each.",
                ),
                io.String.Input(
                    "names",
                    optional=True,
                    force_input=True,
                    tooltip="One name per image for sheet and table, as Load Image Folder gives them.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    "scores",
                    display_name="scores",
                    is_output_list=True,
                    tooltip=(
                        "One score per image, in the order of the images; nan where it could not be judged."
                    ),
                ),
                io.Int.Output(
                    "best_first",
                    display_name="best_first",
                    is_output_list=True,
                    tooltip="Positions of the images (from 0), the best one first.",
                ),
                io.Image.Output(
                    "ranked",
                    display_name="ranked",
                    tooltip="A sheet of the images from best to worst with their scores.",
                ),
                io.String.Output(
                    "table",
                    display_name="table",
                    tooltip="The ranking as text, with each reward's own score.",
                ),
                ScoresWire.Output(
                    "details",
                    display_name="details",
                    tooltip="Every reward's own scores and the prompts, for Save Scored Images.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, images: list[Tensor], reward: list[RewardSet], prompt: list[str], names: list[str] | None = None
    ) -> io.NodeOutput:
        """Judge and rank."""
        check_inputs(cls, locals())
        rewards, pictures = one("reward", reward), checked_images(images)
        titles = (
            [f"image {i}" for i in range(len(pictures))]
            if names is None
            else [harmless(name) for name in names]
        )
        if len(titles) != len(pictures):
            raise ValueError(
                f"names has {len(titles)} entries for {len(pictures)} images; connect one per image, "
                "or nothing"
            )
        prompts, notes = prompts_for(prompt, len(pictures))
        channels = {picture.shape[-1] for picture in pictures}
        notes += ["alpha was ignored"] if 4 in channels else []
        notes += ["grey images were judged as grey RGB"] if 1 in channels else []
        if len(set(prompts)) > 1:
            relative = [each.name for each in rewards.rewards if not each.compares_across_prompts]
            notes += (
                [f"the prompts differ, and {', '.join(relative)} compares only images of one prompt"]
                if relative
                else []
            )
        if (blank := sum(not text.strip() for text in prompts)) and any(
            embedder([each]) for each in rewards.rewards
        ):
            notes.append(f"{blank} images have no prompt: a judge that reads it judged them by an empty one")
        if len(rewards.rewards) > 1 and rewards.mix != "sum":
            notes.append(
                f"a mix by {rewards.mix} says how an image stands among these ones, not how good it is "
                "by itself"
            )
        scores = judge(rewards, pictures, prompts)
        mixed = overall(rewards, scores)
        tiles = [
            Tile(picture, score, lines=(title,))
            for picture, score, title in zip(pictures, mixed, titles, strict=True)
        ]
        text = score_table(rewards, scores, notes, "images", titles)
        grid = ranked_grid(tiles, "Images from best to worst")
        judges = tuple(each.name for each in rewards.rewards)
        details = ScoresData(
            judges, rewards.weights, scores, mix=rewards.mix, gates=rewards.gates, prompts=tuple(prompts)
        )
        return io.NodeOutput(mixed, best_first(mixed), grid, text, details, ui=show(cls, text))


class SelectBest(io.ComfyNode):
    """The best of some images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        return io.Schema(
            node_id="G2RPO_SelectBest",
            display_name="Select Best",
            category=SCORING,
            description=(
                "Keep the images with the best scores, best first, of all or of every prompt. Images "
                "without a score are dropped."
            ),
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="The images that were scored."),
                io.Float.Input(
                    "scores",
                    force_input=True,
                    min=-MAX_SCORE,
                    max=MAX_SCORE,
                    tooltip="One score per image in the same order, from Score Images.",
                ),
                io.Int.Input("k", default=1, min=1, max=MAX_IMAGES, tooltip="Keep at most so many images."),
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
                    tooltip=(
                        "Lowest score to keep, in the reward's own units; counts only with use_threshold."
                    ),
                ),
                io.String.Input(
                    "prompts",
                    optional=True,
                    force_input=True,
                    tooltip=(
                        "One prompt per image, as Load Image Folder gives them: then k images of every "
                        "prompt are kept."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    "best",
                    display_name="images",
                    tooltip="What was kept, best first, as one batch: all of one size.",
                ),
                io.Int.Output(
                    "kept",
                    display_name="kept",
                    is_output_list=True,
                    tooltip="Positions (from 0) of the kept images, best first.",
                ),
                io.Image.Output(
                    "image_list",
                    display_name="image_list",
                    is_output_list=True,
                    tooltip="What was kept one by one: of any sizes.",
                ),
                io.Float.Output(
                    "kept_scores",
                    display_name="kept_scores",
                    is_output_list=True,
                    tooltip="The scores of what was kept.",
                ),
            ],
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
    ) -> io.NodeOutput:
        """Select and sort."""
        check_inputs(cls, locals())
        pictures = checked_images(images)
        values = [bounded("scores", value) for value in scores]
        if len(values) != len(pictures):
            raise ValueError(
                f"scores has {len(values)} entries for {len(pictures)} images; connect the scores of "
                "these very images"
            )
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
        groups = [""] * len(pictures) if prompts is None else prompts
        if len(groups) != len(pictures):
            raise ValueError(
                f"prompts has {len(groups)} texts for {len(pictures)} images; connect one per image, "
                "or nothing"
            )
        kept = best_of_each(order, groups, k[0])
        chosen = [pictures[i] for i in kept]
        return io.NodeOutput(
            one_batch(chosen), kept, [image[None] for image in chosen], [values[i] for i in kept]
        )


def best_of_each(order: Sequence[int], groups: Sequence[str], count: int) -> list[int]:
    """Keep the first `count` of every group of an order."""
    seen: dict[str, int] = {}
    kept = []
    for i in order:
        seen[groups[i]] = seen.get(groups[i], 0) + 1
        if seen[groups[i]] <= count:
            kept.append(i)
    return kept


def one_batch(images: Sequence[Tensor]) -> Tensor | ExecutionBlocker:
    """Put images of one size into a batch.

    Of several sizes there is none, and whoever wants it is told so.
    """
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
        return io.Schema(
            node_id="G2RPO_ScoreRollout",
            display_name="Score Rollout",
            category=SCORING,
            description="Decode a rollout's completions and score each of them.",
            inputs=[
                RolloutWire.Input("rollout", tooltip="From Rollout."),
                io.Vae.Input("vae", tooltip="The VAE of the model that made the rollout."),
                RewardWire.Input("reward", tooltip="From Load Reward, or several from Mix Rewards."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip=(
                        f"The prompt that the rollout was made with, at most {MAX_CHARACTERS} characters; "
                        "rewards read it."
                    ),
                ),
            ],
            outputs=[
                ScoresWire.Output("scores", display_name="scores", tooltip="For Advantages."),
                io.Image.Output(
                    "pictures",
                    display_name="pictures",
                    tooltip="The decoded completions, in the order of the rollout.",
                ),
                io.String.Output(
                    "table",
                    display_name="table",
                    tooltip="The ranking as text, with each reward's own score.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

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
        )
        scorer([0] * len(latents), list(range(len(latents))), latents)
        pictures = torch.stack([scorer.pictures[0, i] for i in range(len(latents))])
        names = tuple(each.name for each in reward.rewards)
        found = scorer.scores[:, 0]
        scores = ScoresData(
            names, reward.weights, found, text, pictures.nan_to_num(0.0), reward.mix, reward.gates
        )
        table = score_table(reward, scores.values, [], "completions")
        return io.NodeOutput(scores, scores.pictures, table, ui=show(cls, table))


class ScoresFromValues(io.ComfyNode):
    """Anybody's judgement of a rollout."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        return io.Schema(
            node_id="G2RPO_ScoresFromValues",
            display_name="Scores From Values",
            category=SCORING,
            description=(
                "Let any graph, or your own votes, judge a rollout: one number per completion, higher is "
                "better."
            ),
            is_input_list=True,
            inputs=[
                RolloutWire.Input("rollout", tooltip="The rollout that is judged."),
                io.String.Input(
                    "votes",
                    default="",
                    multiline=True,
                    tooltip="One number per completion in the order of the rollout, separated by commas, "
                    "spaces or new lines; "
                    "nan where you have no opinion. Leave empty if values are connected.",
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
                    tooltip="The decoded completions, if the ranked grid is to show them.",
                ),
            ],
            outputs=[ScoresWire.Output("made", display_name="scores", tooltip="For Advantages.")],
        )

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
        return io.NodeOutput(
            ScoresData((name,), (1.0,), torch.tensor([found], dtype=torch.float32), "", shown)
        )


NODES: list[type[io.ComfyNode]] = [ScoreImages, SelectBest, ScoreRollout, ScoresFromValues]
