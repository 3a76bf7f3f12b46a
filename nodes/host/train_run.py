"""A training run on a MODEL: what was asked for, checked and made into the loop's setup, and the loop."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_sampling
import torch
from torch import Tensor

from ...comfy_g2rpo import lora, recipes
from ...comfy_g2rpo.blocks.block_settings import block_fields
from ...comfy_g2rpo.blocks.train_presets import AS_TYPED, TREE, WIDGETS, preset_numbers
from ...comfy_g2rpo.curriculum.prompt_choice import choice_cost
from ...comfy_g2rpo.files.one_writer import one_writer
from ...comfy_g2rpo.files.safe import finite
from ...comfy_g2rpo.recipes import Recipe, build_plan
from ...comfy_g2rpo.rewards import RewardError
from ...comfy_g2rpo.run import settings
from ...comfy_g2rpo.run.checkpoint import restore
from ...comfy_g2rpo.run.folder import MAY_CHANGE, RunFolder, is_run
from ...comfy_g2rpo.run.pace import Pace
from ...comfy_g2rpo.run.setup import Setup, make_learner, preview_shape, prompts_ahead
from ...comfy_g2rpo.run.summary import alarm_at
from ...comfy_g2rpo.schedule import shifted_sigmas
from ..inputs.judging import checked_prompt
from ..model.adapter import Adapter, fresh_adapter, is_large
from ..model.comfy_policy import text_policy
from ..model.fingerprint import UNPATCHED, fingerprint, patches_of
from ..sampling import check_sigmas
from ..types import RewardSet
from .changed_settings import Change, said, without
from .comfyui import STOPS, Live, run_place
from .open_run import NEW, Wanted, choose_run, note_changes, open_run, plain_errors, says_patches
from .publish import metadata, publish
from .run_limits import Typed, check_recipe, look_parts, price, read_prompts

DEFAULTS = {"method": dataclasses.asdict(Recipe()), "train": dataclasses.asdict(Pace())}
TOLD = (*WIDGETS, "num_steps", "group_size", "granularities", "pick")
"""Numbers that are told of a preset; what `changes` say is in them."""
FIRST = (
    *("num_steps", "shift", "kernel", "eta", "steps", "pick", "pick_size", "slide_every"),
    *("train_share", "tree", "group_size", "starts", "shared_start", "granularities", "terminal"),
    *("antithetic", "mix", "std", "std_floor", "clamp", "diversity_weight", "diversity_by"),
    *("step_weight", "objective", "clip", "epochs", "update", "kl", "kl_reference", "optimizer"),
    *("learning_rate", "weight_decay", "max_grad_norm", "ema"),
)
"""Fields that every run has. A run's name does not count another one at its default: older runs lack it."""


@dataclass(frozen=True, kw_only=True)
class Request(Typed):
    """What Train LoRA was asked for: its inputs by name."""

    model: Any
    clip: Any
    vae: Any
    reward: RewardSet
    run: str
    if_settings_changed: str = NEW
    heldout_reward: RewardSet | None = None
    sigmas: Tensor | None = None


@dataclass(frozen=True)
class Trained:
    """A run that has ended: its folder, its LoRA, that one's file under models/loras, its summary."""

    folder: RunFolder
    adapter: Adapter
    file: Path
    summary: dict[str, Any]
    steps: int


def train(asked: Request, node: str | None, say: Callable[[str], None]) -> Trained:
    """Tell the cost, then run the loop, by `node` and `say` of the block that asks for it."""
    # Nodes run in inference mode, where nothing could be learned.
    with torch.inference_mode(False), torch.enable_grad():
        numbers = preset_of(asked)
        wanted = dataclasses.replace(asked, **{name: numbers[name] for name in numbers if name in WIDGETS})
        setup, config = make_setup(wanted, numbers)
        price_of(wanted, setup)  # refused before anything is written
        if numbers:
            say(f"preset {wanted.preset}: {numbers_used(wanted, setup)}")
        name = wanted.run.strip() or known_name(config, wanted.recipe)
        run = Wanted(name, config, DEFAULTS, sources_of(wanted, numbers))
        choice = choose_run(run, wanted.if_settings_changed or NEW)
        if choice.remark:
            say(choice.remark)
        run = dataclasses.replace(run, name=choice.name)
        with plain_errors(run.name), one_writer(run_place(run.name)):
            folder = open_run(run, choice.changes)
            summary = trained(wanted, setup, run, folder, choice.changes, Live(node, run.name), say)
        if summary["stopped_by"] == "watch":
            alarm = summary["alarms"][-1]["text"]
            say(f"stopped by the watch, LoRA of step {summary['lora_step']}: {alarm}")
        with plain_errors(run.name):
            file = lora.read(folder.outcome() / "lora.safetensors")
            place = publish(folder, run.name)
        pairs = {module: file.pairs[module] for module in setup.policy.pairs()}
        adapter = Adapter(pairs, wanted.rank, float(wanted.rank), wanted.targets)
        return Trained(folder, adapter, place, summary, setup.pace.steps)


def trained(
    wanted: Request,
    setup: Setup,
    run: Wanted,
    folder: RunFolder,
    changes: Sequence[Change],
    live: Live,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Go on with a run from where it stands, as its one writer; return its summary."""
    # Imported when somebody trains: most who start ComfyUI do not.
    from ...comfy_g2rpo.run.loop import finish, learn, nothing_left

    learner = make_learner(setup)
    for remark in restore(setup, learner, folder) if folder.metrics() or folder.latest() else []:
        say(remark)
    stopped = halted(setup, folder, learner.step) or nothing_left(setup, learner)
    if changes and not stopped:
        note_changes(folder, run, changes, learner.step)
    say(stopped or price_of(wanted, setup, learner.step))
    live.rows, live.expected = len(folder.metrics()), expected(setup)
    try:
        learn(setup, learner, folder, live, live.check, (*STOPS, RewardError))
        summary = finish(setup, learner, folder, live, live.check, wanted.recipe)
        live.finish(summary)
    except STOPS:
        live.stopped()
        raise
    return summary


def preset_of(wanted: Request) -> dict[str, Any]:
    """Return the numbers of the preset that is chosen, by field."""
    parameters = sum(part.numel() for part in wanted.model.model.diffusion_model.parameters())
    return preset_numbers(wanted.preset or AS_TYPED, parameters, wanted.recipe)


def numbers_used(wanted: Request, setup: Setup) -> str:
    """Return the numbers that a run with a preset uses, in words."""
    parts = setup.pace, setup.recipe, wanted
    made = [(name, next(getattr(part, name) for part in parts if hasattr(part, name))) for name in TOLD]
    return ", ".join(f"{name} {said(value)}" for name, value in made)


def sources_of(wanted: Request, numbers: Mapping[str, Any]) -> dict[str, str]:
    """Name the widgets of fields that come from others than their own."""
    changes = settings.parse(wanted.changes, "changes")
    typed = {name for part in changes for name in part}
    preset = {*numbers, *TREE} if numbers else ()
    sources = {name: "preset" for name in preset if name not in typed and name != "steps"}
    return sources | ({} if wanted.heldout_prompts.strip() else {"heldout": "prompts"})


def make_setup(wanted: Request, numbers: Mapping[str, Any]) -> tuple[Setup, dict[str, Any]]:
    """Check everything and encode the prompts; return the loop's setup and the content of config.json.

    `numbers` are those of a preset.
    """
    method, train = block_fields(vars(wanted), numbers, wanted.changes)
    sigmas = checked_schedule(wanted.sigmas) if wanted.sigmas is not None else None
    made = make_recipe(wanted, method, sigmas)
    pace = Pace(**train)
    prompts = read_prompts(wanted.prompts, wanted.heldout_prompts, pace.seed)
    checked_prompt(wanted.negative, "negative")
    if sigmas is None:
        sigmas = shifted_sigmas(made.num_steps, made.shift)
    adapter = fresh_adapter(wanted.model, wanted.rank, wanted.alpha, pace.seed, wanted.targets)
    saving = is_large(wanted.model)
    parts = wanted.model, wanted.clip, wanted.vae
    policy = text_policy(*parts, wanted.guidance, wanted.negative, adapter, checkpoint=saving)
    with torch.no_grad():
        policy.encode(prompts_ahead(prompts, pace, made))
    held = wanted.heldout_reward or RewardSet((), ())
    judges = {reward.name: reward for reward in (*wanted.reward.rewards, *held.rewards)}
    rewards = wanted.reward.named_weights
    setup = Setup(
        recipe=made,
        pace=pace,
        policy=policy,
        rewards=wanted.reward.rewards,
        weights=wanted.reward.weights,
        gates=wanted.reward.gates,
        judges=tuple(judges.values()),
        measures=held.named_weights,
        prompts=prompts,
        sigmas=sigmas,
        shape=policy.latent_shape(wanted.width, wanted.height),
        alpha=wanted.alpha,
        style="native",
        metadata=metadata(wanted.model, wanted.recipe, rewards, (wanted.width, wanted.height)),
        preview=preview_shape(pace, policy.latent_shape),
    )
    return setup, describe(wanted, setup, rewards, list(judges))


def make_recipe(wanted: Request, changes: dict[str, Any], sigmas: Tensor | None) -> Recipe:
    """Make the recipe: the named one, the model's own shift, then what `block_fields` gives."""
    mix = {"mix": wanted.reward.mix} if len(wanted.reward.rewards) > 1 else {}
    fields: dict[str, Any] = {"shift": model_shift(wanted.model), **mix, **changes}
    if sigmas is not None:
        fields["num_steps"] = len(sigmas) - 1
    made = recipes.recipe(wanted.recipe, **fields)
    check_recipe(made)
    return made


def model_shift(model: Any) -> float:
    """Return the time shift s of a MODEL's own schedule σ ↦ sσ/(1+(s−1)σ)."""
    sampling = model.get_model_object("model_sampling")
    shift = float(getattr(sampling, "shift", 1.0))
    # FLUX writes it as an exponent.
    return math.exp(shift) if isinstance(sampling, comfy.model_sampling.ModelSamplingFlux) else shift


def checked_schedule(sigmas: Tensor) -> Tensor:
    """Return noise levels [T+1] as float32 on the CPU; raise ValueError unless they fall from 1 to 0."""
    check_sigmas(sigmas)
    levels = sigmas.detach().to("cpu", torch.float32, copy=True)
    if not math.isclose(levels[0].item(), 1.0, abs_tol=1e-3) or levels[-1] != 0:
        ends = f"{levels[0]:.4g} to {levels[-1]:.4g}"
        raise ValueError(
            f"sigmas: they run from {ends}; training starts from pure noise: connect 1 to 0 (denoise 1)"
        )
    return levels


def halted(setup: Setup, folder: RunFolder, step: int) -> str:
    """Say that the watch stopped a run at this step, and stops it again; nothing where it did not."""
    if setup.pace.watch != "stop" or not alarm_at(folder.metrics(), step):
        return ""
    return f"nothing left to do: the watch stopped the run at step {step}; watch = warn in changes goes on"


def price_of(wanted: Request, setup: Setup, made: int = 0) -> str:
    """Return what a run will cost after the steps that are made, in words."""
    size = wanted.width, wanted.height
    return price(setup.recipe, setup.pace, len(setup.prompts.heldout), size, made)


def expected(setup: Setup) -> dict[str, int]:
    """Return by phase how often a step asks whether to stop: once per forward and per batch of pictures."""
    pace, plan = setup.pace, build_plan(setup.recipe, 0, setup.pace.seed)

    def batches(*parts: tuple[int, int]) -> int:
        return sum(math.ceil(count / size) for count, size in parts)

    def drawn(forwards: int, pictures: int) -> int:
        return batches((forwards, pace.slots), (pictures, pace.decode_batch))

    groups, (more, seen) = pace.prompts_per_step, choice_cost(setup.recipe)
    looks = look_parts(setup.recipe, pace, len(setup.prompts.heldout))
    return {
        "rollout": drawn(groups * plan.forwards, groups * plan.pictures)
        + drawn(groups * more, groups * seen),
        "update": batches((groups * plan.rows * (1 + setup.recipe.replay), pace.micro_batch)),
        "evaluate": sum(drawn(*part) for part in looks.values()),
    }


def describe(wanted: Request, setup: Setup, rewards: dict[str, float], judges: list[str]) -> dict[str, Any]:
    """Return the content of a run's config.json: all that its results depend on."""
    made = dataclasses.asdict(setup.recipe)
    return {
        "config": {
            "model": {
                "fingerprint": fingerprint(wanted.model),
                "patches": patches_of(wanted.model),
                **{name: getattr(wanted, name) for name in ("width", "height", "guidance", "negative")},
            },
            "lora": {"rank": wanted.rank, "alpha": wanted.alpha, "targets": wanted.targets},
            "method": {"name": wanted.recipe, **made, "sigmas": setup.sigmas.tolist()},
            "rewards": [
                {"name": name, "weight": weight, **({} if gate is None else {"gate": gate})}
                for (name, weight), gate in zip(rewards.items(), wanted.reward.all_gates, strict=True)
            ],
            "heldout_rewards": judges,
            "prompts": {"train": list(setup.prompts.train), "heldout": list(setup.prompts.heldout)},
            "train": dataclasses.asdict(setup.pace),
        },
        "recipe": made,
    }


def known_name(config: dict[str, Any], recipe: str) -> str:
    """Return the name of a run by its settings, or of one that an earlier version began with them."""
    name = name_of(config, recipe)
    settled = {**config["config"], "model": without(config["config"]["model"], {"patches"})}
    former = name_of({"config": settled}, recipe)
    place = run_place(former)
    with plain_errors(former):
        known = not is_run(run_place(name)) and is_run(place) and not says_patches(RunFolder(place))
    return former if known else name


def name_of(config: dict[str, Any], recipe: str) -> str:
    """Return the name of a run by its settings: the same ones go on, others start a new run."""
    settled = dict(config["config"])
    settled |= {name: without(settled[name], free) for name, free in MAY_CHANGE.items() if name in settled}
    method = settled["method"].items()
    plain = without(DEFAULTS["method"], FIRST)
    # Read from a file, a tuple is a list.
    settled["method"] = {
        key: value for key, value in method if key not in plain or finite(plain[key]) != finite(value)
    }
    if settled["model"].get("patches") == UNPATCHED:
        settled["model"] = without(settled["model"], {"patches"})
    content = json.dumps(finite(settled), sort_keys=True).encode()
    return f"{recipe}-{hashlib.blake2b(content, digest_size=4).hexdigest()}"
