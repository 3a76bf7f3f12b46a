"""Load Noise Prior and Apply Noise Prior: start noise that a trained prior has moved by the prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ...comfy_g2rpo.files.safe import stamps
from ...comfy_g2rpo.priors.noise_prior import Trained, Vectors, load_prior, text_feature
from ..host.comfyui import contained
from ..inputs.checks import check_inputs
from ..inputs.finding import offered
from ..inputs.widgets import output, show
from ..model.comfy_policy import check_flow
from ..sampling import start_noise
from ..types import SAMPLING, PriorData, PriorWire

FOLDER = "noise_priors"
NONE = "(none in models/noise_priors)"
MAX_FILES = 1000


def root() -> Path:
    """Return where ComfyUI keeps noise priors."""
    return Path(folder_paths.models_dir) / FOLDER


def choices() -> list[str]:
    """List the noise priors; a line that says where they belong where there are none."""
    place = root()
    found = sorted(path.name for path in place.glob("*.safetensors")) if place.is_dir() else []
    return found[:MAX_FILES] or [NONE]


def vectors_of(model: Any) -> Vectors:
    """Measure a MODEL's own weights; where a patch is in them, what was there before."""

    def weight(name: str, now: Tensor) -> Tensor:
        kept = model.backup.get(f"diffusion_model.{name}")
        return now if kept is None else kept.weight

    named = model.model.diffusion_model.named_parameters()
    return Vectors.of((name, weight(name, now)) for name, now in named)


def features_of(conditioning: Any) -> Tensor:
    """Return the text features [n, d] of a CONDITIONING's first entry, one per row of its batch."""
    try:
        tokens, more = conditioning[0][:2]
        pooled, mask = more.get("pooled_output"), more.get("attention_mask")
        rows = []
        for i, row in enumerate(tokens):
            whole = row[mask[i].bool()] if mask is not None and mask.ndim == 2 else row
            rows.append(text_feature(whole, None if pooled is None else pooled[i]))
        return torch.stack(rows)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"conditioning: it holds no text features ({type(error).__name__}); connect CLIP Text Encode"
        ) from error


@dataclass(frozen=True)
class MovedNoise:
    """A NOISE: another one's, moved by strength · μ(c)."""

    noise: Any
    trained: Trained
    features: Tensor  # [n, d]
    strength: float

    @property
    def seed(self) -> int:
        """Return the given noise's seed."""
        return self.noise.seed

    def generate_noise(self, input_latent: dict[str, Any]) -> Tensor:
        """Return noise like the latent's samples [B, C, …]."""
        if not self.strength:
            return self.noise.generate_noise(input_latent)
        samples = input_latent["samples"]
        self.trained.check_shape(samples.shape[1:])
        made = start_noise(self.noise, input_latent)
        return made + self.strength * self.shift(len(made)).to(made).view(-1, *made.shape[1:])

    def shift(self, rows: int) -> Tensor:
        """Return μ [rows or 1, …]: each row's own where there are as many prompts as rows."""
        some: Sequence[Tensor] = self.features if len(self.features) == rows else self.features[:1]
        return torch.stack([self.trained.shift(feature) for feature in some])


class LoadNoisePrior(io.ComfyNode):
    """A noise prior from models/noise_priors."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_LoadNoisePrior",
            display_name="Load Noise Prior",
            category=SAMPLING,
            description="Load a noise prior that g2rpo prior has trained: it moves start noise to where the "
            "reward finds more. It fits one checkpoint and one size.",
            inputs=[
                io.Combo.Input(
                    "prior",
                    options=choices(),
                    tooltip="A file in models/noise_priors; press R after putting one there.",
                ),
                io.Model.Input(
                    "model",
                    tooltip="The model that you sample with: a prior of another checkpoint is refused. A "
                    "LoRA does not count.",
                ),
            ],
            outputs=[
                output(PriorWire, "noise_prior", "For Apply Noise Prior.", shown="prior"),
                output(io.String, "report", "What it was trained for, and what it gained there."),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return offered(schema, "prior guidance, noise prior, golden noise, initial noise, better images")

    @classmethod
    def fingerprint_inputs(cls, prior: str = NONE, model: Any = None) -> str:
        """Return what changes where the file does."""
        return hashlib.sha256(stamps([root() / str(prior)]).encode(errors="replace")).hexdigest()

    @classmethod
    def execute(cls, prior: str, model: Any) -> io.NodeOutput:
        """Read the file, and see that it is for this model."""
        check_inputs(cls, locals())
        if prior == NONE:
            raise ValueError(
                "prior: there is none yet; train one on the command line by g2rpo prior, put it into "
                "models/noise_priors, and press R"
            )
        check_flow(model)
        trained = load_prior(contained(root(), prior, "prior"))
        trained.check_model(vectors_of(model))
        text = described(trained)
        return io.NodeOutput(PriorData(trained), text, ui=show(cls, text))


def described(trained: Trained) -> str:
    """Say what a prior is for and what it gained; notes of a file are cut short and shown as plain text."""
    size, notes = "×".join(map(str, trained.prior.shape)), trained.notes
    said = {"gain": "gained", "gain_with_another_prompts_shift": "with another prompt's shift", "kl": "KL"}
    lines = [f"{label} {ascii(str(notes[key])[:200])[1:-1]}" for key, label in said.items() if key in notes]
    # ASCII alone, but for the sign that stands in every gain.
    return "\n".join([f"for latents of {size}", *(line.replace("\\xb1", "±") for line in lines)])


class ApplyNoisePrior(io.ComfyNode):
    """A NOISE that a prior has moved by the prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_ApplyNoisePrior",
            display_name="Apply Noise Prior",
            category=SAMPLING,
            description="Moves start noise by what a noise prior has learned for the prompt. The model stays "
            "as it is, and an image costs no more than before.",
            inputs=[
                io.Noise.Input("noise", tooltip="The noise to move; its seed stays."),
                PriorWire.Input("prior", tooltip="From Load Noise Prior."),
                io.Conditioning.Input(
                    "conditioning", tooltip="The prompt that you sample with, from CLIP Text Encode."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    round=False,
                    tooltip="How far the noise is moved: 0 leaves it as it is, 1 is as trained.",
                ),
            ],
            outputs=[
                output(
                    io.Noise,
                    "moved",
                    "For SamplerCustomAdvanced, and every node that takes noise.",
                    shown="noise",
                )
            ],
        )
        return offered(
            schema,
            "prior guidance, noise prior, golden noise, initial noise, better images, without training",
        )

    @classmethod
    def execute(cls, noise: Any, prior: PriorData, conditioning: Any, strength: float) -> io.NodeOutput:
        """Make the noise; a prompt that the prior cannot read is refused here, a size when it is drawn."""
        check_inputs(cls, locals())
        features = features_of(conditioning)
        prior.trained.check_feature(features[0])
        return io.NodeOutput(MovedNoise(noise, prior.trained, features, strength))


NODES: list[type[io.ComfyNode]] = [LoadNoisePrior, ApplyNoisePrior]
