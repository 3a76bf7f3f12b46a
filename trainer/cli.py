"""The command line `g2rpo`: its program, and the commands that have no file of their own."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from .cluster.cluster_options import (
    RayAddress,
    RewardWorkers,
    RolloutWorkers,
    Staleness,
    cluster_of,
    cluster_settings,
)
from .commands.answers import Ended, Program, answer, answering, explain, leave, wanted
from .commands.arguments import Best, CommandError, Force, Preset, Recipe, Settings, lora_of, refuse_best
from .commands.calibrate import calibrate
from .commands.compare import compare
from .commands.doctor import doctor
from .commands.elsewhere.remote import remote_app
from .commands.elsewhere.run_graph import run, workflow
from .commands.elsewhere.serve_jobs import serve_jobs
from .commands.elsewhere.worker import worker
from .commands.exit_codes import DONE, UNFORESEEN, leave_at_once, ran_out, several
from .commands.export import check_lora, export
from .commands.rewards import rewards_app
from .commands.score import score
from .commands.search_images import search
from .commands.train_here import ChangedInputs, How, Quiet, run_in
from .commands.train_prior import prior
from .commands.vote import vote
from .config.bundled import bundled_recipes
from .quiet import quieten_notices

if TYPE_CHECKING:
    from .config.reading import Config

# PyTorch and diffusers are imported inside the commands, so that --help answers at once.
app = Program(
    help="Align flow models with rewards by G²RPO.",
    epilog=f"Bundled recipes: {', '.join(bundled_recipes())}.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def print_version(asked: bool) -> None:
    """Print the version and leave, if it was asked for."""
    if asked:
        version()
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and leave."),
    ] = False,
) -> None:
    """Align flow models with rewards by G²RPO."""


@app.command()
def train(
    recipe: Recipe,
    out: Annotated[
        Path | None, typer.Option(help="Run folder [default: the recipe's, or runs/<recipe>].")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in that folder, as `g2rpo resume` does.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Remove a former run in that folder first.")
    ] = False,
    settings: Settings = None,
    preset: Preset = None,
    changed_inputs: ChangedInputs = False,
    force: Force = False,
    quiet: Quiet = False,
    ray: RayAddress = None,
    rollout_workers: RolloutWorkers = None,
    reward_workers: RewardWorkers = None,
    staleness: Staleness = None,
) -> None:
    """Train a LoRA by a recipe; Ctrl-C stops it and `g2rpo resume` goes on."""
    if resume and replace:
        raise CommandError("--resume and --replace exclude each other; give one of them")
    from .config.reading import load, load_run
    from .cost.presets import preset_settings

    cluster = cluster_of(ray, rollout_workers, staleness, reward_workers)
    given = preset_settings(recipe, preset, settings or [])
    config = load(recipe, given)
    folder = out or Path(config.out or Path("runs") / Path(recipe).stem)
    made = load_run(folder, given, recipe) if resume else config
    if more := cluster_settings(made, cluster, resume, quiet):
        given = [*given, *more]
        made = load_run(folder, given, recipe) if resume else load(recipe, given)
    run_in(folder, made, given, How(resume, replace, changed_inputs, force, quiet, cluster))


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    settings: Settings = None,
    changed_inputs: ChangedInputs = False,
    force: Force = False,
    quiet: Quiet = False,
    ray: RayAddress = None,
    rollout_workers: RolloutWorkers = None,
    reward_workers: RewardWorkers = None,
    staleness: Staleness = None,
) -> None:
    """Continue a run after Ctrl-C or a crash, bit for bit; --set train.steps=600 makes it longer."""
    from .config.reading import load_run

    cluster, given = cluster_of(ray, rollout_workers, staleness, reward_workers), settings or []
    config = load_run(run, given)
    if more := cluster_settings(config, cluster, True, quiet):
        given = [*given, *more]
        config = load_run(run, given)
    run_in(run, config, given, How(True, False, changed_inputs, force, quiet, cluster))


@app.command()
def pairs(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders with votes; the first sets the rest.")
    ],
    out: Annotated[Path | None, typer.Option(help="New run folder [default: RUN-pairs].")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="How often every vote is learned from [default: 4].")
    ] = None,
    settings: Settings = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Remove a former run in that folder first.")
    ] = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Train a new LoRA from the votes that runs have kept, several times over and without rollouts."""
    from .commands.train_pairs import pair_config, pair_settings
    from .config.reading import apply_overrides, from_dict

    given = pair_settings(runs, settings or [], epochs)
    config = from_dict(apply_overrides(pair_config(runs), given))
    place = runs[0].resolve()
    how = How(replace=replace, force=force, quiet=quiet)
    run_in(out or place.with_name(f"{place.name}-pairs"), config, given, how)


@app.command()
def plan(
    recipe: Recipe,
    settings: Settings = None,
    preset: Preset = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure the time again, even if it was measured here within a day."),
    ] = False,
) -> None:
    """Say what a recipe will cost before anything runs: forwards, pictures, time, memory."""
    from .config.reading import load
    from .cost.presets import preset_settings
    from .cost.price import price

    config = load(recipe, preset_settings(recipe, preset, settings or []))
    found = price(config, recipe, measure)
    for line in found.lines():
        typer.echo(line)
    answer(found.content())


@app.command()
def sample(
    prompt: Annotated[list[str], typer.Option(help="What to draw; repeat for several pictures.")],
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|RUN", help="Recipe, or run folder, whose model and schedule are used."
        ),
    ] = "demo",
    model: Annotated[str | None, typer.Option(help="Folder of another model.")] = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA file [default for a run: its result].")] = None,
    negative: Annotated[
        str | None, typer.Option(help="Negative prompt: what not to draw; needs a model.guidance above 1.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the start noise.")] = 0,
    tail: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the steps, the last ones, that runs without the LoRA."),
    ] = 0.0,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Picture that a prompt starts from; one for all, or as many as prompts."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="PNG to write; several are numbered, clips lie beside as WebP.")
    ] = Path("sample.png"),
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite existing pictures.")] = False,
    best: Best = False,
    settings: Settings = None,
    force: Force = False,
) -> None:
    """Draw pictures with a model, with or without a LoRA."""
    images = image or []
    if len(images) not in (0, 1, len(prompt)):
        raise CommandError(
            f"--image is given {len(images)} times for {len(prompt)} prompts; give one for all, or one "
            "for each"
        )
    places = free_places(out, len(prompt), replace)
    given = [*(settings or []), *model_settings(model, negative)]
    config, own_lora = configuration(recipe, given, best)
    from .cost.presets import before_drawing
    from .model.quiet_libraries import quieten_libraries

    for line in before_drawing(config, force):
        typer.echo(line, err=True)
    quieten_libraries()
    from comfy_g2rpo.files.save_pictures import save_picture
    from comfy_g2rpo.run.scorer import levels

    from .model.inference import draw, note_of

    asked = from_pictures(prompt, images) if images else prompt
    pictures = draw(config, asked, seed, lora or own_lora, tail)
    for place, text, picture in zip(places, prompt, pictures, strict=True):
        note = note_of(config, text, seed, lora or own_lora, tail)
        save_picture(place, levels(picture) if picture.ndim == 4 else picture, note)
        typer.echo(place)
    answer({"files": places, "prompts": prompt, "seed": seed, "lora": lora or own_lora})


def model_settings(path: str | None, negative: str | None) -> list[str]:
    """Write options of a command as settings of the recipe's model."""
    given = {"path": path or None, "negative_prompt": negative}
    return [
        f"model.{name}={json.dumps(text, ensure_ascii=False)}"
        for name, text in given.items()
        if text is not None
    ]


def from_pictures(prompts: Sequence[str], images: Sequence[Path]) -> list[str]:
    """Let every prompt start from its picture, or all of them from the only one."""
    from comfy_g2rpo.prompts import starting, with_columns

    pairs = zip(prompts, [*images] * (len(prompts) // len(images)), strict=True)
    return [
        starting(with_columns(text, {"image": str(file)}, "--image"), Path(), "--image")
        for text, file in pairs
    ]


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]) -> None:
    """Draw a run's curves and its before/after picture again, from its folder; say where its time went."""
    from comfy_g2rpo.run.folder import RunFolder

    from .reports.report import write_report
    from .reports.time_shares import of_workers, shares_of, time_table

    folder = RunFolder.open(run)
    written = write_report(folder, partial(typer.echo, err=True))
    for path in written:
        typer.echo(path)
    for line in time_table(rows := folder.metrics()):
        typer.echo(line, err=True)
    found = {"seconds": shares_of(rows), "workers": of_workers(rows)}
    answer({"run": run, "files": written, **found, "summary": folder.summary()})


app.command()(run)
app.command()(workflow)
app.command()(calibrate)
app.command()(search)
app.command()(prior)
app.command()(score)
app.command()(compare)
app.command()(vote)
app.command()(worker)
app.command()(export)
app.command()(check_lora)
app.command("serve")(serve_jobs)
app.add_typer(remote_app, name="remote")
app.command()(doctor)
app.add_typer(rewards_app, name="rewards")


@app.command()
def options(
    pattern: Annotated[
        str,
        typer.Argument(
            metavar="[PATTERN]", help="Part of a name or sentence, or a name with *, such as 'method.*'."
        ),
    ] = "",
) -> None:
    """List the options of a recipe: default, type, range or choices, and what each does."""
    from .config.recipe_fields import options as known
    from .config.recipe_fields import similar

    found = known(pattern)
    if not found:
        near = f"; did you mean {', '.join(similar(pattern))}?" if similar(pattern) else ""
        raise CommandError(f"no option matches {pattern[:80]!r}{near or '; leave it out to list all'}")
    for option in found:
        typer.echo(f"{option.line()}\n    {option.sentence}")
    answer({"options": [asdict(option) for option in found]})


@app.command()
def version() -> None:
    """Print the version."""
    from comfy_g2rpo import __version__

    typer.echo(__version__)
    answer({"version": __version__})


def free_places(out: Path, count: int, replace: bool) -> list[Path]:
    """Return where so many pictures go: to a file, or to numbered ones; existing ones are refused."""
    numbered = [out.with_name(f"{out.stem}-{i:03d}{out.suffix}") for i in range(count)]
    places = [out] if count == 1 else numbered
    for place in places:
        if place.exists() and not replace:
            raise CommandError(f"{place} exists; choose another --out, or give --replace")
    return places


def configuration(source: str, settings: list[str], best: bool = False) -> tuple[Config, Path | None]:
    """Load a recipe, or a run's settings and its LoRA: the best where the watch ended it, else the newest."""
    from comfy_g2rpo.run.folder import RunFolder, is_run

    from .config.reading import apply_overrides, from_dict, load

    if not is_run(Path(source)):
        refuse_best(best, source)
        return load(source, settings), None
    run = RunFolder(Path(source))
    lora = lora_of(run.path, best) if best or run.latest() else None
    return from_dict(apply_overrides(run.config()["config"], settings)), lora


def main(arguments: list[str] | None = None) -> None:
    """Run a command; an error that a user can fix becomes one line and exit code 2."""
    quieten_notices()
    try:
        with answering("--json" in (sys.argv[1:] if arguments is None else arguments)):
            obey(arguments)
    except SystemExit as left:
        leave_at_once(left.code)
        raise
    except Exception:
        if several():
            traceback.print_exc()
            leave_at_once(UNFORESEEN)
        raise


def obey(arguments: list[str] | None) -> None:
    """Run a command, and leave with its exit code."""
    try:
        code = app(arguments, standalone_mode=not wanted())
    except Ended as error:
        explain(error, error.code, label="")
    except Exception as error:
        if usage := getattr(error, "format_message", None):
            explain(usage(), error.exit_code)
        if ran_out(error):
            explain(
                "out of memory, even for one latent at a time; g2rpo plan RECIPE says what is needed, "
                "--preset SIZE fits a smaller card"
            )
        if isinstance(error, (ValueError, OSError)) and ours(error.__traceback__):
            explain(error)
        answer({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
        raise
    leave(code if isinstance(code, int) else DONE)  # who was not asked for JSON has left before


def ours(traceback: TracebackType | None) -> bool:
    """Return whether this project's own code raised an error, which it then words for the user."""
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    module = traceback.tb_frame.f_globals.get("__name__", "") if traceback else ""
    return module.partition(".")[0] in ("comfy_g2rpo", (__package__ or "").partition(".")[0])


if __name__ == "__main__":
    main()
