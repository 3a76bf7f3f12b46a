"""The sections of a run's configuration: every field has a type, bounds and a sentence."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, create_model, field_validator
from pydantic_core import PydanticCustomError

from comfy_g2rpo.options import CLIPS, MAX_CHARACTERS, complaint
from comfy_g2rpo.priors.prior_settings import PriorSettings
from comfy_g2rpo.recipes import RECIPES, Recipe
from comfy_g2rpo.run import pace
from comfy_g2rpo.sampling.search_settings import SearchSettings
from comfy_g2rpo.speed.cheap_completions import Speed

from .family_names import DEFAULT_FAMILY, EDITS, FAMILIES, Schedule


def setting(default: Any, text: str, low: float, high: float) -> Any:
    """Declare a number with its sentence and its bounds, which `comfy_g2rpo.options` checks."""
    return Field(default, description=text, json_schema_extra={"low": low, "high": high})


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

    @field_validator("*")
    @classmethod
    def keep_bounds(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what is out of its field's bounds."""
        rule = cls.model_fields[info.field_name].json_schema_extra or {}
        left_out = value is None or (value == () and rule.get("may_be_empty"))
        wrong = complaint("", value, rule["low"], rule["high"]) if rule and not left_out else ""
        if wrong:
            raise PydanticCustomError("bounds", "{sentence}", {"sentence": wrong})
        return value


class FrozenLora(Section):
    """A LoRA file that belongs to the model that is aligned."""

    path: str = Field(
        description="LoRA file of any form, added to the model before anything else; it is not trained."
    )
    strength: float = setting(1.0, "Its strength, as in ComfyUI's loader.", -100, 100)


class ModelSection(Section):
    """The model that is aligned."""

    family: Literal[tuple(FAMILIES)] = Field(DEFAULT_FAMILY, description="Kind of model.")
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
        (), description="LoRA files that are already applied to the model; they stay as they are."
    )
    guidance: float = setting(
        1.0, "Guidance; 1 is none, more doubles the cost of a forward; FLUX.1 takes it as an input.", 0, 50
    )
    negative_prompt: str | None = Field(
        None,
        description=(
            "What pictures should not show, in place of the empty prompt; needs a guidance above 1 that is "
            "no input of the model."
        ),
    )
    width: int = setting(512, "Width of the pictures in pixels.", 16, 4096)
    height: int = setting(512, "Height of the pictures in pixels.", 16, 4096)
    sizes: tuple[str, ...] = Field(
        (),
        description=(
            "Sizes that training steps take in turn, such as [512x512, 640x448]; evaluations keep width and "
            "height."
        ),
    )
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
    max_sequence_length: int = setting(256, "Tokens for the T5 encoder; 0 where the model has none.", 0, 512)
    frames: int = setting(
        1, "Frames of a clip: 1 for pictures, or 1 more than a multiple of 4 (wan).", 1, 241
    )
    edits: Literal[tuple(EDITS)] | None = Field(
        None,
        description=(
            "Model that edits the image of a prompt, where its transformer comes from a file; its own "
            "folder says so itself."
        ),
    )
    reference_size: int = setting(
        1024,
        "Prompts that start from an image (FLUX.1 Kontext, Qwen-Image-Edit): side of a square to whose "
        "area it is brought.",
        64,
        2048,
    )

    @field_validator("sizes")
    @classmethod
    def read_sizes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse what is no size, and a size out of the bounds of width and height."""
        for text in value:
            sides = text.split("x")
            if len(sides) != 2 or any(not side.isdecimal() or not 16 <= int(side) <= 4096 for side in sides):
                sentence = f" has {text[:40]!a}; write a size as 640x448, each side between 16 and 4096"
                raise PydanticCustomError("bounds", "{sentence}", {"sentence": sentence})
        return value

    @property
    def step_sizes(self) -> list[tuple[int, int]]:
        """List the sizes (width, height) of training steps."""
        found = [tuple(map(int, text.split("x"))) for text in self.sizes]
        return found or [(self.width, self.height)]

    @field_validator("negative_prompt")
    @classmethod
    def keep_short(cls, value: str | None) -> str | None:
        """Refuse a negative prompt that is longer than prompts may be."""
        if value is not None and len(value) > MAX_CHARACTERS:
            sentence = f" has {len(value)} characters; at most {MAX_CHARACTERS} are allowed"
            raise PydanticCustomError("bounds", "{sentence}", {"sentence": sentence})
        return value


class MemorySection(Section):
    """How the model is kept, so that a run fits its card; `--preset 16gb` sets these."""

    quantization: Literal["none", "fp8", "nf4"] = Field(
        "none",
        description=(
            "Weights of the transformer's blocks: as model.dtype, in 8 bit, or in 4 (bitsandbytes); the "
            "adapter is fp32."
        ),
    )
    block_swap: int = setting(
        0,
        "Blocks of the transformer whose weights wait in the computer's memory and are fetched when needed.",
        0,
        1000,
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

    rank: int = setting(16, "Rank of the adapter.", 1, 512)
    alpha: float = setting(16.0, "Its scale is alpha / rank.", 0.0001, 4096)
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
    timeout: float | None = setting(
        None,
        "Seconds to wait for an answer; if not given, 60 for a judge, 600 for your own reward.",
        0.1,
        86400,
    )
    retries: int = setting(3, "Further attempts after a failed question.", 0, 20)
    concurrency: int = setting(8, "Questions that are asked at once.", 1, 64)
    batch: int = setting(32, "Pictures that a reward model scores at once.", 1, 1024)
    device: str = Field("auto", description="Where a reward model runs: auto, cpu, cuda, mps.")
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision of a reward model's trunk; its head is always fp32."
    )
    frames: Literal[CLIPS] = Field(
        CLIPS[0],
        description=(
            "How a clip is judged: mean of its frames, min for the worst, or strip for some side by side."
        ),
    )


class TrainedReward(RewardSection):
    """One of the rewards that are trained on."""

    weight: float = setting(
        1.0, "Weight of its advantage; negative trains against it, 0 leaves its gate.", -1000, 1000
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

    weight: float = setting(
        1.0,
        "Its say in the watch and in the choice of the best step; 0 has none, below 0 less is better.",
        -1000,
        1000,
    )


class ReportSection(Section):
    """Where a run shows its metrics beside its own folder."""

    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = Field(
        (), description="Trackers that get the metrics, too: tensorboard, trackio, wandb; install them first."
    )
    project: str = Field("g2rpo", description="Project under which trackio and wandb list the run.")

    @field_validator("trackers", mode="before")
    @classmethod
    def take_name(cls, value: Any) -> Any:
        """Take a single name for a list of it."""
        return [value] if isinstance(value, str) else value


class PromptSection(Section):
    """Where prompts come from."""

    train: str = Field(
        description=(
            "File of prompts to train on: .txt, one per line, .jsonl, or .csv with a column prompt; or the "
            "prompts themselves, a text with a line for each."
        )
    )
    heldout: str | None = Field(None, description="File of prompts that only measure, or these themselves.")
    heldout_share: float = setting(
        0.0, "Without a held-out file: share of the prompts that is set aside.", 0, 0.99
    )


PairsSection = create_model(
    "PairsSection",
    __base__=Section,
    __doc__="Kept votes to learn from, where method.objective is pairs; g2rpo pairs writes this section.",
    runs=(
        tuple[str, ...],
        Field((), description="Run folders whose kept votes are learned from; needs objective pairs."),
    ),
    # A word of Python's own, which a class cannot have as a field.
    **{
        "from": (
            Literal["votes", "rewards"],
            Field(
                "votes",
                description=(
                    "Who prefers: people, by their votes, or the rewards, which judge the kept pictures anew."
                ),
            ),
        )
    },
)


def _made_of(options: type, keep_defaults: bool = True) -> dict[str, tuple[Any, Any]]:
    """Make fields of a dataclass whose fields document themselves; None, where defaults are not kept."""
    made, kinds = {}, get_type_hints(options)
    for field in dataclasses.fields(options):
        rule, kind = field.metadata, kinds[field.name]
        default = field.default if keep_defaults else None
        kind = Literal[rule["choices"]] if rule["choices"] else kind
        bounds = {key: rule[key] for key in ("low", "high", "may_be_empty")}
        found = Field(
            default, description=rule["help"], json_schema_extra=None if rule["low"] is None else bounds
        )
        made[field.name] = (kind if default is not None else kind | None, found)
    return made


MethodSection = create_model(
    "MethodSection",
    __base__=Section,
    __doc__="A named method and what differs from it.",
    name=(Literal[tuple(RECIPES)], Field("g2rpo", description="Method to start from.")),
    **_made_of(Recipe, keep_defaults=False),
)

SpeedSection = create_model("SpeedSection", __base__=Section, __doc__=Speed.__doc__, **_made_of(Speed))

TrainSection = create_model(
    "TrainSection", __base__=Section, __doc__=pace.Pace.__doc__, **_made_of(pace.Pace)
)

SearchSection = create_model(
    "SearchSection", __base__=Section, __doc__=SearchSettings.__doc__, **_made_of(SearchSettings)
)

PriorSection = create_model(
    "PriorSection", __base__=Section, __doc__=PriorSettings.__doc__, **_made_of(PriorSettings)
)
