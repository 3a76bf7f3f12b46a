"""`g2rpo check-lora` on adapters that are no pairs: what it says of them, and what it does not say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from program import leave
from safetensors.torch import save_file
from torch import Tensor

NOISE = torch.Generator().manual_seed(0)
QKV = "layers.0.attention.qkv"


def draw(*shape: int) -> Tensor:
    """Draw a matrix."""
    return torch.randn(*shape, generator=NOISE)


def pair(stem: str, rows: int, columns: int) -> dict[str, Tensor]:
    """Write a pair of rank 2 with its alpha."""
    tensors = {
        "lora_down.weight": draw(2, columns),
        "lora_up.weight": draw(rows, 2),
        "alpha": torch.tensor(2.0),
    }
    return {f"{stem}.{part}": tensor for part, tensor in tensors.items()}


def of_layer(stem: str, **parts: Tensor) -> dict[str, Tensor]:
    """Write the parts of a layer."""
    return {f"{stem}.{part}": tensor for part, tensor in parts.items()}


NATIVE = f"diffusion_model.{QKV}"
WAN = "diffusion_model.blocks.0"
LOHA = {
    "hada_w1_a": draw(768, 2),
    "hada_w1_b": draw(2, 256),
    "hada_w2_a": draw(768, 2),
    "hada_w2_b": draw(2, 256),
}
LOADS = {
    "LoKr": (of_layer(NATIVE, lokr_w1=draw(4, 4), lokr_w2=draw(192, 64), alpha=torch.tensor(1.0)), "z_image"),
    "LoKr of pairs": (
        of_layer(NATIVE, lokr_w1=draw(4, 4), lokr_w2_a=draw(192, 2), lokr_w2_b=draw(2, 64)),
        "z_image",
    ),
    "LoHa": (of_layer(NATIVE, **LOHA), "z_image"),
    "OFT": (of_layer(f"{WAN}.ffn.0", oft_blocks=draw(2, 4, 4)), "wan"),
    "diff": (of_layer(NATIVE, diff=draw(768, 256)), "z_image"),
    "lightx2v's pairs, norms and biases": (
        pair(f"{WAN}.self_attn.q", 64, 64)
        | of_layer(f"{WAN}.self_attn.q", diff_b=draw(64))
        | of_layer(f"{WAN}.norm3", diff=draw(64), diff_b=draw(64))
        | of_layer(f"{WAN}.self_attn.norm_k", diff=draw(64)),
        "wan",
    ),
    "DoRA": (pair(NATIVE, 768, 256) | of_layer(NATIVE, dora_scale=draw(768, 1)), "z_image"),
}


@pytest.mark.parametrize("name", LOADS)
def test_what_comfyui_loads_is_no_trouble(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, family = LOADS[name]
    save_file(tensors, tmp_path / "a.safetensors")
    code, said, _ = leave(capsys, "check-lora", tmp_path / "a.safetensors")
    assert code == 0 and f"({family})" in said and "!" not in said
    assert "matrices is missing" not in said and "ignore" not in said
    assert "no pair of matrices equals these: training, g2rpo export and --merge refuse the file" in said
    code, _, error = leave(capsys, "export", tmp_path / "a.safetensors", "--out", tmp_path / "b.safetensors")
    assert code == 2 and "is refused" in error


LOST = {
    "a doubled underscore": (
        pair("lora_unet__double_blocks_0_img_attn_proj", 128, 128)
        | pair("lora_unet__single_blocks_0_linear1", 896, 128),
        "! ComfyUI ignores 2 modules, such as double_blocks.0.img_attn.proj; mend: g2rpo export",
    ),
    "one underscore in some keys alone": (
        pair("lora_unet_double_blocks_0_img_attn_proj", 128, 128)
        | pair("lora_unet__single_blocks_0_linear1", 896, 128),
        "! ComfyUI ignores 1 modules, such as single_blocks.0.linear1",
    ),
    "another adapter's name": (
        of_layer(
            "transformer.transformer_blocks.0.img_mod.1",
            **{"lora_A.style.weight": draw(2, 64), "lora_B.style.weight": draw(384, 2)},
        ),
        "! ComfyUI ignores 1 modules, such as transformer_blocks.0.img_mod.1; mend: g2rpo export",
    ),
    "magnitudes of peft": (
        of_layer(
            "transformer.transformer_blocks.0.img_mod.1",
            **{
                "lora_A.weight": draw(2, 64),
                "lora_B.weight": draw(384, 2),
                "lora_magnitude_vector": draw(384),
            },
        ),
        "the pairs load without them, which is not what was trained",
    ),
    "LoKr under names of another program": (
        of_layer("transformer.blocks.0.attn1.to_q", lokr_w1=draw(4, 4), lokr_w2=draw(16, 16)),
        "! ComfyUI ignores 2 keys of LoKr, such as transformer.blocks.0.attn1.to_q.lokr_w1",
    ),
    "biases that the layers lack": (
        pair(NATIVE, 768, 256) | of_layer(NATIVE, diff_b=draw(768)),
        f"! ComfyUI ignores 1 keys of biases (diff_b), such as {NATIVE}.diff_b",
    ),
    "a norm's scale outside of a control LoRA": (
        pair("diffusion_model.double_blocks.0.img_mlp.0", 512, 128)
        | {"double_blocks.0.img_attn.norm.key_norm.scale": draw(128)},
        "! ComfyUI ignores 1 keys of replaced weights (set_weight)",
    ),
    "half a LoHa": (
        of_layer(NATIVE, hada_w1_a=draw(768, 2), hada_w1_b=draw(2, 256)),
        f"! ComfyUI 0.33 stops with an error at this file: {NATIVE} lacks its hada_w2_a; save the file again",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_what_comfyui_does_not_take_is_said(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, words = LOST[name]
    save_file(tensors, tmp_path / "a.safetensors")
    code, said, _ = leave(capsys, "check-lora", tmp_path / "a.safetensors")
    assert code == 1 and words in said


def test_layers_that_no_family_has_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(of_layer("lora_unet_down_blocks_0", lokr_w1=draw(4, 4)), tmp_path / "a.safetensors")
    code, _, error = leave(capsys, "check-lora", tmp_path / "a.safetensors")
    assert code == 2 and "names no layer of a family that is known" in error


def test_doubled_underscores_are_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(LOST["a doubled underscore"][0], tmp_path / "a.safetensors")
    assert leave(capsys, "export", tmp_path / "a.safetensors", "--out", tmp_path / "b.safetensors")[0] == 0
    code, said, _ = leave(capsys, "check-lora", tmp_path / "b.safetensors")
    assert code == 0 and "ComfyUI: 5 load" in said
