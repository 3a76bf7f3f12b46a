"""`g2rpo prior`: learn to move the start noise by what the prompt says; the model stays as it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .answers import answer
from .arguments import CommandError, Force, Quiet, Recipe, Settings
from .calibrate import check_rewards_answer, prepared, shortened

if TYPE_CHECKING:
    from comfy_g2rpo.priors.prior_training import Heldout, Look, PriorTraining
    from comfy_g2rpo.run.setup import Setup

    from ..config.reading import Config


def prior(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The noise prior to write.")] = Path(
        "prior.safetensors"
    ),
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite an existing file.")] = False,
    settings: Settings = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Train a noise prior by a recipe's prompts, rewards and steps; Ctrl-C keeps the best so far."""
    check_file(out, replace)
    from ..config.reading import load

    config = load(recipe, settings or [])
    check_rewards_answer(config)

    def say(text: str) -> None:
        if not quiet:
            typer.echo(text, err=True)

    short = config.model_copy(update={"train": shortened(config)})
    with prepared(short, force, say, left=f"what was learned is in {out}, if a step was made") as ready:
        setup, check = ready
        check_prompts_to_measure(setup)
        kept = learn(setup, config, lambda: check("rollout"), out, say)
    typer.echo(out)
    gains = {name: gain._asdict() for name, gain in kept.best.gains.items()}
    answer({"file": out, "steps": kept.looked, "gains": gains, "verdict": kept.verdict()})


def check_file(out: Path, replace: bool) -> None:
    """Refuse a file that cannot be written, before anything is trained."""
    if out.suffix.lower() != ".safetensors":
        raise CommandError(f"--out is {out}; a noise prior is a .safetensors file: name one")
    if out.is_dir():
        raise CommandError(f"--out is {out}, a folder; name a .safetensors file in it")
    if out.exists() and not replace:
        raise CommandError(f"{out} exists; choose another --out, or give --replace")


def check_prompts_to_measure(setup: Setup) -> None:
    """Refuse a recipe without two held-out prompts, whose shifts are compared."""
    count = len(setup.prompts.heldout[: setup.pace.eval_prompts or None])
    if count < 2:
        raise CommandError(
            f"held-out prompts: there is {count} to measure by; give prompts.heldout at least 2, and "
            "train.eval_prompts 0 or 2 and more"
        )


def learn(
    setup: Setup, config: Config, check: Callable[[], None], out: Path, say: Callable[[str], None]
) -> Keeper:
    """Train for the recipe's steps or minutes, measure at its evaluations, and keep the best file."""
    from comfy_g2rpo.priors.prior_settings import PriorSettings
    from comfy_g2rpo.priors.prior_training import PriorTraining

    training = PriorTraining(setup, PriorSettings(**dict(config.prior)), check)
    forwards, images = training.price()
    say(f"{setup.pace.steps} steps, each of {forwards} forwards and {images} images")
    keeper = Keeper(training, config, out)
    heldout = training.heldout(setup.pace.seed)
    means = ", ".join(f"{name} {mean:.3f}" for name, mean in heldout.before.means().items())
    typer.echo(f"ordinary noise: {means}, diversity {heldout.diversity:.3f}")
    begin = time.monotonic()
    try:
        while not ended(setup, training.steps, time.monotonic() - begin):
            training.step()
            if setup.pace.eval_every and training.steps % setup.pace.eval_every == 0:
                keeper.look(heldout)
        if keeper.looked != training.steps:
            keeper.look(heldout)
    except KeyboardInterrupt:
        keeper.save_unmeasured()
        raise
    typer.echo(keeper.verdict())
    return keeper


def ended(setup: Setup, steps: int, seconds: float) -> bool:
    """Return whether a training has had its steps or minutes."""
    minutes = setup.pace.minutes
    return steps >= setup.pace.steps or (steps > 0 and minutes is not None and seconds > 60 * minutes)


class Keeper:
    """Measures a training and writes its file whenever the held-out gain is the best so far."""

    def __init__(self, training: PriorTraining, config: Config, out: Path) -> None:
        from comfy_g2rpo.priors.noise_prior import Vectors

        self.training, self.out = training, out
        self.model = Vectors.of(training.setup.policy.transformer.named_parameters())
        self.notes = {
            "model": Path(config.model.transformer or config.model.path).name,
            "family": str(config.model.family),
            "rewards": ", ".join(reward.name for reward in training.setup.rewards),
            "size": f"{config.model.width}x{config.model.height}",
            "estimator": training.settings.estimator,
        }
        self.best: Look | None = None
        self.looked = -1

    def look(self, heldout: Heldout) -> None:
        """Measure, tell, and write the file where it is better than before."""
        found = self.training.look(heldout, self.training.setup.pace.seed)
        self.looked = self.training.steps
        typer.echo(f"step {self.looked}: {found.line()}")
        if self.best is None or self.merit(found, heldout) > self.merit(self.best, heldout):
            self.best = found
            gained = "; ".join(f"{name} {gain}" for name, gain in found.gains.items())
            control = "; ".join(f"{name} {gain}" for name, gain in found.others.items())
            self.save({"kl": f"{found.kl:.4g}", "gain": gained, "gain_with_another_prompts_shift": control})

    def merit(self, look: Look, heldout: Heldout) -> float:
        """Weigh up the gains of the rewards that are trained on, each in spreads of its own scores."""
        spread = dict(zip(heldout.before.names, heldout.before.scores.double(), strict=True))
        total = 0.0
        for name, weight in self.training.setup.trained.items():
            known = spread[name][~spread[name].isnan()]
            wide = known.std().item() if len(known) > 1 else 0.0
            total += weight * look.gains[name].mean / (wide or 1.0)
        return total

    def save(self, measured: dict[str, str]) -> None:
        """Write the file."""
        from comfy_g2rpo.priors.noise_prior import save_prior

        save_prior(
            self.out,
            self.training.prior,
            self.model,
            {**self.notes, "steps": str(self.training.steps), **measured},
        )

    def save_unmeasured(self) -> None:
        """Write the file where a training is stopped before its first look."""
        if self.best is None and self.training.steps:
            self.save({})

    def verdict(self) -> str:
        """Say what the kept file's numbers mean."""
        found, trained = self.best, self.training.setup.trained
        if not any(found.gains[name].sure for name in trained):
            return "kept the best, but no gain is shown: the 95 % interval over prompts (±) reaches 0"
        if any(found.beyond[name].sure for name in trained):
            return "kept the best: it gains, and more by a prompt's own shift than by another prompt's"
        return (
            "kept the best: it gains, but as much by another prompt's shift. What was learned is one shift "
            "for all prompts"
        )
