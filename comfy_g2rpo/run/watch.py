"""Is the model getting better, or gaming its reward? Signs at an evaluation, alarms where they last, and the
best step so far.

Pure functions of evaluations and of rows of metrics, so that what the watch knows is what the run folder
holds. A change counts where its 95 % interval over prompts (paired, Student's t) leaves out 0, and a fall
must be `min_fall` standard deviations besides: one is that of the untrained model's scores over prompts.
Rewards that are trained on are judged together, by their weights, and a weight below 0 turns its reward
round. Rewards that only measure are judged each by itself, and one of weight 0 not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..prompts import Prompts
from ..rewards import Reward, RewardError
from .evaluation import Evaluation, interval
from .pace import Pace

TREND = 5  # training steps, at least, that are averaged to see a trend
TYPICAL_GAIN = 0.5
"""Gain of a run that is worth having, in spreads of the untrained model's scores: an assumption."""
SURE = 1.96 * math.sqrt(2)
"""A gain of g spreads shows at 95 % with (SURE / g)² images: two sets of scores are compared."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Seen:
    """What the watch goes by: the evaluations at the start, at the best step and now, weights and rows."""

    base: Evaluation
    best: Evaluation
    now: Evaluation
    best_step: int
    weights: Mapping[str, float]
    pace: Pace
    rows: Sequence[Row] = ()
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def trained(self) -> str:
        """Name the trained rewards."""
        return " and ".join(name for name in self.now.names if name in self.weights)

    def since(self, step: int) -> str:
        """Return since when."""
        return f"since step {step}" if step else "against the untrained model"


@dataclass(frozen=True)
class Change:
    """A mean change over prompts and the half width of its 95 % interval."""

    mean: float
    width: float

    @property
    def rose(self) -> bool:
        """Return whether it is above 0 beyond chance."""
        return self.mean > self.width

    def fell(self, least: float = 0.0) -> bool:
        """Return whether it is below 0 beyond chance, and by `least`."""
        return self.mean < -self.width and self.mean <= -least

    def __str__(self) -> str:
        return f"{abs(self.mean):.3g} ± {self.width:.2g}"


def changes(values: Tensor) -> Change:
    """Summarise the changes [P] of single prompts."""
    return Change(*interval(values)) if (~values.isnan()).any() else Change(math.nan, math.nan)


def unit(base: Evaluation, name: str) -> float:
    """Return the untrained model's standard deviation of a reward over prompts, 1 where there is none."""
    by_prompt = base.scores[base.names.index(name)].nanmean(1)
    known = by_prompt[~by_prompt.isnan()]
    return (known.std().item() if len(known) > 1 else 0.0) or 1.0


def together(base: Evaluation, weights: Mapping[str, float], change: Tensor) -> Tensor:
    """Weigh the trained rewards' changes [R, P] into [P]: Σ w·change/unit over Σ|w| of those that judged."""
    used = [(r, weights[name]) for r, name in enumerate(base.names) if weights.get(name)]
    if not used:
        # People, for instance, do not measure held-out pictures.
        return torch.full(change.shape[1:], torch.nan)
    scaled = torch.stack([change[r] / unit(base, base.names[r]) for r, _ in used])
    weight = torch.tensor([w for _, w in used])[:, None] * ~scaled.isnan()
    # 0/0, and so NaN, where none could judge.
    return (weight * scaled.nan_to_num()).sum(0) / weight.abs().sum(0)


def gained(seen: Seen, before: Evaluation, after: Evaluation) -> Change:
    """Return how the trained rewards changed on held-out prompts, in standard deviations."""
    return changes(together(seen.base, seen.weights, after.scores.nanmean(2) - before.scores.nanmean(2)))


def hacking(seen: Seen) -> str | None:
    """Notice that the trained rewards rose on held-out prompts while one that only measures fell."""
    for step, before in ((seen.best_step, seen.best), (0, seen.base)):
        rise = gained(seen, before, seen.now)
        for r, name in enumerate(seen.now.names) if rise.rose else ():
            say = 0.0 if name in seen.weights else seen.measures.get(name, 1.0)
            fall = changes(
                math.copysign(1, say) * (seen.now.scores[r].nanmean(1) - before.scores[r].nanmean(1))
            )
            if say and fall.fell(seen.pace.min_fall * unit(seen.base, name)):
                moved = f"held-out {name} {'fell' if say > 0 else 'rose'} by {fall} {seen.since(step)}"
                return f"{moved} while what is trained on, {seen.trained}, rose: the model games its reward"
    return None


def memorising(seen: Seen) -> str | None:
    """Notice that the trained rewards rose in training and fell on held-out prompts."""
    fall = gained(seen, seen.base, seen.now)
    if fall.fell(seen.pace.min_fall) and rising(seen.rows, seen.weights):
        rise = f"{seen.trained} rose in training"
        return (
            f"{rise} and fell on held-out prompts by {fall} standard deviations: the model memorises its "
            "prompts"
        )
    return None


def unlearning(seen: Seen) -> str | None:
    """Notice that the trained rewards fell below the untrained model, in training as on held-out prompts."""
    fall = gained(seen, seen.base, seen.now)
    if fall.fell(seen.pace.min_fall) and not rising(seen.rows, seen.weights):
        worse = f"held-out {seen.trained} lies {fall} standard deviations below the untrained model"
        return f"{worse}: training has gone wrong; a lower learning_rate may help"
    return None


def noise(seen: Seen) -> str | None:
    """Notice that rewards rose for images with exploration noise, and not for those that a user draws."""
    if seen.base.noisy is None or seen.now.noisy is None:
        return None
    gap = changes(together(seen.base, seen.weights, seen.now.noisy - seen.base.noisy))
    if gap.rose and gap.mean >= seen.pace.min_fall and not gained(seen, seen.base, seen.now).rose:
        return (
            f"{seen.trained} rose for pictures with exploration noise alone, by {gap} standard deviations: "
            "what you draw does not gain"
        )
    return None


def collapse(seen: Seen) -> str | None:
    """Notice that pictures have become alike: of a prompt's noises, or of different prompts."""
    for key in seen.now.spread.keys() & seen.base.spread.keys() if seen.pace.min_diversity else ():
        before, after = seen.base.spread[key], seen.now.spread[key]
        if changes(after - seen.pace.min_diversity * before).fell():
            measure, _, of = key.partition("/")
            what = "different prompts" if of == "set" else "one prompt"
            share = (after.nanmean() / before.nanmean()).item()
            return (
                f"pictures of {what} have become alike: {share:.0%} of the untrained model's diversity is "
                f"left ({measure})"
            )
    return None


def size(seen: Seen) -> str | None:
    """Notice that the trained rewards rose at the training size and fell at the preview size."""
    if seen.base.preview is None or seen.now.preview is None or not gained(seen, seen.base, seen.now).rose:
        return None
    fall = gained(seen, seen.base.preview, seen.now.preview)
    if fall.fell(seen.pace.min_fall):
        return (
            f"{seen.trained} rose at the training size and fell at the preview size by {fall} standard "
            "deviations: look for grids there"
        )
    return None


SIGNS: dict[str, Callable[[Seen], str | None]] = {
    "hacking": hacking,
    "memorising": memorising,
    "unlearning": unlearning,
    "noise": noise,
    "collapse": collapse,
    "size": size,
}


def signs(seen: Seen) -> dict[str, str]:
    """Return what an evaluation shows, by kind, in words."""
    return {kind: text for kind, look in SIGNS.items() if (text := look(seen)) is not None}


def blind_spots(
    pace: Pace,
    heldout: int,
    judges: Sequence[str],
    weights: Mapping[str, float],
    measures: Mapping[str, float],
) -> list[str]:
    """Say, before a run, what the watch will not see, and how to let it."""
    if pace.watch == "off":
        return []
    if not heldout:
        return ["the watch sees nothing without held-out prompts: set some aside"]
    found = []
    if not 0 < pace.eval_every < pace.steps:
        found.append(
            "the watch looks at the start and the end alone, and can stop nothing between: set eval_every"
        )
    if not any(measures.get(name, 1.0) for name in judges if name not in weights):
        found.append(
            "no reward only measures, so that the watch cannot tell whether the trained ones are "
            "gamed: add a held-out reward"
        )
    return found


def forewarnings(
    pace: Pace, prompts: Prompts, rewards: Sequence[Reward], judges: Sequence[Reward]
) -> list[str]:
    """Say what of a run's settings will waste it; RewardError where no training prompt can be judged."""
    found, count = [], len(prompts.train)
    if pace.prompts_per_step > count:
        found.append(
            f"prompts_per_step is {pace.prompts_per_step}, but there are {count} prompts to train on, so "
            "that a step sees some of them again: lower it or add prompts"
        )
    found += unjudged(prompts.train, rewards, "prompts to train on", teach=True)
    found += unjudged(prompts.heldout, judges, "held-out prompts")
    if prompts.heldout:
        found += too_few(pace, min(pace.eval_prompts or len(prompts.heldout), len(prompts.heldout)))
    return found


def unjudged(prompts: Sequence[str], rewards: Sequence[Reward], kind: str, teach: bool = False) -> list[str]:
    """Name prompts that no reward can judge."""
    lost = [prompt for prompt in prompts if not any(reward.can_judge(prompt) for reward in rewards)]
    if not lost or not rewards:
        return []
    names = ", ".join(reward.name for reward in rewards)
    much = f"none of {names} can judge {len(lost)} of the {len(prompts)} {kind}, such as {lost[0][:80]!r}"
    if teach and len(lost) == len(prompts):
        raise RewardError(f"{much}; write prompts that it reads, or name another reward")
    return [f"{much}: they cost as much as others and say nothing; reword or remove them"]


def too_few(pace: Pace, prompts: int) -> list[str]:
    """Say whether the held-out images are too few to show a typical gain."""
    images, needed = prompts * pace.eval_noises, math.ceil((SURE / TYPICAL_GAIN) ** 2)
    if images >= needed:
        return []
    return [
        f"{images} held-out images ({prompts} prompts × {pace.eval_noises} noises) show no gain below "
        f"{SURE / math.sqrt(images):.1f} spreads of a score, and many runs gain {TYPICAL_GAIN:g}: hold out "
        f"more prompts, or set eval_noises to {math.ceil(needed / prompts)}"
    ]


def rising(rows: Sequence[Row], weights: Mapping[str, float]) -> bool:
    """Return whether the trained rewards rose from the first tenth of the steps to the last, by TREND."""
    steps = [row for row in rows if "nfe" in row]
    count = max(len(steps) // 10, TREND)
    if len(steps) < 2 * count:
        return False
    total = 0.0
    for name, weight in weights.items():
        series = [value for row in steps if (value := row.get(f"reward/{name}/mean")) is not None]
        if len(series) >= 2 * count:
            first, last = torch.tensor(series[:count]), torch.tensor(series[-count:])
            error = math.sqrt((first.var().item() + last.var().item()) / count) or 1.0
            total += weight * (last.mean() - first.mean()).item() / error
    return total > 1.96 * math.sqrt(sum(weight**2 for weight in weights.values()))


def sign_row(found: Mapping[str, str], before: Row, patience: int) -> dict[str, Any]:
    """Return an evaluation's row: how often in a row each sign was seen, and alarms."""
    counts = {kind: int(before.get(f"alarm/{kind}") or 0) + 1 for kind in found}
    row: dict[str, Any] = {f"alarm/{kind}": count for kind, count in counts.items()}
    row |= {"sign": "; ".join(found.values())} if found else {}
    lasting = [found[kind] for kind, count in counts.items() if count >= patience]
    return row | ({"alarm": "; ".join(lasting)} if lasting else {})


def evaluated(rows: Sequence[Row]) -> list[Row]:
    """List the rows of evaluations, oldest first."""
    return [row for row in rows if any(key.startswith("heldout/") or key == "kl/heldout" for key in row)]


def judging(
    rows: Sequence[Row], weights: Mapping[str, float], measures: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return the weights of the rewards that tell which evaluation is best: those that only measure, or,
    where there are none, the trained ones.
    """
    looks = evaluated(rows)
    names = [
        key.split("/", 1)[1].removesuffix("/mean")
        for key in (looks[0] if looks else {})
        if key.startswith("heldout/") and key.endswith("/mean")
    ]
    held = {name: (measures or {}).get(name, 1.0) for name in names if name not in weights}
    return held if any(held.values()) else {name: weights.get(name, 0.0) for name in names}


def best_step(
    rows: Sequence[Row], weights: Mapping[str, float], measures: Mapping[str, float] | None = None
) -> int | None:
    """Return the step whose evaluation is best by the rewards that `judging` names.

    Rewards are added up in units of the first evaluation's interval, so that none dominates by its scale.
    None before the first one, and where no reward measures single pictures.
    """
    looks, used = evaluated(rows), judging(rows, weights, measures)
    if not looks or not used:
        return None

    def gain(row: Row) -> float:
        total = 0.0
        for name, weight in used.items():
            first, now = known(looks[0], f"heldout/{name}/mean"), known(row, f"heldout/{name}/mean")
            if first is not None and now is not None:
                total += weight * (now - first) / (known(looks[0], f"heldout/{name}/ci95") or 1.0)
        return total

    return int(max(looks, key=gain)["step"])


def known(row: Row, name: str) -> float | None:
    """Return a row's number; None where it has none, such as where a reward could judge nothing."""
    value = row.get(name)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
