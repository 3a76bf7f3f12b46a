"""What policies over a diffusers pipeline share: a peft LoRA on the transformer, prompts encoded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import LoraConfig
from torch import Tensor, nn

from comfy_g2rpo import lora
from comfy_g2rpo.lora.convert import renamed
from comfy_g2rpo.lora.key_names import Family
from comfy_g2rpo.prompts import image_of
from comfy_g2rpo.rollout import seeded_noise

from ...lora.lora_files import for_transformer
from ...model.lean_adapters import LeanAdapters
from ...model.prompt_cache import PromptCache
from ..cpu.taesd_decoder import folded_decoder
from ..files.parts import Parts

if TYPE_CHECKING:
    from typing import Self

    from ...config.sections import ModelSection
    from ..files.single_file import Held
    from ..files.weight_names import Rules

KEPT = 64
"""Prompts whose features stay on the device where the disk has them, too."""


class PeftPolicy:
    """A pipeline whose transformer carries a LoRA.

    A family adds `_forward` or `velocity`, `latent_shape`, targets, `encode_one`.
    """

    # what every family says
    pipeline_class: Any  # of diffusers
    cond: Callable[..., Any]  # named tuple of a prompt's features
    comfyui_shift: float
    blocks: str  # pattern of the modules that targets lie in, such as r"transformer_blocks\.\d+"
    attention: Sequence[str]  # targets in a block
    feed_forward: Sequence[str]  # further targets
    # what some families say
    guidance = 1.0
    max_sequence_length = 0
    reads = ""  # how the model reads its prompts, where it cannot do without max_sequence_length
    blank: str | None = None  # the text that classifier-free guidance moves away from
    optional: Sequence[str] = ()  # components of the pipeline that a folder may lack
    names: Family | None = None  # where LoRA files have other module names than diffusers
    lora_style = "diffusers"
    layout: Rules = ()  # where single files have other weight names than `lora.key_names` tells
    makes_clips = False
    edits = False  # whether prompts bring an image
    fills_text = True  # whether features always have the full length
    clip_tokens = False  # whether CLIP's tokens stand in front of the others

    decodes_while_rolling = True
    cache: PromptCache | None = None
    load_text_encoders: Callable[[], Mapping[str, nn.Module]] | None = None
    """Loads the pipeline's text encoders when the first prompt is encoded; None where they are there."""
    _encoders_taken = False
    packed = False
    """Whether weights of the transformer are kept in few bits, or in the computer's memory."""

    def __init__(
        self,
        pipeline: Any,
        *,
        guidance: float | None = None,
        max_sequence_length: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        if guidance is not None:
            self.guidance = guidance
        if max_sequence_length is not None:
            self.max_sequence_length = max_sequence_length
        if self.reads and not self.max_sequence_length:
            full = type(self).max_sequence_length
            raise ValueError(f"model.max_sequence_length is 0, but {self.reads}; set it to {full}")
        self.pipeline, self.autocast = pipeline, autocast
        self.transformer: Any = pipeline.transformer.requires_grad_(False).eval()
        self.vae: Any = pipeline.vae.requires_grad_(False).eval()
        # Looked up once: diffusers walks through every module for them.
        self.device, self.dtype, self.vae_dtype = (
            pipeline.device,
            pipeline.transformer.dtype,
            pipeline.vae.dtype,
        )
        if all(weight.dim() < 5 for weight in self.vae.parameters()):
            self.vae.to(memory_format=torch.channels_last)  # a video decoder's weights have no such format
        self._folded = folded_decoder(self.vae)
        self.find_layers()
        self._prompts: dict[str, Any] = {}
        self.set_up()

    def set_up(self) -> None:
        """Do what a family does once, when its pipeline is there."""

    @classmethod
    def load(cls, section: ModelSection, path: Path | None, device: torch.device | str) -> Self:
        """Load the model of a configuration's section onto a device."""
        parts = Parts(cls, section, path, device)
        policy = cls.of(section, parts.pipeline())
        return parts.attach(policy, section.family, section.dtype, section.max_sequence_length)

    @classmethod
    def of(cls, section: ModelSection, pipeline: Any) -> Self:
        """Make the policy of a pipeline that is there, as a configuration's section says."""
        autocast = torch.bfloat16 if section.dtype == "bf16" else None
        length = section.max_sequence_length
        return cls(pipeline, guidance=section.guidance, max_sequence_length=length, autocast=autocast)

    @classmethod
    def pipeline_of(cls, path: Path | None) -> Any:
        """Return the diffusers pipeline that a folder, or files alone, are loaded as."""
        return cls.pipeline_class

    @staticmethod
    def sizes(held: Held) -> dict[str, Any]:
        """Read the sizes in a transformer's configuration off the shapes of its weights."""
        raise NotImplementedError

    @classmethod
    def facts(cls, family: str, config: Mapping[str, Any], folder: Path | None) -> str:
        """Name the shipped facts about a model, whose variant its transformer's configuration tells."""
        return family

    def text_tokens(self, longest: int, reference_size: int) -> int:
        """Return the most tokens of a prompt whose longest text has `longest`."""
        return min(self.max_sequence_length, longest)

    def rollout_copies(self) -> int:
        """Return the bytes of copies of weights that rollouts in fp32 work on."""
        return 0

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[Any]) -> Tensor:
        """Return v like x [B, C, …, h, w] in float32, with classifier-free guidance where it is above 1."""
        if self.guidance <= 1:
            return self._forward(x, sigma, cond)
        return self.guide(*self.both(x, sigma, cond))

    def both(self, x: Tensor, sigma: Tensor, cond: Sequence[Any]) -> Sequence[Tensor]:
        """Return the predictions with the prompts and with the blank one, each like x."""
        blank = self.encode([self.blank]) * len(cond)
        return self._forward(torch.cat([x, x]), sigma.repeat(2), [*cond, *blank]).chunk(2)

    def guide(self, given: Tensor, without: Tensor) -> Tensor:
        """Return the guided velocity of both predictions."""
        return without + self.guidance * (given - without)

    def velocity_and_gap(self, x: Tensor, sigma: Tensor, cond: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return v as `velocity` does, and the mean square of v_c − v_∅ [B], for rows of one size."""
        if self.blank is None or self.guidance <= 1:
            raise ValueError(f"model.guidance is {self.guidance:g} and weighs up no second prompt; raise it")
        given, without = self.both(x, sigma, cond)
        gap = (given - without).float().square().flatten(1).mean(1)
        return self.guide(given, without), gap.cpu().double()

    def _forward(self, x: Tensor, sigma: Tensor, cond: Sequence[Any]) -> Tensor:
        """Return the model's own prediction, v like x [B, C, …, h, w] in float32."""
        raise NotImplementedError

    def encode_one(self, prompt: str) -> Any:
        """Run the text encoders on one prompt: a named tuple of tensors without batch dimension."""
        raise NotImplementedError

    def avoid(self, negative: str) -> None:
        """Let guidance move away from a negative prompt; ValueError where it moves away from none."""
        if self.blank is None:
            remedy = "this model takes its guidance as an input, and moves away from no prompt; remove it"
            raise ValueError(f"model.negative_prompt has no effect: {remedy}")
        self.check_guided()
        self.blank = negative

    def check_guided(self) -> None:
        """Raise ValueError where guidance is too low for a negative prompt to count."""
        if self.guidance <= 1:
            remedy = "set it above 1, which doubles the cost of a forward, or remove the negative prompt"
            raise ValueError(
                f"model.negative_prompt has no effect at model.guidance {self.guidance:g}; {remedy}"
            )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Any]:
        """Return text features, computed once per prompt."""
        return [self._encoded(prompt) for prompt in prompts]

    def key(self, prompt: str) -> str:
        """Return a key of a prompt's features; refuse an image where the model takes none."""
        if image_of(prompt):
            remedy = "remove that column, or choose FLUX.1 Kontext or Qwen-Image-Edit"
            raise ValueError(
                f"prompts: {prompt[:60]!a} has an image to start from, but this model takes none; {remedy}"
            )
        return prompt

    def _encoded(self, prompt: str) -> Any:
        key = self.key(prompt)
        if key in self._prompts:
            return self._prompts[key]
        if self.cache and (known := self.cache.get(key)):
            found = self.cond(**{name: tensor.to(self.device) for name, tensor in known.items()})
        else:
            self.take_text_encoders()
            found = self.encode_one(prompt)
            if self.cache:
                self.cache.put(key, found._asdict())
        if self.cache and len(self._prompts) >= KEPT:
            # The disk has them all; the device keeps the latest.
            del self._prompts[next(iter(self._prompts))]
        self._prompts[key] = found
        return found

    def take_text_encoders(self) -> None:
        """Load the text encoders where they are not there yet."""
        if self.load_text_encoders and not self._encoders_taken:
            for name, module in self.load_text_encoders().items():
                setattr(self.pipeline, name, module.requires_grad_(False).eval().to(self.device))
            self._encoders_taken = True

    def drop_text_encoders(self) -> None:
        """Free the text encoders' memory once every prompt has been encoded."""
        if self.blank is not None and self.guidance > 1:
            self.encode([self.blank])
        for name in self.pipeline.components:
            if name.startswith("text_encoder"):
                setattr(self.pipeline, name, None)
        self._encoders_taken = False

    def add_lora(self, rank: int, alpha: float, seed: int, feed_forward: bool = False) -> None:
        """Put a fresh adapter on the targets: A seeded as N(0, 1/3n), B zero."""
        self.attach_lora(rank, alpha, feed_forward)
        with torch.no_grad():
            for name, (down, up) in self.pairs().items():
                down.copy_(seeded_noise(down.shape, "lora", seed, name) / math.sqrt(3 * down.shape[1]))
                up.zero_()
        for parameter in self.parameters():
            # The adapter learns in float32 whatever the weights beneath are kept in.
            parameter.data = parameter.data.float()

    def attach_lora(self, rank: int, alpha: float, feed_forward: bool) -> None:
        """Put an adapter on the projections whose numbers nobody has set yet."""
        targets = (*self.attention, *(self.feed_forward if feed_forward else ()))
        pattern = rf"{self.blocks}\.({'|'.join(target.replace('.', chr(92) + '.') for target in targets)})"
        self.transformer.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, init_lora_weights=False)
        )
        self.find_layers()

    def moved(self, device: torch.device) -> None:
        """Record that the model is on a device now, and bring along what has been made of it."""
        self.device = device
        self._folded = folded_decoder(self.vae)
        self._prompts = {
            key: self.cond(*(tensor.to(device) for tensor in found)) for key, found in self._prompts.items()
        }

    def load_lora(self, path: Path) -> None:
        """Put the adapter of a file of any form on the model, to draw with, or refuse a misfit."""
        pairs = for_transformer(path, self.transformer)
        state = {
            f"transformer.{name}.lora_{part}.weight": pair[i]
            for name, pair in pairs.items()
            for i, part in enumerate("AB")
        }
        self.transformer.load_lora_adapter(state)
        self.find_layers()

    def rename(self, pairs: lora.Pairs) -> lora.Pairs:
        """Give modules the names that they have in LoRA files."""
        return renamed(self.names, pairs, "native") if self.names else pairs

    def find_layers(self) -> None:
        """Find the layers that carry an adapter, which `reference` switches off."""
        self.layers: dict[str, nn.Module] = {
            name: module
            for name, module in self.transformer.named_modules()
            if hasattr(module, "get_delta_weight")
        }
        self.lean = LeanAdapters(self.transformer, self.layers)

    def pairs(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return the adapter's (A, B) by module name."""
        return {
            name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            for name, layer in self.layers.items()
        }

    def parameters(self) -> list[nn.Parameter]:
        """List the adapter's parameters: A, B of every module in order."""
        return [parameter for pair in self.pairs().values() for parameter in pair]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Switch the adapter off."""
        for layer in self.layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluate without gradients, the adapter cast to the weights' precision once."""
        with torch.no_grad(), self.lean.used(cast=True):
            yield

    def training(self) -> AbstractContextManager[None]:
        """Evaluate differentiably, the adapter in the weights' precision."""
        return self.lean.used(cast=False)

    @contextmanager
    def completing(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Evaluate by the transformer's own blocks inside, under autocast to `dtype` if given."""
        if dtype is None:
            yield
            return
        kept, self.autocast = self.autocast, dtype
        try:
            with self.lean.put_aside():
                yield
        finally:
            self.autocast = kept

    def casting(self) -> AbstractContextManager[Any]:
        """Run the transformer in the precision of `autocast` where layers need that."""
        needed = self.autocast is not None and not self.lean.in_place
        return torch.autocast(self.device.type, self.autocast) if needed else nullcontext()

    def pipeline_sigmas(self, num_steps: int, shape: Sequence[int]) -> Tensor:
        """Return the scheduler's noise levels [T+1] where nothing is shifted by resolution."""
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(num_steps)
        return scheduler.sigmas.float().cpu()

    def shifted_sigmas(self, num_steps: int, tokens: int = 0, mu: float | None = None) -> Tensor:
        """Return the scheduler's noise levels [T+1], shifted by mu or as it does for a number of tokens."""
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        if mu is None:
            mu = calculate_shift(tokens, *(scheduler.config.get(*item) for item in names.items()))
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
        return scheduler.sigmas.float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] to images [B, H, W, 3] in [0, 1], float32 and contiguous."""
        config = self.vae.config
        raw = latents / config.scaling_factor + (config.shift_factor or 0.0)
        if self._folded:
            images = self._folded(raw)
        else:
            raw = raw.to(self.vae_dtype, memory_format=torch.channels_last)
            images = self.vae.decode(raw, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).contiguous()


def cells(width: int, height: int, scale: int, patch: int) -> tuple[int, int]:
    """Return (h, w) of the latent of a picture; `scale` pixels are a cell, `patch` cells a token's side."""
    factor = scale * patch
    if width % factor or height % factor:
        raise ValueError(
            f"model.width and model.height are {width}×{height}; both must be multiples of {factor}"
        )
    return height // scale, width // scale
