"""Optimizers from libraries that are asked for by name: 8-bit moments, and a step size that finds itself."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout

import torch
from torch import nn

from comfy_g2rpo.recipes import Recipe
from comfy_g2rpo.run.optimizers import adamw


def make_optimizer(parameters: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Make the optimizer that a recipe names; ValueError with the command that installs what it lacks."""
    if recipe.optimizer == "adamw_8bit":
        return adamw_8bit(parameters, recipe)
    if recipe.optimizer == "prodigy":
        return prodigy(parameters, recipe)
    return adamw(parameters, recipe)


def adamw_8bit(parameters: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Make AdamW whose moments have 8 bit (arXiv 2110.02861)."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "method.optimizer is adamw_8bit, which needs bitsandbytes; install it with: pip install "
            "bitsandbytes"
        ) from error
    return AdamW8bit(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


def prodigy(parameters: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Make Prodigy (arXiv 2306.06101), with decoupled weight decay as AdamW's."""
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise ValueError(
            "method.optimizer is prodigy, which needs prodigyopt; install it with: pip install prodigyopt"
        ) from error
    with redirect_stdout(io.StringIO()):  # it prints what it is told to do
        return Prodigy(
            parameters,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            decouple=True,
            use_bias_correction=True,
            safeguard_warmup=recipe.warmup_steps > 0,
        )
