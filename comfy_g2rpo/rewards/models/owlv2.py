"""Objects, counts, colours and places as the prompt asks for them, found by OWLv2 (arXiv 2306.09683).

What is asked for, and what counts, is GenEval's (`geneval.py`). The detector is another: GenEval's
Mask2Former knows COCO's 80 classes, OWLv2 looks for any words. A colour is told by which of ten coloured
queries fits a box best. Pictures: black below or to the right makes them square, then 960 × 960; queries: 16
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..protocol import RewardError
from .catalogue import KNOWN
from .clip import Judge, ModelReward
from .geneval import COLOURS, Scene, Seen, Thing, parse, score
from .preprocess import Pictures
from .safe_folder import WEIGHTS, Folder, check_tokenizer, fill, read_tokenizer, table

CONTEXT = 16
SURE = 0.25  # of a box's best query, from which it counts
SAME = 0.5  # overlap (IoU) from which two boxes of one thing are one object
ANY = 0.8  # and of two things: a dog is no cat besides
MAX_BOXES = 32


class Detector(Judge):
    """OWLv2 as a judge of scenes."""

    trunks = ("vision_model", "text_model")
    counts = True
    may_abstain = True

    def __init__(self, detector: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.detector, self.tokenizer = detector, tokenizer

    @property
    def vision_model(self) -> nn.Module:
        """Return the tower that reads pictures."""
        return self.detector.owlv2.vision_model

    @property
    def text_model(self) -> nn.Module:
        """Return the tower that reads queries."""
        return self.detector.owlv2.text_model

    def check_prompts(self, prompts: Sequence[str], name: str) -> None:
        """Refuse prompts of which none can be read."""
        if prompts and not any(map(parse, prompts)):
            raise RewardError(
                f"reward '{name}' can read none of the prompts; write them like: a photo of two red apples, "
                "a photo of a dog left of a cat"
            )

    def see(self, pixels: Tensor) -> Tensor:
        """Read pictures [B, 3, size, size]: a feature per patch, [B, rows, columns, D]."""
        states = self.vision_model.post_layernorm(self.vision_model(pixels)[0]).float()
        # As OWLv2 has it, every patch knows of the whole picture.
        patches = self.detector.layer_norm(states[:, 1:] * states[:, :1])
        return patches.unflatten(1, (math.isqrt(patches.shape[1]), -1))

    def embed(self, features: Tensor) -> Tensor:
        """Return the mean over the patches, unit norm: [B, D]."""
        return normalize(features.flatten(1, 2).mean(1), dim=-1)

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score what was seen by prompts [B]: [B], NaN for a prompt that is not in GenEval's form."""
        scores = torch.full((len(prompts),), torch.nan)
        for prompt in dict.fromkeys(prompts):
            rows = [row for row, other in enumerate(prompts) if other == prompt]
            if (scene := parse(str(prompt))) is not None:
                for row, seen in zip(rows, look(scene, features[rows], self.find), strict=True):
                    scores[row] = score(scene, seen)
        return scores

    def find(self, features: Tensor, queries: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return boxes [B, N, 4] (left, top, right, bottom) and how sure of each every query is [B, N, Q]."""
        words = self.tokenizer(
            list(queries), padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
        ).to(self.device)
        read = self.text_model(input_ids=words.input_ids, attention_mask=words.attention_mask)[1].float()
        embeds = normalize(self.detector.owlv2.text_projection(read), dim=-1).expand(len(features), -1, -1)
        patches = features.flatten(1, 2)
        logits, _ = self.detector.class_predictor(patches, embeds, torch.ones_like(embeds[..., 0]).bool())
        middle, size = self.detector.box_predictor(patches, features).split(2, -1)
        return torch.cat([middle - size / 2, middle + size / 2], -1), logits.sigmoid()


def queries_for(thing: Thing) -> list[str]:
    """List what a thing is looked for by: its name, or its name in every colour."""
    return (
        [f"a photo of a {colour} {thing.noun}" for colour in COLOURS]
        if thing.colour
        else [f"a photo of a {thing.noun}"]
    )


def look(
    scene: Scene, features: Tensor, find: Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor]]
) -> list[list[Seen]]:
    """Look for a scene's things in B pictures: for each picture, what was seen of each thing.

    A box is of the thing whose query is the surest of it.
    """
    queries = [queries_for(thing) for thing in scene.things]
    boxes, sure = (found.cpu() for found in find(features, [query for each in queries for query in each]))
    parts = sure.split([len(each) for each in queries], -1)
    best, kinds = torch.stack([part.amax(-1) for part in parts], -1).max(-1)
    found = []
    for picture in range(len(features)):
        kept = apart(boxes[picture], best[picture], kinds[picture])
        seen = []
        for i, (thing, part) in enumerate(zip(scene.things, parts, strict=True)):
            own = [box for box in kept if kinds[picture, box] == i]
            colours = part[picture, own].argmax(-1).tolist()
            named = tuple(COLOURS[c] if thing.colour else None for c in colours)
            seen.append(Seen(boxes[picture, own], named))
        found.append(seen)
    return found


def apart(boxes: Tensor, sure: Tensor, kinds: Tensor) -> list[int]:
    """Choose from boxes [N, 4] of kinds [N], the surest [N] first, the sure ones of different objects."""
    kept: list[int] = []
    for i in sure.argsort(descending=True, stable=True).tolist():
        if sure[i] < SURE or len(kept) == MAX_BOXES:
            break
        most = torch.where(kinds[kept] == kinds[i], SAME, ANY)
        if (overlap(boxes[i], boxes[kept]) < most).all():
            kept.append(i)
    return kept


def overlap(box: Tensor, others: Tensor) -> Tensor:
    """Return the area that a box [4] has in common with others [N, 4], by that of both: [N]."""
    shared = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])).clamp(min=0)
    area, areas = (box[2:] - box[:2]).prod(), (others[:, 2:] - others[:, :2]).prod(-1)
    both = shared.prod(-1)
    return both / (area + areas - both).clamp(min=1e-12)


def grid(rows: int) -> Tensor:
    """Return what OWLv2 adds to a patch's box before the sigmoid: its own place and size, [rows², 4]."""
    steps = torch.arange(1, rows + 1) / rows
    down, across = torch.meshgrid(steps, steps, indexing="ij")
    size = torch.full_like(down, 1 / rows)
    share = torch.stack([across, down, size, size], -1).flatten(0, 1)
    return torch.log(share + 1e-4) - torch.log1p(1e-4 - share)


def load(folder: Folder, name: str, dtype: torch.dtype, batch: int) -> ModelReward:
    """Load the detector from its folder."""
    from transformers import CLIPTokenizerFast, Owlv2Config, Owlv2ForObjectDetection

    config, place = folder.json("config.json"), folder.path / "config.json"
    vision, text = table(config, "vision_config", place), table(config, "text_config", place)
    width = table({"config": config}, "config", place).get("projection_dim", 512)
    tokenizer = read_tokenizer(folder, CLIPTokenizerFast, ("vocab.json", "merges.txt"))
    made = Owlv2Config(vision_config=vision, text_config=text, projection_dim=width)
    detector = fill(lambda: Owlv2ForObjectDetection(made), folder.file(WEIGHTS))
    check_tokenizer(tokenizer, detector.owlv2.text_model.config, CONTEXT, place)
    side = detector.config.vision_config.image_size
    rows = side // detector.config.vision_config.patch_size
    # No weight, and so not in the file; a buffer or not, by transformers' version.
    detector.box_bias = grid(rows)
    pictures = Pictures(side, "corner")
    return ModelReward.of(KNOWN["detection"], name, Detector(detector, tokenizer), pictures, dtype, batch)
