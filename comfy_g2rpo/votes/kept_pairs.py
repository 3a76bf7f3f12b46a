"""Pairs of branches out of the ballots that runs have kept: who was preferred to whom at every fork."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files.safe import RunError
from .ballots import Ballot, matching, read, read_ballots
from .forks import Forks, read_forks
from .strengths import Votes


@dataclass(frozen=True)
class ForkPairs:
    """A fork of a ballot with what is known of its branches."""

    forks: Forks
    row: int
    prompt: str
    wins: Tensor  # [G, G], how often one branch was preferred to another
    scores: Tensor  # [G], NaN where people preferred


Judge = Callable[[Ballot], Tensor]
"""Scores the pictures [P] of a ballot, NaN for one that cannot be judged."""


def read_pairs(
    runs: Sequence[Path],
    base: str,
    prompts: Mapping[str, str],
    judge: Judge | None = None,
    least: float = 0.0,
) -> tuple[ForkPairs, ...]:
    """Read the forks of runs whose branches votes compare, or scores that differ by more than `least`.

    `base` tells the model that is trained from others, whose forks are refused; `prompts` are what ballots
    show by other words. Raises RunError where there is nothing to learn from, and says what to do.
    """
    found: list[ForkPairs] = []
    for run in runs:
        votes, ballots = read(run), read_ballots(run)
        voted = [(ballot, matching(votes, list(ballot.files), ballot.prompt)) for ballot in ballots]
        asked = [(ballot, mine) for ballot, mine in voted if mine or judge]
        if not asked:
            raise RunError(f"{run} keeps no votes; vote first (g2rpo vote {run}), or name another run")
        known = [(ballot, mine, kept) for ballot, mine in asked if (kept := read_forks(ballot))]
        if not known:
            raise RunError(
                f"{run} keeps {len(asked)} ballots without their forks: they are of an earlier version, or "
                "of a method that draws whole images of their own; vote in a new run, with method.tree: "
                "singular"
            )
        for ballot, mine, kept in known:
            if kept.base != base:
                raise RunError(
                    f"{ballot.path} was drawn by another model than the one that is trained; give the run's "
                    "own model files, LoRAs and guidance, or leave this run out"
                )
            prompt = prompts.get(ballot.prompt, ballot.prompt)
            found += (
                by_scores(kept, judge(ballot), prompt, least)
                if judge
                else by_votes(kept, ballot, mine, prompt)
            )
    if not found:
        why = "score all branches of every fork alike" if judge else "compare no two branches of one fork"
        how = "name another reward" if judge else "vote on more pictures of a group"
        raise RunError(f"pairs: {'the rewards' if judge else 'the votes'} {why}, so there is no pair; {how}")
    return tuple(found)


def by_votes(forks: Forks, ballot: Ballot, votes: Sequence[Votes], prompt: str) -> list[ForkPairs]:
    """Return the forks whose branches votes compare; a comparison across forks teaches neither."""
    place = {key: picture for picture, key in enumerate(ballot.files)}
    wins = no_wins(forks)
    for vote in votes:
        for winner, loser in vote.within(place):
            if parted := forks.parted(place[winner], place[loser]):
                fork, better, worse = parted
                wins[fork][better, worse] += 1
    unknown = [torch.full((len(table),), torch.nan) for table in wins]
    return with_pairs(forks, wins, unknown, prompt)


def by_scores(forks: Forks, scores: Tensor, prompt: str, least: float = 0.0) -> list[ForkPairs]:
    """Return the forks whose branches' scores differ: the mean over their pictures' scores [P]."""
    wins, means = no_wins(forks), []
    for fork, table in enumerate(wins):
        pictures: list[list[int]] = [[] for _ in range(len(table))]
        for picture, way in forks.ways.items():
            if fork in way:
                pictures[way[fork]].append(picture)
        means.append(torch.stack([scores[some].nanmean() for some in pictures]))
        table[means[-1][:, None] > means[-1][None] + least] = 1
    return with_pairs(forks, wins, means, prompt)


def no_wins(forks: Forks) -> list[Tensor]:
    """Return a table [G, G] of no wins for every fork."""
    return [torch.zeros(len(branches), len(branches)) for branches in forks.branches]


def with_pairs(
    forks: Forks, wins: Sequence[Tensor], scores: Sequence[Tensor], prompt: str
) -> list[ForkPairs]:
    """Return the forks that have a pair."""
    rows = zip(wins, scores, strict=True)
    return [ForkPairs(forks, row, prompt, *found) for row, found in enumerate(rows) if found[0].any()]
