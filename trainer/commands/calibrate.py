"""`g2rpo calibrate`: how much noise every step takes, or what the kernels' noise costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .answers import Ended, answer
from .arguments import CommandError, Force, Quiet, Recipe, Settings

if TYPE_CHECKING:
    from comfy_g2rpo.exploration.calibration import Round
    from comfy_g2rpo.prompts import Prompts
    from comfy_g2rpo.run.setup import Setup

    from ..config.reading import Config

STRENGTHS = (0.3, 0.5, 0.7, 1.0, 1.2)
"""Strengths that the report tries; a kernel whose noise is full before leaves out those beyond."""


def calibrate(
    recipe: Recipe,
    prompts: Annotated[int, typer.Option(min=1, max=10000, help="Prompts of a round.")] = 16,
    rounds: Annotated[
        int, typer.Option(min=1, max=10000, help="Rounds; each raises or lowers every step's eta once.")
    ] = 20,
    step: Annotated[float, typer.Option(help="By how much a round raises or lowers an eta.")] = 0.05,
    balance: Annotated[
        float,
        typer.Option(
            help="An eta rises while better and worse images differ by less than this share of all, and "
            "falls otherwise."
        ),
    ] = 0.1,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Instead, list for every kernel and some etas what its noise costs, and what a group gets "
            "to learn from.",
        ),
    ] = False,
    out: Annotated[Path, typer.Option(metavar="PNG", help="The plot to write.")] = Path("calibrate.png"),
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite an existing plot.")] = False,
    settings: Settings = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Find how much noise each sampling step takes (DenseGRPO): prints method.etas, draws a plot, trains
    nothing.
    """
    check_number("--step", step, 0, 10)
    check_number("--balance", balance, 0, 1)
    if not report:
        check_place(out, replace)
    from ..config.reading import load

    config = short_run(load(recipe, settings or []), prompts, 1 if report else rounds)
    check_can_be_asked(config)

    def say(text: str) -> None:
        if not quiet:
            typer.echo(text, err=True)

    with prepared(config, force, say) as (setup, check):
        if report:
            answer({"kernels": [*exploration_table(setup, check, say)]})
            return
        found = list(rounds_of(setup, rounds, step, balance, check, say))
    from comfy_g2rpo.files.safe import write_bytes

    from ..reports.calibration_plot import draw_rounds

    write_bytes(out, draw_rounds(found))
    typer.echo(f"method.etas=[{','.join(f'{eta:g}' for eta in found[-1].following)}]")
    typer.echo(out)
    answer({"etas": found[-1].following, "rounds": [each.following for each in found], "file": out})


def check_number(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number that is not above `low` and at most `high`; typer's own bounds let nan through."""
    if not (math.isfinite(value) and low < value <= high):
        raise CommandError(f"{name} is {value:g}; it must be above {low:g} and at most {high:g}")


def check_place(out: Path, replace: bool) -> None:
    """Refuse a plot that cannot be written, before anything is measured."""
    if out.suffix.lower() != ".png":
        raise CommandError(f"--out is {out}; the plot is a picture: name a .png file")
    if out.is_dir():
        raise CommandError(f"--out is {out}, a folder; name a .png file in it")
    if out.exists() and not replace:
        raise CommandError(f"{out} exists; choose another --out, or give --replace")


def short_run(config: Config, prompts: int, rounds: int) -> Config:
    """Return the configuration of a run of as many steps as rounds; nothing but its rewards judges."""
    train = shortened(config, steps=rounds, prompts_per_step=prompts, eval_prompts=1)
    return config.model_copy(update={"train": train, "heldout_rewards": ()})


def shortened(config: Config, **changes: int) -> Any:
    """Return the section `train` of a run without previews."""
    return config.train.model_copy(update={**changes, "preview_width": 0, "preview_height": 0})


def check_can_be_asked(config: Config) -> None:
    """Refuse a recipe that explores nothing, and rewards that nobody answers now."""
    from comfy_g2rpo.methods.recipe_checks import FORWARD

    from ..config.reading import make_recipe

    if (objective := make_recipe(config).objective) in (*FORWARD, "pairs"):
        raise CommandError(
            f"method.objective is {objective}, which explores no step; there is no eta to find"
        )
    check_rewards_answer(config)


def check_rewards_answer(config: Config) -> None:
    """Refuse rewards that nobody answers now."""
    from ..config.reward_checks import VOTES, missing_models

    if any(reward.name == VOTES for reward in config.rewards):
        raise CommandError("rewards has votes, which come after a run has stopped; give another reward here")
    if missing := missing_models(config.rewards):
        raise CommandError(missing)


@contextmanager
def prepared(
    config: Config,
    force: bool,
    say: Callable[[str], None],
    prompts: Prompts | None = None,
    left: str = "nothing was written",
) -> Iterator[tuple[Setup, Callable[[str], None]]]:
    """Load what a run needs; Ctrl-C ends the command between two forwards, and says what it has left."""
    from ..cost.presets import before_drawing
    from ..model.quiet_libraries import quieten_libraries

    for remark in before_drawing(config, force):
        say(remark)
    quieten_libraries()
    import torch
    from accelerate import Accelerator

    from ..run import prepare, stoppable

    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    try:
        with stoppable() as check:
            yield prepare(config, Accelerator(cpu=cpu), prompts=prompts), check
    except KeyboardInterrupt:
        raise Ended(f"interrupted; {left}", 130) from None


def rounds_of(
    setup: Setup,
    rounds: int,
    step: float,
    balance: float,
    check: Callable[[str], None],
    say: Callable[[str], None],
) -> Iterator[Round]:
    """Calibrate a recipe's etas on its model, and say what it costs and how it goes on."""
    from comfy_g2rpo.exploration.calibration import MOST, calibrate
    from comfy_g2rpo.exploration.measuring import FULL_NOISE, measured_gains, noisy_steps, probing_plan

    recipe = setup.recipe
    steps, begin = noisy_steps(recipe, setup.sigmas), recipe.etas or (recipe.eta,) * recipe.num_steps
    if not steps:
        raise CommandError(
            f"no step of {recipe.num_steps} takes noise; choose method.steps: all, or more steps"
        )
    plan, groups = probing_plan(recipe, steps, begin), rounds * setup.pace.prompts_per_step
    say(f"{groups * plan.forwards} forwards and {groups * len(plan.images)} pictures in {rounds} rounds")

    def measure(etas: tuple[float, ...], number: int) -> Any:
        return measured_gains(setup, steps, etas, number, check)

    most = FULL_NOISE.get(recipe.kernel, MOST)
    for number, found in enumerate(calibrate(begin, measure, rounds, step, balance, most), start=1):
        if not any(share == share for share in found.balance.values()):
            raise CommandError(
                f"rewards judged none of the pictures of round {number}; mend them or the prompts"
            )
        say(f"round {number} of {rounds}: {' '.join(f'{eta:g}' for eta in found.following)}")
        yield found


def exploration_table(
    setup: Setup, check: Callable[[str], None], say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Print a table: per kernel and strength the gap of SDE and ODE, and the spread within a group; yield its
    rows.
    """
    from comfy_g2rpo.exploration.measuring import FULL_NOISE, exploring
    from comfy_g2rpo.methods.recipe_options import KERNELS

    names = [reward.name for reward in setup.rewards]
    wide = max(24, *(len(name) + 2 for name in names))
    typer.echo(f"{'kernel':<10}{'eta':>5}" + "".join(f"{name:>{wide}}" for name in names))
    typer.echo(f"{'':<15}" + "".join(f"{'SDE − ODE    spread':>{wide}}" for _ in names))
    for kernel in KERNELS:
        for eta in (eta for eta in STRENGTHS if eta <= FULL_NOISE.get(kernel, eta)):
            say(f"measuring {kernel} at eta {eta:g}")
            measured = exploring(setup, kernel, eta, check)
            cells = (f"{found.gap:+.3f} ± {found.width:.3f}  {found.spread:.3f}" for found in measured)
            typer.echo(f"{kernel:<10}{eta:>5g}" + "".join(f"{cell:>{wide}}" for cell in cells))
            rewards = {name: found._asdict() for name, found in zip(names, measured, strict=True)}
            yield {"kernel": kernel, "eta": eta, "rewards": rewards}
    typer.echo("SDE − ODE: what the noise changes in reward; ± is half of a 95 % interval over prompts.")
    typer.echo("spread: how far apart a group's scores lie, which is what it learns from.")
