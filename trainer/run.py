"""The headless host of a run: models from disk, processes, Ctrl-C, and the report at the end."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from comfy_g2rpo import __version__
from comfy_g2rpo.files.one_writer import one_writer
from comfy_g2rpo.lora.modelspec import about_run, base_of_model
from comfy_g2rpo.prompts import Prompts
from comfy_g2rpo.rewards import Reward, RewardError, check_prompts
from comfy_g2rpo.run import rank_guard
from comfy_g2rpo.run.checkpoint import restore
from comfy_g2rpo.run.folder import RunFolder, check_place
from comfy_g2rpo.run.loop import finish, learn
from comfy_g2rpo.run.setup import Setup, Size, World, make_learner, preview_shape, prompts_ahead

from . import families
from .commands.exit_codes import heard
from .config.file_checks import read_prompts
from .config.input_files import INPUTS, compare_inputs, input_digests
from .config.reading import Config, defaults, dump, make_pace, make_recipe, make_speed, model_folder
from .config.reward_checks import VOTES
from .config.sections import TrainedReward
from .families import FamilyPolicy
from .lora.lora_files import add_frozen, shapes_of, start_from
from .model.cheap_forward import completions
from .model.named_optimizers import make_optimizer
from .model.placing import Seat, in_turn, keep_freed_memory, load_in_stages
from .processes import Left, Pulse, accelerator_of, together, world_of
from .reports.listeners import check_trackers, listening
from .reports.progress import Progress, Silent
from .reports.report import write_report
from .rewards.build import build_all
from .rewards.kept_votes import kept_steps


def train(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    replace: bool = False,
    progress: Progress,
    settings: Sequence[str] = (),
    changed_inputs: bool = False,
    explorers: AbstractContextManager[Callable[[Setup], Setup]] | None = None,
) -> dict[str, Any]:
    """Run or continue a run in the folder `out` and return its summary.

    `learn` repeats the three verbs of `comfy_g2rpo.run.iteration`: explore, score, update. A stop leaves a
    checkpoint of the last finished step. With `changed_inputs` a run goes on although its prompts, rewards
    or weights are not what they were. The context of `explorers` gives the setup one, for others to explore.
    """
    check_trackers(config.report.trackers)
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    accelerator = accelerator_of(cpu)
    main = accelerator.is_main_process
    with (
        together(accelerator) as (world, pulse),
        one_writer(out) if main else nullcontext(),
        ExitStack() as later,
    ):
        if main:
            check_place(out, replace or resume)
        else:
            progress = Silent()
        # Only a run that can start makes a folder, or replaces another.
        explored = later.enter_context(explorers) if explorers else lambda setup: setup
        setup = explored(prepare(config, accelerator, Path(out), world=world))
        learner = make_learner(setup)
        if main:
            content = {**dump(config, settings), INPUTS: input_digests(config, setup.prompts)}
            if resume:
                for remark in reopen_run(config, content, Path(out), changed_inputs):
                    progress.note(remark)
            else:
                RunFolder.create(out, content, replace)
        setup.world.wait()
        folder = RunFolder(Path(out))
        for remark in restore(setup, learner, folder) if resume else []:
            progress.note(remark)
        if main and resume:
            # A run that is made longer stays so when it is resumed again.
            folder.save_config(content)
            progress.recall(folder.metrics())
        follow = listening(progress, config, folder, cpu) if main else nullcontext(progress)
        with stoppable(pulse) as check, follow as heard:
            learn(setup, learner, folder, heard, check, (Stopped, Left, RewardError))
            summary = finish(setup, learner, folder, heard, check, config.method.name)
        if summary:
            write_report(folder, progress.note)
            progress.finish(summary)
    return summary


def prepare(
    config: Config,
    accelerator: Accelerator,
    run: Path | None = None,
    prompts: Prompts | None = None,
    world: World | None = None,
    rewards: tuple[Reward, ...] | None = None,
) -> Setup:
    """Load what a run needs; every mistake of the configuration shows here, before the first forward.

    `prompts` and `rewards` take the place of those that the configuration names, and with `rewards` nobody
    else judges. Without a `world`, processes meet here.
    """
    keep_freed_memory()
    check_processes(config, accelerator.num_processes)
    recipe, pace, speed = make_recipe(config), make_pace(config), make_speed(config)
    prompts = prompts or read_prompts(config)
    judges = rewards or ()
    if rewards is None:
        rewards, judges = load_rewards(config, accelerator.device, run)
    check_prompts(judges, [*prompts.train, *prompts.heldout])
    rank_guard.check(speed, rewards, pace.prompts_at_once)
    stored = kept_steps(config, prompts, rewards) if config.pairs.runs else None
    prompts = dataclasses.replace(prompts, train=stored.prompts) if stored else prompts
    ahead = (*prompts.train, *prompts.heldout) if stored else prompts_ahead(prompts, pace, recipe)
    policy = load_policy(config, accelerator.device, ahead)
    lora, notes = config.lora, lora_metadata(config, policy)
    policy.add_lora(lora.rank, lora.alpha, config.train.seed, lora.targets != "attention")
    if lora.init:
        continue_from(policy, Path(lora.init), lora.alpha / lora.rank, config.model.family)
    shape = policy.latent_shape(config.model.width, config.model.height)
    preview = preview_shape(pace, policy.latent_shape)
    return Setup(
        recipe=recipe,
        stored=stored,
        optimizer=make_optimizer,
        pace=pace,
        policy=policy,
        rewards=rewards,
        weights=tuple(reward.weight for reward in config.rewards),
        gates=tuple(reward.gate for reward in config.rewards),
        judges=judges,
        speed=speed,
        velocity=completions(policy, speed),
        measures={reward.name: reward.weight for reward in config.heldout_rewards},
        prompts=prompts,
        sigmas=families.sigmas(policy, config.model.schedule, recipe, shape),
        shape=shape,
        sizes=tuple(
            Size(each, families.sigmas(policy, config.model.schedule, recipe, each))
            for each in families.step_shapes(policy, config.model)
        ),
        alpha=lora.alpha,
        style=policy.lora_style,
        rename=policy.rename,
        metadata=notes,
        world=world or world_of(accelerator)[0],
        preview=preview,
        preview_sigmas=families.sigmas(policy, config.model.schedule, recipe, preview) if preview else None,
    )


def load_rewards(
    config: Config, device: torch.device, run: Path | None = None
) -> tuple[tuple[Reward, ...], tuple[Reward, ...]]:
    """Load the rewards that are trained on; and all that judge, as the configuration places them."""
    rewards, judges = build_all(config.rewards, config.heldout_rewards, device, run)
    if config.memory.rewards_in_turn:
        seat = Seat(device)
        alone = {reward.name: in_turn(reward, seat) for reward in (*rewards, *judges)}
        rewards, judges = (tuple(alone[reward.name] for reward in some) for some in (rewards, judges))
    return rewards, judges


def check_processes(config: Config, count: int) -> None:
    """Refuse a number of processes that the configuration cannot be shared out over."""
    if config.train.prompts_per_step % count:
        needs = f"{count} processes need a multiple of {count}"
        raise ValueError(f"train.prompts_per_step is {config.train.prompts_per_step}; {needs}")
    if count > 1 and any(reward.name == VOTES for reward in config.rewards):
        needs = "for which a run waits by stopping, and that needs a single process; start one"
        raise ValueError(f"rewards has votes, {needs}")


def lora_metadata(config: Config, policy: FamilyPolicy) -> dict[str, str]:
    """Return what a LoRA file says about itself; the policy's model carries no LoRA yet."""
    model = config.model
    base = base_of_model(shapes_of(policy.transformer), str(model.family))
    rewards = {reward.name: weighted(reward) for reward in config.rewards}
    name = Path(model.transformer or model.path).name
    applied = (f"{each.strength:g} {Path(each.path).name}" for each in config.model.lora)
    return {
        "g2rpo.version": __version__,
        "g2rpo.base_model": name,
        "g2rpo.family": str(config.model.family),
        "g2rpo.base_loras": ", ".join(applied) or "none",
        "g2rpo.recipe": config.method.name,
        "g2rpo.rewards": ", ".join(rewards.values()),
        **about_run(base, config.method.name, rewards, (model.width, model.height)),
        "ss_sd_model_name": name,
    }


def weighted(reward: TrainedReward) -> str:
    """Name a reward with its weight and gate."""
    return f"{reward.weight:g} {reward.name}" + ("" if reward.gate is None else f" (gate {reward.gate:g})")


def load_policy(config: Config, device: torch.device | str, prompts: Sequence[str] = ()) -> FamilyPolicy:
    """Load the model of a configuration onto a device, with the LoRAs already applied to it.

    With prompts, they are encoded and the text encoders dropped before the transformer comes to the device.
    """

    def load() -> Any:
        policy: Any = families.load(
            config.model, model_folder(config.model.path, bool(config.model.transformer)), "cpu"
        )
        for applied in config.model.lora:
            add_frozen(policy.transformer, Path(applied.path), applied.strength, config.model.family)
        return policy

    return load_in_stages(load, config.memory, torch.device(device), prompts)


def continue_from(policy: FamilyPolicy, path: Path, scale: float, family: str | None = None) -> None:
    """Start from a LoRA file of any form; what it lacks stays fresh, other scales are folded into B."""
    ours = policy.pairs()
    theirs = start_from(path, {name: (len(up), *down.shape) for name, (down, up) in ours.items()}, family)
    with torch.no_grad():
        for name, (down, up) in theirs.items():
            ours[name][0][: len(down)].copy_(down)
            ours[name][1][:, : len(down)].copy_(up / scale)


def reopen_run(config: Config, content: dict[str, Any], out: Path, changed_inputs: bool) -> list[str]:
    """See that a run was made by the same configuration and from the same inputs; return what is to be said.

    `content`, what config.json is going to say, gets the settings that were given before.
    """
    before = RunFolder(out).config()
    remarks, moved = compare_inputs(out, before, content.get(INPUTS, {}), config, changed_inputs)
    RunFolder.reopen(out, content, defaults(), moved)
    former = before.get("settings")
    content["settings"] = [*(former if isinstance(former, list) else []), *content["settings"]]
    return remarks


class Stopped(KeyboardInterrupt):
    """A stop between two forwards: nothing is torn. `number` is the signal that asked for it."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = number


@contextmanager
def stoppable(pulse: Pulse | None = None) -> Iterator[Callable[[str], None]]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a stop at the next forward; the second stops at once.

    So does what the `pulse` of other processes tells, and all of it also while one waits for these.
    """
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    def check(phase: str) -> None:
        if asked:
            raise Stopped(asked[0])
        if pulse:
            pulse.check()

    if pulse:
        pulse.look = check
    if threading.current_thread() is not threading.main_thread():
        yield check
        return

    former = {number: signal.signal(number, ask) for number in heard()}
    try:
        yield check
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
