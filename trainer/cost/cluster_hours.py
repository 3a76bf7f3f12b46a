"""What workers bring: the seconds of a step by the time of its parts, the learner's, and what travels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """A step, by what `g2rpo report` says of one, or what is declared of a card."""

    prompts: int
    rollout: float  # seconds of a worker for one prompt: drawing, decoding and judging
    update: float  # seconds of the learner for the whole step
    adapter: float  # bytes of the LoRA, once to every machine
    part: float  # bytes of one prompt's states and scores
    bandwidth: float = 1.25e9  # bytes a second at the learner's machine; 10 Gbit/s


@dataclass(frozen=True)
class Share:
    """A step on a cluster: its seconds, the share of them that the learner waits, and steps a card-second
    beside those of one card that does both.
    """

    seconds: float
    idle: float
    efficiency: float


def shared(load: Load, workers: int, staleness: int) -> Share:
    """Return how long a step takes with so many workers of a card each, beside the learner's own.

    The prompts of the busiest worker count; the LoRA goes out to one machine after the other, which is the
    worst case. Without staleness the learner's time comes on top, with it the slower of both counts.
    """
    travels = (workers * load.adapter + load.prompts * load.part) / load.bandwidth
    explored = -(-load.prompts // workers) * load.rollout + travels
    seconds = max(explored, load.update) if staleness else explored + load.update
    alone = load.prompts * load.rollout + load.update
    return Share(seconds, 1 - load.update / seconds, alone / (seconds * (workers + 1)))
