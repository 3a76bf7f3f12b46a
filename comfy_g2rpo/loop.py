"""A whole run, whoever hosts it: roll out, score, update; evaluate, save, stop, resume. The command line and the graph share it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from . import lora
from .advantages import mixed, zero_std_share
from .diversity import describe, mean_distance, measure, shaping
from .evaluation import Evaluation, compare, evaluate
from .guard import Speed, explore
from .limits import Limits, peak_memory
from .optimizers import Optimizers, adamw, load_optimizer_tensors, optimizer_tensors
from .pace import Pace
from .plan import Plan
from .policy import Trainee
from .prompts import PromptCursor, Prompts
from .recipes import Recipe, build_plan
from .rewards import Reward, RewardError
from .rewards.protocol import embedder, may_abstain, settle
from .rollout import Rollout, stream
from .runs import RunFolder, fitting, read_progress, write_state
from .scoring import Scorer, roll_out_and_score
from .shortcut import Shortcut
from .update import records, swapped, update, update_average
from .watch import Seen, best_step, blind_spots, evaluated, signs, standing


@dataclass(frozen=True)
class World:
    """The processes that share a run; `gather` stacks scores [R, P, images] over P, `reduce` averages a gradient, `wait` lines them up."""

    index: int = 0
    count: int = 1
    gather: Callable[[Tensor], Tensor] = lambda scores: scores
    reduce: Callable[[Tensor], Tensor] | None = None
    wait: Callable[[], None] = lambda: None

    @property
    def speaks(self) -> bool:
        """Say whether this is the process that writes and shows."""
        return self.index == 0


@dataclass(frozen=True)
class Setup:
    """Everything of a run that does not change while it runs."""

    recipe: Recipe
    pace: Pace
    policy: Trainee
    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]
    judges: tuple[Reward, ...]
    prompts: Prompts
    sigmas: Tensor
    shape: tuple[int, ...]
    alpha: float
    gates: tuple[float | None, ...] = ()
    style: str = "diffusers"
    rename: lora.Rename | None = None
    """Gives the adapter's modules the names that they have in LoRA files, where these differ."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    world: World = field(default_factory=World)
    preview: tuple[int, ...] | None = None
    """Shape of a latent at the preview size, where evaluations draw there, too."""
    preview_sigmas: Tensor | None = None
    """Noise levels [T+1] at that size; those of training where they do not depend on the size."""
    speed: Speed = field(default_factory=Speed)
    velocity: CheapVelocity | None = None
    """Evaluates completions in the policy's place, where `speed` asks for it."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """Say of the rewards that only measure in the watch, by name: 1 where it is left out, 0 is none, below 0 less is better."""

    optimizer: Optimizers = adamw
    """Makes the recipe's optimizer."""

    @property
    def trained(self) -> dict[str, float]:
        """Return the weights of the rewards that are trained on, by name."""
        return {reward.name: weight for reward, weight in zip(self.rewards, self.weights, strict=True)}


@dataclass
class Learner:
    """What learning changes: the optimizer over the adapter, the adapter's moving average, and the count of finished steps."""

    optimizer: torch.optim.Optimizer
    average: list[Tensor]
    step: int = 0
    forwards: int = 0
    seconds: float = 0.0
    start: list[Tensor] = field(default_factory=list)
    """The adapter as the run began with it, where the KL is measured against that."""
    cheap: bool = True
    """Whether completions may still be cheaper than exact (`Setup.speed`)."""
    limits: Limits = field(default_factory=lambda: Limits.of(Pace()))
    """What fits into memory at once; not part of a checkpoint, for results do not depend on it."""


class CheapVelocity(Protocol):
    """A velocity for completions, and what there is to say about it, such as why blocks are not compiled."""

    notes: list[str]

    def __call__(self, x: Tensor, sigma: Tensor, cond: Sequence[Any]) -> Tensor:
        """Return v as the policy does."""
        ...


class Watcher(Protocol):
    """Who is told what happens."""

    def start(self, total_steps: int, first_step: int, plan_line: str) -> None:
        """Begin at `first_step`."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Take the row of a step, as it goes into the run folder."""

    def note(self, text: str) -> None:
        """Take a remark."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End, with the summary."""


Check = Callable[[str], None]
"""Called before every forward and every batch of pictures with the phase, one of PHASES; raises to stop."""

PHASES = ("rollout", "update", "evaluate")


def preview_shape(pace: Pace, shape_of: Callable[[int, int], tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape of a latent at the preview size, by the host's own function of (width, height); None without previews."""
    if not pace.preview_width and not pace.preview_height:
        return None
    size = f"preview_width and preview_height are {pace.preview_width}×{pace.preview_height}"
    if not pace.preview_width or not pace.preview_height:
        raise ValueError(f"{size}; give both, or 0 for none")
    try:
        return shape_of(pace.preview_width, pace.preview_height)
    except ValueError as error:
        raise ValueError(f"{size}, which the model cannot draw: {error}") from error


def make_learner(setup: Setup) -> Learner:
    """Set up the recipe's optimizer over the adapter."""
    measure(embedder(setup.rewards), setup.recipe.diversity_by)
    parameters = setup.policy.parameters()
    optimizer = setup.optimizer(parameters, setup.recipe)
    average, start = setup.recipe.ema, setup.recipe.kl and setup.recipe.kl_reference == "start"
    average, start = ([p.detach().clone() for p in parameters] if wanted else [] for wanted in (average, start))
    return Learner(optimizer, average, start=start, limits=Limits.of(setup.pace))


def learn(
    setup: Setup, learner: Learner, folder: RunFolder, watcher: Watcher, check: Check, stops: tuple[type[BaseException], ...]
) -> None:
    """Run up to the budget of steps or minutes; one of `stops` leaves a checkpoint of the last finished step and goes on up."""
    pace, plan = setup.pace, build_plan(setup.recipe, coarsest=setup.speed.tail_stride if learner.cheap else 1)
    count = pace.prompts_per_step
    watcher.start(pace.steps, learner.step, f"{count * plan.forwards} forwards and {count * len(plan.images)} pictures per step")
    judges = [judge.name for judge in setup.judges]
    for note in (*setup.prompts.notes, *blind_spots(pace, len(setup.prompts.heldout), judges, setup.trained, setup.measures)):
        watcher.note(note)
    try:
        if learner.step == 0 or (due(pace.eval_every, learner.step) and learner.step < pace.steps):
            # A run that was stopped while it looked looks again.
            look(setup, learner, folder, watcher, check)
        halted = halt(setup, learner, folder, watcher)
        while learner.step < pace.steps and not halted and not out_of_time(setup, learner):
            row = iterate(setup, learner, check)
            if setup.world.speaks:
                folder.append(row)
            watcher.step(row)
            tell(setup, learner, row, watcher)
            if due(pace.eval_every, learner.step) and learner.step < pace.steps:
                look(setup, learner, folder, watcher, check)
                halted = halt(setup, learner, folder, watcher)
            if due(pace.checkpoint_every, learner.step):
                save(setup, learner, folder)
    except stops:
        if learner.step:
            save(setup, learner, folder)
        raise
    save(setup, learner, folder)


def tell(setup: Setup, learner: Learner, row: Mapping[str, Any], watcher: Watcher) -> None:
    """Say what became of memory and of cheap completions in the iteration that made a row."""
    if news := learner.limits.news():
        watcher.note(f"step {row['step']}: {news}")
    while setup.velocity and setup.velocity.notes:
        watcher.note(setup.velocity.notes.pop(0))
    if row.get("guard/on") == 0:
        much = f"rank rewards as exact ones do to {row['guard/rank']:.3f} only, and speed.guard_rank asks for {setup.speed.guard_rank:g}"
        watcher.note(f"step {row['step']}: cheap completions {much}; they are switched off, and this step was rolled out exactly")


def iterate(setup: Setup, learner: Learner, check: Check) -> dict[str, float]:
    """Make one update: roll out the step's prompts, score, learn; return the row of metrics. An exception leaves the last step's state."""
    pace, recipe, policy, limits = setup.pace, setup.recipe, setup.policy, learner.limits
    begin = time.perf_counter()
    prompts, seeds = draw(setup, learner.step)
    conds = policy.encode(prompts)
    rolling = partial(check, "rollout")

    def roll(plan: Plan, places: Sequence[int], rewards: Sequence[Reward], shortcut: Shortcut | None) -> tuple[Scorer, Rollout]:
        texts, given, drawn = ([part[p] for p in places] for part in (prompts, conds, seeds))
        # The guard's pictures teach nothing and need no description.
        describe = described(setup) if rewards is setup.rewards else None
        scorer = Scorer(policy.decode, rewards, texts, len(plan.images), limits.decode_batch, check=rolling, describe=describe)
        return scorer, roll_out_and_score(policy, plan, setup.sigmas, given, drawn, setup.shape, scorer, limits.slots, rolling, shortcut)

    now = {"cheap": learner.cheap, "step": learner.step, "seed": pace.seed, "prompts": len(prompts)}
    explored = explore(roll, recipe, setup.speed, setup.velocity, rewards=setup.rewards, gather=setup.world.gather, **now)
    plan, scorer, rollout = explored.plan, explored.scorer, explored.rollout
    settle(setup.rewards)
    rolled = time.perf_counter()
    rewards = [plan.values(scorer.scores[:, p]) for p in range(len(prompts))]
    everywhere = setup.world.gather(scorer.scores)
    if everywhere.isnan().all():
        none = f"rewards judged none of the {everywhere[0].numel()} pictures of step {learner.step + 1}"
        raise RewardError(f"{none}; mend the prompts, or the judge that is asked, and resume the run")
    dropped = dropped_share(setup, everywhere, learner.step + 1)
    scale = [plan.values(scores) for scores in everywhere.unbind(1)] if recipe.std == "global" else None
    advantages = mixed(rewards, setup.weights, recipe.mix, setup.gates, recipe.clamp, recipe.std_floor, scale)
    features = {name: [plan.values(table.T).movedim(0, -1) for table in tables] for name, tables in scorer.features.items()}
    if recipe.diversity_weight:
        unlike = features[measure(embedder(setup.rewards), recipe.diversity_by)]
        extra = [shaping(f, reward, recipe.diversity_weight, recipe.clamp) for f, reward in zip(unlike, rewards, strict=True)]
        advantages = [advantage + more for advantage, more in zip(advantages, extra, strict=True)]
    made = records(rollout, advantages, step_weight=recipe.step_weight, samples=recipe.objective == "clip")
    with undone_on_error(setup, learner), policy.training():
        learning = {"micro_batch": limits.micro_batch, "reduce": setup.world.reduce, "check": partial(check, "update")}
        if learner.start:
            learning["reference"] = partial(swapped, policy.parameters(), learner.start)
        stats = update(policy, made, conds, learner.optimizer, recipe, **learning)
    if recipe.ema:
        update_average(learner.average, policy.parameters(), min(recipe.ema, (learner.step + 1) / (learner.step + 10)))
    learner.step += 1
    learner.cheap = explored.cheap
    learner.forwards += (rollout.nfe + int(explored.metrics.get("guard/nfe", 0))) * setup.world.count
    updated = time.perf_counter()
    learner.seconds += updated - begin
    row: dict[str, float] = {"step": learner.step} | reward_metrics(setup.rewards, everywhere)
    row["advantage/abs_mean"] = torch.stack(advantages).abs().mean().item()
    row["zero_std_share"] = sum(zero_std_share(reward, recipe.std_floor) for reward in rewards) / len(rewards)
    row["dropped_share"] = dropped
    if "pixels" in features:
        row["diversity/group"] = torch.stack([mean_distance(f.movedim(2, 1)).nanmean() for f in features["pixels"]]).nanmean().item()
    judged = scorer.seconds["decode"] + scorer.seconds["reward"]
    times = {"rollout": rolled - begin - judged, **scorer.seconds, "update": updated - rolled}
    row |= stats | explored.metrics | {"nfe": rollout.nfe} | {f"memory/{name}": rows for name, rows in limits.lowered().items()}
    return row | {f"time/{k}": v for k, v in times.items()} | {"memory/peak": peak_memory(policy.device)}


def described(setup: Setup) -> Callable[[Tensor], dict[str, Tensor]] | None:
    """Return what measures the pictures of a rollout: a reward's embedding only where advantages need it, for it costs another forward."""
    if not setup.recipe.diversity_weight:
        return None if setup.pace.watch == "off" else partial(describe, embed=None)
    embed = embedder(setup.rewards)
    return partial(describe, embed=embed if measure(embed, setup.recipe.diversity_by) == "embed" else None)


def dropped_share(setup: Setup, scores: Tensor, step: int) -> float:
    """Return the share of pictures that the least able reward could not judge, scores [R, P, images]; RewardError above `max_dropped`."""
    shares = scores.isnan().flatten(1).float().mean(1)
    shares[torch.tensor([may_abstain(reward) for reward in setup.rewards])] = 0
    worst = int(shares.argmax())
    if shares[worst] > setup.pace.max_dropped:
        much = f"could not judge {shares[worst]:.0%} of the {scores[0].numel()} pictures of step {step}"
        allowed = f"max_dropped allows {setup.pace.max_dropped:.0%}"
        remedy = "mend the reward or its prompts, or raise max_dropped, and resume the run"
        raise RewardError(f"reward '{setup.rewards[worst].name}' {much}, and {allowed}; {remedy}")
    return shares[worst].item()


def reward_metrics(rewards: Sequence[Reward], scores: Tensor) -> dict[str, float]:
    """Return mean and standard deviation of each reward's valid scores [R, …]."""
    row = {}
    for reward, values in zip(rewards, scores, strict=True):
        valid = values[~values.isnan()]
        row |= {f"reward/{reward.name}/mean": valid.mean().item(), f"reward/{reward.name}/std": valid.std().item()}
    return row


def prompts_ahead(prompts: Prompts, pace: Pace) -> tuple[str, ...]:
    """Return the prompts that a run can come to: those that its steps draw, and those that it is measured on."""
    drawn = min(pace.steps * pace.prompts_per_step, len(prompts.train))
    return (*PromptCursor(prompts.train, drawn, pace.seed).batch(0), *prompts.heldout[: pace.eval_prompts or None])


def draw(setup: Setup, step: int) -> tuple[list[str], list[int]]:
    """Return this process's share of the step's prompts, and the seed of each; a function of (seed, step) alone."""
    pace, world = setup.pace, setup.world
    prompts = PromptCursor(setup.prompts.train, pace.prompts_per_step, pace.seed).batch(step)
    seeds = [stream("rollout", pace.seed, step, place) for place in range(len(prompts))]
    mine = slice(world.index, None, world.count)
    return prompts[mine], seeds[mine]


@contextmanager
def undone_on_error(setup: Setup, learner: Learner) -> Iterator[None]:
    """Bring adapter and optimizer back if an update of several optimizer steps is broken off."""
    if setup.recipe.epochs == 1 and setup.recipe.update == "accumulate":
        # The only optimizer step is the last thing that such an update does.
        yield
        return
    parameters = [p.detach().clone() for p in setup.policy.parameters()]
    state = {name: tensor.clone() for name, tensor in optimizer_tensors(learner.optimizer).items()}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, before in zip(setup.policy.parameters(), parameters, strict=True):
                parameter.copy_(before)
        learner.optimizer.state.clear()
        load_optimizer_tensors(learner.optimizer, state)
        raise


def averaged(setup: Setup, learner: Learner) -> AbstractContextManager[None]:
    """Put the moving average, where there is one, in the adapter's place."""
    return swapped(setup.policy.parameters(), learner.average) if learner.average else nullcontext()


def look(setup: Setup, learner: Learner, folder: RunFolder, watcher: Watcher, check: Check) -> None:
    """Evaluate on the held-out prompts, unless this step has been; keep scores, pictures and a row of metrics, and the best checkpoint."""
    if not setup.world.speaks or not setup.prompts.heldout or looked(folder, learner.step):
        return
    recipe = None if setup.pace.watch == "off" else setup.recipe
    with averaged(setup, learner):
        evaluation = evaluate(
            setup.policy,
            setup.judges,
            setup.prompts.heldout,
            learner.limits.within(setup.pace),
            setup.sigmas,
            setup.shape,
            partial(check, "evaluate"),
            recipe=recipe,
            preview=setup.preview,
            preview_sigmas=setup.preview_sigmas,
        )
    evaluation.save(folder, learner.step)
    row = {"step": learner.step} | evaluation.metrics()
    if recipe:
        row |= notice(setup, folder, evaluation)
    folder.append(row)
    if recipe and best_step(folder.metrics(), setup.trained, setup.measures) == learner.step:
        save(setup, learner, folder)
    watcher.step(row)
    if text := row.get("alarm") or row.get("sign"):
        watcher.note(f"{'ALARM' if 'alarm' in row else 'watch'}, step {learner.step}: {text}")


def notice(setup: Setup, folder: RunFolder, now: Evaluation) -> dict[str, Any]:
    """Compare an evaluation with those before it, which the run folder holds; return what the watch adds to its row."""
    rows = folder.metrics()
    looks = evaluated(rows)
    if not looks:
        return {}
    first = int(looks[0]["step"])
    best = best_step(rows, setup.trained, setup.measures) or first
    base = Evaluation.read(folder, first)
    if (base.names, base.prompts) != (now.names, now.prompts):
        return {}
    seen = Seen(base, base if best == first else Evaluation.read(folder, best), now, best, setup.trained, setup.pace, rows, setup.measures)
    return standing(signs(seen), looks[-1], setup.pace.patience)


def halt(setup: Setup, learner: Learner, folder: RunFolder, watcher: Watcher) -> bool:
    """Say, in every process alike, whether the evaluation of this step raised an alarm that stops the run."""
    alarm = setup.world.speaks and setup.pace.watch == "stop" and alarm_at(folder.metrics(), learner.step)
    if not setup.world.gather(torch.tensor([[[float(bool(alarm))]]])).any():
        return False
    watcher.note(f"stopped by the watch at step {learner.step}; watch = warn goes on")
    return True


def alarm_at(rows: Sequence[Mapping[str, Any]], step: int) -> str:
    """Return the alarm of a step's evaluation, or nothing."""
    return next((str(row["alarm"]) for row in rows if row.get("step") == step and row.get("alarm")), "")


def looked(folder: RunFolder, step: int) -> bool:
    """Say whether a step has its row of held-out metrics."""
    return any(row.get("step") == step for row in evaluated(folder.metrics()))


def finish(setup: Setup, learner: Learner, folder: RunFolder, watcher: Watcher, check: Check, name: str) -> dict[str, Any]:
    """Evaluate the outcome and write the summary of a run by the recipe `name`."""
    look(setup, learner, folder, watcher, check)
    setup.world.wait()
    if not setup.world.speaks:
        return {}
    rows = folder.metrics()
    steps = [old for old in rows if "nfe" in old]
    names = [reward.name for reward in setup.rewards]
    ends = {"before": steps[: max(len(steps) // 10, 1)], "after": steps[-max(len(steps) // 10, 1) :]}
    summary: dict[str, Any] = {"recipe": name, "steps": learner.step, "seed": setup.pace.seed}
    for when, part in ends.items():
        summary[f"reward_{when}"] = {n: sum(old[f"reward/{n}/mean"] for old in part) / len(part) for n in names}
    summary |= verdict(setup, learner, folder)
    if setup.prompts.heldout and setup.judges:
        before, after = Evaluation.read(folder, 0), Evaluation.read(folder, summary["lora_step"])
        summary |= {"heldout_before": before.means(), "heldout_after": after.means(), "heldout_gain": compare(before, after)}
    summary |= {"seconds": learner.seconds, "forwards": learner.forwards}
    folder.save_summary(summary)
    return summary


def verdict(setup: Setup, learner: Learner, folder: RunFolder) -> dict[str, Any]:
    """Return what ended the run, what the watch saw, and the LoRA to use: the best where the watch ended the run, else the last."""
    rows = folder.metrics()
    best = best_step(rows, setup.trained, setup.measures)
    stopped = setup.pace.watch == "stop" and bool(alarm_at(rows, learner.step))
    saved = {int(place.name): place for place in folder.saved()}
    chosen = saved[best] if stopped and best in saved else folder.latest()
    looks = evaluated(rows)
    return {
        "stopped_by": "watch" if stopped else "steps" if learner.step >= setup.pace.steps else "minutes",
        "best_step": best,
        "alarms": [{"step": row["step"], "text": row["alarm"]} for row in looks if row.get("alarm")],
        "sign": looks[-1].get("sign", "") if looks else "",
        "lora_step": int(chosen.name),
        "lora": f"{chosen.relative_to(folder.path)}/lora.safetensors",
    }


def save(setup: Setup, learner: Learner, folder: RunFolder) -> None:
    """Write a checkpoint: the adapter as a LoRA file, and all that a bit-equal continuation needs. The best one stays beside the newest."""
    if not setup.world.speaks or (folder.latest() and int(folder.latest().name) == learner.step):
        return
    tensors = {f"parameter/{i}": p.detach() for i, p in enumerate(setup.policy.parameters())} | optimizer_tensors(learner.optimizer)
    tensors |= {f"average/{i}": mean for i, mean in enumerate(learner.average)}
    progress = {"step": learner.step, "forwards": learner.forwards, "seconds": learner.seconds, "cheap": learner.cheap}
    metadata = {**setup.metadata, "g2rpo.step": str(learner.step)}

    def write(path: Any) -> None:
        with averaged(setup, learner):
            form = {"style": setup.style, "rename": setup.rename, "metadata": metadata}
            lora.write(path / "lora.safetensors", setup.policy.pairs(), setup.alpha, **form)
        write_state(path, tensors, progress)

    best = None if setup.pace.watch == "off" else best_step(folder.metrics(), setup.trained, setup.measures)
    folder.save_checkpoint(learner.step, write, keep_last=setup.pace.keep_checkpoints, keep=best)


def restore(setup: Setup, learner: Learner, folder: RunFolder) -> None:
    """Bring adapter, average, optimizer and metrics back to the newest checkpoint; without one, to the start."""
    place = folder.latest()
    if place is None:
        if setup.world.speaks:
            folder.truncate_metrics(0)
        return
    tensors, progress = read_progress(place, ("forwards", "seconds"))
    targets = {"parameter": setup.policy.parameters(), "average": learner.average}
    found = {kind: fitting(tensors, kind, like, place) for kind, like in targets.items()}
    load_optimizer_tensors(learner.optimizer, tensors)
    with torch.no_grad():
        for kind, like in targets.items():
            for target, value in zip(like, found[kind], strict=True):
                target.copy_(value)
    learner.step, learner.forwards, learner.seconds = progress["step"], progress["forwards"], progress["seconds"]
    learner.cheap = progress.get("cheap", True) is not False
    if setup.world.speaks:
        folder.truncate_metrics(learner.step)


def due(every: int, step: int) -> bool:
    """Say whether something that happens every so many steps happens after this one."""
    return every > 0 and step % every == 0


def out_of_time(setup: Setup, learner: Learner) -> bool:
    """Say whether the budget of training minutes is spent."""
    return setup.pace.minutes is not None and learner.seconds >= 60 * setup.pace.minutes
