"""An adapter costs a 16-bit model's forward next to nothing, in every family, and means what peft's means."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flux2_folder
import flux_folder
import lumina2_folder
import pytest
import qwen_folder
import torch
import wan_folder
import z_image_folder
from family_model import LONG, SHORT, moved
from peft import LoraConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from comfy_g2rpo.rollout import seeded_noise
from g2rpo_trainer import families
from g2rpo_trainer.config.sections import ModelSection
from g2rpo_trainer.families.flux import Flux
from g2rpo_trainer.families.flux2 import Flux2
from g2rpo_trainer.families.lumina2 import Lumina2
from g2rpo_trainer.families.qwen_image import QwenImage
from g2rpo_trainer.families.sd3 import SD3, load_pipeline
from g2rpo_trainer.families.wan import Wan
from g2rpo_trainer.families.z_image import ZImage
from g2rpo_trainer.model.cheap_forward import CompiledBlocks, FP8Products
from g2rpo_trainer.model.lean_adapters import LeanLayer
from g2rpo_trainer.model.stored_linear import StoredLinear, store

BF16, made_of = torch.bfloat16, StoredLinear.make
FAMILIES: dict[str, tuple[Any, Callable[[], Any], dict[str, Any]]] = {
    "sd3": (SD3, lambda: load_pipeline("models/tiny", torch.float32), {"max_sequence_length": 0}),
    "flux": (Flux, flux_folder.pipeline, {"max_sequence_length": 24}),
    "flux2": (Flux2, flux2_folder.pipeline, {"max_sequence_length": 64}),
    "qwen_image": (QwenImage, qwen_folder.pipeline, {"max_sequence_length": 64, "guidance": 1.0}),
    "wan": (Wan, wan_folder.pipeline, {"max_sequence_length": 64, "guidance": 1.0}),
    "z_image": (ZImage, z_image_folder.pipeline, {"max_sequence_length": 64}),
    "lumina2": (Lumina2, lumina2_folder.pipeline, {"max_sequence_length": 64}),
}


def made(name: str, dtype: torch.dtype, adapter: bool = True) -> Any:
    """Make a small policy, with an adapter that has moved."""
    kind, pipeline, settings = FAMILIES[name]
    torch.manual_seed(0)
    policy = kind(pipeline(), **settings)
    policy.encode([SHORT, LONG])
    policy.transformer.to(dtype)
    policy.dtype, policy.autocast = dtype, dtype if dtype == BF16 else None
    return moved(policy, size=0.1) if adapter else policy


def batch(policy: Any) -> tuple[Tensor, Tensor, list[Any]]:
    """Three rows at three noise levels."""
    x = seeded_noise((3, *policy.latent_shape(64, 64)), "x")
    return x, torch.tensor([1.0, 0.6, 0.1]), policy.encode([SHORT, LONG, SHORT])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


class Count(TorchDispatchMode):
    """Counts operations, and conversions of weights."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.weights = {weight.data_ptr() for weight in policy.transformer.parameters()}
        self.all = self.casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        self.casts += "_to_copy" in str(func) and args[0].data_ptr() in self.weights
        return func(*args, **(kwargs or {}))


def operations(policy: Any) -> Count:
    """Count one forward of a rollout."""
    given = batch(policy)
    with policy.inference(), Count(policy) as count:
        policy.velocity(*given)
    return count


def test_a_forward_takes_5_per_cent_more_operations_than_without_adapter_at_most(family: str) -> None:
    bare, adapted = (operations(made(family, BF16, adapter)) for adapter in (False, True))
    assert adapted.all <= 1.05 * bare.all, (adapted.all, bare.all)
    assert adapted.casts <= bare.casts


def test_it_is_the_same_model(family: str) -> None:
    policy = made(family, torch.float32)
    given = batch(policy)
    with torch.no_grad():
        expected = policy.velocity(*given)
        with policy.reference():
            base = policy.velocity(*given)
    with policy.inference():
        found = policy.velocity(*given)
    with policy.reference(), policy.inference():
        untrained = policy.velocity(*given)
    size = (expected - base).abs().max()
    assert size > 1e-2 and (found - expected).abs().max() < 1e-4 * size.clamp(min=1)
    assert torch.allclose(untrained, base, rtol=0, atol=1e-5)
    with policy.inference():
        again = policy.velocity(*given)
    assert torch.equal(again, found), "nothing of one rollout is left in the next"


def test_16_bit_is_no_less_exact_than_under_autocast(family: str) -> None:
    policy = made(family, BF16)
    given = batch(policy)
    exact = copy.deepcopy(policy)
    exact.transformer.double()
    exact.dtype = torch.float64
    exact.autocast = None
    with torch.no_grad():
        wanted = exact.velocity(given[0].double(), *given[1:])
        autocast = policy.velocity(*given)
    with policy.inference():
        found = policy.velocity(*given)
    errors = [(each - wanted).square().mean().sqrt() for each in (found, autocast)]
    assert errors[0] < 1.15 * errors[1], errors


def test_an_update_sees_what_it_would_see_in_full_precision(family: str) -> None:
    gradients = []
    for dtype in (torch.float32, BF16):
        policy = made(family, dtype)
        x, sigma, cond = batch(policy)
        with policy.training():
            assert any(isinstance(part, LeanLayer) for part in policy.transformer.modules())
            with torch.no_grad():
                old = policy.velocity(x, sigma, cond)
            velocity = policy.velocity(x, sigma, cond)
            assert torch.equal(velocity.detach(), old), "the first ratio is exactly 1"
            (velocity * seeded_noise(velocity.shape, "gradient")).sum().backward()
        found = [weight.grad for weight in policy.parameters() if weight.grad is not None]  # a last block's
        assert found and all(gradient.dtype == torch.float32 for gradient in found)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_peft_has_its_layers_back_whatever_happens(family: str) -> None:
    policy = made(family, BF16)
    names = dict(policy.transformer.named_parameters())
    places = dict(policy.transformer.named_modules())
    for context in (policy.inference, policy.training):
        with pytest.raises(KeyboardInterrupt), context():
            policy.velocity(*batch(policy))
            raise KeyboardInterrupt
        assert dict(policy.transformer.named_modules()) == places
    assert all(policy.transformer.get_parameter(name) is weight for name, weight in names.items())
    assert all(part.weight is None for part in policy.lean.parts)


def first_call(calls: dict[str, Any], name: str, block: Any, given: Any, named: Any) -> None:
    """Keep what a block of a kind is given first."""
    calls.setdefault(name, (block, given, named))


@pytest.mark.long
def test_blocks_with_their_adapters_are_captured_without_a_break(family: str) -> None:
    policy, calls = made(family, torch.float32), {}
    for place in CompiledBlocks(policy.transformer).places:
        keep = partial(first_call, calls, type(place[2]).__name__)
        place[2].register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad(), policy.lean.used(cast=True):
        policy.velocity(*batch(policy))
        assert calls
        for block, given, named in list(calls.values()):
            block._forward_pre_hooks.clear()
            expected = block(*given, **named)
            torch.compiler.reset()
            captured = torch.compile(block, backend="eager", fullgraph=True)(*given, **named)
            for ours, theirs in zip(tree_leaves(captured), tree_leaves(expected), strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_8_bit_products_reach_the_layers_that_have_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, seen = made("flux", BF16), []
    monkeypatch.setattr("g2rpo_trainer.model.cheap_forward.eligible", lambda x, w: seen.append(w.shape))
    given = batch(policy)
    with policy.inference(), FP8Products():
        policy.velocity(*given)
    with policy.inference(), policy.reference(), FP8Products():
        before = len(seen)
        policy.velocity(*given)
    assert before == len(seen) - before


def test_contexts_within_contexts_leave_each_as_it_was() -> None:
    policy = made("flux", BF16)
    x, sigma, cond = batch(policy)
    with policy.inference():
        expected = policy.velocity(x, sigma, cond)
        with policy.inference():
            pass
        with policy.completing(torch.float16):
            assert not policy.lean.in_place and policy.autocast == torch.float16
        with torch.enable_grad(), policy.training():
            policy.velocity(x, sigma, cond).sum().backward()
        assert torch.equal(policy.velocity(x, sigma, cond), expected)
        assert policy.parameters()[0].grad is not None
    assert not policy.lean.in_place


class Interrupted:
    """A place at which Ctrl-C comes while layers are put in, the first time."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in vars(self):
            vars(self)[name] = value
            raise KeyboardInterrupt


def test_layers_come_back_if_putting_them_in_is_interrupted() -> None:
    policy = made("flux", BF16)
    places = dict(policy.transformer.named_modules())
    policy.lean.places.insert(3, (Interrupted(), "x", *policy.lean.places[3][2:]))
    with pytest.raises(KeyboardInterrupt), policy.inference():
        raise AssertionError("nothing runs inside")
    assert dict(policy.transformer.named_modules()) == places and not policy.lean.in_place


def test_a_packed_weight_is_not_unpacked_to_look_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = made("flux", BF16, adapter=False)
    store(policy.transformer, "fp8", 0, torch.device("cpu"))
    moved(policy)
    layers, unpacked = len(policy.layers), []
    monkeypatch.setattr(StoredLinear, "make", lambda self, *how: unpacked.append(self) or made_of(self, *how))
    for context in (policy.inference, policy.training):
        unpacked.clear()
        with torch.no_grad(), context():
            policy.velocity(*batch(policy))
        assert len(unpacked) == len({*map(id, unpacked)}) >= layers, "once each in a forward"


def test_layers_of_other_kinds_stay_as_they_are() -> None:
    policy = made("sd3", BF16, adapter=False)
    policy.transformer.add_adapter(LoraConfig(r=2, target_modules=["proj", "to_q"], init_lora_weights=False))
    policy.find_layers()
    assert any(isinstance(layer.get_base_layer(), torch.nn.Conv2d) for layer in policy.layers.values())
    given = batch(policy)
    with torch.no_grad():
        expected = policy.velocity(*given)
    with policy.inference():
        assert torch.allclose(policy.velocity(*given), expected, atol=0.1 * expected.std().item())


SAVED: dict[str, tuple[Callable[..., Any], int]] = {
    "flux": (flux_folder.save, 24),
    "flux2": (flux2_folder.save, 64),
    "qwen_image": (qwen_folder.save, 64),
    "wan": (wan_folder.save, 64),
    "z_image": (z_image_folder.save, 64),
    "lumina2": (lumina2_folder.save, 64),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_model_that_keeps_some_layers_in_full_precision_runs_without_autocast(
    name: str, tmp_path: Path
) -> None:
    save, length = SAVED[name]
    folder = save(tmp_path / "model")
    section = ModelSection(
        family=name, path=str(folder), dtype="bf16", max_sequence_length=length, guidance=1
    )
    policy = moved(families.load(section, folder, "cpu"), size=0.1)
    given = batch(policy)
    with torch.no_grad():
        expected = policy.velocity(*given)
    with policy.inference():
        found = policy.velocity(*given)
    with policy.training():
        policy.velocity(*given).square().mean().backward()
    assert (found - expected).square().mean() < 1e-2 * expected.square().mean()
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in policy.parameters())
