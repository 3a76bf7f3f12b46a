"""Train LoRA: a whole run in one block."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..comfy_g2rpo import recipes
from ..comfy_g2rpo.blocks.train_presets import AS_TYPED, PRESETS
from ..comfy_g2rpo.files.safe import finite
from ..comfy_g2rpo.run.pace import FIELDS as PACE
from .host.comfyui import lora_listing
from .host.open_run import IF_CHANGED, NEW
from .host.publish import file_ui
from .host.train_run import Request, Trained, train
from .inputs import widgets
from .inputs.checks import check_inputs
from .inputs.finding import offered
from .inputs.widgets import output
from .model.adapter import lora_model, with_adapter
from .model.comfy_policy import check_flow
from .types import TRAINING, RewardSet, RewardWire
from .views.curve import reward_curve


class TrainLoRA(io.ComfyNode):
    """Train a LoRA that aligns the MODEL with the rewards."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_TrainLoRA",
            display_name="Train LoRA on a Reward (G²RPO)",
            category=TRAINING,
            description="Train a LoRA on the connected flow model by G²RPO, with live curves. "
            "Stopped, it goes on where it was.",
            inputs=train_inputs(),
            outputs=[
                output(io.Model, "tuned", "The model with the trained LoRA.", shown="model"),
                output(io.LoraModel, "lora", "The LoRA alone, for Save LoRA and core's Load LoRA Model."),
                output(
                    io.LossMap,
                    "loss",
                    "Minus the weighted training reward of every step, for core's Plot Loss Graph.",
                ),
                output(io.Image, "curve", "Training and held-out rewards over the steps."),
                output(io.String, "run_name", "The run's name, for Run Monitor and Save LoRA.", shown="run"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )
        return offered(
            schema,
            "grpo, dancegrpo, flow-grpo, rlhf, reinforcement learning, preference alignment, lora training, "
            "fine-tune, pickscore, hps, aesthetic",
            rare="negative, alpha, targets, prompts_per_step, slots, eval_every, changes, "
            "if_settings_changed",
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
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
        heldout_reward: RewardSet | None = None,
        sigmas: Tensor | None = None,
    ) -> io.NodeOutput:
        """Train, or go on with a run of the same settings."""
        wanted = Request(**check_inputs(cls, locals()))
        check_flow(model)
        done = train(wanted, widgets.node_id(cls), lambda text: widgets.announce(cls, text))
        name, rows = done.folder.path.name, done.folder.metrics()
        return io.NodeOutput(
            with_adapter(model, done.adapter),
            lora_model(done.adapter),
            {"loss": losses(rows, reward)},
            reward_curve(rows, f"Run {name}", done.steps),
            name,
            ui={"g2rpo_run": [name], "g2rpo_result": [result_of(done)], **file_ui(done.file)},
        )


def result_of(done: Trained) -> dict[str, Any]:
    """Return what came out of a run, for those who read /history: names, steps and final scores."""
    told = ("steps", "stopped_by", "lora_step", "reward_before", "reward_after")
    told += ("heldout_before", "heldout_after")
    kept = {name: done.summary[name] for name in told if name in done.summary}
    return finite({"run": done.folder.path.name, "lora": lora_listing(done.file), **kept})


def train_inputs() -> list[io.Input]:
    """List Train LoRA's inputs."""
    tips = {name: field.metadata["help"] for name, field in PACE.items()}
    return [
        widgets.trained_model_input(),
        io.Clip.Input("clip", tooltip="Its text encoder: every prompt is encoded once."),
        io.Vae.Input("vae", tooltip="Its VAE: finished latents are decoded and scored as pictures."),
        RewardWire.Input("reward", tooltip="What training makes more of: Load Reward, or Mix Rewards."),
        io.Combo.Input(
            "recipe",
            options=list(recipes.RECIPES),
            default="g2rpo",
            tooltip="The training method; g2rpo is the one to start with, and 'changes' below adapts it.",
        ),
        widgets.int_input("steps", 100, 1, 100_000, tips["steps"] + " More continues a run."),
        widgets.text_area("prompts", "What is trained on: one prompt per line."),
        widgets.text_area(
            "heldout_prompts",
            ("Prompts that only measure, one per line. Blank sets a fifth of the prompts aside."),
        ),
        *widgets.drawing_inputs(", more doubles the cost"),
        widgets.learning_rate_input(),
        *widgets.lora_inputs(),
        widgets.int_input("prompts_per_step", 1, 1, 1024, tips["prompts_per_step"]),
        widgets.slots_input(tips["slots"]),
        widgets.int_input("eval_every", 10, 0, 100_000, tips["eval_every"]),
        widgets.seed_input(tips["seed"]),
        widgets.name_input("run", "Name of the run: the same name goes on, blank makes one of the settings."),
        widgets.text_area(
            "changes",
            "Other settings, one 'name = value' per line, such as: group_size = 8. The docs list them all.",
        ),
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            default=AS_TYPED,
            optional=True,
            tooltip="Numbers for your model's size in place of the typed ones. The node says which; lines in "
            "'changes' still win.",
        ),
        io.Combo.Input(
            "if_settings_changed",
            options=list(IF_CHANGED),
            default=NEW,
            optional=True,
            tooltip="What a named run does when its settings changed: new starts name-2, continue goes on "
            "with the new numbers, ask stops and names them.",
        ),
        RewardWire.Input(
            "heldout_reward",
            optional=True,
            tooltip="Rewards that only measure. They show when the model games the trained one.",
        ),
        io.Sigmas.Input(
            "sigmas",
            optional=True,
            tooltip="Noise levels from 1 to 0; left open, the recipe's steps with the model's own shift.",
        ),
    ]


def losses(rows: list[dict[str, Any]], reward: RewardSet) -> list[float]:
    """Return minus the weighted training reward of every step: the on-policy loss itself is always 0."""
    weights = {f"reward/{name}/mean": weight for name, weight in reward.named_weights.items()}
    made = [-sum(w * (row.get(name) or 0.0) for name, w in weights.items()) for row in rows if "nfe" in row]
    if len(set(made)) < 2:
        # Core's plot divides by the range of the values.
        made = [*made, (made[-1] if made else 0.0) + 1e-6, 0.0]
    return made


NODES: list[type[io.ComfyNode]] = [TrainLoRA]
