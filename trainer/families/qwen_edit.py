"""Qwen-Image-Edit (Alibaba), 2509 and 2511: the text encoder and the model both see the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from PIL import Image
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin

from ..model.prompt_cache import PICTURE_PARTS
from .files import diffusers_folder
from .files.parts import Parts
from .flux import pack
from .qwen_image import QwenImage
from .shared.editing import Editing, by_size, picture_of
from .shared.video_vae import encode_picture

if TYPE_CHECKING:
    from typing import Self

    from ..config.sections import ModelSection

BLANK = " "
# Of an image that Qwen2.5-VL looks at (its preprocessor_config.json).
PIXELS = {"shortest_edge": 56**2, "longest_edge": 12845056}
NEWEST = "__index_timestep_zero__"  # ComfyUI's mark of a 2511
PATCH = 28  # side in pixels of what is one token to Qwen2.5-VL
GLANCE = 384  # side of the square at whose area the text encoder of Plus looks at a picture


class Cond(NamedTuple):
    """One prompt's features, each of text and picture together, and its picture."""

    tokens: Tensor  # [L, joint_attention_dim]
    # The same of the negative prompt " "; [0, joint_attention_dim] where there is no guidance.
    without: Tensor
    picture: Tensor  # latent [C, h, w] as the model sees it


class QwenEdit(Editing, QwenImage):
    """A policy and decoder over either pipeline; every prompt starts from an image, no text is cut."""

    cond = Cond
    blank = None  # differs from picture to picture
    negative = BLANK

    @classmethod
    def load(cls, section: ModelSection, path: Path | None, device: torch.device | str) -> Self:
        """Load the model of a configuration's section onto a device."""
        own = "Edit" in diffusers_folder.pipeline_name(path)
        parts, pipeline = (from_folder if own else from_files)(cls, section, path, device)
        policy, size = cls.of(section, pipeline), section.reference_size
        policy.start_from_pictures(size)
        settings = type(pipeline).__name__, section.dtype, size, section.guidance > 1
        return parts.attach(policy, *settings, parts=PICTURE_PARTS)

    @classmethod
    def pipeline_of(cls, path: Path | None) -> Any:
        """Return the pipeline of a folder of its own; files are parts of Qwen-Image's."""
        own = {kind.__name__: kind for kind in (QwenImageEditPipeline, QwenImageEditPlusPipeline)}
        return own.get(diffusers_folder.pipeline_name(path), QwenImagePipeline)

    def text_tokens(self, longest: int, reference_size: int) -> int:
        """Return the most tokens of a prompt, which are never cut: its text's and the image's patches."""
        return longest + (reference_size // PATCH) ** 2

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[Cond]) -> Tensor:
        """Return v [B, C, h, w] in float32; guidance keeps the norm of every token's prediction."""
        return by_size(super().velocity, x, sigma, cond)

    def avoid(self, negative: str) -> None:
        """Let guidance move away from a negative prompt, which is read with every picture."""
        self.check_guided()
        self.negative = negative

    def key(self, prompt: str) -> str:
        """Return a key of a prompt's features, of which the negative prompt's are a part."""
        own = super().key(prompt)
        return own if self.negative == BLANK else f"{own}\n{self.negative}"

    def without(self, cond: Sequence[Cond]) -> list[Cond]:
        """Return what guidance moves away from, row by row: the negative prompt with the same picture."""
        return [c._replace(tokens=c.without) for c in cond]

    def seen(
        self, tokens: Tensor, cond: Sequence[Cond], height: int, width: int
    ) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Return the tokens that the model sees, the latents' first and the images' behind, and sizes."""
        pictures = torch.stack([c.picture for c in cond])
        sizes = [(1, height, width), (1, pictures.shape[2] // 2, pictures.shape[3] // 2)]
        return torch.cat([tokens, pack(pictures).to(tokens)], 1), sizes

    def encode_one(self, prompt: str) -> Cond:
        """Run Qwen2.5-VL on text and picture together, and the VAE on the picture."""
        image, processor = picture_of(prompt), self.pipeline.image_processor
        if image is None:
            raise ValueError(
                f'prompts: {prompt[:60]!a} has no picture to edit; write it as {{"prompt": "…", '
                f'"image": "picture.png"}}'
            )
        ratio = image.width / image.height
        width, height = area(ratio, self.reference_size)
        latent = encode_picture(
            self.vae, processor.preprocess(image, height, width).to(self.device), self.vae_dtype
        )[0]
        if isinstance(self.pipeline, QwenImageEditPlusPipeline):
            glance: Image.Image | list[Image.Image] = [
                processor.resize(image, *reversed(area(ratio, GLANCE)))
            ]
        else:
            glance = processor.resize(image, height, width)
        read = self.pipeline.encode_prompt
        tokens = read(prompt=str(prompt), image=glance, device=self.device)[0][0]
        without = (
            read(prompt=self.negative, image=glance, device=self.device)[0][0]
            if self.guidance > 1
            else tokens[:0]
        )
        return Cond(tokens, without.clone(), latent)


def from_folder(
    policy: type[QwenEdit], section: ModelSection, path: Path, device: torch.device | str
) -> tuple[Parts, Any]:
    """Load a pipeline from its own folder, of which files may replace parts."""
    parts = Parts(policy, section, path, device)
    return parts, parts.pipeline({"processor": read_processor(path)})


def from_files(
    policy: type[QwenEdit], section: ModelSection, path: Path | None, device: torch.device | str
) -> tuple[Parts, Any]:
    """Load a pipeline from files, or from Qwen-Image's folder with Edit's transformer."""
    if section.transformer is None:
        raise ValueError(
            f"model.edits is {section.edits}, but no file has that model's transformer; give it as "
            "model.transformer"
        )
    parts = Parts(policy, section, path, device)
    newest = section.edits == "qwen_edit_2511"
    if (NEWEST in parts.transformer.tensors) > newest or (newest and parts.folder):
        remedy = "set model.edits: qwen_edit_2511, and give its other parts as files or its own folder"
        raise ValueError(
            f"model.transformer {section.transformer}: Qwen-Image-Edit-2511 looks at its picture in "
            f"its own way; {remedy}"
        )
    parts.facts["transformer"]["zero_cond_t"] = newest
    plain = parts.pipeline()
    kind = QwenImageEditPipeline if section.edits == "qwen_edit" else QwenImageEditPlusPipeline
    return parts, kind(
        **plain.components, processor=PictureReader(picture_processor()(size=PIXELS), plain.tokenizer)
    )


class PictureReader(Qwen2VLProcessor):
    """Qwen2-VL's processor without its part for videos, which is never asked and needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
            [self.image_token, self.video_token]
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer)


def picture_processor() -> Any:
    """Return the class that makes patches by Pillow, which is the same on every machine."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    except ImportError:  # before transformers 5
        from transformers import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil
    return Qwen2VLImageProcessorPil


def read_processor(path: Path) -> PictureReader:
    """Read what turns a picture into the text encoder's patches from a folder."""
    place = path / "processor"
    try:
        images, tokenizer = (
            kind.from_pretrained(place, local_files_only=True)
            for kind in (picture_processor(), Qwen2Tokenizer)
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model.path {path}: its processor cannot be read ({reason}); "
            f"{diffusers_folder.remedy(path, 'processor')}"
        ) from error
    if len(tokenizer) < 256:
        raise ValueError(
            f"model.path {path}: the files of its processor's tokenizer are missing; "
            f"{diffusers_folder.remedy(path, 'processor')}"
        )
    return PictureReader(images, tokenizer)


def area(ratio: float, size: int) -> tuple[int, int]:
    """Return (width, height), multiples of 32, with about the area of a square."""
    width, height, _ = calculate_dimensions(size * size, ratio)
    return max(width, 32), max(height, 32)


POLICY = QwenEdit
