"""Choose a step's prompts: in turn, by the signal of their last groups, or among candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..plan import deterministic
from ..prompts import PromptCursor
from ..recipes import Recipe
from ..rollout import stream
from ..run.scorer import Scorer, roll_out_and_score
from ..run.setup import Learner, Setup
from .prompt_history import History, by_signal, nearest, spreads


@dataclass(frozen=True)
class Chosen:
    """The prompts of a step, of all processes in order, and what choosing them took."""

    places: Sequence[int] = ()
    """In the list of prompts."""
    history: History = field(default_factory=History)
    nfe: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def choice_cost(recipe: Recipe) -> tuple[int, int]:
    """Count the forwards and the pictures that choosing one prompt takes."""
    count = recipe.candidates if recipe.prompt_choice == "curriculum" else 0
    return count * recipe.num_steps, count


def absolute_weights(setup: Setup) -> list[float]:
    """Return the rewards' weights, 0 for those whose scores mean something within a group alone."""
    return [0.0 if reward.needs_group else w for reward, w in zip(setup.rewards, setup.weights, strict=True)]


def slot_seed(setup: Setup, step: int, slot: int) -> int:
    """Return the seed of the rollout of one of a step's prompts."""
    return stream("rollout", setup.pace.seed, step, slot)


def process_order(setup: Setup) -> list[int]:
    """List the step's prompts as `World.gather` stacks those of all processes."""
    slots, world = range(setup.pace.prompts_per_step), setup.world
    return [slot for index in range(world.count) for slot in slots[index :: world.count]]


def choose_prompts(setup: Setup, learner: Learner, check: Callable[[], None]) -> Chosen:
    """Choose the prompts of the next step, by (seed, step, history) alone; the same in every process."""
    choice, history = setup.recipe.prompt_choice, learner.history
    if choice == "curriculum":
        return among_candidates(setup, learner, check)
    if choice == "signal":
        return Chosen(by_signal(cursor_of(setup), learner.step, history, setup.weights), history)
    return Chosen(cursor_of(setup).places(learner.step), history)


def cursor_of(setup: Setup) -> PromptCursor:
    """Return what walks through the prompts that are trained on."""
    return PromptCursor(setup.prompts.train, setup.pace.prompts_per_step, setup.pace.seed)


def in_turn(setup: Setup, step: int) -> Chosen:
    """Take the prompts that stand next, whatever the recipe would choose."""
    return Chosen(cursor_of(setup).places(step))


def among_candidates(setup: Setup, learner: Learner, check: Callable[[], None]) -> Chosen:
    """Draw one image of every candidate without randomness, move the baseline, take those nearest to it.

    AdaGRPO's online curriculum filtering (arXiv 2606.06828). The candidates come in turn, so that each prompt
    is looked at once per epoch; those of a place share the start noise of the group that follows.
    """
    pace, recipe, step = setup.pace, setup.recipe, learner.step
    train, count, size = setup.prompts.train, recipe.candidates, setup.size(step)
    places = PromptCursor(train, pace.prompts_per_step * count, pace.seed).places(step)
    mine = range(pace.prompts_per_step)[setup.world.index :: setup.world.count]
    texts = [train[place] for slot in mine for place in places[slot * count : (slot + 1) * count]]
    seeds = [slot_seed(setup, step, slot) for slot in mine for _ in range(count)]
    scorer = Scorer(setup.policy.decode, setup.rewards, texts, 1, learner.limits.decode_batch, check=check)
    plan, conds = deterministic(recipe.num_steps), setup.policy.encode(texts)
    how = size.sigmas, conds, seeds, size.shape, scorer, learner.limits.slots, check
    rollout = roll_out_and_score(setup.policy, plan, *how)
    scores: Tensor = setup.world.gather(scorer.scores[:, :, 0].unflatten(1, (-1, count)))
    weights = absolute_weights(setup)
    scores = torch.where(torch.tensor(weights).view(-1, 1, 1) == 0, torch.nan, scores)
    history = learner.history.with_scores(scores, recipe.baseline_decay)
    picks = dict(zip(process_order(setup), nearest(history, scores, weights), strict=True))
    taken = [places[slot * count + picks[slot]] for slot in sorted(picks)]
    return Chosen(taken, history, rollout.nfe, scorer.seconds)


def history_after(
    setup: Setup, chosen: Chosen, rewards: Sequence[Tensor], pictures: Tensor, noise: Sequence[float]
) -> History:
    """Return the history with what the rewards [R, K, G, L] of this process's prompts, and the scores
    [R, P, F] of all pictures that teach, show; where the recipe asks for it.
    """
    recipe, history = setup.recipe, chosen.history
    if recipe.prompt_choice == "signal":
        found = setup.world.gather(spreads(rewards, noise)[..., None])[..., 0]
        history = history.with_spreads([chosen.places[slot] for slot in process_order(setup)], found)
    if recipe.global_advantage and recipe.prompt_choice != "curriculum":
        history = history.with_scores(pictures, recipe.baseline_decay)
    return history
