"""The training loop: roll out, score, update; evaluate, save, stop, resume."""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from comfy_g2rpo import __version__, lora
from comfy_g2rpo.advantages import global_std, integrate, zero_std_share
from comfy_g2rpo.recipes import Recipe, build_plan
from comfy_g2rpo.rewards import Reward, RewardError
from comfy_g2rpo.rewards import load as load_reward
from comfy_g2rpo.rollout import roll_out, stream
from comfy_g2rpo.runs import RunError, RunFolder, check_place, load_optimizer_tensors, optimizer_tensors, read_state, write_state
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.scoring import Scorer
from comfy_g2rpo.update import records, update, update_average

from .allocator import keep_freed_memory
from .config import Config, dump, make_recipe, model_folder
from .evaluation import Evaluation, compare, evaluate
from .families.sd3 import SD3, load_pipeline
from .progress import Progress, Silent
from .prompts import PromptCursor, Prompts
from .prompts import load as load_prompts
from .report import write_report


@dataclass(frozen=True)
class Setup:
    """Everything of a run that does not change while it runs."""

    config: Config
    recipe: Recipe
    policy: SD3
    rewards: tuple[Reward, ...]
    judges: tuple[Reward, ...]
    prompts: Prompts
    sigmas: Tensor
    shape: tuple[int, ...]
    accelerator: Accelerator


@dataclass
class Learner:
    """What learning changes: the optimizer over the adapter, the adapter's moving average, and the count of finished steps."""

    optimizer: torch.optim.AdamW
    average: list[Tensor]
    step: int = 0
    forwards: int = 0
    seconds: float = 0.0


def train(config: Config, out: Path, *, resume: bool = False, replace: bool = False, progress: Progress) -> dict[str, Any]:
    """Run or continue a run in the folder `out` and return its summary; a stop leaves a checkpoint of the last finished step."""
    accelerator = Accelerator(cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()))
    main = accelerator.is_main_process
    if main:
        check_place(out, replace or resume)
    else:
        progress = Silent()
    # Only a run that can start makes a folder, or replaces another.
    setup = prepare(config, accelerator)
    learner = make_learner(setup)
    if main:
        open_run(config, out, resume, replace)
    accelerator.wait_for_everyone()
    folder = RunFolder(Path(out))
    if resume:
        restore(setup, learner, folder)
    plan = build_plan(setup.recipe)
    count = config.train.prompts_per_step
    progress.start(config.train.steps, learner.step, f"{count * plan.forwards} forwards and {count * len(plan.images)} pictures per step")
    for note in setup.prompts.notes:
        progress.note(note)
    with stoppable() as check:
        try:
            if learner.step == 0 and not folder.metrics():
                look(setup, learner, folder, progress, check)
            while learner.step < config.train.steps and not out_of_time(config, learner):
                row = iterate(setup, learner, check)
                if due(config.train.eval_every, learner.step) and learner.step < config.train.steps:
                    row |= look(setup, learner, folder, None, check)
                if main:
                    folder.append(row)
                progress.step(row)
                if due(config.train.checkpoint_every, learner.step):
                    save(setup, learner, folder)
        except (Stopped, RewardError):
            # Both arise between forwards of a rollout, where learner and step agree; an error within an update leaves the last checkpoint.
            if learner.step:
                save(setup, learner, folder)
            raise
        save(setup, learner, folder)
        return finish(setup, learner, folder, progress, check)


def iterate(setup: Setup, learner: Learner, check: Callable[[], None]) -> dict[str, float]:
    """Make one update: roll out the step's prompts, score, learn; return the row of metrics."""
    config, recipe, policy = setup.config.train, setup.recipe, setup.policy
    begin = time.perf_counter()
    prompts, seeds = draw(setup, learner.step)
    conds = policy.encode(prompts)
    plan = build_plan(recipe, learner.step, config.seed)
    scorer = Scorer(policy.decode, setup.rewards, prompts, len(plan.images), config.decode_batch, check=check)
    rollout = roll_out(
        policy, plan, setup.sigmas, conds, seeds, setup.shape, slots=config.slots, sink=scorer, check=check, device=policy.device
    )
    rolled = time.perf_counter()
    rewards = [plan.values(scorer.scores[:, p]) for p in range(len(prompts))]
    everywhere = gathered(setup.accelerator, scorer.scores)
    if everywhere.isnan().all():
        raise RewardError(f"rewards judged none of the {everywhere[0].numel()} pictures of step {learner.step + 1}; check the prompts")
    std = global_std([plan.values(scores) for scores in everywhere.unbind(1)]) if recipe.std == "global" else None
    weights = [reward.weight for reward in setup.config.rewards]
    advantages = [integrate(reward, weights, recipe.clamp, recipe.std_floor, std) for reward in rewards]
    made = records(rollout, advantages, step_weight=recipe.step_weight, samples=recipe.objective == "clip")
    stats = update(policy, made, conds, learner.optimizer, recipe, micro_batch=config.micro_batch, reduce=reducer(setup.accelerator))
    if recipe.ema:
        update_average(learner.average, policy.parameters(), min(recipe.ema, (learner.step + 1) / (learner.step + 10)))
    learner.step += 1
    learner.forwards += rollout.nfe * setup.accelerator.num_processes
    updated = time.perf_counter()
    learner.seconds += updated - begin
    row: dict[str, float] = {"step": learner.step}
    for reward, scores in zip(setup.rewards, everywhere, strict=True):
        valid = scores[~scores.isnan()]
        row |= {f"reward/{reward.name}/mean": valid.mean().item(), f"reward/{reward.name}/std": valid.std().item()}
    row["advantage/abs_mean"] = torch.stack(advantages).abs().mean().item()
    row["zero_std_share"] = sum(zero_std_share(reward, recipe.std_floor) for reward in rewards) / len(rewards)
    judged = scorer.seconds["decode"] + scorer.seconds["reward"]
    times = {"rollout": rolled - begin - judged, **scorer.seconds, "update": updated - rolled}
    return row | stats | {"nfe": rollout.nfe} | {f"time/{k}": v for k, v in times.items()} | {"memory/peak": peak_memory(policy.device)}


def draw(setup: Setup, step: int) -> tuple[list[str], list[int]]:
    """Return this process's share of the step's prompts, and the seed of each; a function of (seed, step) alone."""
    config, accelerator = setup.config.train, setup.accelerator
    prompts = PromptCursor(setup.prompts.train, config.prompts_per_step, config.seed).batch(step)
    seeds = [stream("rollout", config.seed, step, place) for place in range(len(prompts))]
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    return prompts[mine], seeds[mine]


def gathered(accelerator: Accelerator, scores: Tensor) -> Tensor:
    """Return the scores [R, P, images] of all processes as [R, P·processes, images]."""
    if accelerator.num_processes == 1:
        return scores
    return accelerator.gather(scores.transpose(0, 1).contiguous().to(accelerator.device)).cpu().transpose(0, 1)


def reducer(accelerator: Accelerator) -> Callable[[Tensor], Tensor] | None:
    """Return the gradient average over processes, if there are several."""
    return None if accelerator.num_processes == 1 else lambda grad: accelerator.reduce(grad, reduction="mean")


def prepare(config: Config, accelerator: Accelerator) -> Setup:
    """Load what a run needs; every mistake of the configuration shows here, before the first forward."""
    keep_freed_memory()
    if config.train.prompts_per_step % accelerator.num_processes:
        count = accelerator.num_processes
        raise ValueError(f"train.prompts_per_step is {config.train.prompts_per_step}; {count} processes need a multiple of {count}")
    recipe = make_recipe(config)
    heldout = Path(config.prompts.heldout) if config.prompts.heldout else None
    prompts = load_prompts(Path(config.prompts.train), heldout, config.prompts.heldout_share, config.train.seed)
    rewards = tuple(load_reward(reward.name) for reward in config.rewards)
    judges = dict.fromkeys([*(reward.name for reward in config.rewards), *config.heldout_rewards])
    policy = load_policy(config, accelerator.device)
    policy.add_lora(config.lora.rank, config.lora.alpha, config.train.seed, config.lora.targets != "attention")
    if config.lora.init:
        continue_from(policy, Path(config.lora.init), config.lora.alpha / config.lora.rank)
    policy.encode([*prompts.train, *prompts.heldout])
    policy.drop_text_encoders()
    return Setup(
        config,
        recipe,
        policy,
        rewards,
        tuple(map(load_reward, judges)),
        prompts,
        shifted_sigmas(recipe.num_steps, recipe.shift),
        policy.latent_shape(config.model.width, config.model.height),
        accelerator,
    )


def load_policy(config: Config, device: torch.device | str) -> SD3:
    """Load the model of a configuration onto a device."""
    bf16 = config.model.dtype == "bf16"
    pipeline = load_pipeline(model_folder(config.model.path), torch.bfloat16 if bf16 else torch.float32).to(device)
    return SD3(
        pipeline,
        guidance=config.model.guidance,
        max_sequence_length=config.model.max_sequence_length,
        autocast=torch.bfloat16 if bf16 else None,
    )


def continue_from(policy: SD3, path: Path, scale: float) -> None:
    """Start from a LoRA file of the same rank and modules; a scale that differs is folded into B."""
    file, pairs = lora.read(path), policy.pairs()
    if set(file.pairs) != set(pairs) or any(file.pairs[name][0].shape != pairs[name][0].shape for name in pairs):
        raise ValueError(f"lora.init {path}: its modules or rank differ from this run's; set lora.rank and lora.targets as in that file")
    with torch.no_grad():
        for name, (down, up) in pairs.items():
            down.copy_(file.pairs[name][0])
            up.copy_(file.pairs[name][1] * (file.alphas[name] / down.shape[0] / scale))


def make_learner(setup: Setup) -> Learner:
    """Set up AdamW over the adapter."""
    parameters = setup.policy.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=setup.recipe.learning_rate, weight_decay=setup.recipe.weight_decay)
    return Learner(optimizer, [p.detach().clone() for p in parameters] if setup.recipe.ema else [])


@contextmanager
def averaged(setup: Setup, learner: Learner) -> Iterator[None]:
    """Put the moving average, where there is one, in the adapter's place."""
    parameters = setup.policy.parameters() if learner.average else []
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, mean in zip(parameters, learner.average, strict=True):
            parameter.copy_(mean)
        try:
            yield
        finally:
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def look(setup: Setup, learner: Learner, folder: RunFolder, progress: Progress | None, check: Callable[[], None]) -> dict[str, float]:
    """Evaluate on the held-out prompts, keep scores and pictures, and return the metrics; the untrained model gets a row of its own."""
    if not setup.accelerator.is_main_process or not setup.prompts.heldout:
        return {}
    with averaged(setup, learner):
        evaluation = evaluate(setup.policy, setup.judges, setup.prompts.heldout, setup.config.train, setup.sigmas, setup.shape, check)
    evaluation.save(folder, learner.step)
    row = evaluation.metrics()
    if progress:
        folder.append({"step": learner.step} | row)
        progress.step({"step": learner.step} | row)
    return row


def finish(setup: Setup, learner: Learner, folder: RunFolder, progress: Progress, check: Callable[[], None]) -> dict[str, Any]:
    """Evaluate the outcome, write the summary and the pictures."""
    row = look(setup, learner, folder, None, check)
    setup.accelerator.wait_for_everyone()
    if not setup.accelerator.is_main_process:
        return {}
    if row and not any("heldout" in key for old in folder.metrics() if old["step"] == learner.step for key in old):
        folder.append({"step": learner.step} | row)
        progress.step({"step": learner.step} | row)
    steps = [old for old in folder.metrics() if "nfe" in old]
    names = [reward.name for reward in setup.rewards]
    ends = {"before": steps[: max(len(steps) // 10, 1)], "after": steps[-max(len(steps) // 10, 1) :]}
    summary: dict[str, Any] = {"recipe": setup.config.method.name, "steps": learner.step, "seed": setup.config.train.seed}
    for when, rows in ends.items():
        summary[f"reward_{when}"] = {n: sum(old[f"reward/{n}/mean"] for old in rows) / len(rows) for n in names}
    if row:
        before, after = Evaluation.read(folder, 0), Evaluation.read(folder, learner.step)
        summary |= {"heldout_before": before.means(), "heldout_after": after.means(), "heldout_gain": compare(before, after)}
    summary |= {
        "seconds": learner.seconds,
        "forwards": learner.forwards,
        "lora": f"{folder.latest().relative_to(folder.path)}/lora.safetensors",
    }
    folder.save_summary(summary)
    write_report(folder)
    progress.finish(summary)
    return summary


def open_run(config: Config, out: Path, resume: bool, replace: bool) -> RunFolder:
    """Create the run folder, or open it and see that it was made by the same configuration; only length and pace may differ."""
    if not resume:
        return RunFolder.create(out, dump(config), replace)
    folder = RunFolder.open(out)
    free = {"train": ("steps", "minutes", "eval_every", "checkpoint_every", "keep_checkpoints")}
    for section, values in dump(config)["config"].items():
        saved = folder.config()["config"].get(section)
        if not isinstance(values, dict):
            values, saved = {"": values}, {"": saved}
        for key, value in values.items():
            if value != saved.get(key) and section != "out" and key not in free.get(section, ()):
                raise RunError(
                    f"{out} was made with {section}.{key} = {saved.get(key)!r}, not {value!r}; resume with that, or choose another --out"
                )
    return folder


def save(setup: Setup, learner: Learner, folder: RunFolder) -> None:
    """Write a checkpoint: the adapter as a LoRA file, and all that a bit-equal continuation needs."""
    if not setup.accelerator.is_main_process or (folder.latest() and int(folder.latest().name) == learner.step):
        return
    config, policy = setup.config, setup.policy
    metadata = {
        "g2rpo.version": __version__,
        "g2rpo.base_model": Path(config.model.path).name,
        "g2rpo.recipe": config.method.name,
        "g2rpo.step": str(learner.step),
        "g2rpo.rewards": ", ".join(f"{reward.weight:g} {reward.name}" for reward in config.rewards),
    }
    tensors = {f"parameter/{i}": p.detach() for i, p in enumerate(policy.parameters())} | optimizer_tensors(learner.optimizer)
    tensors |= {f"average/{i}": mean for i, mean in enumerate(learner.average)}
    progress = {"step": learner.step, "forwards": learner.forwards, "seconds": learner.seconds}

    def write(path: Path) -> None:
        with averaged(setup, learner):
            lora.write(path / "lora.safetensors", policy.pairs(), config.lora.alpha, metadata=metadata)
        write_state(path, tensors, progress)

    folder.save_checkpoint(learner.step, write, keep_last=config.train.keep_checkpoints)


def restore(setup: Setup, learner: Learner, folder: RunFolder) -> None:
    """Bring adapter, average, optimizer and metrics back to the newest checkpoint; without one, to the start."""
    place = folder.latest()
    if place is None:
        if setup.accelerator.is_main_process:
            folder.truncate_metrics(0)
        return
    tensors, progress = read_state(place)
    with torch.no_grad():
        for kind, targets in (("parameter", setup.policy.parameters()), ("average", learner.average)):
            for i, target in enumerate(targets):
                if (value := tensors.get(f"{kind}/{i}")) is None or value.shape != target.shape:
                    raise RunError(f"{place} does not fit this adapter; resume with the run's own configuration")
                target.copy_(value)
    load_optimizer_tensors(learner.optimizer, tensors)
    learner.step, learner.forwards, learner.seconds = progress["step"], progress["forwards"], progress["seconds"]
    if setup.accelerator.is_main_process:
        folder.truncate_metrics(learner.step)


class Stopped(KeyboardInterrupt):
    """A stop between two forwards: nothing is torn."""


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Turn the first Ctrl-C into a stop at the next forward, so that no update is torn; the second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    def check() -> None:
        if asked.is_set():
            raise Stopped

    former = signal.signal(signal.SIGINT, ask)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, former)


def due(every: int, step: int) -> bool:
    """Say whether something that happens every so many steps happens after this one."""
    return every > 0 and step % every == 0


def out_of_time(config: Config, learner: Learner) -> bool:
    """Say whether the budget of training minutes is spent."""
    return config.train.minutes is not None and learner.seconds >= 60 * config.train.minutes


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of the device, or of the process, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
