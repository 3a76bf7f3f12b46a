"""How a model is kept: packed and swapped weights with their gradients, placing in stages, and the memory
of a run foreseen.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from flux_folder import save as save_flux
from qwen_folder import save as save_qwen
from some_cases import some
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from wan_folder import save as save_wan

from comfy_g2rpo.run.iteration import iterate
from comfy_g2rpo.run.setup import make_learner
from g2rpo_trainer import run as training
from g2rpo_trainer.commands.exit_codes import ran_out
from g2rpo_trainer.config.reading import from_dict
from g2rpo_trainer.cost.count_model import Live, count_model, footprint, operations, weights_of
from g2rpo_trainer.cost.estimate import count
from g2rpo_trainer.families.files.diffusers_folder import read
from g2rpo_trainer.model.placing import weight_bytes
from g2rpo_trainer.model.stored_linear import PACKINGS, Float8, StoredLinear, store, stored

pytestmark = pytest.mark.xdist_group("memory")  # one process makes what they share

CPU = torch.device("cpu")
SAVE = {"flux": save_flux, "qwen_image": save_qwen, "wan": save_wan}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a folder per family."""
    root = tmp_path_factory.mktemp("models")
    return {family: save(root / family) for family, save in SAVE.items()} | {"sd3": Path("models/tiny")}


def config(folder: Path, family: str, tmp_path: Path, **sections: dict):
    """Configure a run of one quick step."""
    (tmp_path / "train.txt").write_text("a red circle on a table\ntwo blue squares\n")
    (tmp_path / "heldout.txt").write_text("a yellow circle\n")
    tree = {
        "model": {
            "family": family,
            "path": str(folder),
            "width": 64,
            "height": 64,
            "max_sequence_length": 0 if family == "sd3" else 24,
        },
        "lora": {"rank": 4, "alpha": 8},
        "method": {"name": "g2rpo", "num_steps": 2, "group_size": 2, "learning_rate": 1e-3},
        "rewards": [{"name": "colourfulness"}],
        "prompts": {"train": str(tmp_path / "train.txt"), "heldout": str(tmp_path / "heldout.txt")},
        "train": {
            "steps": 1,
            "prompts_per_step": 2,
            "slots": 4,
            "micro_batch": 2,
            "decode_batch": 2,
            "watch": "off",
        },
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return from_dict(tree)


@pytest.fixture(scope="module")
def weights() -> nn.Linear:
    """Make a layer with rows of very different sizes."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 96)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-6, 3, 96)[:, None])
    return layer


def test_fp8_is_off_by_a_sixteenth_at_most_in_rows_of_any_size(weights):
    made = Float8.of(weights.weight.detach()).weight(torch.float32)
    largest = weights.weight.abs().amax(1, keepdim=True)
    assert (made - weights.weight).abs().le(weights.weight.abs() / 16 + largest * 2**-16).all()


@pytest.mark.parametrize(("quantization", "size"), [("fp8", 1 + 4 / 128), ("nf4", 0.5 + 4 / 64)])
def test_packed_weights_take_what_is_counted(weights, quantization, size):
    layer = StoredLinear(weights, quantization, CPU)
    assert sum(tensor.nbytes for tensor in layer.packed.tensors()) == size * weights.weight.numel()


@pytest.mark.parametrize("quantization", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_layer_computes_and_differentiates_as_a_plain_one_with_its_weight(
    weights, quantization, dtype
):
    plain = nn.Linear(128, 96).to(dtype)
    plain.load_state_dict(weights.state_dict())
    layer = StoredLinear(plain, quantization, CPU)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    outputs, gradients = [], []
    for module in (plain, layer):
        given = x.clone().requires_grad_()
        outputs.append(module(given))
        outputs[-1].float().square().mean().backward()
        gradients.append(given.grad)
    assert torch.equal(*outputs) and torch.equal(*gradients)
    assert layer.weight.dtype == dtype and not any(p.requires_grad for p in layer.parameters())


def test_the_weights_of_swapped_blocks_come_to_the_device_in_both_passes():
    # The meta device stands for a card: what is computed there cannot be computed with a tensor on the CPU.
    block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    model = nn.Module()
    model.blocks = nn.ModuleList([block, nn.Sequential(nn.Linear(8, 8))])
    card = torch.device("meta")
    store(model, "none", 1, card)
    model.to(card)
    x = torch.empty(2, 8, device=card, requires_grad=True)
    model.blocks[1](model.blocks[0](x)).sum().backward()
    assert x.grad.device == card and len(stored(model)) == 2
    assert all(tensor.device == CPU for layer in stored(model) for tensor in layer.packed.tensors())
    assert weight_bytes(model, CPU) == 4 * 2 * 8 * 16


@pytest.mark.parametrize(
    ("family", "memory"), [("flux", {"block_swap": 2}), ("qwen_image", {"gradient_checkpointing": True})]
)
def test_swapping_and_checkpointing_change_no_number(folders, tmp_path, family, memory):
    found = []
    for section in ({}, memory):
        setup = training.prepare(
            config(folders[family], family, tmp_path, memory=section), Accelerator(cpu=True)
        )
        learner = make_learner(setup)
        row = iterate(setup, learner, lambda phase: None)
        found.append(([p.detach().clone() for p in setup.policy.parameters()], row["grad_norm"]))
    assert found[0][1] == found[1][1] and all(map(torch.equal, found[0][0], found[1][0]))


@pytest.mark.parametrize("quantization", ["fp8", "nf4"])
def test_a_quantized_model_learns_in_fp32_and_its_velocity_is_near(folders, tmp_path, quantization):
    plain, packed = (
        training.prepare(
            config(folders["flux"], "flux", tmp_path, memory={"quantization": kind}), Accelerator(cpu=True)
        ).policy
        for kind in ("none", quantization)
    )
    x, sigma = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
    cond = plain.encode(["a red circle on a table"]) * 2
    with torch.no_grad():
        exact, near = plain.velocity(x, sigma, cond), packed.velocity(x, sigma, cond)
    assert 0 < ((near - exact).norm() / exact.norm()).item() < {"fp8": 0.05, "nf4": 0.15}[quantization]
    assert all(p.dtype == torch.float32 for p in packed.parameters())
    packed.velocity(x, sigma, cond).square().mean().backward()
    assert any(p.grad.abs().max() > 0 for p in packed.parameters())


def test_more_swapped_blocks_than_there_are_are_refused(folders, tmp_path):
    with pytest.raises(
        ValueError, match=r"memory\.block_swap is 5, but this model has 4 blocks; set it to 4 at most"
    ):
        training.load_policy(config(folders["flux"], "flux", tmp_path, memory={"block_swap": 5}), "cpu")


@pytest.mark.parametrize(
    ("family", "changes"),
    some(
        [
            ("flux", {"model": {"dtype": "bf16"}, "memory": {"quantization": "fp8"}}),
            (
                "flux",
                {
                    "memory": {"gradient_checkpointing": True},
                    "method": {"optimizer": "prodigy", "learning_rate": 1.0, "ema": 0.9},
                },
            ),
            ("qwen_image", {"model": {"guidance": 4.0}}),
            (
                "qwen_image",
                {
                    "memory": {"quantization": "nf4", "gradient_checkpointing": True},
                    "model": {"dtype": "bf16"},
                },
            ),
            ("wan", {"model": {"guidance": 4.0}, "train": {"micro_batch": 4}}),
            (
                "wan",
                {
                    "method": {"optimizer": "adamw_8bit"},
                    "lora": {"targets": "attention+feed_forward"},
                    "train": {"decode_batch": 6},
                },
            ),
            ("sd3", {}),
        ],
        2,
    ),
)
def test_the_estimate_is_within_15_per_cent_of_what_a_step_takes(folders, tmp_path, family, changes):
    made = config(folders[family], family, tmp_path, **changes)
    foreseen = footprint(made)
    setup = training.prepare(made, Accelerator(cpu=True))
    learner = make_learner(setup)
    iterate(setup, learner, lambda phase: None)  # after it the optimizer has its state
    state = [
        tensor
        for values in learner.optimizer.state.values()
        for tensor in values.values()
        if isinstance(tensor, torch.Tensor)
    ]
    there = [*weights_of(setup.policy), *state, *learner.average]
    resident = sum(
        {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in there}.values()
    )
    with Live(there) as live:
        iterate(setup, learner, lambda phase: None)
    measured = resident + live.peak
    assert abs(foreseen.need / measured - 1) < 0.15, f"{foreseen.need / measured:.3f} {foreseen}"
    assert sum(foreseen.parts.values()) == pytest.approx(resident, rel=0.05)


class Operations(TorchDispatchMode):
    """Counts floating-point operations."""

    found = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found += operations(func, args, kwargs or {}, out)
        return out


@pytest.mark.parametrize("changes", [{}, {"granularities": [2], "epochs": 2, "objective": "clip"}])
@pytest.mark.parametrize("family", some(["flux", "qwen_image", "wan"], 1))
def test_a_step_takes_the_operations_that_are_counted(folders, tmp_path, family, changes):
    made = config(folders[family], family, tmp_path, method=changes)
    counted, counts = count_model(made), count(made)
    setup = training.prepare(made, Accelerator(cpu=True))
    learner = make_learner(setup)
    with Operations() as taken:
        iterate(setup, learner, lambda phase: None)
    wanted = counts.step_forwards * counted.forward + counts.prompts * (
        counts.group_images * counted.decode + counts.update_operations(counted.update, counted.forward)
    )
    assert taken.found == pytest.approx(wanted, rel=0.02)


class Larger:
    """What takes more memory to load than any machine has."""

    @staticmethod
    def from_pretrained(folder: Path, **how: Any) -> torch.Tensor:
        return torch.empty(2**60, dtype=torch.uint8)


def test_memory_that_runs_out_while_a_model_is_loaded_is_no_broken_folder():
    with pytest.raises(RuntimeError, match="memory") as caught:
        read(Larger, Path("models/tiny"), torch.float32, {})
    assert ran_out(caught.value)
