"""Train LoRA: a whole run in one block."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..comfy_g2rpo import recipes
from ..comfy_g2rpo.run.pace import FIELDS as PACE
from .host.comfyui import NAME_TIP
from .host.train_run import Request, train
from .inputs.checks import check_inputs
from .inputs.widgets import announce, node_id, recipe_input
from .model.adapter import TARGETS, lora_model, with_adapter
from .model.comfy_policy import check_flow
from .types import TRAINING, RewardSet, RewardWire
from .views.curve import reward_curve


class TrainLoRA(io.ComfyNode):
    """Align the MODEL with the rewards and hand the LoRA on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        return io.Schema(
            node_id="G2RPO_TrainLoRA",
            display_name="Train LoRA",
            category=TRAINING,
            description=(
                "Train a LoRA on the connected flow model by G²RPO, with live curves. Stopped, it goes on "
                "where it was."
            ),
            inputs=train_inputs(),
            outputs=[
                io.Model.Output("tuned", display_name="model", tooltip="The model with the trained LoRA."),
                io.LoraModel.Output(
                    "lora",
                    display_name="lora",
                    tooltip="The LoRA alone, for Save LoRA and core's Load LoRA Model.",
                ),
                io.LossMap.Output(
                    "loss",
                    display_name="loss",
                    tooltip="Minus the weighted training reward of every step, for core's Plot Loss Graph.",
                ),
                io.Image.Output(
                    "curve", display_name="curve", tooltip="Training and held-out rewards over the steps."
                ),
                io.String.Output(
                    "run_name", display_name="run", tooltip="The run's name, for Run Monitor and Save LoRA."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
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
        heldout_reward: RewardSet | None = None,
        sigmas: Tensor | None = None,
    ) -> io.NodeOutput:
        """Train, or go on with a run of the same settings."""
        check_inputs(cls, locals())
        wanted = Request(
            model, clip, vae, reward, recipe, steps, prompts, heldout_prompts, negative, guidance, width, height, learning_rate, rank,  # noqa: E501
            alpha, targets, prompts_per_step, slots, eval_every, seed, run, changes, heldout_reward, sigmas,
        )  # fmt: skip
        check_flow(model)
        folder, adapter = train(wanted, node_id(cls), lambda text: announce(cls, text))
        rows = folder.metrics()
        return io.NodeOutput(
            with_adapter(model, adapter),
            lora_model(adapter),
            {"loss": losses(rows, reward)},
            reward_curve(rows, f"Run {folder.path.name}", steps),
            folder.path.name,
            ui={"g2rpo_run": [folder.path.name]},
        )


def train_inputs() -> list[io.Input]:
    """List Train LoRA's inputs."""
    return [
        io.Model.Input("model", tooltip="The flow model that is aligned. It is not changed."),
        io.Clip.Input("clip", tooltip="Its text encoder: every prompt is encoded once."),
        io.Vae.Input("vae", tooltip="Its VAE: finished latents are decoded and scored as pictures."),
        RewardWire.Input("reward", tooltip="What training makes more of: Load Reward, or Mix Rewards."),
        io.Combo.Input(
            "recipe",
            options=list(recipes.RECIPES),
            default="g2rpo",
            tooltip="The method; 'changes' below adapts it.",
        ),
        io.Int.Input(
            "steps",
            default=100,
            min=1,
            max=100_000,
            tooltip=PACE["steps"].metadata["help"] + " More continues a run.",
        ),
        io.String.Input(
            "prompts", multiline=True, default="", tooltip="What is trained on: one prompt per line."
        ),
        io.String.Input(
            "heldout_prompts",
            multiline=True,
            default="",
            tooltip="Prompts that only measure, one per line; blank sets a fifth aside.",
        ),
        io.String.Input(
            "negative",
            multiline=True,
            default="",
            tooltip="Negative prompt; it plays a part where guidance is above 1.",
        ),
        io.Float.Input(
            "guidance",
            default=1.0,
            min=1.0,
            max=30.0,
            step=0.1,
            tooltip="Classifier-free guidance; 1 is none, more doubles the cost.",
        ),
        io.Int.Input(
            "width", default=512, min=16, max=4096, step=8, tooltip="Width of the pictures in pixels."
        ),
        io.Int.Input(
            "height", default=512, min=16, max=4096, step=8, tooltip="Height of the pictures in pixels."
        ),
        recipe_input("learning_rate", step=1e-6),
        io.Int.Input("rank", default=16, min=1, max=512, tooltip="Rank of the LoRA."),
        io.Float.Input(
            "alpha", default=16.0, min=0.01, max=4096.0, step=1.0, tooltip="The LoRA's scale is alpha / rank."
        ),
        io.Combo.Input(
            "targets", options=list(TARGETS), default=TARGETS[0], tooltip="Layers that get a LoRA."
        ),
        io.Int.Input(
            "prompts_per_step", default=1, min=1, max=1024, tooltip=PACE["prompts_per_step"].metadata["help"]
        ),
        io.Int.Input(
            "slots",
            default=8,
            min=1,
            max=4096,
            tooltip=PACE["slots"].metadata["help"] + " Lower it where memory runs out.",
        ),
        io.Int.Input(
            "eval_every", default=10, min=0, max=100_000, tooltip=PACE["eval_every"].metadata["help"]
        ),
        io.Int.Input(
            "seed",
            control_after_generate=False,
            default=0,
            min=0,
            max=2**31 - 1,
            tooltip=PACE["seed"].metadata["help"],
        ),
        io.String.Input(
            "run",
            default="",
            tooltip="Name of the run: the same name goes on, blank makes one of the settings. " + NAME_TIP,
        ),
        io.String.Input(
            "changes",
            multiline=True,
            default="",
            tooltip=(
                "Fields of recipe and pace that differ, one 'name = value' per line, such as: group_size = 8."
            ),
        ),
        RewardWire.Input(
            "heldout_reward",
            optional=True,
            tooltip="Rewards that only measure, to see whether the model games its reward.",
        ),
        io.Sigmas.Input(
            "sigmas",
            optional=True,
            tooltip="Noise levels from 1 to 0; left open, the recipe's steps with the model's own shift.",
        ),
    ]


def losses(rows: list[dict[str, Any]], reward: RewardSet) -> list[float]:
    """Return minus the weighted training reward of every step: the on-policy loss itself is 0 by
    construction.
    """
    weights = {f"reward/{r.name}/mean": w for r, w in zip(reward.rewards, reward.weights, strict=True)}
    made = [-sum(w * (row.get(name) or 0.0) for name, w in weights.items()) for row in rows if "nfe" in row]
    if len(set(made)) < 2:
        # Core's plot divides by the range of the values.
        made = [*made, (made[-1] if made else 0.0) + 1e-6, 0.0]
    return made


NODES: list[type[io.ComfyNode]] = [TrainLoRA]
