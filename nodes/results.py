"""Blocks that look at what training made: base against tuned, a run's curves, a file of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..comfy_g2rpo import lora
from ..comfy_g2rpo.files.safe import HEADER_TENSORS
from ..comfy_g2rpo.lora.modelspec import named_base
from ..comfy_g2rpo.prompts import prompts_of
from ..comfy_g2rpo.run.evaluation import Evaluation, compare, evaluate
from ..comfy_g2rpo.run.folder import RunFolder
from ..comfy_g2rpo.run.pace import Pace
from ..comfy_g2rpo.schedule import shifted_sigmas
from .host.comfyui import NEWEST, check_interrupted, checked_name, known_run, lora_listing, run_place
from .host.open_run import plain_errors
from .host.publish import base_of, file_ui, save_named
from .host.routes import list_runs, runs_root
from .host.train_run import checked_schedule, model_shift
from .host.watch_job import all_rows
from .inputs import widgets
from .inputs.checks import check_inputs, check_text
from .inputs.finding import offered
from .inputs.judging import checked_prompt
from .inputs.widgets import announce, int_input, output, show, text_area
from .model.adapter import Adapter, diffusers_pairs
from .model.comfy_policy import check_flow, text_policy
from .types import TRAINING, RewardSet, RewardWire
from .views.curve import reward_curve
from .views.pair_sheet import Pair, before_after

MAX_WORK = 2**36  # forwards × pixels of a comparison
MAX_KEPT = 2**25  # pixels of each model's pictures that are given out: 400 MB
MAX_SUMMARY_BYTES = 2**20  # that Run Monitor reads


class CompareLoRA(io.ComfyNode):
    """Base and tuned model side by side."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_CompareLoRA",
            display_name="Compare LoRA",
            category=TRAINING,
            description="Draw the same prompts from the same noises with two models, score both, and tell "
            "the change from chance.",
            inputs=[
                io.Model.Input("base", tooltip="The model before training."),
                io.Model.Input(
                    "tuned", tooltip="The model with the LoRA: from Train LoRA, or any LoRA loader."
                ),
                io.Clip.Input("clip", tooltip="Text encoder of both."),
                io.Vae.Input("vae", tooltip="VAE of both."),
                RewardWire.Input("reward", tooltip="Rewards that score the images."),
                text_area("prompts", "One prompt per line; best ones that nothing was trained on."),
                *widgets.drawing_inputs(),
                int_input("num_steps", 16, 1, 1000, "Sampling steps of an image."),
                int_input("noises", 2, 1, 64, "Images per prompt, each from a noise of its own."),
                widgets.slots_input("Images in one forward. Lower it where memory runs out."),
                widgets.seed_input("Seed of the start noises."),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Noise levels from 1 to 0 instead of num_steps with the model's own shift.",
                ),
            ],
            outputs=[
                output(
                    io.Image,
                    "sheet",
                    "Base above, tuned below, with scores and their change: up to eight pairs, of more those "
                    "with the highest and the lowest changes.",
                ),
                output(
                    io.String,
                    "summary",
                    "Gain of every reward with its 95 % interval and p-value, paired by prompt.",
                ),
                output(
                    io.Image,
                    "before",
                    "The base model's pictures, prompt by prompt, for core's Compare Images or any block.",
                ),
                output(io.Image, "after", "The tuned model's pictures, in the same order as before."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )
        return offered(
            schema,
            "before and after, evaluate lora, benchmark lora, ab test, win rate",
            rare="negative, slots",
        )

    @classmethod
    def execute(
        cls,
        base: Any,
        tuned: Any,
        clip: Any,
        vae: Any,
        reward: RewardSet,
        prompts: str,
        negative: str,
        guidance: float,
        width: int,
        height: int,
        num_steps: int,
        noises: int,
        slots: int,
        seed: int,
        sigmas: Tensor | None = None,
    ) -> io.NodeOutput:
        """Evaluate both as training evaluates, and draw the pairs."""
        check_inputs(cls, locals())
        check_flow(base, "base")
        check_flow(tuned, "tuned")
        checked_prompt(negative, "negative")
        texts, _ = prompts_of(prompts.splitlines(), "prompts")
        levels = shifted_sigmas(num_steps, model_shift(base)) if sigmas is None else checked_schedule(sigmas)
        forwards = 2 * len(texts) * noises * (len(levels) - 1)
        if forwards * width * height > MAX_WORK:
            raise ValueError(
                f"prompts: {forwards} forwards of {width}×{height} are above the limit; lower prompts, "
                "noises, num_steps or the size"
            )
        announce(cls, f"{forwards} forwards for {2 * len(texts) * noises} pictures of {width}×{height}")
        pace = Pace(seed=seed, eval_noises=noises, slots=slots, decode_batch=min(slots, 8))
        looks = []
        shown = kept_pictures(len(texts), noises, MAX_KEPT // (width * height))
        for model in (base, tuned):
            policy = text_policy(model, clip, vae, guidance, negative, None)
            shape = policy.latent_shape(width, height)
            look = evaluate(
                policy, reward.rewards, texts, pace, levels, shape, check_interrupted, shown=shown
            )
            looks.append(look)
        text, found = gains(*looks), pairs(*looks)
        sheet = before_after(found, weights=reward.named_weights, drawn=len(texts) * noises)
        before, after = (
            torch.stack([getattr(pair, side) for pair in found]).float().nan_to_num(0.0)
            for side in ("before", "after")
        )
        return io.NodeOutput(sheet, text, before, after, ui=show(cls, text))


def kept_pictures(prompts: int, noises: int, most: int) -> tuple[int, int]:
    """Choose of how many prompts, and of how many noises each, pictures are kept: all, if `most` allows."""
    each = min(noises, max(most // prompts, 1))
    return min(prompts, max(most // each, 1)), each


def pairs(before: Evaluation, after: Evaluation) -> list[Pair]:
    """Pair the pictures that both evaluations kept."""
    made = []
    for old, new in zip(before.samples, after.samples, strict=True):
        scores = {name: (old.scores[name], new.scores[name]) for name in old.scores}
        made.append(Pair(old.prompt, old.seed, old.image, new.image, scores))
    return made


def gains(before: Evaluation, after: Evaluation) -> str:
    """Describe how much every reward changed and how sure that is."""
    lines = []
    old, new = before.means(), after.means()
    for name, gain in compare(before, after).items():
        sure = f" ± {gain['ci95']:.3f} (95 %, {len(before.prompts)} prompts), p = {gain['p']:.2g}"
        sure = "" if math.isnan(gain["p"]) else sure
        lines.append(f"{name}: {old[name]:.3f} → {new[name]:.3f}, {gain['mean']:+.3f}{sure}")
    return "\n".join(lines)


class RunMonitor(io.ComfyNode):
    """A run's curves, while it goes and afterwards."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_RunMonitor",
            display_name="Run Monitor",
            category=TRAINING,
            description="Curves and samples of a run, read from its folder: of one that goes on, or of one "
            "long ago.",
            inputs=[
                io.Combo.Input(
                    "run",
                    options=[NEWEST, *run_names()],
                    default=NEWEST,
                    tooltip="A run under the output folder's g2rpo.",
                ),
                widgets.linked_text(
                    "run_name", "The run of Train LoRA, shown once it is trained; it goes before the list."
                ),
            ],
            outputs=[
                output(io.Image, "curve", "Training and held-out rewards over the steps."),
                output(
                    io.String, "summary", "The last row of its metrics, and what came out if it has ended."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )
        return offered(schema, "grpo, training curve, reward curve, loss graph, training progress")

    @classmethod
    def validate_inputs(cls, run: str = NEWEST) -> bool | str:
        """Allow a run that is younger than the page's list, or that `run_name` stands for; refuse no name."""
        try:
            return run == NEWEST or bool(run_place(run))
        except ValueError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, run: str = NEWEST, run_name: str | None = None) -> str:
        """Return what changes when the run's metrics do; core does not know yet what comes over a link."""
        try:
            folder = found(run_name or run)
        except ValueError:
            return ""
        if folder is None:
            return ""
        metrics = folder.metrics_file
        return f"{metrics} {metrics.stat().st_mtime_ns} {metrics.stat().st_size}"

    @classmethod
    def execute(cls, run: str, run_name: str | None = None) -> io.NodeOutput:
        """Draw what the folder holds."""
        folder = found(run if run_name is None else linked_run(run_name))
        if folder is None:
            return io.NodeOutput(
                reward_curve([], "No run yet"), "There is no run yet; train one with Train LoRA on a Reward."
            )
        with plain_errors(folder.path.name):
            rows, total = all_rows(folder)
            ended = folder.summary_file.is_file() and folder.summary_file.stat().st_size <= MAX_SUMMARY_BYTES
            summary = folder.summary() if ended else {}
        text = "\n".join(f"{name}: {value}" for name, value in (rows[-1] if rows else {}).items())
        if ended:
            text += "\n" + json.dumps(summary, indent=1, ensure_ascii=False)
        curve = reward_curve(rows, f"Run {folder.path.name}", total)
        # Lone surrogates can be written in JSON, and nothing else can hold them.
        text = text[:MAX_SUMMARY_BYTES].encode("utf-8", "replace").decode()
        return io.NodeOutput(curve, text, ui={"g2rpo_run": [folder.path.name]})


def run_names() -> list[str]:
    """List the runs, newest first; one of this name can only come from elsewhere."""
    return [run["id"] for run in list_runs(runs_root()) if run["id"].lower() != NEWEST]


def linked_run(name: str) -> str:
    """Return the name of a run that came over a link; raise ValueError unless it is one."""
    check_text("run_name", name)
    return checked_name(name, "run_name")


def found(run: str) -> RunFolder | None:
    """Return a run to read, by its name, or the newest one; None where there is none yet."""
    names = run_names()
    if run == NEWEST and not names:
        return None
    return known_run(names[0] if run == NEWEST else run, "choose one of the list")


class SaveLoRA(io.ComfyNode):
    """A LoRA file that everybody's ComfyUI loads."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_SaveLoRA",
            display_name="Save LoRA (G²RPO)",
            category=TRAINING,
            description="Write a LoRA under models/loras/g2rpo, with scale and notes. Nothing is "
            "overwritten.",
            inputs=[
                io.LoraModel.Input("lora", tooltip="From Train LoRA or Update LoRA."),
                widgets.name_input("name", "Name of the file; a number is added where it exists.", "my-lora"),
                io.Combo.Input(
                    "key_names",
                    options=list(lora.STYLES)[::-1],
                    default="native",
                    tooltip="native: ComfyUI, every model. diffusers: ComfyUI and diffusers, where the model "
                    "has exact names there.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model it was trained on; needed for diffusers' names.",
                ),
                widgets.linked_text(
                    "run", "The run it comes from: recipe, step and rewards are noted in the file."
                ),
            ],
            outputs=[output(io.String, "file", "Its name in the list of LoRA loaders.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )
        return offered(schema, "export lora, save lora weights, grpo", rare="key_names")

    @classmethod
    def execute(
        cls, lora: dict[str, Tensor], name: str, key_names: str, model: Any = None, run: str | None = None
    ) -> io.NodeOutput:
        """Check, rename if asked for, write."""
        check_inputs(cls, locals())
        place = save(lora, name, key_names, model, run)
        file = lora_listing(place)
        return io.NodeOutput(file, ui={**ui.PreviewText(file).as_dict(), **file_ui(place)})


def save(wire: dict[str, Tensor], name: str, style: str, model: Any, run: str | None) -> Path:
    """Write a LORA_MODEL as a file; return the file."""
    checked_name(name, "name")
    with torch.inference_mode(False):
        tensors = {key: tensor.detach().to("cpu", torch.float32, copy=True) for key, tensor in wire.items()}
    if len(tensors) > HEADER_TENSORS:
        raise ValueError(
            f"lora: it has {len(tensors)} tensors, and files of more than {HEADER_TENSORS} are "
            "refused; connect a smaller one"
        )
    read = lora.parse(tensors, {}, "lora")
    folded = lora.fold(read.pairs, read.alphas)
    notes: dict[str, str] = {} if model is None else named_base(base_of(model))
    folder = known_run(run, "connect the output of Train LoRA") if run else None
    if folder is not None:
        with plain_errors(folder.path.name):
            chosen = folder.outcome()
            notes |= lora.read(chosen / "lora.safetensors").metadata if chosen else {}
    if style == "diffusers":
        if model is None:
            raise ValueError(
                "model: diffusers' names depend on it; connect the model that the LoRA was trained on"
            )
        folded = diffusers_pairs(Adapter(folded, 0, 0.0, ""), model)
    ranks = {len(down) for down, _ in folded.values()}
    if len(ranks) > 1:
        raise ValueError(
            f"lora: its modules have different ranks {sorted(ranks)}; save one that this pack has trained"
        )
    kept = {key: note for key, note in notes.items() if key.startswith(("g2rpo.", "modelspec.", "ss_"))}
    named = lora.named(folded, float(ranks.pop()), "lora", style)
    return save_named(name, lora.file_bytes(named, style, kept), folder)


NODES: list[type[io.ComfyNode]] = [CompareLoRA, RunMonitor, SaveLoRA]
