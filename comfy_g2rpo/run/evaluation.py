"""Held-out evaluation: fixed prompts and start noises, no exploration, paired with the untrained model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.safe import RunError, read_json, write_json
from ..objectives import OBJECTIVES
from ..plan import Plan, deterministic
from ..policy import Policy, Trainee
from ..prompts import image_of, titled
from ..recipes import Recipe, build_plan
from ..rewards import Reward
from ..rewards.protocol import embedder
from ..rollout import Rollout, stream
from ..speed.fitting_batch import Limit
from .diversity import describe, spread
from .folder import PREVIEW, RunFolder, Sample
from .pace import Pace
from .scorer import Scorer, roll_out_and_score
from .setup import ALONE, World

SHOWN_PROMPTS, SHOWN_NOISES = 8, 3
PROBED_PROMPTS = 16


@dataclass(frozen=True)
class Evaluation:
    """Scores [R, prompts, noises] of the held-out prompts, some of the pictures, and what the watch needs
    beside them.

    `spread` holds diversity by prompt [prompts] under "<measure>/group" and "<measure>/set"; `noisy` is by
    how much the pictures of some prompts score higher with the rollouts' exploration noise than without [R,
    some prompts]; `kl` is the velocity KL to the model without adapter; `preview` is the same at another
    size.
    """

    names: tuple[str, ...]
    prompts: tuple[str, ...]
    scores: Tensor
    samples: tuple[Sample, ...] = field(default=(), repr=False)
    spread: Mapping[str, Tensor] = field(default_factory=dict)
    noisy: Tensor | None = None
    kl: float | None = None
    preview: Evaluation | None = None

    def means(self) -> dict[str, float]:
        """Return each reward's mean."""
        return {
            name: scores.double().nanmean().item()
            for name, scores in zip(self.names, self.scores, strict=True)
        }

    def metrics(self) -> dict[str, float]:
        """Return mean and half of the 95 % interval over prompts, and the watch's numbers, as a row."""
        row = {}
        # In float64: what a reward may answer fits float32, its sums and squares may not.
        for name, scores in zip(self.names, self.scores.double(), strict=True):
            by_prompt = scores.nanmean(1)
            by_prompt = by_prompt[~by_prompt.isnan()]
            row[f"heldout/{name}/mean"] = scores.nanmean().item()
            row[f"heldout/{name}/ci95"] = (
                1.96 * by_prompt.std().item() / math.sqrt(len(by_prompt)) if len(by_prompt) > 1 else math.nan
            )
        row |= {f"diversity/{name}": values.nanmean().item() for name, values in self.spread.items()}
        if self.noisy is not None:
            row |= {
                f"noise_gap/{name}": values.nanmean().item()
                for name, values in zip(self.names, self.noisy, strict=True)
            }
        if self.preview is not None:
            row |= {f"preview/{name}/mean": mean for name, mean in self.preview.means().items()}
        return row | ({} if self.kl is None else {"kl/heldout": self.kl})

    def save(self, folder: RunFolder, step: int) -> None:
        """Write the scores, and the pictures, into the run folder."""
        folder.save_samples(step, self.samples)
        if self.preview is not None:
            folder.save_samples(step, self.preview.samples, PREVIEW)
        write_json(folder.path / "images" / f"{step:06d}" / "scores.json", self.content())

    def content(self) -> dict[str, Any]:
        """Return all but the pictures, as JSON holds it."""
        made: dict[str, Any] = {"prompts": self.prompts, "scores": _by_name(self.names, self.scores)}
        made["diversity"] = {name: values.tolist() for name, values in self.spread.items()}
        made |= {} if self.noisy is None else {"noise_gap": _by_name(self.names, self.noisy)}
        return made | {"kl": self.kl, "preview": None if self.preview is None else self.preview.content()}

    @classmethod
    def read(cls, folder: RunFolder, step: int) -> Evaluation:
        """Read the scores of a step; FileError where they are missing or damaged."""
        path = folder.path / "images" / f"{step:06d}" / "scores.json"
        content = read_json(path)
        try:
            return cls.of(content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path} is damaged: it holds no evaluation; bring it back from a copy") from error

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Evaluation:
        """Take what `content` returned; runs of before have scores alone."""
        spread = {name: _numbers(values) for name, values in content.get("diversity", {}).items()}
        noisy, preview = content.get("noise_gap"), content.get("preview")
        return cls(
            names=tuple(content["scores"]),
            prompts=tuple(content["prompts"]),
            scores=_numbers(list(content["scores"].values()))
            if content["scores"]
            else torch.empty(0, len(content["prompts"]), 0),
            spread=spread,
            noisy=_numbers(list(noisy.values())) if noisy else None,
            kl=content.get("kl"),
            preview=cls.of(preview) if preview else None,
        )


def _by_name(names: Sequence[str], tables: Tensor) -> dict[str, Any]:
    """Write a table per reward."""
    return {name: table.tolist() for name, table in zip(names, tables, strict=True)}


def _numbers(table: Any) -> Tensor:
    """Read numbers at any depth, null as NaN."""

    def known(value: Any) -> Any:
        return (
            [known(item) for item in value]
            if isinstance(value, list)
            else math.nan
            if value is None
            else value
        )

    return torch.tensor(known(table))


def evaluate(
    policy: Trainee,
    judges: Sequence[Reward],
    heldout: Sequence[str],
    pace: Pace,
    sigmas: Tensor,
    shape: Sequence[int],
    check: Callable[[], None] | None = None,
    *,
    recipe: Recipe | None = None,
    preview: Sequence[int] | None = None,
    preview_sigmas: Tensor | None = None,
    shown: tuple[int, int] = (SHOWN_PROMPTS, SHOWN_NOISES),
    world: World = ALONE,
) -> Evaluation:
    """Score the deterministic samples of the held-out prompts from noises that every evaluation of a run
    shares.

    With the recipe of the run it measures what the watch needs, too; `preview` is a latent's shape for
    pictures of a second size, along `preview_sigmas` or the same noise levels; `shown` says of
    how many prompts, and of how many noises each, pictures are kept. The processes of `world` share the
    pictures out, and all of them return the whole.
    """
    prompts = tuple(heldout[: pace.eval_prompts or None])
    rows = [(prompt, noise) for prompt in prompts for noise in range(pace.eval_noises)]
    seeds = [stream("evaluation", pace.seed, prompt, noise) for prompt, noise in rows]
    # Evenly spaced over the list, so that nobody chose them for their outcome.
    chosen = {round(i * len(prompts) / shown[0]) for i in range(shown[0])}
    kept = {
        i for i in range(len(rows)) if i // pace.eval_noises in chosen and i % pace.eval_noises < shown[1]
    }
    look = partial(describe, embed=embedder(judges)) if recipe else None
    drawn = draw(policy, judges, rows, seeds, sigmas, shape, pace, kept, check, look, world)
    names = tuple(judge.name for judge in judges)
    scores = drawn.scores.reshape(len(judges), len(prompts), pace.eval_noises)
    found: dict[str, Any] = {"spread": {}}
    for measure, features in drawn.features.items():
        by_prompt = features.reshape(len(prompts), pace.eval_noises, -1)
        found["spread"] |= {f"{measure}/{name}": values for name, values in spread(by_prompt).items()}
    if recipe:
        some = sorted(
            {round(i * len(prompts) / PROBED_PROMPTS) for i in range(PROBED_PROMPTS)}
            & set(range(len(prompts)))
        )
        first = [p * pace.eval_noises for p in some]
        texts, at = [prompts[p] for p in some], [seeds[i] for i in first]
        how = recipe, sigmas, shape, pace.slots, pace.decode_batch, check, world
        noisy, found["kl"] = probe(policy, judges, texts, at, *how)
        found["noisy"] = noisy - drawn.scores[:, first]
    if preview is not None:
        some = sorted(chosen & set(range(len(prompts))))
        at = [p * pace.eval_noises for p in some]
        seen, levels = [rows[i] for i in at], sigmas if preview_sigmas is None else preview_sigmas
        how = levels, preview, pace, range(len(at)), check, None, world
        larger = draw(policy, judges, seen, [seeds[i] for i in at], *how)
        previews, texts = samples(names, seen, larger), tuple(titled(prompts[p]) for p in some)
        found["preview"] = Evaluation(names, texts, larger.scores[..., None], previews)
    return Evaluation(names, tuple(map(titled, prompts)), scores, samples(names, rows, drawn), **found)


def price(recipe: Recipe, pace: Pace, heldout: int, preview: bool = False) -> dict[str, tuple[int, int]]:
    """Count forwards and pictures of one evaluation of so many held-out prompts, by part."""
    prompts = min(pace.eval_prompts or heldout, heldout)
    parts = {"scores": (prompts * pace.eval_noises * recipe.num_steps, prompts * pace.eval_noises)}
    if pace.watch != "off":
        plan, probed = exploring(recipe), min(prompts, PROBED_PROMPTS)
        parts["watch"] = (probed * (plan.forwards + min(len(plan.forks), FORKS)), probed * len(plan.images))
    if preview:
        parts["preview"] = (min(prompts, SHOWN_PROMPTS) * recipe.num_steps, min(prompts, SHOWN_PROMPTS))
    return parts


@dataclass(frozen=True)
class Drawn:
    """What was drawn of some rows: scores [R, rows], features [rows, D] by measure, pictures by row."""

    scores: Tensor
    features: Mapping[str, Tensor]
    pictures: Mapping[int, Tensor]


def draw(
    policy: Trainee,
    judges: Sequence[Reward],
    rows: Sequence[tuple[str, int]],
    seeds: Sequence[int],
    sigmas: Tensor,
    shape: Sequence[int],
    pace: Pace,
    shown: Collection[int],
    check: Callable[[], None] | None,
    look: Callable[[Tensor], dict[str, Tensor]] | None = None,
    world: World = ALONE,
) -> Drawn:
    """Draw and score one deterministic picture per row (prompt, noise), and keep those of the rows `shown`.

    Every process draws a share of them, and has them all in the end.
    """
    dealt, kept = world.dealt(len(rows)), shares_shown(world, len(rows), shown)
    mine = dealt[world.index]
    texts = [rows[i][0] for i in mine]
    keep = kept[world.index]
    scorer = Scorer(policy.decode, judges, texts, 1, pace.decode_batch, keep=keep, check=check, describe=look)
    plan, conds = deterministic(len(sigmas) - 1), policy.encode(texts)
    at = [seeds[i] for i in mine]
    roll_out_and_score(policy, plan, sigmas, conds, at, shape, scorer, pace.slots, check)
    pictures = [scorer.pictures[place, 0] for place in keep]
    if world.count > 1 and pictures:
        pictures = list(world.gather(torch.stack(pictures)[None])[0])
    numbers = [part[place] for part, places in zip(dealt, kept, strict=True) for place in places]
    return Drawn(
        world.collect(scorer.scores[:, :, 0], len(rows)),
        {name: world.collect(table[None, :, 0], len(rows))[0] for name, table in scorer.features.items()},
        {i: picture for i, picture in zip(numbers, pictures, strict=True) if i in shown},
    )


def shares_shown(world: World, count: int, shown: Collection[int]) -> list[list[int]]:
    """List by process the places among its rows whose pictures are kept: as many in each, others where it has
    fewer that are to be shown.
    """
    ranked = [sorted(range(len(part)), key=lambda j: part[j] not in shown) for part in world.dealt(count)]
    most = max(sum(i in shown for i in part) for part in world.dealt(count))
    return [sorted(places[:most]) for places in ranked]


def samples(names: Sequence[str], rows: Sequence[tuple[str, int]], drawn: Drawn) -> tuple[Sample, ...]:
    """Return the pictures that were kept, with their scores."""
    made = []
    for i, picture in sorted(drawn.pictures.items(), key=lambda item: item[0]):
        (prompt, noise), image = rows[i], image_of(rows[i][0])
        by_name = {name: drawn.scores[r, i].item() for r, name in enumerate(names)}
        made.append(Sample(titled(prompt), noise, by_name, picture, start=Path(image) if image else None))
    return tuple(made)


def compare(before: Evaluation, after: Evaluation) -> dict[str, dict[str, float]]:
    """Return each reward's paired gain: mean, half of the 95 % interval, p of a t-test over prompts."""
    from scipy.stats import ttest_rel

    found = {}
    tables = (one.scores.double().nanmean(2) for one in (before, after))
    for name, old, new in zip(before.names, *tables, strict=True):
        valid = ~(old.isnan() | new.isnan())
        mean, width = interval(new - old)
        found[name] = {
            "mean": mean,
            "ci95": width,
            "p": math.nan if width != width else float(ttest_rel(new[valid], old[valid]).pvalue),
        }
    return found


def interval(values: Tensor) -> tuple[float, float]:
    """Return the mean of values [n], NaN left out, and half of its 95 % interval by Student's t."""
    from scipy.stats import t

    known = values[~values.isnan()]
    count = len(known)
    width = t.ppf(0.975, count - 1) * known.std().item() / math.sqrt(count) if count > 1 else math.nan
    return known.mean().item(), float(width)


STEPS = 2  # branch steps that are looked at; one picture each
FORKS = 4  # states of a prompt at which velocities are compared


def exploring(recipe: Recipe) -> Plan:
    """Plan one picture of each kind that the recipe's rollouts judge: the same at every evaluation."""
    alone = {"group_size": 1, "expand": 1.0, "starts": 1, "antithetic": False}
    made = dataclasses.replace(recipe, **alone, credit="final", anchor_image=False)
    if OBJECTIVES[made.objective].images:
        # The same images, by steps without noise, whose states the velocities are compared at.
        made = dataclasses.replace(made, objective="on_policy", eta=0.0, etas=())
    if made.tree == "singular" and made.pick == "every":
        made = dataclasses.replace(made, pick="random", pick_size=STEPS)
    return build_plan(made)


def probe(
    policy: Trainee,
    judges: Sequence[Reward],
    prompts: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    sigmas: Tensor,
    shape: Sequence[int],
    slots: int,
    batch: int,
    check: Callable[[], None] | None = None,
    world: World = ALONE,
) -> tuple[Tensor, float]:
    """Return scores [R, P] of images drawn as rollouts draw them, and the velocity KL at their states."""
    mine = world.dealt(len(prompts))[world.index]
    texts, at = [prompts[p] for p in mine], [seeds[p] for p in mine]
    plan, conds = exploring(recipe), policy.encode(texts)
    scorer = Scorer(policy.decode, judges, texts, len(plan.images), batch, check=check)
    rollout = roll_out_and_score(policy, plan, sigmas, conds, at, shape, scorer, slots, check)
    scores = torch.stack(
        [plan.values(scorer.scores[:, p]).flatten(1).nanmean(1) for p in range(len(texts))], 1
    )
    apart = velocity_distances(policy, rollout, conds, slots, check)
    far = world.collect(apart[None], len(prompts)).mean().item()
    return world.collect(scores, len(prompts)), far


@torch.no_grad()
def velocity_distances(
    policy: Policy,
    rollout: Rollout,
    conds: Sequence[Any],
    slots: int,
    check: Callable[[], None] | None = None,
) -> Tensor:
    """Return ‖v − v_ref‖²/D at some states of a rollout [P, states]: in the mean the update's velocity KL."""
    count = len(rollout.plan.forks)
    chosen = sorted({round(i * (count - 1) / max(FORKS - 1, 1)) for i in range(FORKS)})
    sigma = (
        rollout.coefficients.sigma[[rollout.plan.forks[f] for f in chosen]]
        .repeat(len(conds))
        .to(rollout.x.device)
    )
    x, velocity = rollout.x[:, chosen].flatten(0, 1), rollout.velocity[:, chosen].flatten(0, 1)
    cond = [one for one in conds for _ in chosen]

    def distances(part: slice) -> Tensor:
        if check:
            check()
        reference = policy.velocity(x[part], sigma[part], cond[part]).float()
        return (velocity[part] - reference).square().flatten(1).mean(1)

    with policy.reference(), policy.inference():
        return Limit(slots).parts(distances, len(x)).view(len(conds), -1)
