"""The bundled tiny model as core's MODEL, CLIP and VAE."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from comfy.sd1_clip import SDClipModel, SDTokenizer
from comfy.taesd.taesd import TAESD, Block, Clamp, conv
from comfy_api.latest import io
from torch import Tensor, nn

from .inputs.finding import offered
from .inputs.widgets import output
from .types import TRAINING

TINY = Path(__file__).resolve().parent.parent / "models" / "tiny"
WEIGHTS = (
    "transformer/diffusion_pytorch_model",
    "vae/diffusion_pytorch_model",
    "text_encoder/model",
    "text_encoder_2/model",
)


class TinyDemoLoader(io.ComfyNode):
    """Load the bundled tiny flow model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_TinyDemoLoader",
            display_name="Tiny Demo Loader",
            category=TRAINING,
            description="Loads the tiny model that comes with this pack: the architecture of Stable "
            "Diffusion 3.5 with four million parameters. It draws a few coloured shapes at 64×64 pixels ('a "
            "red circle and a blue square'), so that every graph can be tried in seconds, on any machine.",
            inputs=[],
            outputs=[
                output(
                    io.Model,
                    None,
                    "Tiny flow model with a shift of 3; eight steps at cfg 1 are enough.",
                    "MODEL",
                ),
                output(
                    io.Clip,
                    None,
                    "Its text encoders: colours, shapes, numbers; prompts end at ten words.",
                    "CLIP",
                ),
                output(
                    io.Vae,
                    None,
                    "Its encoder and decoder: 16 channels, Stable Diffusion 3's latent format.",
                    "VAE",
                ),
            ],
        )
        return offered(schema, "grpo, example model, test model, tiny model")

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Load all three."""
        for which, name in enumerate(WEIGHTS):
            if not _weights(which).is_file():
                lost = f"models/tiny/{name}.safetensors is missing from this pack's folder"
                raise ValueError(f"Tiny Demo Loader: {lost}; install the pack again")
        return io.NodeOutput(comfy.sd.load_diffusion_model(str(_weights(0))), tiny_clip(), tiny_vae())


def _weights(which: int) -> Path:
    return TINY / f"{WEIGHTS[which]}.safetensors"


def _config(folder: str) -> dict[str, Any]:
    return json.loads((TINY / folder / "config.json").read_text("utf-8"))


def tiny_vae() -> comfy.sd.VAE:
    """Return core's VAE around the narrow autoencoder; latents keep Stable Diffusion 3's format."""
    # Core's own network is wider: it is built with arbitrary weights, for its settings alone, and replaced.
    wider = TAESD(latent_channels=_config("vae")["latent_channels"])
    vae = comfy.sd.VAE(sd=wider.state_dict(), dtype=torch.float32)
    vae.first_stage_model = _autoencoder().to(vae.vae_dtype).eval().requires_grad_(False)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model,
        load_device=vae.device,
        offload_device=comfy.model_management.vae_offload_device(),
    )
    return vae


def _autoencoder() -> TAESD:
    config, wire = _config("vae"), comfy.latent_formats.SD3()
    model = TAESD(latent_channels=config["latent_channels"])
    model.taesd_encoder, model.taesd_decoder = _encoder(config), _decoder(config)
    # In one: wire to model space is (z - shift) * scale, that to the network's own m / scaling + shift.
    scale = wire.scale_factor / config["scaling_factor"]
    shift = wire.shift_factor - config["shift_factor"] * config["scaling_factor"] / wire.scale_factor
    weights = {"vae_scale": torch.tensor(scale), "vae_shift": torch.tensor(shift)}
    for key, tensor in _read(1).items():
        part, _, number, rest = key.split(".", 3)
        # Core's decoder has its clamp as a layer.
        weights[f"taesd_{part}.{int(number) + (part == 'decoder')}.{rest}"] = tensor
    model.load_state_dict(weights)
    return model


def _read(which: int) -> dict[str, Tensor]:
    return comfy.utils.load_torch_file(str(_weights(which)), safe_load=True)


def _encoder(config: dict[str, Any]) -> nn.Sequential:
    layers, before = [], config["in_channels"]
    stages = zip(config["num_encoder_blocks"], config["encoder_block_out_channels"], strict=True)
    for stage, (blocks, width) in enumerate(stages):
        layers += [conv(before, width, stride=2, bias=False) if stage else conv(before, width)]
        layers += [Block(width, width) for _ in range(blocks)]
        before = width
    return nn.Sequential(*layers, conv(before, config["latent_channels"]))


def _decoder(config: dict[str, Any]) -> nn.Sequential:
    widths = config["decoder_block_out_channels"]
    layers: list[nn.Module] = [Clamp(), conv(config["latent_channels"], widths[0]), nn.ReLU()]
    for blocks, width in zip(config["num_decoder_blocks"][:-1], widths[:-1], strict=True):
        layers += [Block(width, width) for _ in range(blocks)]
        upsample = nn.Upsample(scale_factor=config["upsampling_scaling_factor"])
        layers += [upsample, conv(width, width, bias=False)]
    layers += [Block(widths[-1], widths[-1]) for _ in range(config["num_decoder_blocks"][-1])]
    return nn.Sequential(*layers, conv(widths[-1], config["out_channels"]))


def tiny_clip() -> comfy.sd.CLIP:
    """Return core's CLIP around the two small text encoders, as core makes Stable Diffusion 3's."""
    target = SimpleNamespace(params={}, clip=_TextEncoders, tokenizer=_Tokenizers)
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    for which, encoder in ((2, clip.cond_stage_model.l), (3, clip.cond_stage_model.g)):
        encoder.transformer.load_state_dict(_read(which))
    return clip


class _TextEncoders(nn.Module):
    def __init__(self, device: torch.device, dtype: torch.dtype, model_options: dict[str, Any]) -> None:
        super().__init__()
        self.dtypes = {dtype}
        self.l, self.g = (
            _text_encoder(folder, device, dtype, model_options)
            for folder in ("text_encoder", "text_encoder_2")
        )

    def set_clip_options(self, options: dict[str, Any]) -> None:
        for encoder in (self.l, self.g):
            encoder.set_clip_options(options)

    def reset_clip_options(self) -> None:
        for encoder in (self.l, self.g):
            encoder.reset_clip_options()

    def encode_token_weights(self, tokens: dict[str, Any]) -> tuple[Tensor, Tensor]:
        (features, pooled), (features_2, pooled_2) = (
            getattr(self, name).encode_token_weights(tokens[name]) for name in "lg"
        )
        return torch.cat([features, features_2], -1), torch.cat([pooled, pooled_2], -1)


def _text_encoder(
    folder: str, device: torch.device, dtype: torch.dtype, model_options: dict[str, Any]
) -> SDClipModel:
    config = _config(folder)
    special = {"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": config["pad_token_id"]}
    model = SDClipModel(
        device=device,
        dtype=dtype,
        max_length=config["max_position_embeddings"],
        layer="hidden",
        # The layer before the last; core refuses -2 where there are only two.
        layer_idx=config["num_hidden_layers"] - 2,
        layer_norm_hidden_state=False,
        textmodel_json_config=config,
        special_tokens=special,
        model_options=model_options,
    )
    # Core's network always has CLIP's vocabulary.
    words = comfy.ops.manual_cast.Embedding(
        config["vocab_size"], config["hidden_size"], device=device, dtype=dtype
    )
    model.transformer.text_model.embeddings.token_embedding = words.requires_grad_(False)
    return model


class _Tokenizers:
    def __init__(self, embedding_directory: str | None, tokenizer_data: dict[str, Any]) -> None:
        # As in core's own tokenizer files, the limit is left to max_length.
        settings = {"local_files_only": True, "model_max_length": 8192}
        self.l, self.g = (
            SDTokenizer(
                str(TINY / name),
                max_length=_config(encoder)["max_position_embeddings"],
                tokenizer_args=settings,
            )
            for name, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
        )

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, **options: Any
    ) -> dict[str, Any]:
        both = {"l": self.l, "g": self.g}
        # A prompt that is too long is cut, as in diffusers; core would encode it in pieces.
        tokens = {n: t.tokenize_with_weights(text, return_word_ids, **options)[:1] for n, t in both.items()}
        return {**tokens, "t5xxl": []}  # some nodes ask for a third encoder's tokens

    def untokenize(self, tokens: list[tuple[int, float]]) -> list[Any]:
        return self.l.untokenize(tokens)

    def state_dict(self) -> dict[str, Tensor]:
        return {}


NODES = [TinyDemoLoader]
