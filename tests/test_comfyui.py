"""The bundled transformer and our LoRA files mean in ComfyUI what they mean in diffusers: core's own
loaders, in a real ComfyUI.
"""

from dataclasses import dataclass
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from comfy_host import COMFYUIS, Answer, make_base, run_script

from comfy_g2rpo import lora
from g2rpo_trainer.families.sd3 import ATTENTION, FEED_FORWARD

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("scripts in comfyui")]

TRANSFORMER = Path(__file__).parent.parent / "models/tiny/transformer"
CHILD = Path(__file__).with_name("comfy_child.py")


@dataclass(frozen=True)
class Expected:
    """What both sides are given, and the velocities of the base and the tuned model, [B, C, H, W]."""

    given: dict[str, torch.Tensor]
    lora: Path
    base: torch.Tensor
    tuned: torch.Tensor


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """Make the inputs and write a LoRA file; compute both velocities with diffusers and peft.

    Its alpha is not its rank, on purpose.
    """
    model = diffusers.SD3Transformer2DModel.from_pretrained(TRANSFORMER, torch_dtype=torch.float32).eval()
    noise = torch.Generator().manual_seed(0)
    given = {
        "x": torch.randn(4, 16, 8, 8, generator=noise),
        "sigma": torch.tensor([1.0, 0.8, 0.45, 0.1]),
        "context": torch.randn(4, 16, model.config.joint_attention_dim, generator=noise),
        "pooled": torch.randn(4, model.config.pooled_projection_dim, generator=noise),
    }

    def velocity() -> torch.Tensor:
        with torch.no_grad():
            timestep = given["sigma"] * 1000
            return model(given["x"], given["context"], given["pooled"], timestep, return_dict=False)[0]

    base = velocity()
    torch.manual_seed(0)
    model.add_adapter(
        peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=[*ATTENTION, *FEED_FORWARD], init_lora_weights=False
        )
    )
    file = tmp_path_factory.mktemp("adapter") / "lora.safetensors"
    write_adapter(model, file)
    return Expected(given, file, base, velocity())


def write_adapter(model: torch.nn.Module, path: Path) -> None:
    """Write the model's adapter as the trainer does."""
    weights = peft.get_peft_model_state_dict(model)
    names = [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]
    pairs = {name: (weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]) for name in names}
    lora.write(path, pairs, alpha=8.0, metadata={})


@pytest.fixture(scope="module", params=COMFYUIS)
def core(
    request: pytest.FixtureRequest, expected: Expected, tmp_path_factory: pytest.TempPathFactory
) -> Answer:
    """Compute the same in a ComfyUI."""
    files = {
        "transformer": str(TRANSFORMER / "diffusion_pytorch_model.safetensors"),
        "lora": str(expected.lora),
    }
    return run_script(request.param, CHILD, make_base(tmp_path_factory.mktemp("base")), files, expected.given)


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Compare velocities by their largest difference, relative to the largest velocity."""
    return ((one - other).abs().max() / other.abs().max()).item()


def test_core_loads_the_unchanged_diffusers_file(core: Answer, expected: Expected) -> None:
    assert relative_difference(core.tensors["base"], expected.base) < 1e-5


def test_core_takes_every_key_of_our_lora(core: Answer) -> None:
    assert core.data["patched"] > 0
    assert core.data["warnings"] == []


def test_our_lora_has_the_effect_in_core_that_it_has_in_training(core: Answer, expected: Expected) -> None:
    assert (expected.tuned - expected.base).abs().max() > 0.05
    assert relative_difference(core.tensors["tuned"], expected.tuned) < 1e-5
