"""Tiny models that real ComfyUIs load, with a LoRA as a run leaves it: files for ComfyUI, inputs, and the
velocities that we expect.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flux2_folder
import torch
import wan_folder
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from comfy_g2rpo import lora
from comfy_g2rpo.rollout import seeded_noise
from g2rpo_trainer.families.flux2 import Cond as Flux2Cond
from g2rpo_trainer.families.flux2 import Flux2
from g2rpo_trainer.families.sd3 import SD3, load_pipeline
from g2rpo_trainer.families.wan import Cond as WanCond
from g2rpo_trainer.families.wan import Wan

TOKENS, RANK, ALPHA = 8, 4, 8
FRAMES = {"2.1": 3, "2.2 5B": 1}  # of Wan's latents: a clip and a picture
SIGMA = torch.tensor([0.9, 0.35])
# The published names of Wan: parts of diffusers' names and what they stand for, one after the other.
WAN_NAMES = (
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".o."),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
    (".norm2.", ".norm3."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."),
    ("proj_out.", "head.head."),
)


@dataclass(frozen=True)
class Case:
    """A model on disk, its LoRA files, and what velocities they give."""

    transformer: Path
    loras: dict[str, Path]
    inputs: dict[str, Tensor]
    base: Tensor
    tuned: Tensor
    modules: dict[str, int]
    """How many pairs every LoRA file has."""


def case(
    name: str,
    folder: Path,
    policy: Any,
    cond: Sequence[Any],
    native: dict[str, Tensor],
    x: Tensor,
    more: dict[str, Tensor],
) -> Case:
    """Put a LoRA on every target of a policy, write it as a run does, and compute velocities without and
    with it.
    """
    given = x[:, :, 0] if x.ndim == 5 and x.shape[2] == 1 else x  # a clip of one frame is a picture
    with torch.no_grad():
        base = policy.velocity(given, SIGMA, cond)
        policy.add_lora(RANK, ALPHA, 0, feed_forward=True)
        for module, (_, up) in policy.pairs().items():
            up.copy_(0.05 * seeded_noise(up.shape, "up", module))
        tuned = policy.velocity(given, SIGMA, cond)
    save_file(
        {key: value.detach().contiguous().clone() for key, value in native.items()},
        folder / f"{name}.safetensors",
    )
    loras = {"run": folder / f"{name}-run.safetensors", "diffusers": folder / f"{name}-diffusers.safetensors"}
    lora.write(loras["run"], policy.pairs(), ALPHA, style=policy.lora_style, rename=policy.rename)
    lora.write(loras["diffusers"], policy.pairs(), ALPHA)
    inputs = {"x": x, "sigma": SIGMA.clone(), "context": torch.stack([c.tokens for c in cond]), **more}
    return Case(
        folder / f"{name}.safetensors",
        loras,
        inputs,
        base,
        tuned,
        {form: len(lora.read(file).pairs) for form, file in loras.items()},
    )


def flux2(folder: Path) -> Case:
    """FLUX.2 dev: guidance is an input."""
    policy = Flux2(flux2_folder.pipeline("dev"), guidance=3.5, max_sequence_length=TOKENS)
    native = flux2_folder.published(policy.transformer.state_dict())
    cond = [Flux2Cond(seeded_noise((TOKENS, 96), "text", row)) for row in range(2)]
    return case(
        "flux2",
        folder,
        policy,
        cond,
        native,
        seeded_noise((2, 128, 4, 6), "x"),
        {"guidance": torch.full((2,), 3.5)},
    )


def wan(folder: Path, kind: str = "2.1") -> Case:
    """Wan with a head of the published width and texts of the published width, which an older ComfyUI
    takes for granted.
    """
    pipeline, channels = wan_folder.pipeline(kind), wan_folder.KINDS[kind][0]
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 1, "attention_head_dim": 128, "ffn_dim": 192, "num_layers": 2}
    pipeline.transformer = WanTransformer3DModel(**sizes, in_channels=channels, out_channels=channels)
    policy = Wan(pipeline, guidance=1.0, max_sequence_length=TOKENS)
    native = {}
    for key, value in copy.deepcopy(policy.transformer).state_dict().items():
        name = key.replace("scale_shift_table", "modulation")
        for old, new in WAN_NAMES:
            name = name.replace(old, new)
        native["head.modulation" if name == "modulation" else name] = value
    cond = [WanCond(seeded_noise((TOKENS, 4096), "text", row)) for row in range(2)]
    return case(
        f"wan {kind}", folder, policy, cond, native, seeded_noise((2, channels, FRAMES[kind], 8, 12), "x"), {}
    )


def sd3(folder: Path) -> Case:
    """Stable Diffusion 3: the bundled model, whose diffusers file core loads as it is."""
    policy = SD3(load_pipeline(Path(__file__).parent.parent / "models/tiny", torch.float32), guidance=1.0)
    cond = policy.encode(["two red circles", "a green square left of a blue triangle"])
    pooled = {"pooled": torch.stack([c.pooled for c in cond])}
    return case(
        "sd3",
        folder,
        policy,
        cond,
        dict(policy.transformer.state_dict()),
        seeded_noise((2, 16, 8, 8), "x"),
        pooled,
    )


CASES = {"sd3": sd3, "flux2": flux2, "wan 2.1": wan, "wan 2.2 5B": lambda folder: wan(folder, "2.2 5B")}
