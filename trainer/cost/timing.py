"""A run's parts, timed before it runs: its start, one step of it, and a part of an evaluation."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator

from comfy_g2rpo.curriculum.prompt_choice import choice_cost
from comfy_g2rpo.run.evaluation import evaluate, price
from comfy_g2rpo.run.iteration import explore, score, update
from comfy_g2rpo.run.setup import Learner, Setup, make_learner
from comfy_g2rpo.speed.peak_memory import peak_memory

from ..config.reading import Config
from ..config.reward_checks import VOTES
from ..config.sections import HeldoutReward, TrainedReward
from ..run import prepare
from .estimate import Cost, Counts

FORWARDS = 4000
"""Forwards of a step above which only a part of one is run for its time."""
STEPS = 3
"""Steps that are timed where they are small; their median counts."""
END = 2.0
"""Seconds of CPU in which a run ends: the last checkpoint, curves.png, before_after.png, leaving Python."""
STAND_IN = "jpeg"


def measure(config: Config, counts: Counts, timer: Callable[[], float] = time.perf_counter) -> Cost:
    """Load all that a run needs, and time a step and a part of an evaluation after a warm-up."""
    begin, loading = timer(), time.process_time()  # what Python and its libraries took a run pays, too
    asked, left_out = without_people(config)
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    setup = prepare(asked, Accelerator(cpu=on_cpu))
    where = torch.device(setup.policy.device)

    def now() -> float:
        if where.type == "cuda":
            torch.cuda.synchronize()
        return timer()

    start = loading + now() - begin
    step = time_of_step(setup, counts, now)
    look = time_of_look(setup, now) if setup.prompts.heldout else 0.0
    name = torch.cuda.get_device_name() if where.type == "cuda" else where.type
    return Cost(name, start, step, look, END, peak_memory(where), left_out, time.time())


def without_people(config: Config) -> tuple[Config, str]:
    """Leave out votes and judges over HTTP, which nobody should be asked for the sake of a price."""
    gone = {
        reward.name
        for reward in (*config.rewards, *config.heldout_rewards)
        if reward.url or reward.name == VOTES
    }
    if not gone:
        return config, ""
    trained = tuple(reward for reward in config.rewards if reward.name not in gone)
    held = tuple(reward for reward in config.heldout_rewards if reward.name not in gone)
    changes = {
        "rewards": trained or (TrainedReward(name=STAND_IN),),
        "heldout_rewards": held or (HeldoutReward(name=STAND_IN),),
    }
    return config.model_copy(update=changes), ", ".join(sorted(gone))


def time_of_step(setup: Setup, counts: Counts, now: Callable[[], float]) -> float:
    """Time explore, score and update of a step, or of a part of one that is scaled to the whole."""
    part = setup
    if counts.step_forwards > FORWARDS:
        pace = dataclasses.replace(setup.pace, prompts_per_step=1)
        recipe = setup.recipe
        if recipe.tree == "singular" and recipe.pick == "every":
            recipe = dataclasses.replace(recipe, pick="random", pick_size=1)
        part = dataclasses.replace(setup, pace=pace, recipe=recipe)
    learner = make_learner(part)
    parameters = [parameter.detach().clone() for parameter in part.policy.parameters()]
    found = []
    for _ in range(1 + STEPS if part is setup else 2):
        found.append(one_step(part, learner, counts, now))
        learner.step += 1
    with torch.no_grad():  # what is timed next is the model as it was
        for parameter, before in zip(part.policy.parameters(), parameters, strict=True):
            parameter.copy_(before)
    return sorted(found[1:])[(len(found) - 1) // 2]


def one_step(setup: Setup, learner: Learner, counts: Counts, now: Callable[[], float]) -> float:
    """Return the seconds of a step of the run, from one that may be smaller."""
    begin = now()
    if setup.stored:
        setup.stored(setup, learner, silent)
        return now() - begin
    explored = explore(setup, learner, silent)
    rolled = now()
    stats = update(setup, learner, explored, score(setup, explored, learner.step + 1), silent)
    end = now()
    prompts, plan = len(explored.conds), explored.plan
    passes = (counts.passes - counts.again) * prompts * plan.rows
    passes += setup.recipe.epochs * int(stats.get("replay/rows", 0))  # not as many yet as a long run has
    judging = (explored.seconds["decode"] + explored.seconds["reward"]) / sum(explored.seconds.values())
    more, seen = choice_cost(setup.recipe)
    rollout = (1 - judging) * counts.step_forwards / (prompts * (plan.forwards + more))
    images = judging * counts.prompts * counts.group_images / (prompts * (plan.pictures + seen))
    trained = counts.prompts * counts.group_trained / passes
    return (rolled - begin) * (rollout + images) + (end - rolled) * trained


def time_of_look(setup: Setup, now: Callable[[], float]) -> float:
    """Return the seconds of an evaluation, from one of so many prompts as fill a batch or two."""
    pace, held = setup.pace, setup.prompts.heldout
    recipe = None if pace.watch == "off" else setup.recipe
    count = min(pace.eval_prompts or len(held), len(held), max(pace.slots // pace.eval_noises, 1))
    some = held[:count]
    begin = now()
    evaluate(
        setup.policy,
        setup.judges,
        some,
        dataclasses.replace(pace, eval_prompts=0),
        setup.sigmas,
        setup.shape,
        recipe=recipe,
        preview=setup.preview,
        preview_sigmas=setup.preview_sigmas,
    )
    seconds = now() - begin
    whole, part = (
        sum(forwards for forwards, _ in price(setup.recipe, pace, n, bool(setup.preview)).values())
        for n in (len(held), count)
    )
    return seconds * whole / part


def silent(phase: str) -> None:
    """Let what is timed go on."""
