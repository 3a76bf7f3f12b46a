"""What the scoring blocks share: checks of what they get, judging in batches, the outcome in words."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from torch import Tensor

from ...comfy_g2rpo.blocks.reward_mix import MAX_SCORE, within
from ...comfy_g2rpo.prompts import MAX_CHARACTERS
from ...comfy_g2rpo.rewards import Reward, score_all
from ...comfy_g2rpo.rewards.mixing import ranking_scores
from ...comfy_g2rpo.rewards.models.catalogue import KNOWN
from ...comfy_g2rpo.rewards.protocol import none_judged
from ...comfy_g2rpo.run.scorer import to_8_bit
from ..types import RewardSet, RolloutData
from ..views.drawing import number
from .checks import check_characters

MAX_IMAGES, MAX_PIXELS = 1024, 2**30  # of one run of a block
MAX_VALUES_TEXT = 100_000  # characters of a list of values
MAX_REWARDS = 6
CHUNK_PIXELS = 2**22  # between two looks at the stop button
SLACK = 0.25  # by which resizing may overshoot [0, 1]; saving clips it as well
SHOWN_LINES = 5  # of a table, on a block
LONGEST_CELL = 40  # characters that a column is widened for
RELATIVE = "Compare scores only between images of one prompt."

_VALUE = re.compile(r"nan|[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def one(name: str, values: Sequence[Any]) -> Any:
    """Return the only value of an input that arrives as a list."""
    if len(values) != 1:
        raise ValueError(f"{name} got a list of {len(values)} values; connect one")
    return values[0]


def checked_prompt(text: Any, name: str = "prompt") -> str:
    """Return a prompt; raise ValueError unless it is a text, and not too long."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is {type(text).__name__}; connect a text")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{name} has {len(text)} characters; at most {MAX_CHARACTERS} are allowed, shorten it"
        )
    check_characters(name, text, "prompt")
    return text


def prompts_for(texts: Sequence[Any], count: int) -> tuple[list[str], list[str]]:
    """Return a prompt for each of `count` images, and notes: one for all, one per image, or one per line."""
    if len(texts) > 1:
        if len(texts) != count:
            raise ValueError(
                f"prompt got a list of {len(texts)} texts for {count} images; give one, or one per image"
            )
        return [checked_prompt(text) for text in texts], []
    text = one("prompt", texts)
    lines = [line.strip() for line in text.split("\n") if line.strip()] if isinstance(text, str) else []
    if count > 1 and len(lines) == count:
        return [checked_prompt(line, f"prompt, line {i}") for i, line in enumerate(lines, 1)], []
    note = f"prompt has {len(lines)} lines for {count} images, so all of it is every image's prompt"
    return [checked_prompt(text)] * count, [note] if len(lines) > 1 else []


def names_for(texts: Sequence[str], count: int) -> list[str]:
    """Return a name for each of `count` images: one text per image, or one text with a line per image."""
    lines = [line.strip() for line in texts[0].split("\n") if line.strip()] if len(texts) == 1 else []
    if count > 1 and len(lines) == count:
        return lines
    check_count("names", texts, count)
    return list(texts)


def checked_images(batches: Sequence[Any], name: str = "images") -> list[Tensor]:
    """Split IMAGE batches [B, H, W, C] into images [H, W, C]; raise ValueError for others, or too many."""
    images: list[Tensor] = []
    for batch in batches:
        known = isinstance(batch, Tensor)
        real = known and batch.ndim == 4 and batch.is_floating_point() and batch.shape[-1] in (1, 3, 4)
        if not real:
            found = f"{batch.dtype} {list(batch.shape)}" if known else type(batch).__name__
            raise ValueError(
                f"{name} is {found}; connect an IMAGE, floating-point [batch, height, width, 1, 3 or 4 "
                "channels]"
            )
        if 0 in batch.shape[1:]:
            raise ValueError(
                f"{name} has the size {list(batch.shape)}; connect images with at least one pixel"
            )
        images += batch.unbind()
    if not images:
        raise ValueError(f"{name} is empty; connect at least one image")
    pixels = sum(image.shape[0] * image.shape[1] for image in images)
    if len(images) > MAX_IMAGES or pixels > MAX_PIXELS:
        limits = f"{MAX_IMAGES} images and {MAX_PIXELS // 10**6} megapixels"
        raise ValueError(
            f"{name} holds {len(images)} images with {pixels // 10**6} megapixels; at most {limits} "
            "are allowed, use fewer"
        )
    return images


def scored_images(batches: Sequence[Any], scores: Sequence[Any]) -> tuple[list[Tensor], list[float]]:
    """Return images [H, W, C] and their scores; raise ValueError unless every image has one."""
    images, values = checked_images(batches), [bounded("scores", value) for value in scores]
    if len(values) != len(images):
        raise ValueError(
            f"scores has {len(values)} entries for {len(images)} images; connect the scores of these very "
            "images"
        )
    return images, values


def check_count(name: str, given: Sequence[Any] | None, count: int, what: str = "entries") -> None:
    """Raise ValueError unless an optional list has one element per image."""
    if given is not None and len(given) != count:
        raise ValueError(
            f"{name} has {len(given)} {what} for {count} images; connect one per image, or nothing"
        )


def judge(rewards: RewardSet, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
    """Score images [H, W, C] of any sizes as their saved files would be: [R, images], NaN for broken ones."""
    scores = torch.full((len(rewards.rewards), len(images)), torch.nan)
    start = 0
    while start < len(images):
        throw_exception_if_processing_interrupted()
        height, width, _ = shape = images[start].shape
        stop, limit = start + 1, start + CHUNK_PIXELS // (height * width)
        while stop < min(limit, len(images)) and images[stop].shape == shape:
            stop += 1
        batch = rounded(torch.stack(list(images[start:stop])), start)
        scores[:, start:stop] = score_all(rewards.rewards, batch, prompts[start:stop])
        start = stop
    return scores


def rounded(images: Tensor, first: int, name: str = "images") -> Tensor:
    """Round images [B, H, W, C] to 8 bits and three channels; a broken one becomes NaN throughout.

    Raise ValueError for one that lies outside [0, 1].
    """
    pixels = images.detach().float()
    pixels = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels.expand(*pixels.shape[:3], 3)
    low, high = pixels.flatten(1).aminmax(dim=1)
    broken = ~(high - low).isfinite()
    wrong = ~broken & ((low < -SLACK) | (high > 1 + SLACK))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}, image {first + at} lies in [{low[at]:.3g}, {high[at]:.3g}]; rescale it to [0, 1] "
            "(from [-1, 1]: x/2 + 1/2)"
        )
    return torch.where(broken.view(-1, 1, 1, 1), torch.nan, to_8_bit(pixels))


def harmless(name: str) -> str:
    """Return a stranger's name as no page can take it for markup, nor Markdown for emphasis."""
    return "".join(c if c.isalnum() or c in " ._-+()#" else "-" for c in name[:80])


def best_first(scores: Sequence[float]) -> list[int]:
    """Order images from the best score to the worst, those without a score last; equal ones stay in order."""
    return sorted(range(len(scores)), key=lambda i: math.inf if math.isnan(scores[i]) else -scores[i])


def overall(rewards: RewardSet, scores: Tensor) -> list[float]:
    """Return one score per image of scores [R, images], by the set's mix and gates."""
    return ranking_scores(scores, rewards.weights, rewards.mix, rewards.gates).tolist()


def score_table(
    rewards: RewardSet,
    scores: Tensor,
    notes: Sequence[str],
    what: str,
    titles: Sequence[str] = (),
    elsewhere: str = "",
) -> str:
    """List scores [R, images] best first, with the parts of a mix; titles must be harmless to a page.

    With `elsewhere`, which says where the whole list is, only the best ones are listed. The list is indented,
    so that a page that takes a text for Markdown leaves it as it is.
    """
    mixed, names = overall(rewards, scores), [reward.name for reward in rewards.rewards]
    order = best_first(mixed)
    listed = order[:SHOWN_LINES] if elsewhere else order
    rows = []
    for rank, i in enumerate(listed, 1):
        own = zip(names, map(number, scores[:, i].tolist()), strict=True)
        parts = [f"{name} {value}" for name, value in own] if len(names) > 1 else []
        rows.append([f"{rank}.", f"{titles[i] if titles else f'image {i}'}:", number(mixed[i]), *parts])
    lines = [f"{len(order)} {what}, best first", "", *(f"    {row}" for row in aligned(rows)), ""]
    if more := len(order) - len(listed):
        known = [score for score in mixed if not math.isnan(score)]
        down = f", down to {number(min(known))}" if known else ""
        lines[-1:] = ["    …", "", f"{more} more{down}. {elsewhere}"]
    return "\n".join([*lines, *(f"Note: {note}" for note in notes)]).rstrip()


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Write rows (rank, name, score, parts) in columns that are told apart without the spaces, too.

    Names stand to the left, numbers to the right; signs of East Asia count two.
    """

    def wide(cell: str) -> int:
        return len(cell) + sum(unicodedata.east_asian_width(c) in "WF" for c in cell)

    widths = [min(max(map(wide, column)), LONGEST_CELL) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        gaps = [" " * (width - wide(cell)) for cell, width in zip(row, widths, strict=True)]
        rank, name, score, *parts = (
            cell + gap if column == 1 else gap + cell
            for column, (cell, gap) in enumerate(zip(row, gaps, strict=True))
        )
        lines.append(f"{rank} {name} {score}" + (f"  ({', '.join(parts)})" if parts else ""))
    return lines


def unjudged(scores: Sequence[float]) -> list[str]:
    """Note how many images have no score."""
    missing = sum(map(math.isnan, scores))
    why = "broken image, or a prompt that the reward cannot read"
    return [f"{missing} could not be judged ({why})"] if missing else []


def judgement_notes(rewards: RewardSet, scores: Tensor, prompts: Sequence[str]) -> list[str]:
    """Note what scores [R, images] lack: the prompt that a reward reads, or else why it judged none."""
    blank = sum(not text.strip() for text in prompts)
    readers = [each.name for each in rewards.rewards if each.reads_prompt] if blank else []
    told, notes = [harmless(text) for text in prompts], []
    if readers:
        whose = (
            f"{blank} of {len(prompts)} images have no prompt" if blank < len(prompts) else "prompt is empty"
        )
        reads = "reads" if len(readers) == 1 else "read"
        notes.append(f"{whose}, and {', '.join(readers)} {reads} it; write in prompt what the images show")
    alone = readers and blank == len(prompts)
    for each, row in zip(rewards.rewards, scores, strict=True):
        if not (alone and each.reads_prompt):
            notes += filter(None, [none_judged(each, row, told)])
    explained = alone and scores.isnan().all()
    return notes if explained else [*notes, *unjudged(overall(rewards, scores))]


def describe(reward: Reward) -> str:
    """Describe a reward: what it likes, how it fails, its licence, whether prompts may differ."""
    known = KNOWN.get(reward.name)
    said = f"{known.title}, {known.scale}" if known else reward.about or "a reward model of your own"
    across = "Scores mean the same for every prompt." if reward.compares_across_prompts else RELATIVE
    lines = [f"{reward.name}: {said}", f"As a target: {reward.note}" if reward.note else ""]
    return "\n".join(filter(None, [*lines, f"Licence: {reward.licence}", across]))


def checked_latents(rollout: RolloutData, vae: Any) -> Tensor:
    """Return a rollout's latents [images, C, …]; raise ValueError where this VAE cannot decode them."""
    latents = rollout.rollout.latents
    if latents is None or latents.shape[:2] != (1, len(rollout.rollout.plan.images)):
        raise ValueError("rollout holds no completions of one prompt; connect the output of a Rollout block")
    if latents.shape[1] > MAX_IMAGES:
        raise ValueError(
            f"rollout holds {latents.shape[1]} completions; at most {MAX_IMAGES} are allowed, lower "
            "group_size or branch fewer steps"
        )
    if latents.ndim not in (5, 6) or (latents.ndim == 6 and latents.shape[3] != 1):
        raise ValueError(
            f"rollout holds latents {list(latents.shape[2:])}; only single pictures can be scored, not "
            "video or sound"
        )
    check_channels(vae, latents.shape[2], "the rollout")
    return latents[0]


def check_channels(vae: Any, channels: int, whose: str) -> None:
    """Raise ValueError for a VAE that decodes other latents."""
    own = getattr(vae, "latent_channels", channels)
    if own != channels:
        raise ValueError(
            f"vae decodes {own} latent channels and {whose} has {channels}; connect the VAE of the same model"
        )


def decode(rollout: RolloutData, vae: Any, latents: Tensor) -> Tensor:
    """Decode latents [n, C, …] in model space: [n, H, W, 3] in [0, 1], NaN where a latent is broken."""
    return decode_latents(vae, rollout.guider.model_patcher.model.process_latent_out(latents.float()))


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Decode LATENT samples [n, C, …]: [n, H, W, 3] in [0, 1], NaN where one is broken."""
    whole = latents.flatten(1).isfinite().all(1).cpu()
    images = vae.decode(latents)
    images = images[:, 0] if images.ndim == 5 and images.shape[1] == 1 else images
    if images.ndim != 4 or images.shape[-1] < 3:
        raise ValueError(
            f"vae made {list(images.shape)} of {len(latents)} latents; connect a VAE that makes single "
            "RGB pictures"
        )
    images = images[..., :3].float().cpu()
    sound = whole & images.flatten(1).isfinite().all(1)
    return torch.where(sound.view(-1, 1, 1, 1), images, torch.nan)


def bounded(name: str, value: Any) -> float:
    """Return a score; raise ValueError unless it is nan or a number in the allowed range."""
    if isinstance(value, float) and math.isnan(value):
        return value
    return float(within(name, value, -MAX_SCORE, MAX_SCORE))


def parse_votes(text: str) -> list[float]:
    """Read numbers that are separated by commas, semicolons or white space."""
    if len(text) > MAX_VALUES_TEXT:
        raise ValueError(
            f"votes has {len(text)} characters; at most {MAX_VALUES_TEXT} are allowed, give one number "
            "per completion"
        )
    words = [word for word in re.split(r"[\s,;]+", text) if word]
    for i, word in enumerate(words, 1):
        if not _VALUE.fullmatch(word):
            raise ValueError(f"votes, number {i} is {word[:20]!a}; write numbers such as 0.5, or nan")
    return [bounded("votes", float(word)) for word in words]
