"""The graph as the loop: LoRA Policy → Rollout → Score Rollout → Advantages → Update LoRA.

Every run of the graph is one update.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..comfy_g2rpo.advantages import zero_std_share
from ..comfy_g2rpo.prompts import Prompts
from ..comfy_g2rpo.recipes import recipe
from ..comfy_g2rpo.run.checkpoint import save
from ..comfy_g2rpo.run.folder import RunFolder, fitting, is_run, read_progress
from ..comfy_g2rpo.run.optimizers import load_optimizer_tensors, optimizer_tensors
from ..comfy_g2rpo.run.pace import Pace
from ..comfy_g2rpo.run.setup import Learner, Setup
from ..comfy_g2rpo.update import records, update
from .host.comfyui import NAME_TIP, check_interrupted, run_place
from .host.train_run import fingerprint, metadata
from .inputs.checks import check_inputs
from .inputs.widgets import announce, recipe_input
from .model.adapter import TARGETS, Adapter, fresh_adapter, is_large, lora_model, with_adapter
from .model.comfy_policy import GraphPolicy, check_flow
from .types import TRAINING, AdvantagesData, AdvantagesWire, PolicyData, PolicyWire


class LoRAPolicy(io.ComfyNode):
    """The start of a graph that trains: a fresh LoRA, or the newest one of a run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        return io.Schema(
            node_id="G2RPO_LoRAPolicy",
            display_name="LoRA Policy",
            category=TRAINING,
            description=(
                "A LoRA in training on the model. A named run keeps it, and every run of the graph goes on "
                "from there."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The flow model that is aligned. It is not changed."),
                io.Int.Input("rank", default=16, min=1, max=512, tooltip="Rank of the LoRA."),
                io.Float.Input(
                    "alpha",
                    default=16.0,
                    min=0.01,
                    max=4096.0,
                    step=1.0,
                    tooltip="The LoRA's scale is alpha / rank.",
                ),
                io.Combo.Input(
                    "targets", options=list(TARGETS), default=TARGETS[0], tooltip="Layers that get a LoRA."
                ),
                recipe_input("learning_rate", step=1e-6),
                io.Int.Input(
                    "seed",
                    control_after_generate=False,
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    tooltip="Seed of a fresh LoRA's weights.",
                ),
                io.String.Input(
                    "run", default="", tooltip="Run that keeps the LoRA; blank keeps nothing. " + NAME_TIP
                ),
            ],
            outputs=[
                PolicyWire.Output("policy", display_name="policy", tooltip="For Update LoRA."),
                io.Model.Output(
                    "tuned",
                    display_name="model",
                    tooltip="The model with the LoRA as it stands: for the guider of Rollout.",
                ),
                io.Int.Output(
                    "step",
                    display_name="step",
                    tooltip="Updates made so far: a seed that differs at every one.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(
        cls,
        model: Any = None,
        rank: int = 16,
        alpha: float = 16.0,
        targets: str = "attention",
        learning_rate: float = 1e-4,
        seed: int = 0,
        run: str = "",
    ) -> str:
        """Change when the run has a new checkpoint, so that the graph goes on."""
        if not run.strip():
            return ""
        newest = RunFolder(run_place(run)).latest()
        return str(newest) if newest else "new"

    @classmethod
    def execute(
        cls, model: Any, rank: int, alpha: float, targets: str, learning_rate: float, seed: int, run: str
    ) -> io.NodeOutput:
        """Make the policy, or read it from its run."""
        check_inputs(cls, locals())
        check_flow(model)
        made = fresh_adapter(model, rank, alpha, seed, targets)
        policy = PolicyData(model, made, {}, learning_rate)
        if run.strip():
            policy = continued(policy, run.strip(), seed)
        return io.NodeOutput(policy, with_adapter(model, policy.adapter), policy.step)


def continued(fresh: PolicyData, run: str, seed: int) -> PolicyData:
    """Open the run and take its newest LoRA; an unknown run is begun."""
    adapter, place = fresh.adapter, run_place(run)
    config = {
        "config": {
            "model": {"fingerprint": fingerprint(fresh.model)},
            "lora": {"rank": adapter.rank, "alpha": adapter.alpha, "targets": adapter.targets, "seed": seed},
            "method": {"name": "graph"},
        },
        "recipe": {},
    }
    folder = RunFolder.reopen(place, config) if is_run(place) else RunFolder.create(place, config)
    newest = folder.latest()
    if newest is None:
        folder.truncate_metrics(0)
        return dataclasses.replace(fresh, run=run)
    tensors, progress = read_progress(newest, ())
    numbers = fitting(
        tensors, "parameter", [part for pair in adapter.pairs.values() for part in pair], newest
    )
    pairs = {name: (numbers[2 * i], numbers[2 * i + 1]) for i, name in enumerate(adapter.pairs)}
    state = {key: tensor for key, tensor in tensors.items() if key.startswith("optimizer/")}
    with torch.inference_mode(False):
        # Whether the optimizer's state fits shows now, and not after a rollout.
        load_optimizer_tensors(torch.optim.AdamW([part.clone() for part in numbers]), state)
    folder.truncate_metrics(progress["step"])
    return dataclasses.replace(
        fresh,
        adapter=Adapter(pairs, adapter.rank, adapter.alpha, adapter.targets),
        optimizer=state,
        step=progress["step"],
        run=run,
    )


class UpdateLoRA(io.ComfyNode):
    """One optimizer step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        return io.Schema(
            node_id="G2RPO_UpdateLoRA",
            display_name="Update LoRA",
            category=TRAINING,
            description=(
                "One update of the LoRA from one group's advantages: the exact policy gradient, by AdamW."
            ),
            inputs=[
                PolicyWire.Input("policy", tooltip="From LoRA Policy, or from another Update LoRA."),
                AdvantagesWire.Input(
                    "advantages", tooltip="Of a rollout that was made with this policy's model."
                ),
                recipe_input("kl"),
                recipe_input("step_weight"),
                recipe_input("max_grad_norm"),
                recipe_input("weight_decay", step=1e-5),
                io.Int.Input(
                    "micro_batch",
                    default=1,
                    min=1,
                    max=256,
                    tooltip="Branch steps in one forward and backward; bounds memory.",
                ),
            ],
            outputs=[
                PolicyWire.Output("updated", display_name="policy", tooltip="The policy after the update."),
                io.LoraModel.Output(
                    "lora",
                    display_name="lora",
                    tooltip="Its LoRA alone, for Save LoRA and core's Load LoRA Model.",
                ),
                io.Model.Output("tuned", display_name="model", tooltip="The model with the updated LoRA."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        policy: PolicyData,
        advantages: AdvantagesData,
        kl: float,
        step_weight: str,
        max_grad_norm: float,
        weight_decay: float,
        micro_batch: int,
    ) -> io.NodeOutput:
        """Take the step, and keep it in the policy's run."""
        check_inputs(cls, locals())
        rate = policy.learning_rate
        made = recipe(
            "g2rpo",
            kl=kl,
            step_weight=step_weight,
            max_grad_norm=max_grad_norm,
            weight_decay=weight_decay,
            learning_rate=rate,
        )
        check_current(policy)
        with torch.inference_mode(False), torch.enable_grad():
            trained, optimizer = trainee(policy, advantages, weight_decay)
            rows = records(advantages.rollout.rollout, [advantages.table], step_weight=step_weight)
            announce(cls, f"step {policy.step + 1}: {len(rows)} branch steps, forward and backward")
            with trained.training():
                stats = update(
                    trained, rows, [None], optimizer, made, micro_batch=micro_batch, check=check_interrupted
                )
            adapter = trained.adapter()
            state = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
            after = dataclasses.replace(policy, adapter=adapter, optimizer=state, step=policy.step + 1)
            if policy.run:
                keep(after, advantages, trained, optimizer, stats)
        return io.NodeOutput(
            after, lora_model(adapter), with_adapter(policy.model, adapter), ui={"g2rpo_run": [policy.run]}
        )


def check_current(policy: PolicyData) -> None:
    """Refuse a policy that its run has left behind: saving its next step would replace another."""
    if not policy.run:
        return
    newest = RunFolder(run_place(policy.run)).latest()
    at = int(newest.name) if newest else 0
    if at != policy.step:
        stands = f"it stands at step {policy.step}, but run {policy.run} at step {at}"
        raise ValueError(f"policy: {stands}; run the graph again from LoRA Policy on")


def trainee(
    policy: PolicyData, advantages: AdvantagesData, weight_decay: float
) -> tuple[GraphPolicy, torch.optim.AdamW]:
    """Put the policy's LoRA on its own model under the rollout's conditioning and guidance, with AdamW
    where it stood.
    """
    rollout = advantages.rollout
    if rollout.guider.model_patcher.model is not policy.model.model:
        raise ValueError(
            "advantages: their rollout was made with another model; connect LoRA Policy's model to the "
            "guider of Rollout"
        )
    if advantages.table.shape != rollout.rollout.plan.shape[:2]:
        raise ValueError(
            f"advantages: they are a table of {list(advantages.table.shape)}, not of their rollout's "
            "branches; make them again"
        )
    if not (advantages.table.isfinite().all() and rollout.rollout.x.isfinite().all()):
        raise ValueError("advantages: they hold NaN or infinite values; look at the scores")
    if not all(part.isfinite().all() for pair in policy.adapter.pairs.values() for part in pair):
        raise ValueError(
            "policy: its LoRA holds NaN or infinite values; training has diverged, start again at a "
            "lower learning rate"
        )
    guider = copy.copy(rollout.guider)
    guider.model_patcher, guider.model_options = policy.model, policy.model.model_options
    trained = GraphPolicy(guider, policy.adapter, checkpoint=is_large(policy.model))
    optimizer = torch.optim.AdamW(trained.parameters(), lr=policy.learning_rate, weight_decay=weight_decay)
    load_optimizer_tensors(optimizer, {name: tensor.clone() for name, tensor in policy.optimizer.items()})
    return trained, optimizer


def keep(
    policy: PolicyData,
    advantages: AdvantagesData,
    trained: GraphPolicy,
    optimizer: torch.optim.AdamW,
    stats: dict[str, float],
) -> None:
    """Write the update into the policy's run: a row of metrics, then a checkpoint."""
    folder = RunFolder.open(run_place(policy.run))
    row: dict[str, Any] = {"step": policy.step, **reward_row(advantages)}
    folder.append(row | stats | {"nfe": advantages.rollout.rollout.nfe})
    setup = Setup(
        recipe=recipe("g2rpo"),
        pace=Pace(),
        policy=trained,
        rewards=(),
        weights=(),
        judges=(),
        prompts=Prompts((), ()),
        sigmas=advantages.rollout.sigmas,
        shape=tuple(advantages.rollout.rollout.x.shape[2:]),
        alpha=policy.adapter.alpha,
        style="native",
        metadata=metadata(policy.model, "graph", dict.fromkeys(advantages.names, 1.0)),
    )
    save(setup, Learner(optimizer, [], policy.step), folder)


def reward_row(advantages: AdvantagesData) -> dict[str, float]:
    """Summarise a group's rewards [R, K, G, L] and advantages as the loop's rows do."""
    row = {}
    for name, values in zip(advantages.names, advantages.rewards, strict=True):
        valid: Tensor = values[~values.isnan()]
        row |= {f"reward/{name}/mean": valid.mean().item(), f"reward/{name}/std": valid.std().item()}
    row["advantage/abs_mean"] = advantages.table.abs().mean().item()
    row["zero_std_share"] = zero_std_share(advantages.rewards)
    return row


NODES: list[type[io.ComfyNode]] = [LoRAPolicy, UpdateLoRA]
