"""The votes that runs have kept, as what another run learns from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from comfy_g2rpo.prompts import Prompts, titled
from comfy_g2rpo.rewards import Reward, score_all
from comfy_g2rpo.rewards.mixing import mixed_advantages
from comfy_g2rpo.votes.ballots import Ballot, matching, read, read_ballots, read_png
from comfy_g2rpo.votes.forks import read_forks
from comfy_g2rpo.votes.kept_pairs import Judge, read_pairs
from comfy_g2rpo.votes.pair_steps import PairSteps

from ..config.input_files import INPUTS, input_digests, model_digest
from ..config.reading import Config, make_recipe


def kept_steps(config: Config, prompts: Prompts, rewards: Sequence[Reward]) -> PairSteps:
    """Read what a configuration's `pairs` names; RunError where there is nothing to learn from."""
    content = {"config": config.model_dump(mode="json"), INPUTS: input_digests(config, prompts)}
    known = {titled(prompt): prompt for prompt in prompts.train}
    judge, least = None, 0.0
    if getattr(config.pairs, "from") == "rewards":
        judge = judge_of(config, rewards, known)
        least = max(rewards[0].noise(), make_recipe(config).std_floor) if len(rewards) == 1 else 0.0
    runs = [Path(run) for run in config.pairs.runs]
    pairs = read_pairs(runs, model_digest(content), known, judge, least)
    return PairSteps(pairs, config.train.prompts_per_step, config.train.seed)


def judge_of(config: Config, rewards: Sequence[Reward], known: dict[str, str]) -> Judge:
    """Return what scores a ballot's pictures: one reward by its weight, several by their advantages."""
    weights = [section.weight for section in config.rewards]
    gates, recipe = [section.gate for section in config.rewards], make_recipe(config)

    def judge(ballot: Ballot) -> Tensor:
        pictures = torch.stack([read_png(file) for file in ballot.files.values()])
        prompt = known.get(ballot.prompt, ballot.prompt)
        scores = score_all(rewards, pictures, [prompt] * len(pictures))
        if len(rewards) == 1 and gates == [None]:
            return weights[0] * scores[0]
        noise = [reward.noise() for reward in rewards]
        table = scores[:, None, :, None]
        ranked = mixed_advantages(
            [table], weights, recipe.mix, gates, recipe.clamp, recipe.std_floor, None, noise
        )
        return torch.where(scores.isnan().all(0), torch.nan, ranked[0][0])

    return judge


def steps_per_epoch(runs: Sequence[Path], per_step: int, people: bool) -> int:
    """Count the steps in which every kept fork comes once, before any model or reward is loaded.

    Forks of rewards that turn out to score all branches alike are among them.
    """
    count = 0
    for run in runs:
        votes = read(run)
        for ballot in read_ballots(run):
            if not people or matching(votes, list(ballot.files), ballot.prompt):
                count += len(read_forks(ballot) or ())
    return max(-(-count // per_step), 1)
