"""`g2rpo score`: judge pictures that are there already, and say which are the best."""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from comfy_g2rpo.options import MIXES

from ..quiet import stay_offline
from .answers import Ended, answer
from .arguments import Batch, CommandError, Device, Prompts, Quiet

if TYPE_CHECKING:
    from torch import Tensor

    from comfy_g2rpo.rewards import Reward as RewardKind

    from ..config.sections import RewardSection
    from ..reports.ranking import Entry

MANY = 1000  # files that take a while to look at
SHOWN = 20  # rows that are printed of a folder; the file has all
HEADER = ("rank", "file", "prompt", "prompt_from", "width", "height", "score")
TAIL = ("sha256", "problem")


@dataclass(frozen=True)
class Asked:
    """One reward as it was asked for."""

    section: RewardSection
    weight: float = 1.0
    gate: float | None = None


Reward = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=WEIGHT]", help="Reward: built in, installed, or rewards.py:function; repeat to mix."
    ),
]
Recipe = Annotated[
    str | None, typer.Option(metavar="RECIPE", help="Take rewards, weights, gates and mix from this recipe.")
]
Mix = Annotated[str | None, typer.Option(help=f"How several rewards become one score: {', '.join(MIXES)}.")]
Gate = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=LEAST", help="Score of a reward below which a picture comes last."),
]
Prompt = Annotated[
    list[str] | None, typer.Option(help="What they should show: once for all, or once for each in order.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="For scores.csv and its journal [default: scores, for folders]; a former scores.csv stays.",
    ),
]
Sort = Annotated[
    str,
    typer.Option(metavar="score|NAME|file", help="What to sort by: the score, one reward, or the file name."),
]
Threshold = Annotated[
    float | None, typer.Option(help="Keep what has at least this much of what is sorted by.")
]
CopyBest = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Copy what is kept there; nothing is overwritten.")
]


def score(
    places: Annotated[
        list[str], typer.Argument(metavar="FOLDER|IMAGE…", help="Pictures to judge, or folders of them.")
    ],
    reward: Reward = None,
    recipe: Recipe = None,
    mix: Mix = None,
    gate: Gate = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    deep: Annotated[bool, typer.Option("--deep", help="Look into the folders in a folder, too.")] = False,
    out: Out = None,
    sort: Sort = "score",
    top: Annotated[int | None, typer.Option(min=1, help="Keep so many of the best.")] = None,
    per_prompt: Annotated[bool, typer.Option("--per-prompt", help="Keep so many of every prompt.")] = False,
    threshold: Threshold = None,
    copy_best: CopyBest = None,
    batch: Batch = 32,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Judge pictures, best first; stopped, the same command goes on where it was."""
    names = list(reward or [])
    if not names and not recipe:
        names, places = rewards_first(places)
        sort = names[0] if sort == "score" else sort
    if copy_best and top is None and threshold is None:
        raise CommandError("--copy-best needs to know what is best; give --top or --threshold")
    asked, mode = asked_for(names, recipe, gate or [], mix, device, batch)
    columns = [each.section.name for each in asked]
    if sort not in ("score", "file", *columns):
        raise CommandError(
            f"--sort is {sort[:80]!a}; choose score, file, or one of the rewards: {', '.join(columns)}"
        )
    if any(Path(place).is_dir() for place in places):
        out = out or Path("scores")
    found = [Path(place) for place in places]
    entries, rewards, table = judged(asked, found, prompt or [], prompts, deep, out, batch, quiet)
    from comfy_g2rpo.rewards.mixing import ranking_scores

    from ..reports.ranking import copy_best as copy
    from ..reports.ranking import kept, order

    groups = [entry.prompt for entry in entries] if per_prompt else None
    weights, gates = [each.weight for each in asked], [each.gate for each in asked]
    values = ranking_scores(table, weights, mode, gates, groups).tolist()
    key = values if sort in ("score", "file") else table[columns.index(sort)].tolist()
    paths = [str(entry.path) for entry in entries]
    ranked = order([math.nan] * len(paths) if sort == "file" else key, paths)
    best = kept(ranked, key, groups or [""] * len(entries), top, threshold)
    place = write_table(out, entries, columns, table, values, ranked) if out else None
    shown = best if top is not None or threshold is not None else ranked
    rows = rows_of(entries, columns, table, values, shown)
    report(rows, len(shown) if top or not out else SHOWN)
    if copy_best:
        copy([entries[i].path for i in best], copy_best)
    say_what_happened(entries, rewards, table, place, copy_best and len(best), copy_best)
    answer(rows)


def rewards_first(places: Sequence[str]) -> tuple[list[str], list[str]]:
    """Read the form without --reward: its first word names rewards, joined by commas."""
    if len(places) < 2 or Path(places[0]).exists():
        raise CommandError(
            "no reward is named; give --reward NAME, such as: g2rpo score my_folder --reward pickscore"
        )
    return [name.strip() for name in places[0].split(",")], list(places[1:])


def asked_for(
    names: Sequence[str], recipe: str | None, gates: Sequence[str], mix: str | None, device: str, batch: int
) -> tuple[list[Asked], str]:
    """Read what rewards are wanted and how they are mixed; nothing is loaded."""
    from ..config.reading import load, make_recipe
    from ..config.reward_checks import check_reward
    from ..config.sections import RewardSection

    least = dict(number_of(text, "--gate", 0.0) for text in gates)
    asked: list[Asked] = []
    mode = mix
    if recipe:
        config = load(recipe, [])
        for each in config.rewards:
            section = RewardSection(**each.model_dump(include=set(RewardSection.model_fields)))
            asked.append(Asked(section, each.weight, each.gate))
        mode = mix or make_recipe(config).mix
    for text in names:
        name, weight = number_of(text, "--reward", 1.0)
        own = ":" in name
        given = {"name": name.rpartition(":")[2], "path": name} if own else {"name": name}
        asked.append(Asked(RewardSection(**given, device=device, batch=batch), weight))
    columns = [each.section.name for each in asked]
    if len(set(columns)) < len(columns):
        raise CommandError(
            f"reward {max(columns, key=columns.count)!r} is named twice; name it once, with the sum of "
            "its weights"
        )
    if unknown := set(least) - set(columns):
        raise CommandError(
            f"--gate names {min(unknown)[:80]!a}, which is none of the rewards: {', '.join(columns)}"
        )
    if mode is not None and mode not in MIXES:
        raise CommandError(f"--mix is {mode[:80]!a}; choose one of: {', '.join(MIXES)}")
    for each in asked:
        check_reward(each.section)
    asked = [replace(each, gate=least.get(each.section.name, each.gate)) for each in asked]
    return asked, mode or "zscore"


def number_of(text: str, option: str, otherwise: float) -> tuple[str, float]:
    """Read NAME or NAME=NUMBER."""
    name, sign, number = text.partition("=")
    try:
        value = float(number) if sign else otherwise
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value) or (sign and not number):
        raise CommandError(f"{option} is {text[:80]!a}; write NAME=NUMBER, such as pickscore=0.5")
    return name, value


def judged(
    asked: Sequence[Asked],
    places: Sequence[Path],
    prompt: Sequence[str],
    prompts: Path | None,
    deep: bool,
    out: Path | None,
    batch: int,
    quiet: bool,
) -> tuple[list[Entry], list[RewardKind], Tensor]:
    """Find the pictures and judge what the journal lacks; Ctrl-C says how to go on."""
    stay_offline()
    from ..model.inference import device
    from ..reports.ranking import (
        Journal,
        Judge,
        Meter,
        RankingError,
        examine,
        fill,
        find_pictures,
        read_prompts,
    )
    from ..rewards.build import build

    paths = find_pictures(places, deep)
    if len(paths) >= MANY and not quiet:
        typer.echo(f"looking at {len(paths)} files", err=True)
    entries = examine(paths, prompt, read_prompts(prompts) if prompts else {})
    if all(entry.problem for entry in entries):
        raise RankingError(entries[0].problem)
    if out:
        check_place(out / "scores.csv")
    journal = Journal(out / "scores.jsonl" if out else None)
    judges = [Judge(build(each.section, device()), identity(each.section)) for each in asked]
    write = partial(print, end="", file=sys.stderr, flush=True)
    meter = Meter(len(entries), quiet or len(entries) < SHOWN, write, sys.stderr.isatty())
    try:
        entries = fill(journal, entries, judges, batch, meter)
    except KeyboardInterrupt:
        hint = f"; the scores so far lie in {out}, the same command goes on from there" if out else ""
        print(file=sys.stderr)  # below the meter
        raise Ended(f"interrupted after {meter.count} of {len(entries)} pictures{hint}", 130) from None
    return entries, [judge.reward for judge in judges], journal.table(entries, judges)


def identity(section: RewardSection) -> str:
    """Return what tells a reward from another one, or another version, of the same name."""
    from comfy_g2rpo import __version__
    from comfy_g2rpo.rewards import REWARDS
    from comfy_g2rpo.rewards.likeness import KINDS

    from ..rewards import ocr

    if section.path:
        return f"{section.name} {digest(Path(section.path.rpartition(':')[0])) or section.path}"
    if section.url:
        question = hashlib.sha256((section.question or "").encode()).hexdigest()[:16]
        return f"{section.name} {section.url} {section.protocol} {section.model or ''} {question}"
    if section.name in REWARDS or section.name in KINDS:
        seen = digest(Path(section.reference)) if section.reference else ""
        return " ".join([section.name, __version__, *filter(None, [seen]), *(section.palette or ())])
    if section.name == ocr.NAME:
        return f"{section.name} {__version__} {version('rapidocr')}"
    from ..config.reward_checks import rewards_root

    return f"{section.name} {digest(rewards_root() / section.name / 'reward.json')} {section.dtype}"


def digest(file: Path) -> str:
    """Return a short digest of a file's content; blank where there is none."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""


def check_place(path: Path) -> None:
    """Raise FileError where no table can be written, before anything is judged."""
    from comfy_g2rpo.files.safe import FileError

    try:
        open(path, "rb").close()
    except FileNotFoundError:
        return
    except OSError as error:
        raise FileError(
            f"cannot write {path}: {(error.strerror or str(error)).lower()}; choose another folder (--out)"
        ) from error


def write_table(
    folder: Path,
    entries: Sequence[Entry],
    columns: Sequence[str],
    table: Tensor,
    values: Sequence[float],
    ranked: Sequence[int],
) -> Path:
    """Write all pictures, in order, with every score: scores.csv, or scores-2.csv … beside a former one."""
    from comfy_g2rpo.files.csv_table import csv_bytes
    from comfy_g2rpo.files.safe import write_bytes

    rows = []
    for rank, i in enumerate(ranked, 1):
        entry = entries[i]
        about = (rank, str(entry.path), entry.prompt, entry.source, *entry.size, values[i])
        rows.append((*about, *table[:, i].tolist(), entry.sha256, entry.problem))
    content = csv_bytes((*HEADER, *columns, *TAIL), rows)
    names = itertools.chain(["scores.csv"], (f"scores-{number}.csv" for number in itertools.count(2)))
    places = (folder / name for name in names)
    place = next(each for each in places if not each.exists() or each.read_bytes() == content)
    write_bytes(place, content)
    return place


def rows_of(
    entries: Sequence[Entry],
    columns: Sequence[str],
    table: Tensor,
    values: Sequence[float],
    shown: Sequence[int],
) -> list[dict[str, Any]]:
    """Return pictures with their scores; null where a reward cannot judge."""
    from comfy_g2rpo.files.safe import finite

    return [
        {"image": str(entries[i].path), "prompt": entries[i].prompt, "score": finite(values[i])}
        | {"scores": {name: finite(value) for name, value in zip(columns, table[:, i].tolist(), strict=True)}}
        for i in shown
    ]


def report(rows: Sequence[Mapping[str, Any]], limit: int) -> None:
    """Print pictures with their scores."""
    for row in rows[:limit]:
        parts = row["scores"] if len(row["scores"]) == 1 else {"score": row["score"], **row["scores"]}
        words = {name: "cannot judge" if value is None else f"{value:.4f}" for name, value in parts.items()}
        said = "  ".join(f"{name} {word}" for name, word in words.items())
        typer.echo(f"{said}  {row['image']}  {' '.join(row['prompt'].split())}")
    if len(rows) > limit:
        typer.echo(f"… and {len(rows) - limit} more")


def say_what_happened(
    entries: Sequence[Entry],
    rewards: Sequence[RewardKind],
    table: Tensor,
    place: Path | None,
    copied: int | None,
    folder: Path | None,
) -> None:
    """Print on the error stream what could not be read or judged, and where things are."""
    from comfy_g2rpo.rewards import REWARDS, none_judged

    broken = [entry for entry in entries if entry.problem]
    for entry in broken[:10]:
        typer.echo(f"skipped: {entry.problem}", err=True)
    if len(broken) > 10:
        typer.echo(f"skipped: {len(broken) - 10} more, see the column problem", err=True)
    sound = [i for i, entry in enumerate(entries) if not entry.problem]
    prompts = [entries[i].prompt for i in sound]
    for reward, scores in zip(rewards, table[:, sound], strict=True):
        if said := none_judged(reward, scores, prompts):
            hint = " (--prompt, --prompts)" if reward.needs and not any(prompts) else ""
            typer.echo(said + hint, err=True)
    blank = sum(not prompt for prompt in prompts)
    # Of the built-in rules some ignore the prompt, and the others answer nothing without one.
    if blank and not REWARDS.keys() >= {reward.name for reward in rewards}:
        judged_by = "rewards that read one judged them by an empty one (--prompt, --prompts)"
        typer.echo(f"{blank} pictures have no prompt: {judged_by}", err=True)
    if folder is not None:
        typer.echo(f"{copied} pictures copied to {folder}", err=True)
    if place:
        kept = "" if place.name == "scores.csv" else " (earlier tables are kept)"
        typer.echo(f"all scores: {place}{kept}", err=True)
