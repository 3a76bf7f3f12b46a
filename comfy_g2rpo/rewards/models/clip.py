"""What the model-backed rewards share: the object that a host sees, and CLIP's two towers on transformers'
own classes.

The trunk (the transformer blocks) runs in the dtype that was asked for. What turns its output into a score
(projections, heads, norms of embeddings) is the head and stays in float32: half precision would make ties of
close scores, and a group's z-score divides by their differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..protocol import Reward, RewardError
from .catalogue import Known
from .preprocess import Pictures
from .safe_folder import WEIGHTS, Folder, check_tokenizer, fill, read_tokenizer, table
from .score_noise import measured

CONTEXT = 77


class Judge(nn.Module):
    """The weights of a reward: see(pixels) → features, judge(features, prompts) → scores."""

    trunks: tuple[str, ...] = ("vision_model",)
    counts = False
    """Whether a score counts what is there or not, so that rounding changes all of a step or nothing."""
    may_abstain = False
    reads_prompt = True

    def check_prompts(self, prompts: Sequence[str], name: str) -> None:
        """Refuse prompts, by RewardError, before anything runs; `name` is the reward's."""

    @property
    def device(self) -> torch.device:
        """Return where the weights are now; a host may move them between calls."""
        return next(self.parameters()).device

    def see(self, pixels: Tensor) -> Tensor:
        """Read pictures [B, 3, size, size]: features [B, …] float32."""
        raise NotImplementedError

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score what was seen by prompts [B]: [B] float32."""
        raise NotImplementedError

    def embed(self, features: Tensor) -> Tensor:
        """Return unit-norm features [B, D], for distances between pictures."""
        return normalize(features, dim=-1)


@dataclass(eq=False)
class ModelReward(Reward):
    """A reward with weights; images go in `batch` at a time, and no score depends on it but by rounding."""

    name: str
    licence: str
    compares_across_prompts: bool
    note: str = field()
    module: Judge = field()
    pictures: Pictures
    batch: int = 32
    depends_on_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._noise: dict[tuple[torch.device, torch.dtype], float] = {}

    @classmethod
    def of(
        cls, known: Known, name: str, module: Judge, pictures: Pictures, dtype: torch.dtype, batch: int
    ) -> ModelReward:
        """Put a reward together: its trunk in `dtype`, its head in float32."""
        if batch < 1:
            raise RewardError(f"batch is {batch}; it must be at least 1")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise RewardError(f"dtype is {dtype}; a reward's trunk runs in float32, bfloat16 or float16")
        for trunk in module.trunks:
            getattr(module, trunk).to(dtype)
        return cls(name, known.licence, known.compares_across_prompts, known.note, module, pictures, batch)

    @property
    def runs_elsewhere(self) -> bool:
        """Return whether the scores are computed on another device than the CPU."""
        return self.module.device.type != "cpu"

    @property
    def may_abstain(self) -> bool:
        """Return whether a missing score is no failure."""
        return self.module.may_abstain

    @property
    def reads_prompt(self) -> bool:
        """Return whether scores depend on the prompt."""
        return self.module.reads_prompt

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that the judge cannot read."""
        self.module.check_prompts(prompts, self.name)

    def to(self, device: torch.device | str) -> ModelReward:
        """Move the weights to a device."""
        self.module.to(device)
        return self

    def noise(self) -> float:
        """Return the measured distance of scores of images that look the same: once per device and dtype."""
        if self.module.counts:
            return 0.0
        key = self.module.device, next(self.module.vision_model.parameters()).dtype
        if key not in self._noise:
            self._noise[key] = measured(self.score, self.pictures.size)
        return self._noise[key]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, H, W, 3] in [0, 1] by prompts [B]: [B] on the CPU, NaN where an image has one."""
        if isinstance(prompts, str) or len(prompts) != len(images):
            raise RewardError(
                f"reward '{self.name}' got {len(images)} images; give a list with one prompt per image"
            )
        scores = [self._score(images[part], prompts[part]) for part in self._parts(len(images))]
        broken = images.detach().flatten(1).isfinite().all(1).logical_not().cpu()
        return torch.where(broken, torch.nan, torch.cat(scores)) if scores else torch.zeros(0)

    @property
    def gradient(self) -> bool:
        """Return whether scores change smoothly with an image, which what is counted does not."""
        return not self.module.counts

    def differentiable(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, H, W, 3] in [0, 1], few at a time, by prompts [B]: [B] on the CPU, with a
        gradient.
        """
        trunk = next(self.module.vision_model.parameters())
        with torch.autocast(trunk.device.type, enabled=False):
            pixels = self.pictures.with_gradient(images, self.name).to(trunk.device, trunk.dtype)
            return self.module.judge(self.module.see(pixels), prompts).float().cpu()

    def embed(self, images: Tensor) -> Tensor:
        """Return unit-norm features [B, D] of images [B, H, W, 3] in [0, 1], float32 on the CPU."""
        return (
            torch.cat([self._embed(images[part]) for part in self._parts(len(images))])
            if len(images)
            else torch.zeros(0, 0)
        )

    def _parts(self, count: int) -> list[slice]:
        # Of one size, as far as can be: a kernel is chosen by the size of its batch, and rounds its own way.
        size = math.ceil(count / max(math.ceil(count / self.batch), 1))
        return [slice(start, start + size) for start in range(0, count, size or 1)]

    @torch.no_grad()
    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score one batch."""
        with torch.autocast(self.module.device.type, enabled=False):
            return self.module.judge(self._see(images), prompts).float().cpu()

    @torch.no_grad()
    def _embed(self, images: Tensor) -> Tensor:
        """Embed one batch."""
        with torch.autocast(self.module.device.type, enabled=False):
            return self.module.embed(self._see(images)).float().cpu()

    def _see(self, images: Tensor) -> Tensor:
        # The trunk's own dtype: not every version of transformers' towers casts what it is given.
        trunk = next(self.module.vision_model.parameters())
        return self.module.see(self.pictures(images, self.name).to(trunk.device, trunk.dtype))


class Clip(Judge):
    """CLIP (arXiv 2103.00020): cosine of a picture's and a prompt's embedding, [B], before any scale."""

    trunks = ("vision_model", "text_model")

    def __init__(self, config: dict[str, Any], tokenizer: Any) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        vision, text = CLIPVisionConfig(**config["vision_config"]), CLIPTextConfig(**config["text_config"])
        self.vision_model, self.text_model = CLIPVisionModel(vision), CLIPTextModel(text)
        self.visual_projection = nn.Linear(vision.hidden_size, config["projection_dim"], bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config["projection_dim"], bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(0.0))
        self.tokenizer = tokenizer

    def see(self, pixels: Tensor) -> Tensor:
        """Embed pictures [B, 3, size, size]: unit norm, [B, D]."""
        return normalize(self.visual_projection(self.vision_model(pixels).pooler_output.float()), dim=-1)

    def read(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts [B], cut off after 77 tokens: unit norm, [B, D]."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
        ).input_ids
        hidden = self.text_model(tokens.to(self.device)).last_hidden_state
        # The end of the text has the highest number of all tokens and looks back at the whole text; what pads
        # it comes after.
        return normalize(
            self.text_projection(hidden[torch.arange(len(tokens)), tokens.argmax(-1)].float()), dim=-1
        )

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine [B] of embeddings [B, D] and prompts [B], each prompt read once."""
        return self.scale() * (features * self._read_once(prompts)).sum(-1)

    def scale(self) -> Tensor:
        """Return what the cosine is multiplied by."""
        return torch.ones((), device=self.device)

    def _read_once(self, prompts: Sequence[str]) -> Tensor:
        distinct = list(dict.fromkeys(prompts))
        place = {prompt: row for row, prompt in enumerate(distinct)}
        return self.read(distinct)[[place[prompt] for prompt in prompts]]


class ScaledClip(Clip):
    """CLIP with its own learned temperature, exp(logit_scale)."""

    def scale(self) -> Tensor:
        """Return what the cosine is multiplied by."""
        return self.logit_scale.exp()


def clip_from(folder: Folder, kind: type[Clip]) -> tuple[Clip, int]:
    """Build CLIP from a folder in transformers' layout: the module and the side of its pictures."""
    from transformers import CLIPTokenizerFast

    place = folder.path / "config.json"
    config = folder.json("config.json")
    vision, text = table(config, "vision_config", place), table(config, "text_config", place)
    width = table({"config": config}, "config", place).get("projection_dim", 512)
    tokenizer = read_tokenizer(folder, CLIPTokenizerFast, ("vocab.json", "merges.txt"))
    sections = {"vision_config": vision, "text_config": text, "projection_dim": width}
    module = fill(lambda: kind(sections, tokenizer), folder.file(WEIGHTS))
    check_tokenizer(tokenizer, module.text_model.config, CONTEXT, place)
    return module, module.vision_model.config.image_size


WIDTHS = (1024, 128, 64, 16, 1)


def mlp(width: int, widths: Sequence[int] = WIDTHS) -> nn.Sequential:
    """Stack linear layers; the originals' dropouts do nothing when judging."""
    return nn.Sequential(
        *(nn.Linear(before, after) for before, after in zip((width, *widths), widths, strict=False))
    )
