"""`g2rpo search`: better images from the model as it is, for a budget of forwards; nothing is trained."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from comfy_g2rpo.options import nearest
from comfy_g2rpo.sampling.search_settings import READS, SearchSettings

from .answers import answer
from .arguments import CommandError, Force, Quiet, Recipe, Settings
from .calibrate import check_rewards_answer, prepared, shortened

if TYPE_CHECKING:
    from comfy_g2rpo.sampling.prompt_search import Searcher

    from ..config.reading import Config
    from ..reports.search_table import Row

MOST = 1_000_000
"""Forwards of one search."""


class Job(NamedTuple):
    """One search."""

    prompt: str
    seed: int
    budget: int
    method: str


def search(
    recipe: Recipe,
    methods: Annotated[
        str,
        typer.Option(
            help=f"Searches, by commas; the first is what the others are compared with: {', '.join(READS)}."
        ),
    ] = "best_of_n,coarse_first,particles",
    budgets: Annotated[str, typer.Option(help="Forwards to spend on an image; several by commas.")] = "64",
    seeds: Annotated[int, typer.Option(min=1, max=100_000, help="Seeds per prompt, from train.seed on.")] = 1,
    prompts: Annotated[int, typer.Option(min=0, help="How many of the held-out prompts; 0 takes all.")] = 4,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt of your own instead; repeat for several.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="For the images and search.csv.")] = Path(
        "found"
    ),
    replace: Annotated[
        bool, typer.Option("--replace", help="Overwrite what an earlier search has left there.")
    ] = False,
    settings: Settings = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Find better images for a budget of forwards, without training: writes the best, compares searches."""
    names, spent = method_names(methods), numbers(budgets)
    if (out / "search.csv").exists() and not replace:
        raise CommandError(f"{out / 'search.csv'} exists; choose another --out, or give --replace")
    from ..config.reading import load

    config = load(recipe, settings or [])
    check_rewards_answer(config)
    texts, first = texts_of(config, prompt or [], prompts), config.train.seed
    jobs = [
        Job(text, seed, budget, name)
        for text in texts
        for seed in range(first, first + seeds)
        for budget in spent
        for name in names
    ]
    from ..reports.search_table import table

    rows = run_jobs(config, jobs, out, force, quiet)
    for line in table(rows):
        typer.echo(line)
    typer.echo(out)
    answer({"folder": out, "searches": [asdict(row) for row in rows]})


def run_jobs(config: Config, jobs: Sequence[Job], out: Path, force: bool, quiet: bool) -> list[Row]:
    """Run all searches, and write what each has found; what there is stays when one fails or is stopped."""
    from comfy_g2rpo.prompts import Prompts
    from comfy_g2rpo.sampling.prompt_search import Searcher

    from ..reports.search_table import write_rows

    def say(text: str) -> None:
        if not quiet:
            typer.echo(text, err=True)

    texts = tuple(dict.fromkeys(job.prompt for job in jobs))
    train = shortened(config, steps=1, prompts_per_step=1, eval_prompts=len(texts))
    short, only = config.model_copy(update={"train": train}), Prompts(texts[:1], texts)
    rows: list[Row] = []
    try:
        with prepared(short, force, say, only, f"what was found so far is in {out}") as (setup, check):
            searcher = Searcher(setup, lambda: check("search"))
            check_budgets([job.budget for job in jobs], searcher)
            settings = SearchSettings(**dict(config.search))
            for method in {job.method for job in jobs}:
                settings.check(method, searcher.price > 1)
            say(f"{len(jobs)} searches, up to {sum(job.budget for job in jobs)} forwards")
            for row in found(searcher, settings, jobs, out):
                rows.append(row)
                say(f"{len(rows)} of {len(jobs)}: {row.picture}")
    finally:
        if rows:
            write_rows(out / "search.csv", rows)
    return rows


def method_names(text: str) -> list[str]:
    """Read names of searches."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in READS:
            raise CommandError(
                f"--methods has {name[:80]!r}{nearest(name, READS)}; choose from: {', '.join(READS)}"
            )
    if not names:
        raise CommandError(f"--methods is empty; choose from: {', '.join(READS)}")
    return names


def numbers(text: str) -> list[int]:
    """Read budgets."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part[:9]) <= MOST for part in parts):
        raise CommandError(
            f"--budgets is {text[:80]!r}; give whole numbers from 1 to {MOST}, such as 32,64,128"
        )
    return list(dict.fromkeys(map(int, parts)))


def texts_of(config: Config, own: Sequence[str], count: int) -> list[str]:
    """Return the prompts to search for."""
    from comfy_g2rpo.prompts import prompts_of

    from ..config.file_checks import read_prompts

    if own:
        return prompts_of(own, "--prompt")[0]
    return list(read_prompts(config).heldout[: count or None])


def check_budgets(budgets: Sequence[int], searcher: Searcher) -> None:
    """Refuse budgets that do not pay for one image."""
    least = searcher.setup.recipe.num_steps * searcher.price
    if min(budgets) < least:
        why = f"{searcher.setup.recipe.num_steps} steps" + (
            ", twice each with guidance" if searcher.price > 1 else ""
        )
        raise CommandError(f"--budgets has {min(budgets)}; one image takes {least} forwards ({why})")


def found(searcher: Searcher, settings: SearchSettings, jobs: Sequence[Job], out: Path) -> Iterator[Row]:
    """Search, save the best image of each, and score it by every reward."""
    from comfy_g2rpo.files.save_pictures import save_picture

    from ..reports.search_table import Row

    judges = searcher.setup.judges
    place = {text: i for i, text in enumerate(dict.fromkeys(job.prompt for job in jobs))}
    for job in jobs:
        begin = time.perf_counter()
        result = searcher.find(job.method, settings, job.budget, job.prompt, job.seed)
        seconds, best = time.perf_counter() - begin, result.found[0]
        scores = searcher.scores(judges, best.latent[None], job.prompt)[:, 0].tolist()
        by_name = {judge.name: score for judge, score in zip(judges, scores, strict=True)}
        picture = f"{place[job.prompt]:04d}_seed{job.seed}_{job.method}_{job.budget}.png"
        note = {"prompt": str(job.prompt), "seed": job.seed, "method": job.method, "budget": job.budget}
        save_picture(out / picture, searcher.images(best.latent[None])[0], {**note, "scores": by_name})
        forwards = result.forwards * searcher.price
        spent = {"forwards": forwards, "scored": result.scored, "seconds": seconds}
        yield Row(*job[:2], job.method, job.budget, **spent, picture=picture, name=best.name, scores=by_name)
