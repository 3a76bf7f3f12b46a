"""`g2rpo pairs`: train from the votes that runs have kept, several times over and without rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .arguments import CommandError

KEPT = (
    *("num_steps", "shift", "mix", "std_floor", "clamp", "kl", "kl_reference", "optimizer", "learning_rate"),
    *("lr_schedule", "warmup_steps", "weight_decay", "max_grad_norm", "ema"),
    *("pair_loss", "pair_beta", "pair_alpha", "pair_scale", "pair_keep", "pair_anchor"),
)
"""Fields of a run's method that say how it draws and learns; the others say how it explores."""
STEPS = "train.steps"


def pair_settings(runs: Sequence[Path], settings: Sequence[str], epochs: int | None) -> list[str]:
    """Return all that is set of the first run's configuration, as --set would: `settings` and the length.

    A number of epochs becomes steps, so that `g2rpo resume` and --set make a run longer as any other.
    """
    from ..config.reading import apply_overrides
    from ..rewards.kept_votes import steps_per_epoch

    given = any(setting.partition("=")[0].strip() == STEPS for setting in settings)
    if given and epochs is not None:
        raise CommandError(f"--epochs and --set {STEPS} both say how long to train; give one of them")
    tree = apply_overrides(pair_config(runs), settings)
    if given:
        return list(settings)
    per_step = tree["train"].get("prompts_per_step", 4)
    people = tree["pairs"].get("from", "votes") == "votes"
    if not isinstance(per_step, int) or per_step < 1:
        return list(settings)  # which the configuration refuses
    return [*settings, f"{STEPS}={(epochs or 4) * steps_per_epoch(runs, per_step, people)}"]


def pair_config(runs: Sequence[Path]) -> dict[str, Any]:
    """Return the configuration of a run of pairs: the first run's, without what explores and judges there."""
    from comfy_g2rpo.files.safe import RunError
    from comfy_g2rpo.recipes import Recipe
    from comfy_g2rpo.run.folder import RunFolder

    content, *_ = [RunFolder.open(run).config() for run in runs]
    tree, recipe, plain = content.get("config"), content.get("recipe"), Recipe()
    if not isinstance(tree, dict) or not isinstance(recipe, dict) or not isinstance(tree.get("model"), dict):
        raise RunError(f"{runs[0]} holds no configuration; restore its config.json, or name another run")
    if "fingerprint" in tree["model"]:
        raise CommandError(
            f"{runs[0]} was made in ComfyUI, whose models are not known here; train there, with the node "
            "Update LoRA on Kept Votes"
        )
    method = {
        name: recipe[name] for name in KEPT if recipe.get(name, getattr(plain, name)) != getattr(plain, name)
    }
    train = {name: value for name, value in tree.get("train", {}).items() if name not in ("steps", "minutes")}
    return {
        **{name: value for name, value in tree.items() if name not in ("out", "pairs")},
        "method": {"name": "g2rpo", "objective": "pairs", **method},
        "rewards": [{"name": "votes"}],
        "heldout_rewards": measures(tree),
        "train": train,
        "pairs": {"runs": [str(Path(run).resolve()) for run in runs]},
    }


def measures(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what measures: what did before, and the rewards that were trained on beside votes."""
    held, trained = tree.get("heldout_rewards", ()), tree.get("rewards", ())
    beside = [
        {name: value for name, value in reward.items() if name not in ("gate", "weight")}
        for reward in trained
        if reward.get("name") != "votes"
    ]
    names = {reward.get("name") for reward in beside}
    return [*beside, *(reward for reward in held if reward.get("name") not in names)]
