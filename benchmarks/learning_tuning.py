"""Tuning of the learning benchmark: every arm by the same climb, with the same number of tries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learning_arms import OWN, PUBLISHED, Setting, describe, neighbours, setting_of
from learning_runs import NOISES, read, run_all

TUNE_SEEDS = (1000, 1001, 1002)


def tuning_jobs(arm: str, setting: Setting, seconds: Sequence[float]) -> list[dict[str, Any]]:
    """Describe the tuning runs of one try, one per tuning seed."""
    common = {"split": "tune", "noises": NOISES, "cpu_seconds": list(seconds), "work": 0}
    return [describe(arm, setting, seed=seed, **common) for seed in TUNE_SEEDS]


def tried(results: Sequence[dict[str, Any]], arm: str) -> dict[Setting, float]:
    """List an arm's tries: the mean gain in agreement over the tuning seeds, by setting."""
    gains: dict[Setting, list[float]] = {}
    for run in results:
        if run["arm"] == arm:
            gains.setdefault(setting_of(run), []).append(run["curve"][-1]["agreement"])
    seeds = {run["seed"] for run in results}
    return {setting: sum(found) / len(found) for setting, found in gains.items() if len(found) == len(seeds)}


def next_setting(gains: dict[Setting, float], arm: str, start: Setting) -> Setting:
    """Climb: the first neighbour of the best setting so far with a value that was never tried, else one
    that was not tried as a whole.
    """
    if not gains:
        return start
    ranked = sorted(gains, key=lambda setting: -gains[setting])
    values = [set(column) for column in zip(*gains, strict=True)]
    near = [neighbour for setting in ranked for neighbour in neighbours(arm, setting)]
    new = [
        setting
        for setting in neighbours(arm, ranked[0])
        if any(v not in known for v, known in zip(setting, values, strict=True))
    ]
    return next(setting for setting in [*new, *near] if setting not in gains)


def tune(
    starts: dict[str, Setting], path: Path, seconds: Sequence[float], workers: int, tries: int
) -> dict[str, Setting]:
    """Give every arm the same number of tries, the first at its start, one round after another.

    Return its best setting.
    """
    results = read(path)
    for count in range(1, tries + 1):
        short = [arm for arm in starts if len(tried(results, arm)) < count]
        settings = {arm: next_setting(tried(results, arm), arm, starts[arm]) for arm in short}
        jobs = [job for arm, setting in settings.items() for job in tuning_jobs(arm, setting, seconds)]
        # Seed by seed through all arms, so that a busy hour of the machine hits all alike.
        results = run_all(sorted(jobs, key=lambda job: job["seed"]), path, workers)
    return {arm: best_setting(results, arm) for arm in starts}


def best_setting(results: Sequence[dict[str, Any]], arm: str) -> Setting:
    """Choose an arm's setting by its mean gain on the tuning prompts.

    A published form that was not tuned by itself takes the best of what its arm tried in that form.
    """
    gains = tried(results, arm)
    if not gains and arm.endswith(PUBLISHED):
        tries = tried(results, arm.removesuffix(PUBLISHED))
        gains = {setting: gain for setting, gain in tries.items() if setting.form == OWN}
    if not gains:
        raise SystemExit(f"{arm} was not tuned: run the stage tune with --arms {arm!r} first")
    return max(gains, key=lambda setting: gains[setting])
