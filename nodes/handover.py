"""Blocks that leave a training to a worker beside ComfyUI: one hands it over, one shows what comes of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..comfy_g2rpo.blocks.block_settings import ENCODERS
from ..comfy_g2rpo.blocks.run_names import checked_name
from ..comfy_g2rpo.blocks.train_presets import AS_TYPED
from ..comfy_g2rpo.files.spool import DONE
from ..comfy_g2rpo.rewards import REWARDS, Reward, RewardError, check_prompts
from ..comfy_g2rpo.run.pace import FIELDS as PACE
from .host.comfyui import lora_listing
from .host.open_run import plain_errors
from .host.publish import file_ui, publish
from .host.reward_models import DTYPES, Managed
from .host.routes import runs_root
from .host.watch_job import lora_of, samples_of, stamp, standing, stop_job, the_spool, want_newest, with_lora
from .host.write_job import IF_CHANGED, NEW, Judge, Order, chosen_files, hand_over, job_of
from .inputs import widgets
from .inputs.checks import check_inputs
from .inputs.finding import offered
from .inputs.judging import checked_prompt
from .inputs.model_names import file_choices, model_choices, model_named, spelt
from .inputs.widgets import output
from .training import train_inputs
from .types import TRAINING, RewardSet
from .views.curve import reward_curve

RUN_TIP = "Name of the run: lower-case letters, digits, - and _, 64 at most. Blank makes one of the settings."
WIRED = ("model", "clip", "vae", "sigmas")
"""Inputs of Train LoRA that a job has by name, or not at all."""


class SubmitTraining(io.ComfyNode):
    """Hand a training over to a worker."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_SubmitTraining",
            display_name="Submit Training",
            category=TRAINING,
            description="Hand a training over to a worker beside ComfyUI, and go on at once. The worker is "
            "started by hand: g2rpo worker.",
            inputs=submit_inputs(),
            outputs=[output(io.String, "run_name", "The run's name, for Training Result.", shown="run")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )
        return offered(
            schema,
            "grpo, background training, another gpu, queue, job, worker, headless, remote",
            rare="text_encoder_3, negative, alpha, targets, prompts_per_step, slots, eval_every, changes, "
            "if_settings_changed, try_again",
        )

    @classmethod
    def execute(
        cls,
        model: str,
        text_encoder_1: str,
        text_encoder_2: str,
        text_encoder_3: str,
        vae: str,
        reward: RewardSet,
        recipe: str,
        steps: int,
        prompts: str,
        heldout_prompts: str,
        negative: str,
        guidance: float,
        width: int,
        height: int,
        learning_rate: float,
        rank: int,
        alpha: float,
        targets: str,
        prompts_per_step: int,
        slots: int,
        eval_every: int,
        seed: int,
        run: str,
        changes: str,
        preset: str = AS_TYPED,
        if_settings_changed: str = NEW,
        try_again: bool = False,
        heldout_reward: RewardSet | None = None,
    ) -> io.NodeOutput:
        """Write the job, unless it is there already."""
        given = check_inputs(cls, locals())
        checked_prompt(negative, "negative")
        job, cost = job_of(order_of(given))
        told = job["recipe"]["prompts"]
        judges = (*reward.rewards, *(heldout_reward.rewards if heldout_reward else ()))
        check_prompts(judges, [*told["train"], *told["heldout"]])
        done = hand_over(the_spool(), runs_root(), run, job, if_settings_changed or NEW, bool(try_again))
        how = "is handed over" if done.new else "was handed over before"
        text = f"{done.job_id} {how}{f', {done.remark}' if done.remark else ''}: {cost}"
        logging.info("%s: %s", cls.define_schema().display_name, text)
        shown = widgets.show(cls, text).as_dict()
        return io.NodeOutput(done.job_id, ui={"g2rpo_run": [done.job_id], **shown})


def submit_inputs() -> list[io.Input]:
    """List Submit Training's inputs: Train LoRA's, with names in the place of models."""
    own = {
        "steps": widgets.int_input("steps", 100, 1, 100_000, PACE["steps"].metadata["help"]),
        "guidance": io.Float.Input(
            "guidance",
            default=1.0,
            min=1.0,
            max=30.0,
            step=0.1,
            tooltip="1 is none. FLUX takes it as an input, about 3.5 for dev; others pay double above 1.",
        ),
        "run": io.String.Input("run", default="", tooltip=RUN_TIP),
        "if_settings_changed": io.Combo.Input(
            "if_settings_changed",
            options=list(IF_CHANGED),
            default=NEW,
            optional=True,
            tooltip="What a name does that was handed over with other settings: new takes name-2, ask stops "
            "and names them.",
        ),
    }
    settings = [own.get(one.id, one) for one in train_inputs() if one.id not in WIRED]
    return [
        io.Combo.Input(
            "model",
            options=model_choices(),
            tooltip="The flow model that is aligned, from models/diffusion_models or models/checkpoints.",
        ),
        *(
            io.Combo.Input(
                name,
                options=file_choices("text_encoders"),
                tooltip="A text encoder of the model, in any order; none where the checkpoint has it.",
            )
            for name in ENCODERS
        ),
        io.Combo.Input(
            "vae", options=file_choices("vae"), tooltip="Its VAE; none where the checkpoint has it."
        ),
        *settings[:-1],
        io.Boolean.Input(
            "try_again",
            default=False,
            optional=True,
            tooltip="Take these very settings up again where they failed or were stopped. The run goes on "
            "from its last checkpoint.",
        ),
        settings[-1],
    ]


def order_of(given: Mapping[str, Any]) -> Order:
    """Return what a job is made of: the widgets, and what stands behind wires and names."""
    reward, heldout = given["reward"], given["heldout_reward"] or RewardSet((), ())
    own = {name: value for name, value in given.items() if name in Order.__dataclass_fields__}
    own |= {
        "model": model_named(given["model"]),
        "text_encoders": tuple(map(spelt, chosen_files([given[name] for name in ENCODERS]))),
        "vae": spelt(chosen_files([given["vae"]])[0]) if chosen_files([given["vae"]]) else "",
        "reward": judges_of(reward, "reward"),
        "heldout_reward": judges_of(heldout, "heldout_reward"),
        "mix": reward.mix,
        "preset": given["preset"] or AS_TYPED,
    }
    return Order(**own)


def judges_of(found: RewardSet, widget: str) -> tuple[Judge, ...]:
    """Return rewards as a recipe names them; RewardError for one that only this graph knows."""
    parts = zip(found.rewards, found.weights, found.all_gates, strict=True)
    return tuple(judge_of(reward, weight, gate, widget) for reward, weight, gate in parts)


def judge_of(reward: Reward, weight: float, gate: float | None, widget: str) -> Judge:
    """Return a reward as a recipe names it."""
    if REWARDS.get(reward.name) is reward:
        return Judge(reward.name, weight, gate)
    if isinstance(reward, Managed):
        return Judge(reward.name, weight, gate, reward.batch, precision_of(reward))
    raise RewardError(
        f"{widget}: {reward.name[:80]} is made in this graph, and a job cannot name it; use Load Reward, or "
        "Train LoRA, which trains in ComfyUI"
    )


def precision_of(reward: Managed) -> str:
    """Return the precision of a reward model's trunk, as Load Reward names it."""
    module = reward.reward.module
    kinds = {weight.dtype for trunk in module.trunks for weight in getattr(module, trunk).parameters()}
    return next((name for name, dtype in DTYPES.items() if dtype in kinds and name != "fp32"), "fp32")


class TrainingResult(io.ComfyNode):
    """What a worker makes of a job."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_TrainingResult",
            display_name="Training Result",
            category=TRAINING,
            description="Show how a handed-over training stands, and give its LoRA once it is done. What "
            "needs the LoRA waits until then; press Run again.",
            inputs=[
                io.String.Input(
                    "run", default="", tooltip="Name of the run: connect Submit Training, or type it."
                ),
                io.Boolean.Input(
                    "newest_checkpoint",
                    default=False,
                    tooltip="Give the LoRA of the newest checkpoint while the training goes on, or where it "
                    "was stopped.",
                ),
                io.Boolean.Input(
                    "stop",
                    default=False,
                    tooltip="Stop the training after the step that it is in. Submit Training can take it up "
                    "again.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model that Submit Training names, to get it with the LoRA.",
                ),
            ],
            outputs=[
                output(io.Model, "tuned", "The connected model with the LoRA.", shown="model"),
                output(io.LoraModel, "lora", "The LoRA alone, for Save LoRA and core's Load LoRA Model."),
                output(io.Image, "curve", "Training and held-out rewards over the steps."),
                output(io.Image, "samples", "The newest pictures of the held-out prompts."),
                output(io.String, "state", "How it stands: waiting, step and time left, done, or why not."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )
        return offered(schema, "grpo, background training, job, worker, lora, progress, training curve")

    @classmethod
    def fingerprint_inputs(
        cls, run: str | None = None, newest_checkpoint: bool = False, stop: bool = False, model: Any = None
    ) -> str:
        """Return what changes when the job or its run does; core does not know yet what comes over a link."""
        return stamp(run)

    @classmethod
    def execute(cls, run: str, newest_checkpoint: bool, stop: bool, model: Any = None) -> io.NodeOutput:
        """Look, stop if that is asked for, and give what there is."""
        check_inputs(cls, locals())
        job_id = checked_name(run, "run")
        if stop:
            stop_job(job_id)
        if newest_checkpoint:
            want_newest(job_id)
        with torch.inference_mode(False):
            now = standing(job_id)
            weights, samples = lora_of(now, newest_checkpoint), samples_of(now.folder)
            tuned: Any = ExecutionBlocker(None)
            if weights and model is not None:
                tuned = with_lora(model, weights)
            elif weights:
                tuned = ExecutionBlocker("Training Result: model is not connected; connect the model")
        logging.info("%s: %s", cls.define_schema().display_name, now.text)
        page = {"g2rpo_run": [job_id], **widgets.show(cls, now.text).as_dict()}
        if now.state == DONE and now.folder is not None:
            with plain_errors(job_id):
                file = publish(now.folder, job_id)
            page |= file_ui(file)
            page["g2rpo_result"] = [{"run": job_id, "state": now.state, "lora": lora_listing(file)}]
        return io.NodeOutput(
            tuned,
            weights or ExecutionBlocker(None),
            reward_curve(now.rows, f"Run {job_id}", now.total),
            ExecutionBlocker(None) if samples is None else samples,
            now.text,
            ui=page,
        )


NODES: list[type[io.ComfyNode]] = [SubmitTraining, TrainingResult]
