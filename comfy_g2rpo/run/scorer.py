"""Decode and score finished latents in batches, as the rollout hands them over."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..plan import ROOT, Leaf, Plan
from ..policy import Decoder, Trainee
from ..rewards import Reward
from ..rewards.clips import described, judged
from ..rollout import Frontier, Rollout
from ..speed.fitting_batch import Limit, limit_of
from ..speed.fitting_rollout import FittingFrontier, roll_out
from ..speed.step_cache import Shortcut

MAX_WAITING = 2**29
"""Bytes of pictures that may wait for rewards that run elsewhere, before the rollout waits too; for the
others of their group, before they are judged without them; and for rewards that take turns on a device."""
AT_ONCE, MOST_AT_ONCE = 2**28, 64
"""Bytes of pictures, as float32, and pictures that a reward which takes turns is asked for at once."""
POLL_SECONDS = 0.1
NO_GROUP = -1  # of a state that no trained edge leads to


@dataclass(frozen=True)
class Batch:
    """Images or clips as 8-bit levels, whether free of NaN [n], with prompt and image position of each."""

    levels: Tensor
    whole: Tensor
    prompts: tuple[int, ...]
    images: tuple[int, ...]

    def pictures(self) -> Tensor:
        """Return the pictures as they were judged before: float32 in [0, 1], NaN where something was."""
        return torch.where(
            self.whole.view(-1, *[1] * (self.levels.ndim - 1)), self.levels.float() / 255, torch.nan
        )


@dataclass
class Scorer:
    """A rollout's sink: fills scores [R, P, images] and keeps the pictures of the prompts (by position) in
    `keep` alone.

    Rewards that need a group wait, their pictures as 8-bit levels, for all images of a prompt; those whose
    scores depend on the batch, where `groups` says by image position what is compared with what, for those of
    a group, as far as memory allows. Within `with scorer:` rewards that run elsewhere score in one thread
    while decoding and the rollout go on; leaving waits for the rest, and leaving by an exception drops it.
    Rewards that take turns on a device judge when it is left, or when too many pictures wait: each of them
    comes to the device once.
    """

    decode: Decoder
    rewards: Sequence[Reward]
    prompts: Sequence[str]
    images: int
    batch: int | Limit = 64
    keep: Collection[int] = ()
    check: Callable[[], None] | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"decode": 0.0, "reward": 0.0})
    describe: Callable[[Tensor], dict[str, Tensor]] | None = None
    """Images [B, H, W, 3] → features [B, D] by measure, gathered as [P, images, D], NaN where none came."""
    groups: Sequence[Hashable] = ()
    """What each image is compared with, by its position; blank where nothing is."""
    keeps_latents: bool = False
    """Whether to gather the finished latents as `latents` [P, images, …]."""

    def __post_init__(self) -> None:
        self.scores = torch.full((len(self.rewards), len(self.prompts), self.images), torch.nan)
        self.pictures: dict[tuple[int, int], Tensor] = {}
        self.features: dict[str, Tensor] = {}
        self.latents: Tensor | None = None
        self.whole: list[tuple[int, tuple[int, ...]]] = []
        """Prompt and images of every group that was judged as a whole, in that order."""
        self._grouping = [r for r, reward in enumerate(self.rewards) if reward.needs_group]
        self._elsewhere = [r for r, reward in enumerate(self.rewards) if reward.runs_elsewhere]
        self._together = [
            r
            for r, reward in enumerate(self.rewards)
            if self.groups and reward.depends_on_batch and not reward.needs_group
        ]
        self._in_turn = [r for r, reward in enumerate(self.rewards) if reward.takes_turns]
        apart = {*self._grouping, *self._together, *self._elsewhere, *self._in_turn}
        self._here = [r for r in range(len(self.rewards)) if r not in apart]
        self.expect([(p, image) for p in range(len(self.prompts)) for image in range(self.images)])
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: deque[tuple[int, Batch, Future[Tensor]]] = deque()
        self._later: list[tuple[int, Batch]] = []
        self._undescribed: list[Batch] = []

    def expect(self, coming: Collection[tuple[int, int]]) -> None:
        """Say which images (prompt, position) come from now on: a group is complete when all of it has come.

        All of a rollout's, unless it says otherwise.
        """
        self.coming = coming
        self._whole = _Groups([0] * self.images, coming)
        self._part = _Groups(self.groups, coming if self.groups else ())

    @torch.no_grad()
    def __call__(self, prompts: list[int], images: list[int], latents: Tensor) -> None:
        """Score latents [n, …] of the given prompts and image positions; clips by their frames."""
        if self.keeps_latents:
            if self.latents is None:
                self.latents = latents.new_empty(len(self.prompts), self.images, *latents.shape[1:])
            self.latents[prompts, images] = latents
        limit = limit_of(self.batch)
        size = limit.rows
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            if self.check:
                self.check()
            begin = time.perf_counter()
            pictures = limit.parts(partial(self._decoded, latents[part]), len(prompts[part]))
            decoded = time.perf_counter()
            self._score(pictures, prompts[part], images[part])
            self.seconds["decode"] += decoded - begin
            if self.describe and not self._in_turn:
                self._describe(pictures, prompts[part], images[part])
            self.seconds["reward"] += time.perf_counter() - decoded
            for prompt, image, picture in zip(prompts[part], images[part], pictures, strict=True):
                if prompt in self.keep:
                    self.pictures[prompt, image] = (
                        levels(picture) if picture.ndim == 4 else picture.cpu().clone()
                    )

    def blank(self, kept: Collection[tuple[int, int]]) -> None:
        """Forget the scores and features of all images (prompt, position) but those given: NaN."""
        there = torch.zeros(len(self.prompts), self.images, dtype=torch.bool)
        there[tuple(map(list, zip(*kept, strict=True)))] = True
        self.scores = torch.where(there, self.scores, torch.nan)
        for name, found in self.features.items():
            self.features[name] = torch.where(there[..., None].to(found.device), found, torch.nan)

    def _describe(self, pictures: Tensor, prompts: Sequence[int], images: Sequence[int]) -> None:
        """Put the features of pictures [n, H, W, 3] in their places."""
        for name, found in described(self.describe, pictures).items():
            blank = found.new_full((len(self.prompts), self.images, found.shape[1]), torch.nan)
            self.features.setdefault(name, blank)[list(prompts), list(images)] = found

    def _decoded(self, latents: Tensor, part: slice) -> Tensor:
        """Decode some latents to what a saved file would hold."""
        return to_8_bit(self.decode(latents[part]))

    def _score(self, pictures: Tensor, prompts: list[int], images: list[int]) -> None:
        """Score pictures [n, H, W, 3] now, in the thread, or once their group is complete."""
        texts = [self.prompts[p] for p in prompts]
        for r in self._here:
            self.scores[r, prompts, images] = judged(self.rewards[r], pictures, texts)
        if len(self._here) == len(self.rewards):
            return
        batch = _batch(pictures, prompts, images)
        for r in (*self._elsewhere, *self._in_turn):
            if r not in {*self._grouping, *self._together}:
                self._hand_over(r, batch)
        if self._in_turn and self.describe:
            self._undescribed.append(batch)
        for rewards, groups in ((self._grouping, self._whole), (self._together, self._part)):
            done = groups.add(batch) if rewards else []
            while rewards is self._together and groups.nbytes > MAX_WAITING:
                done.append(groups.oldest())
            for group in done:
                if group.images and rewards is self._grouping:
                    self.whole.append((group.prompts[0], group.images))
                for r in rewards if group.images else ():
                    self._hand_over(r, group)
        self._collect(MAX_WAITING)
        later = [*(batch for _, batch in self._later), *self._undescribed]
        if sum({id(batch): batch.levels.nbytes for batch in later}.values()) > MAX_WAITING:
            self._take_turns()

    def _take_turns(self) -> None:
        """Let the rewards that take turns judge what has waited for them, one after the other, the one whose
        features are wanted last; then all of them rest.
        """
        later, self._later = self._later, []
        undescribed, self._undescribed = self._undescribed, []
        last = next((r for r, reward in enumerate(self.rewards) if reward.embed is not None), None)
        try:
            for r in sorted(self._in_turn, key=lambda r: r == last):
                batches = [batch for owner, batch in later if owner == r]
                for batch in batches if r in {*self._grouping, *self._together} else larger(batches):
                    texts = [self.prompts[p] for p in batch.prompts]
                    self._land(r, batch, _judged(self.rewards[r], batch, texts))
                    if self.check:
                        self.check()
            for batch in larger(undescribed):
                self._describe(batch.pictures(), batch.prompts, batch.images)
        finally:
            for r in self._in_turn:
                self.rewards[r].rest()

    def _hand_over(self, r: int, batch: Batch) -> None:
        """Score a batch by one reward: in the thread if it runs elsewhere, and there is a thread."""
        reward, texts = self.rewards[r], [self.prompts[p] for p in batch.prompts]
        if reward.takes_turns:
            self._later.append((r, batch))
        elif self._thread and r in self._elsewhere:
            self._waiting.append((r, batch, self._thread.submit(_judged, reward, batch, texts)))
        else:
            self._land(r, batch, _judged(reward, batch, texts))

    def _land(self, r: int, batch: Batch, scores: Tensor) -> None:
        """Put scores [n] in their places."""
        self.scores[r, list(batch.prompts), list(batch.images)] = scores

    def _collect(self, limit: int) -> None:
        """Take what the thread has finished; wait while pictures of more than `limit` bytes are under way."""
        while self._waiting:
            r, batch, future = self._waiting[0]
            pending = sum({id(b): b.levels.nbytes for _, b, _ in self._waiting}.values())
            while pending > limit and not future.done():
                wait([future], timeout=POLL_SECONDS)
                if self.check:
                    self.check()
            if not future.done():
                return
            self._land(r, batch, future.result())
            self._waiting.popleft()

    def __enter__(self) -> Scorer:
        """Let rewards that run elsewhere score in a thread from now on."""
        if self._elsewhere:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the rest; after an exception, break off what is under way. Either way the thread ends."""
        begin = time.perf_counter()
        try:
            if kind is None:
                self._collect(-1)
                self._take_turns()
        finally:
            self._close()
            for r in self._in_turn:
                self.rewards[r].rest()
            self.seconds["reward"] += time.perf_counter() - begin

    def _close(self) -> None:
        """End the thread, and the call that it may be in."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        waiting = [future for _, _, future in self._waiting]
        self._waiting.clear()
        thread.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in waiting):
            # Again and again, because the call may have been about to begin.
            for cancel in filter(None, (self.rewards[r].cancel for r in self._elsewhere)):
                cancel()
            wait(waiting, timeout=POLL_SECONDS)
        thread.shutdown(wait=True)


class _Groups:
    """Pictures that wait for the others of their group; `of` names each image's group by its position."""

    def __init__(self, of: Sequence[Hashable], coming: Collection[tuple[int, int]]) -> None:
        self.of, self.nbytes = of, 0
        self.size = Counter((prompt, of[image]) for prompt, image in coming)
        self.known: dict[tuple[int, Hashable], dict[int, Tensor | None]] = {}
        """By prompt and group, in order of arrival: each image's levels [H, W, 3]; None once judged, or
        broken."""

    def add(self, batch: Batch) -> list[Batch]:
        """Add images; return the groups that are complete, in the plan's order and without broken images."""
        done = []
        rows = zip(batch.prompts, batch.images, batch.levels, batch.whole.tolist(), strict=True)
        for prompt, image, levels, whole in rows:
            name = prompt, self.of[image]
            group = self.known.setdefault(name, {})
            # A copy, so that what has been judged is not kept with what has not.
            group[image] = levels.clone() if whole else None
            self.nbytes += levels.nbytes * whole
            if len(group) == self.size[name]:
                done.append(self.take(name))
                del self.known[name]
        return done

    def take(self, name: tuple[int, Hashable]) -> Batch:
        """Return a group's pictures that wait, and wait for them no longer."""
        group = self.known[name]
        images = [image for image in sorted(group) if group[image] is not None]
        levels = torch.stack([group[image] for image in images]) if images else torch.zeros(0)
        self.nbytes -= levels.nbytes if images else 0
        group.update(dict.fromkeys(images))
        return Batch(
            levels, torch.ones(len(images), dtype=torch.bool), (name[0],) * len(images), tuple(images)
        )

    def oldest(self) -> Batch:
        """Take the pictures of the group that has waited longest."""
        return self.take(next(name for name, group in self.known.items() if any_waits(group)))


def any_waits(group: Mapping[int, Tensor | None]) -> bool:
    """Return whether a picture of a group waits."""
    return any(levels is not None for levels in group.values())


def larger(batches: Sequence[Batch]) -> list[Batch]:
    """Put batches together, in their order, to ones of AT_ONCE bytes as float32 and of MOST_AT_ONCE pictures
    at most, or to one each.
    """
    found: list[list[Batch]] = []
    room = places = 0
    for batch in batches:
        need = 4 * batch.levels.nbytes
        if need > room or len(batch.levels) > places:
            found.append([])
            room, places = AT_ONCE, MOST_AT_ONCE
        found[-1].append(batch)
        room, places = room - need, places - len(batch.levels)
    return [
        Batch(
            torch.cat([part.levels for part in parts]),
            torch.cat([part.whole for part in parts]),
            tuple(p for part in parts for p in part.prompts),
            tuple(i for part in parts for i in part.images),
        )
        for parts in found
    ]


def _batch(pictures: Tensor, prompts: Sequence[int], images: Sequence[int]) -> Batch:
    """Pack pictures [n, H, W, 3], which hold nothing but 8-bit levels and NaN, four to one."""
    return Batch(levels(pictures), ~pictures.isnan().flatten(1).any(1).cpu(), tuple(prompts), tuple(images))


def levels(pictures: Tensor) -> Tensor:
    """Return images of 8-bit levels and NaN as those levels, uint8 on the CPU, NaN as 0."""
    return torch.where(pictures.isnan(), 0.0, pictures * 255).round().byte().cpu()


@torch.no_grad()
def _judged(reward: Reward, batch: Batch, texts: Sequence[str]) -> Tensor:
    """Score a batch by one reward: [n]; every thread must switch gradients off for itself."""
    return judged(reward, batch.pictures(), texts)


def comparison_groups(plan: Plan) -> list[Hashable]:
    """Name what each image is compared with: its branch step, and the granularities that it stands for."""
    levels: dict[int, list[int]] = {}
    groups: dict[int, int] = {}
    for leaf in plan.leaves:
        found = levels.setdefault(leaf.state, [])
        found += [] if leaf.granularity in found else [leaf.granularity]
        groups.setdefault(leaf.state, leaf_group(plan, leaf))
    return [(groups[state], *levels[state]) for state in plan.images]


def leaf_group(plan: Plan, leaf: Leaf) -> int:
    """Return the first group on the way to a leaf; of a probe before any, the group that leaves its state."""
    group = first_group(plan, leaf.state)
    if group != NO_GROUP or leaf.of == ROOT:
        return group
    leaving = (plan.states[i] for i in plan.children[leaf.of])
    return next((edge.group for edge in leaving if edge.trained), NO_GROUP)


def first_group(plan: Plan, state: int) -> int:
    """Return the group of the trained edge nearest to the root on the way to a state; −1 without any."""
    group = NO_GROUP
    while state != ROOT:
        group = plan.states[state].group if plan.states[state].trained else group
        state = plan.states[state].parent
    return group


def to_8_bit(images: Tensor) -> Tensor:
    """Round images in [0, 1] to what a saved file holds; infinite numbers become NaN, not white."""
    finite = images.float().nan_to_num(torch.nan, torch.nan, torch.nan)  # a copy in any case
    return finite.clamp_(0, 1).mul_(255).round_().div_(255)


def roll_out_and_score(
    policy: Trainee,
    plan: Plan,
    sigmas: Tensor,
    conds: Sequence[Any],
    seeds: Sequence[int],
    shape: Sequence[int],
    scorer: Scorer,
    slots: int | Limit,
    check: Callable[[], None] | None = None,
    shortcut: Shortcut | None = None,
    frontier: Callable[..., Frontier] = FittingFrontier,
) -> Rollout:
    """Run a plan per prompt and give the scorer every finished latent that it expects, while rolling or
    afterwards. `frontier` makes another frontier than the usual one, such as one that runs a part.
    """
    sink = scorer if policy.decodes_while_rolling else None
    with scorer:
        where = {"device": policy.device, "shortcut": shortcut, "frontier": frontier}
        rollout = roll_out(
            policy, plan, sigmas, conds, seeds, shape, slots=slots, sink=sink, check=check, **where
        )
        if sink:
            return rollout
        prompts, images = map(list, zip(*scorer.coming, strict=True))
        scorer(prompts, images, rollout.latents[prompts, images])
        return dataclasses.replace(rollout, latents=None)
