"""Held-out evaluation: fixed prompts and start noises, no exploration, paired with the untrained model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .pace import Pace
from .plan import deterministic
from .policy import Trainee
from .rewards import Reward
from .rollout import stream
from .runs import RunFolder, Sample, read_json, write_json
from .scoring import Scorer, roll_out_and_score

SHOWN_PROMPTS, SHOWN_NOISES = 8, 3


@dataclass(frozen=True)
class Evaluation:
    """Scores [R, prompts, noises] of the held-out prompts, and some of the pictures."""

    names: tuple[str, ...]
    prompts: tuple[str, ...]
    scores: Tensor
    samples: tuple[Sample, ...] = field(default=(), repr=False)

    def means(self) -> dict[str, float]:
        """Return each reward's mean."""
        return {name: scores.nanmean().item() for name, scores in zip(self.names, self.scores, strict=True)}

    def metrics(self) -> dict[str, float]:
        """Return mean and half width of the 95 % interval over prompts, as a row of metrics."""
        row = {}
        for name, scores in zip(self.names, self.scores, strict=True):
            by_prompt = scores.nanmean(1)
            by_prompt = by_prompt[~by_prompt.isnan()]
            row[f"heldout/{name}/mean"] = scores.nanmean().item()
            row[f"heldout/{name}/ci95"] = 1.96 * by_prompt.std().item() / math.sqrt(len(by_prompt)) if len(by_prompt) > 1 else math.nan
        return row

    def save(self, folder: RunFolder, step: int) -> None:
        """Write the scores, and the pictures, into the run folder."""
        folder.save_samples(step, self.samples)
        scores = {name: table.tolist() for name, table in zip(self.names, self.scores, strict=True)}
        write_json(folder.path / "images" / f"{step:06d}" / "scores.json", {"prompts": self.prompts, "scores": scores})

    @classmethod
    def read(cls, folder: RunFolder, step: int) -> Evaluation:
        """Read the scores of a step."""
        content = read_json(folder.path / "images" / f"{step:06d}" / "scores.json")
        tables = [[[math.nan if value is None else value for value in row] for row in table] for table in content["scores"].values()]
        return cls(tuple(content["scores"]), tuple(content["prompts"]), torch.tensor(tables))


def evaluate(
    policy: Trainee,
    judges: Sequence[Reward],
    heldout: Sequence[str],
    pace: Pace,
    sigmas: Tensor,
    shape: Sequence[int],
    check: Callable[[], None] | None = None,
) -> Evaluation:
    """Score the deterministic samples of the held-out prompts from noises that every evaluation of a run shares."""
    prompts = tuple(heldout[: pace.eval_prompts or None])
    rows = [(prompt, noise) for prompt in prompts for noise in range(pace.eval_noises)]
    seeds = [stream("evaluation", pace.seed, prompt, noise) for prompt, noise in rows]
    # Evenly spaced over the list, so that nobody chose them for their outcome.
    chosen = {round(i * len(prompts) / SHOWN_PROMPTS) for i in range(SHOWN_PROMPTS)}
    shown = {i for i in range(len(rows)) if i // pace.eval_noises in chosen and i % pace.eval_noises < SHOWN_NOISES}
    texts = [prompt for prompt, _ in rows]
    scorer = Scorer(policy.decode, judges, texts, 1, pace.decode_batch, keep=shown, check=check)
    plan = deterministic(len(sigmas) - 1)
    roll_out_and_score(policy, plan, sigmas, policy.encode(texts), seeds, shape, scorer, pace.slots, check)
    names = tuple(judge.name for judge in judges)
    scores = scorer.scores[:, :, 0]
    samples = [
        Sample(rows[i][0], rows[i][1], {name: scores[r, i].item() for r, name in enumerate(names)}, scorer.pictures[i, 0])
        for i in sorted(shown)
    ]
    return Evaluation(names, prompts, scores.reshape(len(judges), len(prompts), pace.eval_noises), tuple(samples))


def compare(before: Evaluation, after: Evaluation) -> dict[str, dict[str, float]]:
    """Return the paired gain of each reward: its mean, half width of the 95 % interval, and two-sided p of a t-test over prompts."""
    from scipy.stats import t, ttest_rel

    found = {}
    for name, old, new in zip(before.names, before.scores.nanmean(2), after.scores.nanmean(2), strict=True):
        valid = ~(old.isnan() | new.isnan())
        gain, count = (new - old)[valid], int(valid.sum())
        if count < 2:
            found[name] = {"mean": gain.mean().item(), "ci95": math.nan, "p": math.nan}
            continue
        width = t.ppf(0.975, count - 1) * gain.std().item() / math.sqrt(count)
        found[name] = {"mean": gain.mean().item(), "ci95": float(width), "p": float(ttest_rel(new[valid], old[valid]).pvalue)}
    return found
