"""The graph as the loop: LoRA Policy → Rollout → Score Rollout → Advantages → Update LoRA.

Every run of the graph is one update.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..comfy_g2rpo.advantages import zero_std_share
from ..comfy_g2rpo.files.one_writer import one_writer
from ..comfy_g2rpo.prompts import Prompts
from ..comfy_g2rpo.recipes import Recipe, recipe
from ..comfy_g2rpo.run.batch_limits import Limits
from ..comfy_g2rpo.run.checkpoint import save
from ..comfy_g2rpo.run.folder import RunFolder, fitting, read_progress
from ..comfy_g2rpo.run.optimizers import load_optimizer_tensors, optimizer_tensors
from ..comfy_g2rpo.run.pace import Pace
from ..comfy_g2rpo.run.setup import Learner, Setup
from ..comfy_g2rpo.update import records, update
from ..comfy_g2rpo.votes.kept_pairs import read_pairs
from ..comfy_g2rpo.votes.pair_steps import PairSteps
from .host.comfyui import check_interrupted, known_run, run_place
from .host.open_run import Wanted, open_run, plain_errors
from .host.publish import metadata
from .inputs import widgets
from .inputs.checks import check_inputs
from .inputs.finding import offered
from .inputs.judging import checked_prompt
from .inputs.widgets import Progress, announce, output, recipe_input, show
from .model.adapter import Adapter, fresh_adapter, is_large, lora_model, with_adapter
from .model.comfy_policy import GraphPolicy, check_flow, text_policy
from .model.fingerprint import fingerprint, patches_of
from .types import TRAINING, AdvantagesData, AdvantagesWire, PolicyData, PolicyWire
from .voting import base_of, votes_stamp


class LoRAPolicy(io.ComfyNode):
    """The start of a graph that trains: a fresh LoRA, or a run's newest."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_LoRAPolicy",
            display_name="LoRA Policy",
            category=TRAINING,
            description="A LoRA in training on the model. A named run keeps it, and every run of the graph "
            "goes on from there.",
            inputs=[
                widgets.trained_model_input(),
                *widgets.lora_inputs(),
                widgets.learning_rate_input(),
                widgets.seed_input("Seed of a fresh LoRA's weights."),
                widgets.name_input("run", "Run that keeps the LoRA; blank keeps nothing."),
            ],
            outputs=[
                output(PolicyWire, "policy", "For Update LoRA."),
                output(
                    io.Model,
                    "tuned",
                    "The model with the LoRA as it stands: for the guider of Rollout.",
                    shown="model",
                ),
                output(io.Int, "step", "Updates made so far: a seed that differs at every one."),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return offered(schema, "grpo, reinforcement learning, policy, trainable lora", rare="alpha, targets")

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
        """Return what changes with every new checkpoint of the run, so that the graph goes on."""
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
            name = run.strip()
            with plain_errors(name), one_writer(run_place(name)):
                policy = continued(policy, name, seed)
        return io.NodeOutput(policy, with_adapter(model, policy.adapter), policy.step)


def continued(fresh: PolicyData, run: str, seed: int) -> PolicyData:
    """Open the run and return its newest LoRA as a policy; begin the run if there is none yet."""
    adapter = fresh.adapter
    config = {
        "config": {
            "model": {"fingerprint": fingerprint(fresh.model), "patches": patches_of(fresh.model)},
            "lora": {"rank": adapter.rank, "alpha": adapter.alpha, "targets": adapter.targets, "seed": seed},
            "method": {"name": "graph"},
        },
        "recipe": {},
    }
    folder = open_run(Wanted(run, config))
    newest = folder.latest()
    if newest is None:
        folder.truncate_metrics(0)
        return dataclasses.replace(fresh, run=run)
    tensors, progress = read_progress(newest, ())
    like = [part for pair in adapter.pairs.values() for part in pair]
    numbers = fitting(tensors, "parameter", like, newest)
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
        schema = io.Schema(
            node_id="G2RPO_UpdateLoRA",
            display_name="Update LoRA (GRPO)",
            category=TRAINING,
            description=(
                "One update of the LoRA: what scored above its group becomes likelier, the rest less likely."
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
                widgets.int_input(
                    "micro_batch",
                    1,
                    1,
                    256,
                    ("Branch steps that are learned from at once. Lower it where memory runs out."),
                ),
            ],
            outputs=[
                output(PolicyWire, "updated", "The policy after the update.", shown="policy"),
                output(io.LoraModel, "lora", "Its LoRA alone, for Save LoRA and core's Load LoRA Model."),
                output(io.Model, "tuned", "The model with the updated LoRA.", shown="model"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )
        return offered(
            schema,
            "grpo, reinforcement learning, policy gradient, optimizer step",
            rare="step_weight, max_grad_norm, weight_decay, micro_batch",
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
        given = {"kl": kl, "step_weight": step_weight, "max_grad_norm": max_grad_norm}
        made = recipe("g2rpo", **given, weight_decay=weight_decay, learning_rate=policy.learning_rate)
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
    """Raise ValueError where the run has gone on: saving this policy's next step would replace another."""
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
    """Return the policy's LoRA on its own model, with the rollout's conditioning, and its AdamW."""
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
    check_sound(policy)
    guider = copy.copy(rollout.guider)
    guider.model_patcher, guider.model_options = policy.model, policy.model.model_options
    trained = GraphPolicy(guider, policy.adapter, checkpoint=is_large(policy.model))
    return trained, optimizer_of(policy, trained, weight_decay)


def check_sound(policy: PolicyData) -> None:
    """Raise ValueError where a policy's LoRA is not finite."""
    if not all(part.isfinite().all() for pair in policy.adapter.pairs.values() for part in pair):
        raise ValueError(
            "policy: its LoRA holds NaN or infinite values; training has diverged, start again at a "
            "lower learning rate"
        )


def optimizer_of(policy: PolicyData, trained: GraphPolicy, weight_decay: float) -> torch.optim.AdamW:
    """Return a policy's AdamW as it stands."""
    optimizer = torch.optim.AdamW(trained.parameters(), lr=policy.learning_rate, weight_decay=weight_decay)
    load_optimizer_tensors(optimizer, {name: tensor.clone() for name, tensor in policy.optimizer.items()})
    return optimizer


def keep(
    policy: PolicyData,
    advantages: AdvantagesData,
    trained: GraphPolicy,
    optimizer: torch.optim.AdamW,
    stats: dict[str, float],
) -> None:
    """Write the update into the policy's run: a row of metrics, then a checkpoint."""
    row: dict[str, Any] = {"step": policy.step, **reward_row(advantages), **stats}
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
    place = run_place(policy.run)
    with plain_errors(policy.run), one_writer(place):
        folder = RunFolder.open(place)
        folder.append(row | {"nfe": advantages.rollout.rollout.nfe})
        save(setup, Learner(optimizer, [], policy.step), folder)


def reward_row(advantages: AdvantagesData) -> dict[str, float]:
    """Summarise a group's rewards [R, K, G, L] and advantages as the loop's rows do."""
    row = {}
    for name, values in zip(advantages.names, advantages.rewards, strict=True):
        valid: Tensor = values[~values.isnan()]
        row |= {f"reward/{name}/mean": valid.mean().item(), f"reward/{name}/std": valid.std().item()}
    row["advantage/abs_mean"] = advantages.table.abs().mean().item()
    row["zero_std_share"] = zero_std_share(advantages.rewards, advantages.std_floor, advantages.noise)
    return row


class UpdateFromVotes(io.ComfyNode):
    """Epochs over the votes that a run has kept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_UpdateFromVotes",
            display_name="Update LoRA on Kept Votes",
            category=TRAINING,
            description="Trains the LoRA on all votes that a run has kept, several times over. Nothing is "
            "drawn for it. Without votes nothing below runs.",
            inputs=[
                PolicyWire.Input("policy", tooltip="From LoRA Policy, best of a run of its own."),
                io.Clip.Input("clip", tooltip="The model's text encoder: voted prompts are encoded once."),
                widgets.name_input("run", "Run that keeps the votes: the one of the node Vote."),
                widgets.int_input(
                    "epochs", 4, 1, 1000, "How often every vote is learned from. More memorises them."
                ),
                recipe_input("pair_loss"),
                recipe_input("pair_beta"),
                *widgets.drawing_inputs(", the same as when the voted images were drawn")[:2],
                widgets.int_input(
                    "forks_per_step", 4, 1, 4096, "States of voted images that an update learns from."
                ),
                recipe_input("kl"),
                recipe_input("max_grad_norm"),
                recipe_input("weight_decay", step=1e-5),
                widgets.int_input(
                    "micro_batch",
                    1,
                    1,
                    256,
                    "States that are learned from at once. Lower it where memory runs out.",
                ),
            ],
            outputs=[
                output(PolicyWire, "updated", "The policy after all updates.", shown="policy"),
                output(io.LoraModel, "lora", "Its LoRA alone, for Save LoRA and core's Load LoRA Model."),
                output(io.Model, "tuned", "The model with the trained LoRA.", shown="model"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )
        return offered(
            schema,
            "dpo, ropo, human preference, offline, pairs, votes, rlhf",
            rare="negative, forks_per_step, kl, max_grad_norm, weight_decay, micro_batch",
        )

    @classmethod
    def fingerprint_inputs(
        cls,
        policy: Any = None,
        clip: Any = None,
        run: str = "",
        epochs: int = 4,
        pair_loss: str = "ropo",
        pair_beta: float = 1.0,
        negative: str = "",
        guidance: float = 1.0,
        forks_per_step: int = 4,
        kl: float = 0.0,
        max_grad_norm: float = 1.0,
        weight_decay: float = 1e-4,
        micro_batch: int = 1,
    ) -> str:
        """Return what changes when the run has other votes."""
        return votes_stamp(run)

    @classmethod
    def execute(
        cls,
        policy: PolicyData,
        clip: Any,
        run: str,
        epochs: int,
        pair_loss: str,
        pair_beta: float,
        negative: str,
        guidance: float,
        forks_per_step: int,
        kl: float,
        max_grad_norm: float,
        weight_decay: float,
        micro_batch: int,
    ) -> io.NodeOutput:
        """Learn from the votes, and keep the result in the policy's run."""
        check_inputs(cls, locals())
        given = {"pair_loss": pair_loss, "pair_beta": pair_beta, "kl": kl, "max_grad_norm": max_grad_norm}
        made = recipe("g2rpo", objective="pairs", **given, weight_decay=weight_decay)
        pace = Pace(prompts_per_step=forks_per_step, micro_batch=micro_batch)
        check_current(policy)
        check_sound(policy)
        if waiting := nobody_voted(run):
            return io.NodeOutput(*[ExecutionBlocker(None)] * 3, ui=show(cls, waiting))
        steps = kept_steps(policy, run, pace)
        count = epochs * steps.steps_per_epoch
        announce(cls, f"{count} updates: {steps.about}")
        with torch.inference_mode(False), torch.enable_grad():
            saving = is_large(policy.model)
            text = checked_prompt(negative, "negative")
            trained = text_policy(policy.model, clip, None, guidance, text, policy.adapter, checkpoint=saving)
            with torch.no_grad():
                trained.encode(steps.prompts)
            learner = Learner(
                optimizer_of(policy, trained, weight_decay), [], policy.step, limits=Limits.of(pace)
            )
            setup = voted_setup(policy, trained, made, pace, steps)
            progress, rows = Progress(cls, count), []
            for _ in range(count):
                rows.append(steps(setup, learner, lambda phase: progress.check()))
                progress.done(1)
            adapter = trained.adapter()
            state = {name: part.clone() for name, part in optimizer_tensors(learner.optimizer).items()}
            after = dataclasses.replace(policy, adapter=adapter, optimizer=state, step=learner.step)
            if policy.run:
                keep_rows(policy.run, setup, learner, rows)
        said = show(cls, outcome_of(rows[-steps.steps_per_epoch :], count)).as_dict()
        tuned = with_adapter(policy.model, adapter)
        return io.NodeOutput(after, lora_model(adapter), tuned, ui={**said, "g2rpo_run": [policy.run]})


def nobody_voted(run: str) -> str:
    """Say that a run has no votes yet, or is not there; nothing where it has some."""
    name = run.strip()
    if not name:
        raise ValueError("run is blank; write the name of the run that keeps the votes, as in Vote")
    if votes_stamp(name):
        return ""
    return f"no votes yet in run {name}: vote there first, with the node Vote; nothing below runs until then"


def kept_steps(policy: PolicyData, run: str, pace: Pace) -> PairSteps:
    """Read the votes that a run has kept on images of the policy's model."""
    name = run.strip()
    place = known_run(name, "write the one of the node Vote").path
    model = {"fingerprint": fingerprint(policy.model), "patches": patches_of(policy.model)}
    with plain_errors(name):
        return PairSteps(read_pairs([place], base_of({"model": model}), {}), pace.prompts_per_step, pace.seed)


def voted_setup(
    policy: PolicyData, trained: GraphPolicy, made: Recipe, pace: Pace, steps: PairSteps
) -> Setup:
    """Return what a step over kept votes, and its checkpoint, need to know."""
    return Setup(
        recipe=made,
        stored=steps,
        pace=pace,
        policy=trained,
        rewards=(),
        weights=(),
        judges=(),
        prompts=Prompts(steps.prompts, ()),
        sigmas=steps.kept[0].forks.sigma,
        shape=tuple(steps.kept[0].forks.x.shape[1:]),
        alpha=policy.adapter.alpha,
        style="native",
        metadata=metadata(policy.model, "pairs", {"votes": 1.0}),
    )


def keep_rows(run: str, setup: Setup, learner: Learner, rows: list[dict[str, float]]) -> None:
    """Write updates into a run: their rows of metrics, then a checkpoint."""
    place = run_place(run)
    with plain_errors(run), one_writer(place):
        folder = RunFolder.open(place)
        for row in rows:
            folder.append(row)
        save(setup, learner, folder)


def outcome_of(rows: list[dict[str, float]], count: int) -> str:
    """Say what the last epoch's rows say."""
    right = sum(row["pairs/accuracy"] for row in rows) / len(rows)
    return f"{count} updates made; the model now ranks {right:.0%} of the voted pairs as the votes do"


NODES: list[type[io.ComfyNode]] = [LoRAPolicy, UpdateLoRA, UpdateFromVotes]
