"""One iteration of a run: explore, score, update. Each verb leaves a frozen result for the next."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..advantages import zero_std_share
from ..curriculum.prompt_choice import Chosen, absolute_weights, choose_prompts, history_after, slot_seed
from ..curriculum.prompt_history import History, global_advantages
from ..exploration.noise_gaps import gain_noise, gap_metrics
from ..objectives import OBJECTIVES
from ..objectives.forward_process import image_rows
from ..plan import Plan
from ..replay.replay_rows import Batch, Share, after, forks_of, metrics_of, seed_of, with_old
from ..rewards import Reward, RewardError
from ..rewards.mixing import mixed_advantages, raw_values
from ..rewards.protocol import embedder
from ..rollout import Rollout
from ..sharing.explored import Explored, merged, parted
from ..speed.peak_memory import peak_memory
from ..speed.step_cache import Shortcut
from ..trees.pruned import PrunedPlan, finished_rows
from ..trees.staged_rollout import PrunedRollout, roll_out_pruned
from ..update import Records, records, snapshot
from ..update import update as take_steps
from .diversity import describe, mean_distance, measure, shaping
from .optimizers import load_optimizer_tensors, optimizer_tensors, swapped, update_average
from .rank_guard import roll_out_guarded
from .scorer import Scorer, comparison_groups, roll_out_and_score
from .setup import Check, Learner, Setup


@dataclass(frozen=True)
class Scored:
    """What the scores say: rewards [R, K, G, L] and advantages [K, G] of every prompt."""

    rewards: Sequence[Tensor]
    advantages: Sequence[Tensor]
    everywhere: Tensor  # [R, P, F] of all processes
    dropped: float  # share of the pictures that the least able reward could not judge
    noise: Sequence[float]  # [R], a spread below which tells nothing
    history: History  # with what this step shows
    metrics: Mapping[str, float]  # of the prompts of all processes
    values: Sequence[Tensor] | None = None  # [K, G] of every prompt, in the rewards' own units


def iterate(setup: Setup, learner: Learner, check: Check) -> dict[str, float]:
    """Explore, score, update; return the row of metrics. An exception leaves the last step's state."""
    begin = time.perf_counter()
    explored = explore(setup, learner, check)
    rolled, waited = time.perf_counter(), setup.world.waited()
    scored = score(setup, explored, learner.step + 1)
    stats = update(setup, learner, explored, scored, check)
    learner.step += 1
    learner.cheap, learner.history = explored.cheap, scored.history
    learner.forwards += explored.forwards * setup.world.count
    end = time.perf_counter()
    learner.seconds += end - begin
    own = end - rolled - (setup.world.waited() - waited)
    return step_row(setup, learner, explored, scored, stats, own)


def explore(setup: Setup, learner: Learner, check: Check) -> Explored:
    """Roll out the step's prompts, and let the rewards judge every finished picture; or ask who explores."""
    if setup.explorer:
        return setup.explorer(setup, learner, check)
    begin, waited = time.perf_counter(), setup.world.waited()
    chosen = choose_prompts(setup, learner, partial(check, "rollout"))
    choosing = time.perf_counter() - begin - sum(chosen.seconds.values()) - (setup.world.waited() - waited)
    chosen = dataclasses.replace(chosen, seconds={"rollout": choosing, **chosen.seconds})
    mine = range(setup.pace.prompts_per_step)[setup.world.index :: setup.world.count]
    found = [
        explore_part(setup, learner, chosen.places, slots, check)
        for slots in parted(mine, setup.pace.prompts_at_once)
    ]
    for reward in setup.rewards:
        reward.settle()
    return merged(found, chosen)


def explore_part(
    setup: Setup, learner: Learner, places: Sequence[int], slots: Sequence[int], check: Check
) -> Explored:
    """Roll out and judge some of a step's prompts, those of `slots`; `places` are those of all of them."""
    begin, waited = time.perf_counter(), setup.world.waited()
    rolling = partial(check, "rollout")
    prompts, seeds = slotted(setup, places, learner.step, slots)
    conds = setup.policy.encode(prompts)
    size = setup.size(learner.step)

    def roll(
        plan: Plan, some: Sequence[int], rewards: Sequence[Reward], shortcut: Shortcut | None
    ) -> tuple[Scorer, Rollout]:
        texts, given, drawn = ([part[p] for p in some] for part in (prompts, conds, seeds))
        # The guard's pictures teach nothing, so nobody needs their features.
        features = features_of(setup) if rewards is setup.rewards else None
        limits, images = learner.limits, len(plan.images)
        seen = {"check": rolling, "describe": features, "groups": comparison_groups(plan)}
        seen["keeps_latents"] = OBJECTIVES[setup.recipe.objective].images
        scorer = Scorer(setup.policy.decode, rewards, texts, images, limits.decode_batch, **seen)
        how = size.sigmas, given, drawn, size.shape, scorer, limits.slots, rolling, shortcut
        with old_policy(setup, learner):
            if isinstance(plan, PrunedPlan):
                return scorer, roll_out_pruned(setup.policy, plan, *how, judge=partial(worth, setup))
            return scorer, roll_out_and_score(setup.policy, plan, *how)

    found = roll_out_guarded(
        roll,
        setup.recipe,
        setup.speed,
        setup.velocity,
        cheap=learner.cheap,
        step=learner.step,
        seed=setup.pace.seed,
        prompts=len(prompts),
        rewards=setup.rewards,
        gather=setup.world.gather,
    )
    for reward in setup.rewards:
        reward.keep_forks(found.rollout, found.scorer.whole)
    scorer, plan, seconds = found.scorer, found.plan, found.scorer.seconds
    features = {
        name: [plan.final_values(table.T).movedim(0, -1) for table in tables]
        for name, tables in scorer.features.items()
    }
    rollout = time.perf_counter() - begin - seconds["decode"] - seconds["reward"]
    rollout -= setup.world.waited() - waited
    spent = {"rollout": rollout, **seconds}
    seen = found.cheap, found.metrics, spent, scorer.latents
    return Explored(conds, plan, found.rollout, scorer.scores, features, *seen)


def score(setup: Setup, explored: Explored, step: int) -> Scored:
    """Turn the scores of a step into advantages; RewardError where too few images were judged."""
    recipe, plan = setup.recipe, explored.plan
    rewards = [plan.credited(scores, recipe.credit) for scores in explored.scores.unbind(1)]
    everywhere = setup.world.gather(explored.final_scores)
    if everywhere.isnan().all():
        setup.world.let_one_say()
        none = f"rewards judged none of the {everywhere[0].numel()} pictures of step {step}"
        raise RewardError(f"{none}; mend the prompts, or the judge that is asked, and resume the run")
    dropped = dropped_share(setup, everywhere, step)
    noise = [reward.noise() for reward in setup.rewards]
    if recipe.credit == "gain":
        noise = gain_noise(noise, everywhere)

    def compared(groups: Sequence[Tensor], scale: Sequence[Tensor] | None = None) -> list[Tensor]:
        how = setup.weights, recipe.mix, setup.gates, recipe.clamp, recipe.std_floor
        return mixed_advantages(groups, *how, scale, noise)

    if recipe.std == "tree":
        pictures = [scores[:, None, :, None] for scores in explored.final_scores.unbind(1)]
        advantages = [compared([one], [all_])[0] for one, all_ in zip(rewards, pictures, strict=True)]
    elif recipe.std == "global":
        gathered = setup.world.gather(explored.scores)
        advantages = compared(
            rewards, [plan.credited(scores, recipe.credit) for scores in gathered.unbind(1)]
        )
    else:
        advantages = compared(rewards)
    history = history_after(setup, explored.chosen, rewards, everywhere, noise)
    if recipe.global_advantage:
        how = absolute_weights(setup), recipe.clamp, recipe.std_floor, noise
        advantages = [
            advantage + recipe.global_advantage * global_advantages(history, reward, *how)
            for advantage, reward in zip(advantages, rewards, strict=True)
        ]
    if recipe.diversity_weight:
        unlike = explored.features[measure(embedder(setup.rewards), recipe.diversity_by)]
        advantages = [
            advantage + shaping(features, reward, recipe.diversity_weight, recipe.clamp)
            for advantage, features, reward in zip(advantages, unlike, rewards, strict=True)
        ]
    values = None
    if recipe.replay or OBJECTIVES[recipe.objective].values:
        how = setup.weights, setup.gates, recipe.std_floor, noise
        values = [raw_values(reward, *how) for reward in rewards]
    metrics = setup.world.mean(prompt_metrics(setup, explored, rewards, advantages, noise))
    return Scored(rewards, advantages, everywhere, dropped, noise, history, metrics, values)


def prompt_metrics(
    setup: Setup,
    explored: Explored,
    rewards: Sequence[Tensor],
    advantages: Sequence[Tensor],
    noise: Sequence[float],
) -> dict[str, float]:
    """Return what the step's prompts say of it: advantages, groups without any order, diversity."""
    # Deep groups may have more members than others; whole images have no edges.
    tables = torch.stack(list(advantages))
    edges = len(tables) * len(explored.plan.transitions) or tables.numel()
    shares = [zero_std_share(reward, setup.recipe.std_floor, noise) for reward in rewards]
    row = {
        "advantage/abs_mean": tables.abs().sum().item() / edges,
        "zero_std_share": sum(shares) / len(shares),
    }
    if pixels := explored.features.get("pixels"):
        apart = [mean_distance(features.movedim(2, 1)).nanmean() for features in pixels]
        row["diversity/group"] = torch.stack(apart).nanmean().item()
    return row


def worth(setup: Setup, rewards: Tensor) -> Tensor:
    """Make one score [n] of the rewards [R, 1, n, 1] of pictures of one group, as advantages are mixed."""
    noise, recipe = [reward.noise() for reward in setup.rewards], setup.recipe
    how = setup.weights, recipe.mix, setup.gates, math.inf, recipe.std_floor
    return mixed_advantages([rewards], *how, noise=noise)[0][0]


def update(
    setup: Setup, learner: Learner, explored: Explored, scored: Scored, check: Check
) -> dict[str, float]:
    """Take the optimizer's steps on the adapter, move its average, and return the update's metrics."""
    recipe, policy = setup.recipe, setup.policy
    made = rows_of(setup, learner, explored, scored)
    batch = Batch(made, explored.conds, len(made))
    if recipe.replay:
        chance = seed_of(setup.pace.seed, learner.step)
        share = Share(setup.world.index, setup.world.count, setup.world.gather)
        batch = with_old(made, explored.conds, learner.forks, recipe, share, chance, policy.encode)
    with undone_on_error(setup, learner), policy.training():
        if drew := explored.drawn_by or learner.old:
            with swapped(policy.parameters(), drew):
                past = snapshot(policy, made, explored.conds, micro_batch=learner.limits.micro_batch)
            batch.compare(past)
        stats, kept = stepped(setup, learner, batch, check), learner.forks
        if recipe.replay:
            prompts, seeds = drawn(setup, explored.chosen, learner.step)
            new = forks_of(made, batch, share, prompts, seeds, learner.step)
            kept = after(learner.forks, new, batch, recipe, share, learner.step + 1)
            stats |= metrics_of(batch, learner.forks, kept, learner.step)
    learner.forks = kept
    follow(setup, learner)
    return stats


def learn_from(
    setup: Setup, learner: Learner, made: Records, conds: Sequence[Any], check: Check
) -> dict[str, float]:
    """Take the optimizer's steps on stored rows, whose prompts have the conditions `conds`."""
    with undone_on_error(setup, learner), setup.policy.training():
        stats = stepped(setup, learner, Batch(made, conds, len(made)), check)
    follow(setup, learner)
    return stats


def stepped(setup: Setup, learner: Learner, batch: Batch, check: Check) -> dict[str, float]:
    """Take the optimizer's steps on a batch, while the policy is in training."""
    recipe, policy = setup.recipe, setup.policy
    return take_steps(
        policy,
        batch.rows,
        batch.conds,
        learner.optimizer,
        recipe,
        micro_batch=learner.limits.micro_batch,
        reduce=setup.world.reduce,
        check=partial(check, "update"),
        reference=partial(swapped, policy.parameters(), learner.start) if learner.start else None,
        watch=batch.see if recipe.replay else None,
    )


def follow(setup: Setup, learner: Learner) -> None:
    """Let the learning rate and the averages follow a step that was taken."""
    recipe, parameters = setup.recipe, setup.policy.parameters()
    if learner.schedule:
        learner.schedule.step()
    if recipe.ema:
        decay = min(recipe.ema, (learner.step + 1) / (learner.step + 10))
        update_average(learner.average, parameters, decay)
    if learner.old:
        # DiffusionNFT's published schedule: nearly the adapter itself at first.
        decay = min(recipe.old_decay, recipe.old_ramp * (learner.step + 1))
        update_average(learner.old, parameters, decay)


def rows_of(setup: Setup, learner: Learner, explored: Explored, scored: Scored) -> Records:
    """Return what the objective learns from: the rollout's forks, or its finished images."""
    recipe, rollout = setup.recipe, explored.rollout
    if explored.latents is not None:
        return image_rows(rollout, explored.latents, scored.advantages, setup.size(learner.step).sigmas)
    objective = OBJECTIVES[recipe.objective]
    made = records(
        rollout,
        scored.advantages,
        step_weight=recipe.step_weight,
        samples=objective.samples,
        values=scored.values,
        every=objective.values,
    )
    if isinstance(rollout, PrunedRollout):
        return finished_rows(made, explored.plan, rollout.finished)
    return made


def old_policy(setup: Setup, learner: Learner) -> AbstractContextManager[None]:
    """Put the average that draws, where there is one, in the adapter's place."""
    return swapped(setup.policy.parameters(), learner.old) if learner.old else nullcontext()


def step_row(
    setup: Setup,
    learner: Learner,
    explored: Explored,
    scored: Scored,
    stats: Mapping[str, float],
    seconds: float,
) -> dict[str, float]:
    """Return the row of metrics of a step whose scoring and updating took `seconds`."""
    row: dict[str, float] = {"step": learner.step}
    for reward, values in zip(setup.rewards, scored.everywhere, strict=True):
        valid = values[~values.isnan()]
        row[f"reward/{reward.name}/mean"] = valid.double().mean().item()
        row[f"reward/{reward.name}/std"] = valid.double().std().item() if len(valid) > 1 else math.nan
    row |= {**scored.metrics, "dropped_share": scored.dropped}
    row |= gap_metrics([reward.name for reward in setup.rewards], explored.plan, scored.everywhere)
    row |= {**stats, **explored.guard, **explored.told, "nfe": explored.rollout.nfe * setup.world.count}
    if explored.chosen.nfe:
        row["choice/nfe"] = explored.chosen.nfe * setup.world.count
    row |= {f"memory/{name}": rows for name, rows in learner.limits.lowered().items()}
    row |= {f"time/{name}": spent for name, spent in explored.seconds.items()}
    return row | {"time/update": seconds, "memory/peak": peak_memory(setup.policy.device)}


def draw(setup: Setup, chosen: Chosen, step: int) -> tuple[list[str], list[int]]:
    """Return this process's share of the step's prompts, and their seeds, by (seed, step) alone."""
    prompts, seeds = drawn(setup, chosen, step)
    mine = slice(setup.world.index, None, setup.world.count)
    return prompts[mine], seeds[mine]


def drawn(setup: Setup, chosen: Chosen, step: int) -> tuple[list[str], list[int]]:
    """Return the step's prompts of all processes, and their seeds."""
    return slotted(setup, chosen.places, step, range(len(chosen.places)))


def slotted(
    setup: Setup, places: Sequence[int], step: int, slots: Sequence[int]
) -> tuple[list[str], list[int]]:
    """Return the prompts in some of a step's slots, and their seeds."""
    prompts = [setup.prompts.train[places[slot]] for slot in slots]
    return prompts, [slot_seed(setup, step, slot) for slot in slots]


def features_of(setup: Setup) -> Callable[[Tensor], dict[str, Tensor]] | None:
    """Return what measures the pictures of a rollout, None where nothing asks for it.

    A reward's embedding costs another forward, so it is taken only where advantages need it.
    """
    if not setup.recipe.diversity_weight:
        return None if setup.pace.watch == "off" else partial(describe, embed=None)
    embed = embedder(setup.rewards)
    return partial(describe, embed=embed if measure(embed, setup.recipe.diversity_by) == "embed" else None)


def dropped_share(setup: Setup, scores: Tensor, step: int) -> float:
    """Return the share of images [R, P, images] that the worst reward could not judge, unless too many."""
    shares = scores.isnan().flatten(1).float().mean(1)
    shares[torch.tensor([reward.may_abstain for reward in setup.rewards])] = 0
    worst = int(shares.argmax())
    if shares[worst] > setup.pace.max_dropped:
        setup.world.let_one_say()
        much = f"could not judge {shares[worst]:.0%} of the {scores[0].numel()} pictures of step {step}"
        allowed = f"max_dropped allows {setup.pace.max_dropped:.0%}"
        remedy = "mend the reward or its prompts, or raise max_dropped, and resume the run"
        raise RewardError(f"reward '{setup.rewards[worst].name}' {much}, and {allowed}; {remedy}")
    return shares[worst].item()


@contextmanager
def undone_on_error(setup: Setup, learner: Learner) -> Iterator[None]:
    """Bring adapter and optimizer back if an update of several optimizer steps is broken off."""
    if setup.recipe.epochs == 1 and setup.recipe.update == "accumulate" and not setup.recipe.replay:
        # The only optimizer step is the last thing that such an update does, and no other process is asked.
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
