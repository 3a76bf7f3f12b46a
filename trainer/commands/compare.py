"""`g2rpo compare`: what changed from one run, or folder of pictures, to another, and how sure that is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .answers import answer
from .arguments import Batch, Best, CommandError, Device, Prompts, Quiet, refuse_best
from .score import asked_for, judged

if TYPE_CHECKING:
    from ..reports.comparison import Change, Comparison

Reward = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Reward that judges the pictures of two folders; repeat for several."),
]


def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="A run folder, or a folder of pictures.")],
    after: Annotated[
        Path | None,
        typer.Argument(
            metavar="B", help="Another one of the same kind [default: run A itself, its last evaluation]."
        ),
    ] = None,
    reward: Reward = None,
    prompt: Annotated[
        str | None, typer.Option(help="What all pictures should show [default: each picture's own].")
    ] = None,
    prompts: Prompts = None,
    out: Annotated[Path, typer.Option(metavar="HTML", help="The report to write.")] = Path("compare.html"),
    pictures: Annotated[int, typer.Option(min=0, max=1000, help="Pairs of pictures that it shows.")] = 48,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite an existing report.")] = False,
    best: Best = False,
    batch: Batch = 32,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Compare two runs by their held-out evaluations, or two folders of pictures of the same names: gains,
    win rates, one HTML file.
    """
    if out.exists() and not replace:
        raise CommandError(f"{out} exists; choose another --out, or give --replace")
    from comfy_g2rpo.files.safe import write_bytes

    from ..reports.comparison import kind_of, of_runs
    from ..reports.comparison_page import page

    other = after or before
    kinds = {kind_of(place) for place in (before, other)}
    if len(kinds) > 1:
        raise CommandError(f"{before} and {other} are a run and a folder of pictures; give two of a kind")
    if kinds == {"run"}:
        if reward or prompt or prompts:
            raise CommandError(
                "--reward and prompts are for folders of pictures; runs are compared by what their "
                "evaluations measured"
            )
        made = of_runs(before, other, best)
    else:
        refuse_best(best, before)
        if after is None or not reward:
            raise CommandError(
                "folders of pictures need a second folder B and --reward, such as: g2rpo compare A B "
                "--reward jpeg"
            )
        made = of_folders(before, after, reward, prompt, prompts, batch, device, quiet)
    write_bytes(out, page(made, pictures).encode(errors="replace"))
    show(made, out)


def show(made: Comparison, out: Path) -> None:
    """Print what changed, and where the report lies."""
    typer.echo(f"{made.before} → {made.after}")
    for each in made.changes:
        typer.echo(line(each))
    for note in made.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(out)
    changes = [each.row() for each in made.changes]
    answer({"before": made.before, "after": made.after, "changes": changes, "notes": made.notes, "file": out})


def of_folders(
    before: Path,
    after: Path,
    reward: list[str],
    prompt: str | None,
    prompts: Path | None,
    batch: int,
    device: str,
    quiet: bool,
) -> Comparison:
    """Judge the pictures that two folders share, and pair their scores."""
    from ..reports.comparison import Comparison, Pair, changes, labels, same_names

    matched, notes = same_names(before, after)
    asked, _ = asked_for(reward, None, [], None, device, batch)
    names = [each.section.name for each in asked]
    places = [path for pair in matched for path in pair]
    entries, _, table = judged(asked, places, [prompt] if prompt else [], prompts, False, None, batch, quiet)
    # Folders that share pictures, or are the same, have them judged once.
    column = {entry.path: i for i, entry in enumerate(entries)}
    sides = [(column[one], column[other]) for one, other in matched]
    pairs = []
    for (one, other), (i, j) in zip(matched, sides, strict=True):
        scores = {name: (float(table[r, i]), float(table[r, j])) for r, name in enumerate(names)}
        label = str(one.relative_to(before))
        pairs.append(Pair(label, entries[j].prompt or entries[i].prompt, scores, one, other))
    broken = sum(bool(entry.problem) for entry in entries)
    notes += [f"{broken} pictures could not be read"] if broken else []
    apart = sum(entries[i].prompt != entries[j].prompt for i, j in sides)
    notes += [f"{apart} pairs have different prompts before and after"] if apart else []
    return Comparison(*labels(before, after), tuple(pairs), changes(pairs), tuple(notes))


def line(each: Change) -> str:
    """Write a reward's change in one line."""
    low, high = each.gain_interval
    wins = f"wins {each.win_rate:.0%} [{each.win_interval[0]:.0%}, {each.win_interval[1]:.0%}]"
    gain = f"gain {each.gain:+.4g} [{low:+.4g}, {high:+.4g}]"
    return f"{each.reward}  {each.before:.4g} → {each.after:.4g}  {gain}  {wins}  {each.count} prompts"
