"""`g2rpo run` and `g2rpo workflow`: a recipe out of a ComfyUI workflow, and the other way round."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..answers import answer, wanted
from ..arguments import CommandError, Force, Preset, Recipe, Settings
from ..train_here import ChangedInputs, How, Quiet, run_in

if TYPE_CHECKING:
    from ...config.reading import Config

MODELS = "COMFYUI_PATH"
TOLD = ("dtype", "max_sequence_length")
"""What a model's files tell. A run keeps its own: another version of this program may tell otherwise."""


def run(
    workflow: Annotated[
        Path, typer.Argument(metavar="WORKFLOW", help="Workflow of ComfyUI, as saved or in the API format.")
    ],
    show: Annotated[bool, typer.Option("--print", help="Show the recipe as YAML; train nothing.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Run folder [default: runs/ and the run's name in the graph].")
    ] = None,
    models: Annotated[
        list[Path] | None,
        typer.Option(
            help="ComfyUI's models folder, or an extra_model_paths.yaml; repeat it [default: models in "
            "$COMFYUI_PATH]."
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option("--input", help="ComfyUI's input folder, for pictures that the graph loads."),
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="Id of the block that trains, where there are several.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in that folder.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Remove a former run in that folder first.")
    ] = False,
    settings: Settings = None,
    preset: Preset = None,
    changed_inputs: ChangedInputs = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Train what a ComfyUI workflow trains, without ComfyUI; --print shows the recipe."""
    if resume and replace:
        raise CommandError("--resume and --replace exclude each other; give one of them")
    from ...config.reading import apply_overrides, from_dict
    from ...cost.presets import preset_settings
    from ...workflows.model_files import ModelFolders
    from ...workflows.printed_recipe import printed
    from ...workflows.training_recipe import read_workflow

    found = read_workflow(workflow, ModelFolders.of(models or usual_models(), pictures), node)
    given = preset_settings(found.tree, preset, settings or [])
    tree = apply_overrides(found.tree, given)
    config = from_dict(tree)
    for line in () if quiet else found.notes:
        typer.echo(f"note: {line}", err=True)
    if show:
        if not wanted():
            typer.echo(printed(tree), nl=False)
        answer({"recipe": tree, "notes": found.notes})
        return
    folder = out or Path(config.out or Path("runs") / (found.run or workflow.stem))
    if resume:
        config = with_own(folder, found.tree, given)
    run_in(folder, config, given, How(resume, replace, changed_inputs, force, quiet))


def usual_models() -> list[Path]:
    """Return the models folder of the ComfyUI that the environment names, where it has one."""
    place = Path(os.environ.get(MODELS) or os.devnull).expanduser() / "models"
    return [place] if place.is_dir() else []


def with_own(folder: Path, tree: Mapping[str, Any], settings: Sequence[str]) -> Config:
    """Return a graph's configuration with what a run has that the graph itself does not say."""
    from comfy_g2rpo.files.safe import spelt_out
    from comfy_g2rpo.run.folder import RunFolder

    from ...config.reading import apply_overrides, as_made, from_dict

    was = RunFolder(folder).config()
    model = spelt_out(spelt_out(was.get("config")).get("model"))
    kept = {**tree["model"], **{name: model[name] for name in TOLD if name in model}}
    return as_made(from_dict(apply_overrides({**tree, "model": kept}, settings)), was.get("recipe"))


def workflow(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="JSON file to write, for ComfyUI to open.")],
    settings: Settings = None,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a recipe as a workflow that ComfyUI opens: the same training in a block."""
    if out.exists() and not replace:
        raise CommandError(f"{out} exists; choose another --out, or give --replace")
    from comfy_g2rpo.files.safe import write_bytes

    from ...config.reading import load
    from ...workflows.graph_writer import written_workflow

    made = written_workflow(load(recipe, settings or []), Path(recipe).stem)
    write_bytes(out, made.text.encode("utf-8"))
    for line in made.unsaid:
        typer.echo(f"note: {line}", err=True)
    typer.echo(out)
    answer({"file": out, "notes": made.unsaid})
