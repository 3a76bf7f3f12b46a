"""One iteration of a run: explore, score, update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ..advantages import mixed, zero_std_share
from ..plan import Plan
from ..prompts import PromptCursor
from ..rewards import Reward, RewardError
from ..rewards.protocol import embedder, may_abstain, settle
from ..rollout import Rollout, stream
from ..speed.step_cache import Shortcut
from ..update import records, swapped, update, update_average
from .batch_limits import peak_memory
from .diversity import describe, mean_distance, measure, shaping
from .optimizers import load_optimizer_tensors, optimizer_tensors
from .rank_guard import explore
from .scorer import Scorer, roll_out_and_score
from .setup import Check, Learner, Setup


def iterate(setup: Setup, learner: Learner, check: Check) -> dict[str, float]:
    """Make one update: roll out the step's prompts, score, learn; return the row of metrics.

    An exception leaves the last step's state.
    """
    pace, recipe, policy, limits = setup.pace, setup.recipe, setup.policy, learner.limits
    begin = time.perf_counter()
    prompts, seeds = draw(setup, learner.step)
    conds = policy.encode(prompts)
    rolling = partial(check, "rollout")

    def roll(
        plan: Plan, places: Sequence[int], rewards: Sequence[Reward], shortcut: Shortcut | None
    ) -> tuple[Scorer, Rollout]:
        texts, given, drawn = ([part[p] for p in places] for part in (prompts, conds, seeds))
        # The guard's pictures teach nothing and need no description.
        describe = described(setup) if rewards is setup.rewards else None
        scorer = Scorer(
            policy.decode,
            rewards,
            texts,
            len(plan.images),
            limits.decode_batch,
            check=rolling,
            describe=describe,
        )
        return scorer, roll_out_and_score(
            policy, plan, setup.sigmas, given, drawn, setup.shape, scorer, limits.slots, rolling, shortcut
        )

    now = {"cheap": learner.cheap, "step": learner.step, "seed": pace.seed, "prompts": len(prompts)}
    explored = explore(
        roll, recipe, setup.speed, setup.velocity, rewards=setup.rewards, gather=setup.world.gather, **now
    )
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
    features = {
        name: [plan.values(table.T).movedim(0, -1) for table in tables]
        for name, tables in scorer.features.items()
    }
    if recipe.diversity_weight:
        unlike = features[measure(embedder(setup.rewards), recipe.diversity_by)]
        extra = [
            shaping(f, reward, recipe.diversity_weight, recipe.clamp)
            for f, reward in zip(unlike, rewards, strict=True)
        ]
        advantages = [advantage + more for advantage, more in zip(advantages, extra, strict=True)]
    made = records(rollout, advantages, step_weight=recipe.step_weight, samples=recipe.objective == "clip")
    with undone_on_error(setup, learner), policy.training():
        learning = {
            "micro_batch": limits.micro_batch,
            "reduce": setup.world.reduce,
            "check": partial(check, "update"),
        }
        if learner.start:
            learning["reference"] = partial(swapped, policy.parameters(), learner.start)
        stats = update(policy, made, conds, learner.optimizer, recipe, **learning)
    if recipe.ema:
        update_average(
            learner.average, policy.parameters(), min(recipe.ema, (learner.step + 1) / (learner.step + 10))
        )
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
        row["diversity/group"] = (
            torch.stack([mean_distance(f.movedim(2, 1)).nanmean() for f in features["pixels"]])
            .nanmean()
            .item()
        )
    judged = scorer.seconds["decode"] + scorer.seconds["reward"]
    times = {"rollout": rolled - begin - judged, **scorer.seconds, "update": updated - rolled}
    row |= (
        stats
        | explored.metrics
        | {"nfe": rollout.nfe}
        | {f"memory/{name}": rows for name, rows in limits.lowered().items()}
    )
    return row | {f"time/{k}": v for k, v in times.items()} | {"memory/peak": peak_memory(policy.device)}


def described(setup: Setup) -> Callable[[Tensor], dict[str, Tensor]] | None:
    """Return what measures the pictures of a rollout: a reward's embedding only where advantages need it,
    for it costs another forward.
    """
    if not setup.recipe.diversity_weight:
        return None if setup.pace.watch == "off" else partial(describe, embed=None)
    embed = embedder(setup.rewards)
    return partial(describe, embed=embed if measure(embed, setup.recipe.diversity_by) == "embed" else None)


def dropped_share(setup: Setup, scores: Tensor, step: int) -> float:
    """Return the share of pictures that the least able reward could not judge, scores [R, P, images].

    RewardError above `max_dropped`.
    """
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
        row |= {
            f"reward/{reward.name}/mean": valid.mean().item(),
            f"reward/{reward.name}/std": valid.std().item(),
        }
    return row


def draw(setup: Setup, step: int) -> tuple[list[str], list[int]]:
    """Return this process's share of the step's prompts, and the seed of each.

    A function of (seed, step) alone.
    """
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
