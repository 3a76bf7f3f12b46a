"""What a reward is, and the one place where rewards are called and their answers are checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..options import CLIPS
from ..prompts import columns_of
from ..rollout import Rollout
from ..speed.fitting_batch import Limit, OutOfMemory

TOLERANCE = 1e-3  # by which images may leave [0, 1] through rounding


class RewardError(ValueError):
    """A reward, or what it was given, cannot be used."""


def exit_error(what: str, cause: SystemExit) -> RewardError:
    """Return the error for what tried to end the program."""
    return RewardError(f"{what} called sys.exit({cause.code!r}); let it raise an error instead")


class Reward:
    """Judges images [B, H, W, 3] float32 in [0, 1] by their prompts; a subclass overrides what differs."""

    name: str
    """What metrics, recipes and errors call it."""
    licence: str
    """Licence of the judge's code and weights."""
    compares_across_prompts: bool
    """Whether a score means the same for every prompt."""
    about = ""
    """What it likes and how high its scores are, in words for users."""
    note = ""
    """How it fails as a target."""
    needs = ""
    """What an image's prompt must hold for a score; blank where it judges every image."""
    reads_prompt = True
    """Whether scores may depend on the prompt; a judge that does not know says yes."""
    needs_group = False
    """Whether it must see all images of a prompt's group in one call, as a pairwise judge and votes must."""
    runs_elsewhere = False
    """Whether it waits for a device or a network, so that decoding may go on beside it."""
    depends_on_batch = False
    """Whether the last digits of a score may differ by what else is judged in the same call, as with a neural
    network. Then equal images are judged once, and a group's come in one call where memory allows."""
    takes_turns = False
    """Whether its weights come to the device when it is asked and stay until `rest`: then it is asked as much
    at once as memory allows."""
    may_abstain = False
    """Whether a missing score is an opinion withheld, as with people, and no failure of the judge."""
    gradient = False
    """Whether it offers `differentiable`."""
    frames = CLIPS[0]
    """How it judges a clip: one of CLIPS."""
    module: nn.Module | None = None
    """Weights that a host may move between devices."""
    embed: Callable[[Tensor], Tensor] | None = None
    """Images [B, H, W, 3] → unit-norm features [B, D]."""
    cancel: Callable[[], None] | None = None
    """Breaks off a call that is under way, from any thread."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores [B] float32, higher is better; NaN for an image that it cannot judge."""
        raise NotImplementedError

    def differentiable(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores [B] as `score` does, that autograd can follow back to images [B, H, W, 3] in [0, 1].

        The images are not rounded to 8 bits, as that has no gradient.
        """
        raise NotImplementedError

    def rest(self) -> None:
        """Send the weights away, where it takes turns: nothing is asked for now."""

    def noise(self) -> float:
        """Return how far apart scores of images that look the same may lie, in the reward's units.

        A group whose standard deviation is not above it teaches nothing. 0, the default, is for a score that
        is exact: float32's own rounding is seen to for every reward.
        """
        return 0.0

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts, by RewardError, before anything runs."""

    def can_judge(self, prompt: str) -> bool:
        """Return whether any image of a prompt can get a score; a judge that does not know says yes."""
        return True

    def keep_forks(self, rollout: Rollout, groups: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Take, before `settle`, what drew a step's images, to keep what belongs to them.

        `groups` names every group that was judged as a whole, in that order: its prompt, and its images by
        their places in the plan.
        """

    def settle(self) -> None:
        """Stop a run, by raising, once all images of a step have been seen and people must be asked."""


def _forwarded(member: str) -> property:
    return property(lambda self: getattr(self.reward, member))


class Wrapped(Reward):
    """Another reward in every respect; a subclass overrides those in which it differs."""

    reward: Reward
    name, licence, about = map(_forwarded, ("name", "licence", "about"))
    note, needs, reads_prompt = map(_forwarded, ("note", "needs", "reads_prompt"))
    compares_across_prompts, needs_group = map(_forwarded, ("compares_across_prompts", "needs_group"))
    depends_on_batch, noise = map(_forwarded, ("depends_on_batch", "noise"))
    runs_elsewhere, may_abstain = map(_forwarded, ("runs_elsewhere", "may_abstain"))
    takes_turns, rest = map(_forwarded, ("takes_turns", "rest"))
    module, embed, cancel = map(_forwarded, ("module", "embed", "cancel"))
    score, check_prompts, settle = map(_forwarded, ("score", "check_prompts", "settle"))
    can_judge, keep_forks = map(_forwarded, ("can_judge", "keep_forks"))
    gradient, differentiable, frames = map(_forwarded, ("gradient", "differentiable", "frames"))


@dataclass(frozen=True)
class Rule(Reward):
    """Judge by a plain function of images and prompts."""

    name: str
    function: Callable[[Tensor, Sequence[str]], Tensor]
    compares_across_prompts: bool
    licence: str = "Apache-2.0"
    note: str = ""
    needs: str = ""
    check: Callable[[Sequence[str]], None] | None = None
    about: str = ""
    depends_on_batch: bool = False
    reads: Callable[[str], bool] | None = None
    """Whether a prompt asks for something that the rule looks for; None where it looks at images alone."""
    reads_prompt: bool = True
    smooth: Callable[[Tensor, Sequence[str]], Tensor] | None = None
    """The function in terms of torch, that autograd can follow; None where it has no gradient."""

    @property
    def gradient(self) -> bool:
        """Return whether there is one."""
        return self.smooth is not None

    def differentiable(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, H, W, 3], not rounded, by prompts [B]: [B], with a gradient."""
        if self.smooth is None:
            raise RewardError(f"reward '{self.name}' has no gradient")
        return self.smooth(images, prompts)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts whose columns the rule cannot use."""
        if self.check:
            self.check(prompts)

    def can_judge(self, prompt: str) -> bool:
        """Return whether the rule can read a prompt."""
        return self.reads is None or self.reads(prompt)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, H, W, 3] by prompts [B]: [B]."""
        return self.function(images, prompts)


def embedder(rewards: Sequence[Reward]) -> Callable[[Tensor], Tensor] | None:
    """Return the first reward's function from images to features; None where no reward has one."""
    return next((reward.embed for reward in rewards if reward.embed is not None), None)


def check_prompts(rewards: Sequence[Reward], prompts: Sequence[str]) -> None:
    """Let each reward refuse prompts, by RewardError, before anything runs."""
    for reward in rewards:
        reward.check_prompts(prompts)


def check_alone(rewards: Sequence[Reward], what: str) -> None:
    """Refuse rewards that compare the images of a group, where each image is judged by itself."""
    for reward in rewards:
        if reward.needs_group:
            raise RewardError(
                f"rewards has {reward.name}, which compares the images of a group; {what} needs scores that "
                "stand by themselves"
            )


def none_judged(reward: Reward, scores: Tensor, prompts: Sequence[str]) -> str:
    """Say why a reward gave none of some images [B] a score; blank where it gave one."""
    if not len(scores) or not scores.isnan().all():
        return ""
    told = next((" ".join(text.split())[:60] for text in prompts if text.strip()), "")
    have = f'a prompt of theirs is "{told}"' if told else "they have no prompt"
    why = f"it needs {reward.needs}; {have}" if reward.needs else "it gave no score for any"
    return f"{reward.name} judged none of {len(scores)} images: {why}"


def score_all(rewards: Sequence[Reward], images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Score images [B, H, W, 3] by every reward: [R, B] float32 on the CPU."""
    if not rewards:
        raise RewardError("rewards is empty; name at least one")
    return torch.stack([checked(reward, images, prompts) for reward in rewards])


def checked(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Score images [B, H, W, 3] by one reward, checked both ways: [B] on the CPU, NaN for a broken image."""
    finite = _finite_images(reward.name, images, prompts)
    # A judge never sees NaN: some raise on it, others answer with a number.
    judged = images.detach().float()
    judged = judged if finite.all() else torch.where(finite[:, None, None, None], judged, 0.0)
    apart = reward.needs_group or not reward.depends_on_batch
    first = [*range(len(judged))] if apart else firsts(judged, prompts)
    rows = sorted(set(first))
    if len(rows) < len(first):
        judged, prompts = judged[rows], [prompts[row] for row in rows]
    try:
        scores = _scored(reward, judged, prompts)
    except RewardError:
        raise
    except OutOfMemory as cause:
        why = "ran out of memory; choose a smaller judge, or free memory on its device"
        raise RewardError(f"reward '{reward.name}' {why}") from cause
    except SystemExit as cause:
        raise exit_error(f"reward '{reward.name}'", cause) from cause
    except Exception as cause:
        raise RewardError(f"reward '{reward.name}' failed with {type(cause).__name__}: {cause}") from cause
    place = {row: at for at, row in enumerate(rows)}
    return torch.where(finite.cpu(), scores[[place[row] for row in first]], torch.nan)


def _scored(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Score images [B, H, W, 3] by one reward: as many at once as fit into memory, a group as a whole."""

    def score(part: slice) -> Tensor:
        return _valid_scores(reward.name, reward.score(images[part], prompts[part]), len(images[part]))

    whole = reward.needs_group or not len(images)
    return score(slice(None)) if whole else Limit(len(images)).parts(score, len(images))


def firsts(images: Tensor, prompts: Sequence[str]) -> list[int]:
    """Return for each of images [B, H, W, 3] and prompts [B] the first that is the same in every bit.

    The same picture, judged twice, may score a little differently by its place in the batch, and a z-score
    makes an advantage of that.
    """
    if not len(images):
        return []
    # Whole numbers, so that their sum is exact whatever the order; what has another sum is not the same.
    sums = torch.stack([(image + 0.0).contiguous().view(torch.int32).sum() for image in images]).tolist()
    seen: dict[tuple[int, str], list[int]] = {}
    found = []
    for i, key in enumerate(zip(sums, prompts, strict=True)):
        alike = seen.setdefault(key, [])
        same = (
            j
            for j in alike
            if columns_of(prompts[i]) == columns_of(prompts[j]) and torch.equal(images[i], images[j])
        )
        found.append(next(same, i))
        if found[-1] == i:
            alike.append(i)
    return found


def _finite_images(name: str, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Check the images [B, H, W, 3] and say which are free of NaN and infinity: [B]."""
    if images.ndim != 4 or images.shape[-1] != 3 or not images.is_floating_point():
        raise RewardError(
            f"reward '{name}' got images {images.dtype} {list(images.shape)}; give floating-point [B, "
            "H, W, 3]"
        )
    if isinstance(prompts, str) or len(prompts) != len(images):
        given = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise RewardError(
            f"reward '{name}' got {given} for {len(images)} images; give a list with one prompt per image"
        )
    if 0 in images.shape:
        return torch.ones(len(images), dtype=torch.bool, device=images.device)
    low, high = images.aminmax()
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:  # by far the usual case, and NaN is neither
        return torch.ones(len(images), dtype=torch.bool, device=images.device)
    low, high = images.flatten(1).aminmax(dim=1)
    finite = (high - low).isfinite()
    outside = finite & ((low < -TOLERANCE) | (high > 1 + TOLERANCE))
    if outside.any():
        span = f"[{low[outside].min():.3g}, {high[outside].max():.3g}]"
        raise RewardError(
            f"reward '{name}' got images in {span}; rescale them to [0, 1] (from [-1, 1]: x/2 + 1/2)"
        )
    return finite


def _valid_scores(name: str, scores: Tensor, count: int) -> Tensor:
    """Check what a reward returned for `count` images: [B] float32 on the CPU."""
    if not isinstance(scores, Tensor):
        raise RewardError(
            f"reward '{name}' returned {type(scores).__name__}; return a torch.Tensor of shape [{count}]"
        )
    if scores.shape != (count,) or not scores.is_floating_point():
        raise RewardError(
            f"reward '{name}' returned {scores.dtype} {list(scores.shape)}; return one float per "
            f"image, [{count}]"
        )
    if scores.isinf().any():
        raise RewardError(
            f"reward '{name}' returned an infinite score; return NaN for an image that it cannot judge"
        )
    return scores.detach().float().cpu()
