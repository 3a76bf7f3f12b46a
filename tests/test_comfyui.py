"""The bundled transformer and our LoRA files mean in ComfyUI what they mean in diffusers: core's own loaders, in a real ComfyUI."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from comfy_g2rpo import lora
from g2rpo_trainer.families.sd3 import ATTENTION, FEED_FORWARD

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("comfyui")]

TRANSFORMER = Path(__file__).parent.parent / "models/tiny/transformer"
CHILD = Path(__file__).with_name("comfy_child.py")


def comfyui_roots() -> list[Path]:
    """List the ComfyUI folders to test against: COMFYUI_PATH alone where it is set, otherwise ~/comfy/ComfyUI*."""
    named = os.environ.get("COMFYUI_PATH")
    candidates = [Path(named)] if named else sorted(Path.home().glob("comfy/ComfyUI*"))
    return [path for path in candidates if (path / "comfy/sd.py").is_file()]


MISSING = "no ComfyUI found: set COMFYUI_PATH to its folder, or put it at ~/comfy/ComfyUI, with its venv/ inside"
COMFYUIS = [pytest.param(root, id=root.name) for root in comfyui_roots()] or [
    pytest.param(None, id="none", marks=pytest.mark.skip(reason=MISSING))
]


@dataclass(frozen=True)
class Velocities:
    """Velocities of the base and the tuned model, [B, C, H, W], and what core said while loading the LoRA."""

    base: torch.Tensor
    tuned: torch.Tensor
    patched: int = 0
    warnings: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder that both sides read and write."""
    return tmp_path_factory.mktemp("exchange")


@pytest.fixture(scope="module")
def expected(exchange: Path) -> Velocities:
    """Write the inputs and a LoRA file; compute both velocities with diffusers and peft. Its alpha is not its rank, on purpose."""
    model = diffusers.SD3Transformer2DModel.from_pretrained(TRANSFORMER, torch_dtype=torch.float32).eval()
    noise = torch.Generator().manual_seed(0)
    given = {
        "x": torch.randn(4, 16, 8, 8, generator=noise),
        "sigma": torch.tensor([1.0, 0.8, 0.45, 0.1]),
        "context": torch.randn(4, 16, model.config.joint_attention_dim, generator=noise),
        "pooled": torch.randn(4, model.config.pooled_projection_dim, generator=noise),
    }
    save_file(given, exchange / "inputs.safetensors")

    def velocity() -> torch.Tensor:
        with torch.no_grad():
            timestep = given["sigma"] * 1000
            return model(given["x"], given["context"], given["pooled"], timestep, return_dict=False)[0]

    base = velocity()
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=[*ATTENTION, *FEED_FORWARD], init_lora_weights=False))
    write_adapter(model, exchange / "lora.safetensors")
    return Velocities(base, velocity())


def write_adapter(model: torch.nn.Module, path: Path) -> None:
    """Write the model's adapter as the trainer does."""
    weights = peft.get_peft_model_state_dict(model)
    names = [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]
    pairs = {name: (weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]) for name in names}
    lora.write(path, pairs, alpha=8.0, metadata={})


@pytest.fixture(scope="module", params=COMFYUIS)
def core(request: pytest.FixtureRequest, exchange: Path, expected: Velocities) -> Velocities:
    """Compute the same in a ComfyUI: its own Python, started in its root, our repository not on its path."""
    python = request.param / "venv/bin/python"
    output = exchange / f"{request.param.name}.safetensors"
    files = [TRANSFORMER / "diffusion_pytorch_model.safetensors", exchange / "lora.safetensors", exchange / "inputs.safetensors", output]
    command = [str(python if python.is_file() else sys.executable), str(CHILD), *map(str, files)]
    child = subprocess.run(command, cwd=request.param, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    with safe_open(output, "pt") as file:
        notes = file.metadata()
        return Velocities(file.get_tensor("base"), file.get_tensor("tuned"), int(notes["patched"]), tuple(json.loads(notes["warnings"])))


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Compare velocities by their largest difference, relative to the largest velocity."""
    return ((one - other).abs().max() / other.abs().max()).item()


def test_core_loads_the_unchanged_diffusers_file(core: Velocities, expected: Velocities) -> None:
    assert relative_difference(core.base, expected.base) < 1e-5


def test_core_takes_every_key_of_our_lora(core: Velocities) -> None:
    assert core.patched > 0
    assert core.warnings == ()


def test_our_lora_has_the_effect_in_core_that_it_has_in_training(core: Velocities, expected: Velocities) -> None:
    assert (expected.tuned - expected.base).abs().max() > 0.05
    assert relative_difference(core.tuned, expected.tuned) < 1e-5
