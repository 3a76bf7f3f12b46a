"""The sections of a run's configuration: every field has a type, bounds and a sentence."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, create_model, field_validator
from pydantic_core import PydanticCustomError

from comfy_g2rpo import recipes
from comfy_g2rpo.rewards.clips import DEFAULT, MODES
from comfy_g2rpo.run import pace, rank_guard

from .family_names import EDITS, FAMILIES, Schedule


class Section(BaseModel):
    """A part of the configuration: closed and unchangeable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where they would pass for 1 and 0."""
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise PydanticCustomError("other", "true or false")
        return value


class FrozenLora(Section):
    """A LoRA file that belongs to the model that is aligned."""

    path: str = Field(
        description="LoRA file of any form, added to the model before anything else; it is not trained."
    )
    strength: float = Field(1.0, ge=-100, le=100, description="Its strength, as in ComfyUI's loader.")


class ModelSection(Section):
    """The model that is aligned."""

    family: Literal[tuple(FAMILIES)] = Field("sd3", description="Kind of model.")
    path: str | None = Field(
        None,
        description=(
            "Folder of the model, the name of one that the Hugging Face cache holds, or a checkpoint; "
            "nothing is downloaded."
        ),
    )
    transformer: str | None = Field(
        None, description="File of the transformer, such as one of ComfyUI's models/diffusion_models."
    )
    text_encoders: tuple[str, ...] = Field(
        (), description="Files of the text encoders, such as those of ComfyUI's models/text_encoders."
    )
    vae: str | None = Field(None, description="File of the VAE, such as one of ComfyUI's models/vae.")
    tokenizers: str | None = Field(
        None,
        description=(
            "Folder with tokenizer, tokenizer_2 …; without it those of the ComfyUI that holds the files, "
            "or of COMFYUI_PATH."
        ),
    )
    lora: tuple[FrozenLora, ...] = Field(
        (), description="LoRA files that the model already wears, and keeps."
    )
    guidance: float = Field(
        1.0,
        ge=0,
        le=50,
        description="Guidance; 1 is none, more doubles the cost of a forward; FLUX.1 takes it as an input.",
    )
    width: int = Field(512, ge=16, le=4096, description="Width of the pictures in pixels.")
    height: int = Field(512, ge=16, le=4096, description="Height of the pictures in pixels.")
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision of the model; the method's own arithmetic is always fp32."
    )
    schedule: Schedule = Field(
        "method",
        description=(
            "Noise levels: by method.shift, or as the model's own pipeline (by resolution) or ComfyUI "
            "shifts them."
        ),
    )
    max_sequence_length: int = Field(
        256, ge=0, le=512, description="Tokens for the T5 encoder; 0 where the model has none."
    )
    frames: int = Field(
        1, ge=1, le=241, description="Frames of a clip: 1 for pictures, or 1 more than a multiple of 4 (wan)."
    )
    edits: Literal[tuple(EDITS)] | None = Field(
        None,
        description=(
            "Model that edits the image of a prompt, where its transformer comes from a file; its own "
            "folder says so itself."
        ),
    )
    reference_size: int = Field(
        1024,
        ge=64,
        le=2048,
        description=(
            "Prompts that start from an image (FLUX.1 Kontext, Qwen-Image-Edit): side of a square to whose "
            "area it is brought."
        ),
    )


class MemorySection(Section):
    """How the model is kept, so that a run fits its card; `--preset 16gb` sets these."""

    quantization: Literal["none", "fp8", "nf4"] = Field(
        "none",
        description=(
            "Weights of the transformer's blocks: as model.dtype, in 8 bit, or in 4 (bitsandbytes); the "
            "adapter is fp32."
        ),
    )
    block_swap: int = Field(
        0,
        ge=0,
        le=1000,
        description=(
            "Blocks of the transformer whose weights wait in the computer's memory and are fetched when "
            "needed."
        ),
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute a block's activations again in the backward pass instead of keeping them."
    )
    vae_tiling: bool = Field(
        False,
        description="Decode pictures tile by tile, which shows at seams; train.decode_batch: 1 goes first.",
    )
    text_encoders: Literal["device", "cpu"] = Field(
        "device", description="Where prompts are encoded, once, before anything else."
    )
    rewards_in_turn: bool = Field(
        False, description="Keep reward models in the computer's memory but for the one that judges."
    )


class LoraSection(Section):
    """The adapter that is trained."""

    rank: int = Field(16, ge=1, le=512, description="Rank of the adapter.")
    alpha: float = Field(16.0, gt=0, le=4096, description="Its scale is alpha / rank.")
    targets: Literal["attention", "attention+feed_forward"] = Field(
        "attention", description="Layers that get an adapter."
    )
    init: str | None = Field(None, description="LoRA file to continue from.")


class RewardSection(Section):
    """A reward: built in, installed, your own (`path`), or a judge over HTTP (`url`)."""

    name: str = Field(description="Name of the reward; with path or url, what metrics call it.")
    path: str | None = Field(
        None, description="Your own reward, as rewards.py:function or package.module:object."
    )
    url: str | None = Field(None, description="Address of a judge over HTTP.")
    protocol: Literal["g2rpo", "yes_no", "rating", "pairwise"] = Field(
        "g2rpo",
        description="What the judge speaks: this project's protocol, or OpenAI's with a kind of question.",
    )
    model: str | None = Field(None, description="Model that the judge is asked to use.")
    question: str | None = Field(None, description="Question to the judge; {prompt} stands for the prompt.")
    reference: str | None = Field(
        None, description="Picture to compare with; a prompt's own column of that name goes first."
    )
    palette: tuple[str, ...] | None = Field(
        None, description="Colours to compare with, such as ['#ff8800']; a prompt's own go first."
    )
    timeout: float = Field(60.0, ge=0.1, le=3600, description="Seconds to wait for an answer of the judge.")
    retries: int = Field(3, ge=0, le=20, description="Further attempts after a failed question.")
    concurrency: int = Field(8, ge=1, le=64, description="Questions that are asked at once.")
    batch: int = Field(32, ge=1, le=1024, description="Pictures that a reward model scores at once.")
    device: str = Field("auto", description="Where a reward model runs: auto, cpu, cuda, mps.")
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision of a reward model's trunk; its head is always fp32."
    )
    frames: Literal[MODES] = Field(
        DEFAULT,
        description=(
            "How a clip is judged: mean of its frames, min for the worst, or strip for some side by side."
        ),
    )


class TrainedReward(RewardSection):
    """One of the rewards that are trained on."""

    weight: float = Field(
        1.0,
        ge=-1000,
        le=1000,
        description="Weight of its advantage; negative trains against it, 0 leaves its gate.",
    )
    gate: float | None = Field(
        None,
        description=(
            "Score below which (above, for a negative weight) a picture is the worst of its group in every "
            "reward."
        ),
    )


class HeldoutReward(RewardSection):
    """One of the rewards that only measure."""

    weight: float = Field(
        1.0,
        ge=-1000,
        le=1000,
        description=(
            "Its say in the watch and in the choice of the best step; 0 has none, below 0 less is better."
        ),
    )


class PromptSection(Section):
    """Where prompts come from."""

    train: str = Field(description="File of prompts to train on: .txt, one per line, or .jsonl.")
    heldout: str | None = Field(None, description="File of prompts that only measure.")
    heldout_share: float = Field(
        0.0, ge=0, lt=1, description="Without a held-out file: share of the prompts that is set aside."
    )


def _field(field: dataclasses.Field[Any], annotation: Any, default: Any) -> tuple[Any, Any]:
    """Make a field of the configuration from one that documents itself: its type, bounds and sentence."""
    rule = field.metadata
    bounds = {"ge": rule["low"], "le": rule["high"]} if rule["low"] is not None else {}
    if rule["choices"]:
        annotation = Literal[rule["choices"]]
    elif get_origin(annotation) is tuple:
        annotation = tuple[Annotated[get_args(annotation)[0], Field(**bounds)], ...]
        bounds = {"min_length": 1}
    if default is None:
        annotation = annotation | None
    return annotation, Field(default, description=rule["help"], **({} if rule["choices"] else bounds))


MethodSection = create_model(
    "MethodSection",
    __base__=Section,
    __doc__="A named method and what differs from it.",
    name=(Literal[tuple(recipes.RECIPES)], Field("g2rpo", description="Method to start from.")),
    **{
        name: _field(recipes.FIELDS[name], kind, None)
        for name, kind in get_type_hints(recipes.Recipe).items()
    },
)

SpeedSection = create_model(
    "SpeedSection",
    __base__=Section,
    __doc__=rank_guard.Speed.__doc__,
    **{
        name: _field(rank_guard.FIELDS[name], kind, rank_guard.FIELDS[name].default)
        for name, kind in get_type_hints(rank_guard.Speed).items()
    },
)

TrainSection = create_model(
    "TrainSection",
    __base__=Section,
    __doc__=pace.Pace.__doc__,
    **{
        name: _field(pace.FIELDS[name], kind, pace.FIELDS[name].default)
        for name, kind in get_type_hints(pace.Pace).items()
    },
)
