"""For the scripts of test_nodes_policy.py, inside ComfyUI: the pack's modules, gradients against
differences, portraits of a MODEL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy_side
import torch
from torch import Tensor

policy_module = comfy_side.pack_module("nodes.model.comfy_policy")
sampling_module = comfy_side.pack_module("nodes.sampling")
rollout_module = comfy_side.pack_module("comfy_g2rpo.rollout")


def noise(shape: Sequence[int], *key: int | str) -> Tensor:
    """Draw seeded noise as an ordinary tensor."""
    with torch.inference_mode(False):
        return rollout_module.seeded_noise(shape, "test", *key)


def core_node(name: str, *given: object) -> Any:
    """Run one of core's nodes, old style or new; return its first output."""
    block = comfy_side.node_class(name)
    return (block.execute if hasattr(block, "execute") else getattr(block(), block.FUNCTION))(*given)[0]


def trained_adapter(model: Any, targets: str = "attention", size: float = 0.02) -> Any:
    """Make an adapter that has moved away from zero."""
    fresh = policy_module.fresh_adapter(model, 4, 8.0, 0, targets)
    pairs = {name: (down, size * noise(up.shape, "up", name)) for name, (down, up) in fresh.pairs.items()}
    return policy_module.Adapter(pairs, fresh.rank, fresh.alpha, targets)


def gradient(policy: Any, x: Tensor, sigma: Tensor, conds: list[Any], cotangent: Tensor) -> list[Tensor]:
    """Return d⟨velocity, cotangent⟩ by parameter."""
    with policy.training():
        for parameter in policy.parameters():
            parameter.grad = None
        (policy.velocity(x, sigma, conds) * cotangent).sum().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.parameters()]


def difference_error(
    policy: Any, x: Tensor, sigma: Tensor, conds: list[Any], cotangent: Tensor, step: float = 0.5
) -> float:
    """Compare the gradient with central differences along each module's own part of it.

    Return the largest relative error.
    """
    found = gradient(policy, x, sigma, conds, cotangent)
    largest = max(part.norm().item() for part in found)
    worst = 0.0
    with policy.training(), torch.no_grad():

        def value() -> float:
            return (policy.velocity(x, sigma, conds).double() * cotangent.double()).sum().item()

        for parameter, part in zip(policy.parameters(), found, strict=True):
            if part.norm() < 0.02 * largest:
                continue
            kept, direction = parameter.clone(), part / part.norm()
            size = step * parameter.norm().clamp(min=0.1)
            ends = []
            for sign in (1, -1):
                parameter.copy_(kept + sign * size * 0.05 * direction)
                ends.append(value())
            parameter.copy_(kept)
            measured = (ends[0] - ends[1]) / (2 * 0.05 * size)
            worst = max(worst, abs(measured.item() - part.norm().item()) / largest)
    return worst


def checkpoint_error(
    make: Callable[[bool], Any], x: Tensor, sigma: Tensor, conds: list[Any], cotangent: Tensor
) -> float:
    """Return the largest relative difference between the gradients with and without checkpoints."""
    plain, again = (gradient(make(checkpoint), x, sigma, conds, cotangent) for checkpoint in (False, True))
    largest = max(part.norm() for part in plain)
    return max(((a - b).norm() / largest).item() for a, b in zip(plain, again, strict=True))


def portrait(model: Any) -> dict[str, Any]:
    """Describe everything about a MODEL that we could have changed, weights bit for bit."""
    inner = model.model
    parameters = dict(inner.named_parameters())
    return {
        "weights": {name: tensor.clone() for name, tensor in inner.state_dict().items()},
        "objects": {
            name: (id(tensor), tensor.is_inference(), tensor.requires_grad)
            for name, tensor in parameters.items()
        },
        "functions": [
            list(module.weight_function) for module in inner.modules() if hasattr(module, "weight_function")
        ],
        "forwards": [name for name, module in inner.named_modules() if "forward" in module.__dict__],
        "patches": (
            dict(model.patches),
            model.patches_uuid,
            dict(model.object_patches),
            dict(model.weight_wrapper_patches),
        ),
        "wrappers": (repr(model.wrappers), repr(model.callbacks), repr(model.model_options), model.hook_mode),
        "state": (
            inner.current_patcher,
            getattr(comfy.model_management, "in_training", None),
            torch.is_inference_mode_enabled(),
        ),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name what differs between two portraits."""
    same = {name: torch.equal(tensor, after["weights"][name]) for name, tensor in before["weights"].items()}
    return [name for name, equal in same.items() if not equal] + [
        key for key in before if key != "weights" and before[key] != after[key]
    ]
