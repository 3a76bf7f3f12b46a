"""Train the bundled tiny model from nothing: `python tools/train_tiny.py` rewrites models/tiny in ten minutes
on two cores.

Two stages, each cached under a hash of everything that made it: the autoencoder, then the flow model with its
text encoders. The second one stops half-trained on purpose, so that fine-tuning has something left to do.
"""

import argparse
import hashlib
import inspect
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import shapes_data
import tiny_model
import torch
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import l1_loss, mse_loss

from comfy_g2rpo.rewards.shapes.agreement import agreement, strict

ROOT = Path(__file__).resolve().parent.parent
THREADS = 2
MOMENT_WEIGHT = 0.01  # of the loss that draws each latent channel to mean 0 and deviation 1
UNIFORM_SHARE = 0.2  # of noise levels; the rest are logit-normal
SHIFT = 3.0  # of the logit-normal noise levels and of sampling
SAMPLE_PROMPTS = (
    "a red circle",
    "two blue squares",
    "three green triangles",
    "a yellow circle and a purple square",
    "a green square left of a blue triangle",
    "a red triangle above a yellow square",
)


@dataclass(frozen=True)
class AutoencoderSettings:
    """Say how the autoencoder is trained."""

    seed: int = 0
    pictures: int = 40_000
    steps: int = 2_000
    batch: int = 32
    rate: float = 3e-3
    noise: float = 0.3  # largest deviation of the latent noise that the decoder learns to ignore


@dataclass(frozen=True)
class FlowSettings:
    """Say how the flow model and its text encoders are trained."""

    seed: int = 0
    schedule: int = 6_000  # steps after which the learning rate would be down
    snapshots: tuple[int, ...] = (
        2_000,
        3_000,
    )  # steps whose moving averages make up the model; the last one ends the training
    batch: int = 128
    rate: float = 3e-3
    prompt_dropout: float = 0.1  # share of pictures without a prompt, so that guidance works
    ema: float = 0.999
    compiled: bool = True  # needs a C++ compiler, saves 40 % of the time


QUICK = (
    AutoencoderSettings(pictures=64, steps=4, batch=8),
    FlowSettings(schedule=8, snapshots=(2, 4), batch=8, compiled=False),
)


def cache_key(*parts: object) -> str:
    """Hash what made a file: settings, and the code that they went through."""
    texts = [
        inspect.getsource(part) if callable(part) or inspect.ismodule(part) else json.dumps(part)
        for part in parts
    ]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def save_weights(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft)
    os.replace(draft, path)


def batches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Draw batches of indices [size], every index at most once per pass."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(count, generator=generator)
        yield order[:size]
        order = order[size:]


def warm_cosine(step: int, steps: int, warm: int = 100, floor: float = 0.02) -> float:
    """Scale the learning rate: a linear rise, then a cosine down to `floor`."""
    rise = min(1.0, (step + 1) / min(warm, steps))
    return rise * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def report(stage: str, step: int, steps: int, loss: torch.Tensor, started: float) -> None:
    """Print progress now and then."""
    if step % 100 == 0:
        print(f"{stage} {step}/{steps} loss {loss.item():.4f} {time.time() - started:.0f} s", flush=True)


def to_images(pictures: torch.Tensor) -> torch.Tensor:
    """Turn uint8 [B, 64, 64, 3] into float [B, 3, 64, 64] in [-1, 1], channels last in memory."""
    return (
        pictures.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
    )


def autoencoder_loss(
    vae: AutoencoderTiny, images: torch.Tensor, noise_limit: float, generator: torch.Generator
) -> torch.Tensor:
    """Compute the loss of reconstructions of images [B, 3, 64, 64] from noisy latents."""
    latents = vae.encode(images).latents.float()
    levels = noise_limit * torch.rand(len(latents), 1, 1, 1, generator=generator)
    noise = torch.randn(latents.shape, generator=generator) * levels
    decoded = vae.decode(latents + noise).sample.float()
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
    moments = mean.square().mean() + (deviation - 1).square().mean()
    return l1_loss(decoded, images) + 2 * mse_loss(decoded, images) + MOMENT_WEIGHT * moments


def train_autoencoder(pictures: torch.Tensor, settings: AutoencoderSettings) -> AutoencoderTiny:
    """Train the autoencoder on pictures [N, 64, 64, 3]."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    vae = tiny_model.initialise_autoencoder(tiny_model.make_autoencoder()).to(
        memory_format=torch.channels_last
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.01)
    started = time.time()
    for step, index in enumerate(batches(len(pictures), settings.batch, settings.steps, generator)):
        optimizer.param_groups[0]["lr"] = settings.rate * warm_cosine(step, settings.steps)
        noise_limit = settings.noise * min(1.0, 2 * step / settings.steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = autoencoder_loss(vae, to_images(pictures[index]), noise_limit, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        report("autoencoder", step, settings.steps, loss, started)
    return vae.eval()


@torch.no_grad()
def encode_pictures(vae: AutoencoderTiny, pictures: torch.Tensor) -> torch.Tensor:
    """Encode all pictures [N, 64, 64, 3]: latents [N, 16, 8, 8]."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([vae.encode(to_images(chunk)).latents for chunk in pictures.split(250)]).float()


def make_autoencoder(
    pictures: torch.Tensor, settings: AutoencoderSettings, cache: Path
) -> tuple[AutoencoderTiny, torch.Tensor]:
    """Train the autoencoder or read it from the cache.

    Answer it with its scale set, and the scaled latents [N, 16, 8, 8].
    """
    code = (
        shapes_data,
        tiny_model.make_autoencoder,
        tiny_model.initialise_autoencoder,
        autoencoder_loss,
        train_autoencoder,
    )
    path = cache / f"autoencoder-{cache_key(asdict(settings), MOMENT_WEIGHT, *code)}.safetensors"
    if not path.exists():
        vae = train_autoencoder(pictures, settings)
        save_weights({**vae.state_dict(), "latents": encode_pictures(vae, pictures)}, path)
    weights = load_file(path)
    latents = weights.pop("latents")
    vae = tiny_model.make_autoencoder(round(1 / latents.std().item(), 4), round(latents.mean().item(), 4))
    vae.load_state_dict(weights)
    return vae.eval(), (latents - vae.config.shift_factor) * vae.config.scaling_factor


def noise_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw sigmas [count]: logit-normal and time-shifted (Esser et al.

    2024, sections 3.1 and 5.3.2), a share of them uniform.
    """
    level = torch.randn(count, generator=generator).sigmoid()
    shifted = SHIFT * level / (1 + (SHIFT - 1) * level)
    uniform = torch.rand(2, count, generator=generator)
    return torch.where(uniform[0] < UNIFORM_SHARE, uniform[1], shifted)


def flow_loss(
    pipeline: StableDiffusion3Pipeline, latents: torch.Tensor, ids: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Compute the flow-matching loss of latents [B, 16, 8, 8]: x = (1 - sigma) latents + sigma noise has
    velocity noise - latents.
    """
    sigma = noise_levels(len(latents), generator)
    noise = torch.randn(latents.shape, generator=generator)
    level = sigma[:, None, None, None]
    tokens, pooled = tiny_model.encode_prompts(pipeline, ids)
    velocity = pipeline.transformer(
        hidden_states=(1 - level) * latents + level * noise,
        timestep=1000 * sigma,
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return mse_loss(velocity.float(), noise - latents)


def make_optimizers(modules: list[nn.Module], rate: float) -> list[torch.optim.Optimizer]:
    """Build Muon (Jordan et al.

    2024) for the matrices of attention and feed-forward layers, and AdamW for the rest.
    """
    matrices, others = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            hidden = parameter.ndim == 2 and (".attn." in name or ".ff" in name)
            (matrices if hidden else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def train_flow(
    pipeline: StableDiffusion3Pipeline, latents: torch.Tensor, ids: torch.Tensor, settings: FlowSettings
) -> None:
    """Train the flow model on latents [N, 16, 8, 8] and token ids [N, 12].

    Leave the mean of the snapshots in the pipeline.
    """
    generator = torch.Generator().manual_seed(settings.seed + 2)
    modules = list(tiny_model.flow_modules(pipeline).values())
    weights = [parameter for module in modules for parameter in module.parameters()]
    average = [weight.detach().clone() for weight in weights]
    snapshots = []
    optimizers = make_optimizers(modules, settings.rate)
    for block in pipeline.transformer.transformer_blocks if settings.compiled else ():
        block.compile(dynamic=False)
    empty = pipeline.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    started = time.time()
    for step, index in enumerate(batches(len(latents), settings.batch, settings.snapshots[-1], generator)):
        dropped = torch.rand(len(index), 1, generator=generator) < settings.prompt_dropout
        # Flash attention is five times slower backwards on a CPU.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = flow_loss(pipeline, latents[index], torch.where(dropped, empty, ids[index]), generator)
            loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = settings.rate * warm_cosine(step, settings.schedule)
            optimizer.step()
            optimizer.zero_grad()
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - settings.ema)
        if step + 1 in settings.snapshots:
            snapshots.append([mean.clone() for mean in average])
        report("flow", step, settings.snapshots[-1], loss, started)
    for weight, *means in zip(weights, *snapshots, strict=True):
        weight.data.copy_(sum(means) / len(means))


def make_model(autoencoder: AutoencoderSettings, flow: FlowSettings, cache: Path) -> StableDiffusion3Pipeline:
    """Train every part of the pipeline, or read it from the cache."""
    pictures, prompts = shapes_data.make_pictures(autoencoder.pictures, autoencoder.seed)
    vae, latents = make_autoencoder(torch.from_numpy(pictures), autoencoder, cache)
    torch.manual_seed(flow.seed)
    pipeline = tiny_model.make_pipeline(vae, tiny_model.make_tokenizer(cache / "tokenizer"))
    modules = nn.ModuleDict(tiny_model.flow_modules(pipeline))
    code = (
        shapes_data,
        tiny_model,
        autoencoder_loss,
        train_autoencoder,
        noise_levels,
        flow_loss,
        make_optimizers,
        train_flow,
    )
    key = cache_key(asdict(autoencoder), asdict(flow), MOMENT_WEIGHT, UNIFORM_SHARE, SHIFT, *code)
    path = cache / f"flow-{key}.safetensors"
    ids = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    if not path.exists():
        train_flow(pipeline, latents, ids, flow)
        save_weights(modules.state_dict(), path)
    modules.load_state_dict(load_file(path))
    torch.compiler.set_stance("force_eager")  # sampling sees batches of other sizes
    return pipeline


def sample(pipeline: StableDiffusion3Pipeline, prompts: list[str], seed: int) -> torch.Tensor:
    """Sample one picture per prompt in 8 Euler steps without guidance: [B, 64, 64, 3] in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        prompts,
        num_inference_steps=8,
        guidance_scale=1.0,
        max_sequence_length=0,
        height=shapes_data.SIDE,
        width=shapes_data.SIDE,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return torch.from_numpy(pictures)


def measure(pipeline: StableDiffusion3Pipeline, count: int, seed: int = 5) -> dict[str, float]:
    """Score pictures of random prompts."""
    prompts = shapes_data.sample_prompts(count, np.random.default_rng(seed))
    pictures = torch.cat(
        [sample(pipeline, prompts[start : start + 64], seed + start) for start in range(0, count, 64)]
    )
    scores = {"graded": agreement(pictures, prompts), "strict": strict(pictures, prompts)}
    return {name: round(values.mean().item(), 3) for name, values in scores.items()}


def contact_sheet(pipeline: StableDiffusion3Pipeline, columns: int = 10) -> Image.Image:
    """Draw a row of pictures for each of the sample prompts, not selected."""
    rows = [torch.cat(list(sample(pipeline, [prompt] * columns, seed=0)), dim=1) for prompt in SAMPLE_PROMPTS]
    levels = torch.cat(rows).mul(255).round().byte().numpy()
    return Image.fromarray(levels)


def write_model(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """Write the pipeline's folder file by file, so that no file is ever half there.

    Transformer and autoencoder in half precision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        draft = Path(name)
        # Text encoders stay in float32: transformers loads them in the precision of their file, diffusers
        # turns the others into float32.
        pipeline.tokenizer([""], padding=True)  # a tokenizer's file keeps the padding of its latest call
        halves = nn.ModuleList([pipeline.transformer, pipeline.vae]).half()
        pipeline.save_pretrained(draft)
        halves.float()
        for tokenizer in ("tokenizer", "tokenizer_2"):
            tiny_model.write_tokenizer(draft / tokenizer)  # older transformers versions read these files
        contact_sheet(pipeline).save(draft / "samples.png", optimize=True)
        for path in sorted(path for path in draft.rglob("*") if path.is_file()):
            path.chmod(0o644)
            target = folder / path.relative_to(draft)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)


def main() -> None:
    """Train, measure and write the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "tiny", help="folder to write")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "build" / "tiny", help="folder of trained stages"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few steps only: the model is useless, the path to it is tested",
    )
    options = parser.parse_args()
    if options.quick and options.out == ROOT / "models" / "tiny":
        parser.error("--quick makes a useless model: give it a folder of its own with --out")
    torch.set_num_threads(THREADS)
    started = time.process_time()
    settings = QUICK if options.quick else (AutoencoderSettings(), FlowSettings())
    pipeline = make_model(*settings, options.cache)
    write_model(pipeline, options.out)
    print(
        measure(pipeline, 64 if options.quick else 2048),
        f"{(time.process_time() - started) / 60:.1f} CPU minutes",
    )


if __name__ == "__main__":
    main()
