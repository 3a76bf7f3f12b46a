"""A policy over a MODEL, which it never changes: the guider's velocity with our LoRA, also for training."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors

from ..inputs.checks import blamed
from .adapter import Adapter, diffusers_pairs, fresh_adapter, lora_model, target_modules, with_adapter
from .autograd import checkpointed, gradients, ordinary_weights, pytorch_attention
from .conditioning import Conds, mapped, processed, velocity
from .core_sd3 import SD3Rollout, copies, is_exact, is_plain
from .merged_weights import Delta, MergedWeights, fits, state_of
from .tiny_decoder import fits as fits_decoded
from .tiny_decoder import tiny_decoder

__all__ = [
    "Adapter",
    "GraphPolicy",
    "TextPolicy",
    "check_flow",
    "diffusers_pairs",
    "fresh_adapter",
    "lora_model",
    "text_policy",
    "with_adapter",
]

MISFIT = (
    "model: it does not take these latents with this conditioning; choose another size, or the clip that "
    "belongs to it"
)

CLIP_MISFIT = "clip: it cannot encode a prompt; connect the text encoder that belongs to the model"

TOLERANCE = 1e-3  # between two ways of computing one velocity, whose rounding differs by less than 1e-5

# They remember the steps of one image in order; a rollout visits states of many.
STEP_CACHES = {"easycache", "lazycache"}


def check_flow(model: Any, name: str = "model") -> None:
    """Raise ValueError, with the input's name, unless a MODEL is a flow model without step caches."""
    sampling, flow = model.get_model_object("model_sampling"), comfy.model_sampling.CONST
    kind = type(model.model).__name__
    # A subclass may predict something else than a velocity, or start from something else than noise.
    parts = ("calculate_denoised", "noise_scaling")
    whole = all(getattr(type(sampling), part, None) is getattr(flow, part) for part in parts)
    if not isinstance(sampling, flow) or not whole or getattr(sampling, "noise_scale", 1.0) != 1.0:
        raise ValueError(
            f"{name}: {kind} is not a flow model; connect one that is, such as Stable Diffusion 3.5, "
            "FLUX, Qwen-Image or Wan"
        )
    if STEP_CACHES & {key for group in model.wrappers.values() for key, found in group.items() if found}:
        raise ValueError(
            f"{name}: EasyCache and LazyCache count on the steps of one image in order; connect the "
            "model without them"
        )


class GraphPolicy:
    """A policy (comfy_g2rpo.policy) over a guider: its model, its guidance, its conditioning by default.

    Call `velocity` inside `inference()` or `training()`; outside them nothing of ours is on the model.
    """

    def __init__(self, guider: Any, adapter: Adapter | None = None, *, checkpoint: bool = False) -> None:
        check_flow(guider.model_patcher)
        self._guider, model = copy.copy(guider), guider.model_patcher
        self._guider.model_patcher = resident(model) if adapter else model.clone()
        self._guider.model_options = comfy.model_patcher.create_model_options_clone(guider.model_options)
        self._checkpoint = checkpoint
        self._given = adapter
        self._session: _Session | None = None
        self._layers: dict[str, nn.Module] = {}
        self._deltas: dict[str, Delta] = {}
        if adapter:
            self._make_deltas(adapter)
        self._merged = MergedWeights(self._layers, self._deltas)
        self._proved = self._apart = False  # whether a forward of rollouts was tried, and agreed with core's

    def _make_deltas(self, adapter: Adapter) -> None:
        self._layers = target_modules(self.model, adapter.targets)
        if self._layers.keys() != adapter.pairs.keys():
            raise ValueError(
                "policy: its LoRA was made for another model; connect the model that it was made for"
            )
        # Nodes run in inference mode, where a parameter could never get a gradient.
        with torch.inference_mode(False):
            for name, pair in adapter.pairs.items():
                copies = (part.detach().to(self.device, torch.float32, copy=True) for part in pair)
                self._deltas[name] = Delta(*map(nn.Parameter, copies), adapter.alpha / adapter.rank)

    @property
    def model(self) -> Any:
        """Return our clone of the MODEL."""
        return self._guider.model_patcher

    @property
    def device(self) -> torch.device:
        """Return where the model computes."""
        return self.model.load_device

    def parameters(self) -> list[nn.Parameter]:
        """List the adapter's parameters: down, up of every module in order."""
        return [parameter for pair in self.pairs().values() for parameter in pair]

    def pairs(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return the adapter's (down, up) by native module name."""
        return {name: (delta.down, delta.up) for name, delta in self._deltas.items()}

    def adapter(self) -> Adapter:
        """Copy the current weights to the CPU."""
        if self._given is None:
            raise ValueError("policy: it has no LoRA; make one with LoRA Policy")
        with torch.inference_mode(False), torch.no_grad():
            pairs = {
                name: tuple(part.detach().to("cpu", copy=True) for part in pair)
                for name, pair in self.pairs().items()
            }
        return Adapter(pairs, self._given.rank, self._given.alpha, self._given.targets)

    def set_adapter(self, adapter: Adapter) -> None:
        """Copy an adapter's weights into ours, in place."""
        own = self._given
        if own is None or adapter.pairs.keys() != self._deltas.keys() or adapter.rank != own.rank:
            raise ValueError(
                "policy: the LoRA that is to be taken over has other modules or another rank; use one "
                "of the same make"
            )
        self._given = adapter
        with torch.inference_mode(False), torch.no_grad():
            for name, pair in adapter.pairs.items():
                delta = self._deltas[name]
                delta.scale = adapter.alpha / adapter.rank
                for own, new in zip((delta.down, delta.up), pair, strict=True):
                    own.copy_(new)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[Any]) -> Tensor:
        """Return v [B, …] with guidance; cond: per row None (the guider's own) or CONDITIONING by kind."""
        if self._session is None:
            raise ValueError(
                "policy: velocity is asked for outside inference() and training(), where no model is loaded"
            )
        return self._session.velocity(x, sigma, cond)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Switch the adapter off inside the context."""
        for delta in self._deltas.values():
            delta.active = False
        try:
            yield
        finally:
            for delta in self._deltas.values():
                delta.active = True

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Load the model with the LoRA and without gradients inside the context."""
        with torch.no_grad(), self._open(training=False):
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Load the whole model and make velocities differentiable in the LoRA inside the context."""
        with gradients(), self._open(training=True):
            yield

    @contextmanager
    def _open(self, training: bool) -> Iterator[None]:
        if self._session is not None:
            raise ValueError("policy: inference() and training() cannot be entered twice at a time")
        with ExitStack() as stack:
            self._session = _Session(self, stack, training)
            stack.callback(setattr, self, "_session", None)
            yield


def resident(model: Any, name: str = "model") -> Any:
    """Clone a MODEL so that its weights stay on the device as a whole: newer cores page them in and out."""
    if not getattr(model, "is_dynamic", bool)():
        return model.clone()
    try:
        # Core loads the file a second time for this, once per MODEL.
        return model.get_non_dynamic_delegate()
    except RuntimeError as error:
        raise ValueError(
            f"{name}: its loader cannot load it without dynamic VRAM; use one of core's loaders or start "
            "ComfyUI with --disable-dynamic-vram"
        ) from error


class _Session:
    """A loaded model with our layers' functions on it; everything that it changes is undone by its stack."""

    def __init__(self, policy: GraphPolicy, stack: ExitStack, training: bool) -> None:
        self.policy, self.stack, self.training = policy, stack, training
        self.guider, self.model = copy.copy(policy._guider), policy.model
        conds = self.guider.original_conds.items()
        self.base = {kind: [entry.copy() for entry in entries] for kind, entries in conds}
        if any("hooks" in entry for entries in self.base.values() for entry in entries):
            raise ValueError(
                "guider: conditioning with hooks (scheduled LoRAs) has no gradient; use it without them"
            )
        self.options = comfy.model_patcher.create_model_options_clone(self.guider.model_options)
        comfy.sampler_helpers.prepare_model_patcher(self.model, self.base, self.options)
        self.guider.model_options = self.options
        if training:
            self.options["transformer_options"]["optimized_attention_override"] = pytorch_attention
        self.elements, self.loaded = 0, []
        self.plain, self.copied = False, 0  # whether the model can be taken apart; into how many bytes
        self.apart: tuple[Any, SD3Rollout] | None = None
        self.rows: dict[int, tuple[Any, Conds]] = {}
        stack.callback(self._leave)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[Any]) -> Tensor:
        """Load what is not loaded yet and run the guider."""
        device = self.policy.device
        x, sigma = x.to(device, torch.float32), sigma.to(device, torch.float32)
        if self.training:
            # Tensors that came over a wire may be inference tensors.
            x, sigma = x.clone(), sigma.clone()
        if x.numel() > self.elements:
            self._load(x)
        with blamed(MISFIT):
            rows = [self._row(one, x[:1]) for one in cond]
            made = self._apart(x, sigma, rows)
            made = self._by_core(x, sigma, rows) if made is None else made
        deltas = self.policy._deltas.values()
        if deltas and not any(delta.dtype for delta in deltas):
            raise ValueError(
                f"model: {type(self.model.model).__name__}'s layers do not take a LoRA while they run; "
                "connect another model"
            )
        return made

    def _by_core(self, x: Tensor, sigma: Tensor, rows: list[Conds]) -> Tensor:
        self.policy._merged.attach(self.model, None if self.training else x)
        levels = torch.cat([sigma.unique().flip(0), sigma.new_zeros(1)])
        self.options["transformer_options"]["sample_sigmas"] = levels
        try:
            return velocity(self.guider, x, sigma, rows, self.options)
        except torch.cuda.OutOfMemoryError:
            self.policy._merged.spares = False  # the next try has the room of the sums
            raise

    def _apart(self, x: Tensor, sigma: Tensor, rows: list[Conds]) -> Tensor | None:
        """Return the velocity by the forward of rollouts, or None where core's own is needed."""
        if self.plain and not self.policy._proved:
            self.policy._proved = True
            self.policy._apart = self._agrees(x[:1], sigma[:1], rows[:1])
            # Its tables hold a row that was computed alone: a resumed run would differ in the last bits.
            self.apart = None
        if not self.plain or not self.policy._apart:
            return None
        return self._taken_apart().velocity(x, sigma, rows, self._guidance())

    def _agrees(self, x: Tensor, sigma: Tensor, rows: list[Conds]) -> bool:
        """Return whether the forward of rollouts does what core's own does: later cores may differ."""
        core = self._by_core(x, sigma, rows)
        try:
            made = self._taken_apart().velocity(x, sigma, rows, self._guidance())
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            logging.warning("G²RPO: rollouts run core's own forward", exc_info=True)
            return False
        return made is not None and bool((made - core).norm() < TOLERANCE * core.norm())

    def _taken_apart(self) -> SD3Rollout:
        policy, state = self.policy, state_of(self.policy._deltas)
        if self.apart is None or self.apart[0] != state:
            policy._merged.detach()
            self.apart = state, SD3Rollout(self.model, policy._layers, policy._deltas)
        return self.apart[1]

    def _guidance(self) -> float:
        return 1.0 if math.isclose(self.guider.cfg, 1.0) else self.guider.cfg

    def _load(self, x: Tensor) -> None:
        """Load for a batch like x, the largest so far."""
        first = self.elements == 0
        self.elements = x.numel()
        # Core may rewrite the layers' functions and move weights while it loads, so that ours come after.
        self.policy._merged.detach()
        if self.training:
            if first:
                self._load_whole()
        elif first or x.device.type != "cpu":  # where it has nothing to make room for
            inner, _, self.loaded = comfy.sampler_helpers.prepare_sampling(
                self.model, x.shape, self.base, self.options
            )
            self.guider.inner_model = inner
        if first:
            comfy.samplers.cast_to_load_options(
                self.options, device=self.policy.device, dtype=self.model.model_dtype()
            )
            self.model.pre_run()
            self._look_for_others()
        if self.plain and not fits(self.model, x, self.copied):
            self.plain, self.apart = False, None

    def _look_for_others(self) -> None:
        """See whether core's own layers run and nothing else, so that we know what they do."""
        policy, network = self.policy, self.model.model.diffusion_model
        plain = type(self.guider) is comfy.samplers.CFGGuider and is_plain(self.model, self.options)
        if not self.training and policy._deltas and plain and is_exact(network):
            self.plain, self.copied = True, copies(network, policy._layers)
        if self.training and not plain and not policy._checkpoint:
            # Others may edit activations in place. The recomputation of checkpoints allows that by itself,
            # and the two must not be nested.
            self.stack.enter_context(allow_mutation_on_saved_tensors())

    def _load_whole(self) -> None:
        extra = comfy.sampler_helpers.get_additional_models(self.base, self.model.model_dtype())[0]
        # A request for everything makes core unload whatever else is there, as its own trainer does.
        comfy.model_management.load_models_gpu(
            [self.model, *extra], memory_required=1e20, force_full_load=True
        )
        self.guider.inner_model, self.loaded = self.model.model, extra
        kind = self.policy.device.type
        if any(parameter.device.type != kind for parameter in self.model.model.parameters()):
            raise ValueError(
                "model: training needs all of it on the device; start ComfyUI without --novram, or "
                "choose a smaller model"
            )
        self.stack.enter_context(ordinary_weights(self.model.model))
        if self.policy._checkpoint:
            self.stack.enter_context(checkpointed(self.model.model.diffusion_model))

    def _row(self, cond: Any, like: Tensor) -> Conds:
        """Process a row's conditioning once; None is the guider's own."""
        if id(cond) not in self.rows:
            conds = {kind: [[None, entry] for entry in entries] for kind, entries in self.base.items()}
            conds |= cond or {}
            if any("hooks" in entry[1] for entries in conds.values() for entry in entries):
                raise ValueError(
                    "prompts: conditioning with hooks (scheduled LoRAs) cannot be trained; use it "
                    "without them"
                )
            made = processed(self.guider.inner_model, conds, like, self.policy.device)
            made = mapped(made, torch.Tensor.clone) if self.training else made
            self.rows[id(cond)] = (cond, made)
        return self.rows[id(cond)][1]

    def _leave(self) -> None:
        self.policy._merged.detach()
        if self.elements:
            self.model.cleanup()
            comfy.sampler_helpers.cleanup_models(self.base, self.loaded)
            comfy.samplers.cast_to_load_options(self.options, device=self.model.offload_device)


class TextPolicy(GraphPolicy):
    """A policy whose rows are prompts, with a decoder: what a training loop needs."""

    decodes_while_rolling = False  # the VAE may push the model off the device

    def __init__(
        self,
        guider: Any,
        clip: Any,
        vae: Any,
        negative: str,
        adapter: Adapter | None,
        *,
        checkpoint: bool = False,
    ) -> None:
        super().__init__(guider, adapter, checkpoint=checkpoint)
        self._clip, self._vae, self._negative = clip, vae, negative
        self._folded, self._proved_folded = tiny_decoder(vae), False
        self._texts: dict[str, Any] = {}
        self._rows: dict[str, dict[str, Any]] = {}

    def encode(self, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """Return a row's conditioning per prompt, computed once each."""
        for prompt in prompts:
            if prompt not in self._rows:
                negative = {"negative": self._encoded(self._negative)} if self._guider.cfg > 1 else {}
                self._rows[prompt] = {"positive": self._encoded(prompt), **negative}
        return [self._rows[prompt] for prompt in prompts]

    def _encoded(self, text: str) -> Any:
        if text not in self._texts:
            with blamed(CLIP_MISFIT):
                self._texts[text] = self._clip.encode_from_tokens_scheduled(self._clip.tokenize(text))
        return self._texts[text]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, …] in model space to images [B, H, W, 3] in [0, 1], outside of any context."""
        if self._session is not None:
            raise ValueError(
                "policy: decode is asked for inside inference() or training(); leave that first, the "
                "VAE needs the memory"
            )
        if latents.ndim == 5 and latents.shape[2] > 1:
            raise ValueError("vae: videos are not supported yet; train on single images")
        with blamed("vae: it cannot decode the model's latents; connect the VAE that belongs to the model"):
            raw = self.model.model.process_latent_out(latents.float())
            images = self._decoded(raw)
        return images.reshape(-1, *images.shape[-3:]).float()

    def _decoded(self, raw: Tensor) -> Tensor:
        if self._folded is None or raw.ndim != 4 or not fits_decoded(self._vae, raw):
            return self._vae.decode(raw)
        if not self._proved_folded:
            self._proved_folded = True
            self._folded = self._folded if self._folded.is_exact(raw) else None
        return self._folded(raw) if self._folded else self._vae.decode(raw)

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Return the shape of one latent in model space for a picture of the given size in pixels."""
        form, factor = self.model.get_model_object("latent_format"), self._vae.spacial_compression_decode()
        channels = getattr(self._vae, "latent_channels", form.latent_channels)
        if channels != form.latent_channels:
            had = f"it has {channels} latent channels and the model {form.latent_channels}"
            raise ValueError(f"vae: {had}; connect the VAE that belongs to the model")
        if width % factor or height % factor:
            raise ValueError(f"width and height are {width}×{height}; both must be multiples of {factor}")
        frames = (1,) if form.latent_dimensions == 3 else ()
        return form.latent_channels, *frames, height // factor, width // factor


def text_policy(
    model: Any,
    clip: Any,
    vae: Any,
    guidance: float,
    negative: str,
    adapter: Adapter | None,
    *,
    checkpoint: bool = False,
) -> TextPolicy:
    """Return a policy whose conditioning is text, with classifier-free guidance where it is above 1."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_cfg(max(guidance, 1.0))
    return TextPolicy(guider, clip, vae, negative, adapter, checkpoint=checkpoint)
