"""What came of a run: its rewards before and after, the best of its evaluations, and the LoRA to use.

Nothing in a run folder can keep a summary from being written: what is damaged there is named and left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files.safe import FileError, RunError
from .evaluation import Evaluation, compare
from .folder import RunFolder
from .setup import Learner, Setup
from .watch import best_step, evaluated, judging


def summarise(
    setup: Setup, learner: Learner, folder: RunFolder, name: str
) -> tuple[dict[str, Any], list[str]]:
    """Return the summary of a run by the recipe `name`, and what is to be said about it."""
    rows, notes = folder.metrics(), []
    names = [reward.name for reward in setup.rewards]
    steps = [row for row in rows if "nfe" in row]
    count = max(len(steps) // 10, 1)
    summary: dict[str, Any] = {"recipe": name, "steps": learner.step, "seed": setup.pace.seed}
    summary["reward_before"] = means(steps[:count], names)
    summary["reward_after"] = means(steps[-count:], names)
    summary |= verdict(setup, learner, folder, rows)
    if setup.prompts.heldout and setup.judges:
        try:
            first = first_look(rows)
            before, after = (Evaluation.read(folder, step) for step in (first, summary["lora_step"]))
            check_comparable(before, after)
            summary |= {
                "heldout_before": before.means(),
                "heldout_after": after.means(),
                "heldout_gain": compare(before, after),
            }
            summary |= {"best": best_look(setup, folder, rows, before)}
        except FileError as error:
            notes.append(f"held-out gains are left out of the summary: {error}")
    return summary | {"seconds": learner.seconds, "forwards": learner.forwards}, notes


def check_comparable(before: Evaluation, after: Evaluation) -> None:
    """Refuse, by RunError, to compare evaluations of different rewards or held-out prompts."""
    if (before.names, before.prompts) != (after.names, after.prompts):
        raise RunError("held-out prompts or rewards have changed since the first evaluation")


def means(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float | None]:
    """Average each reward over rows of metrics; None where no row could judge."""
    found = {}
    for name in names:
        known = [value for row in rows if (value := row.get(f"reward/{name}/mean")) is not None]
        found[name] = math.fsum(known) / len(known) if known else None
    return found


def first_look(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the step of a run's first evaluation: that of the untrained model, unless rows are missing."""
    return int(next(iter(evaluated(rows)), {}).get("step", 0))


def verdict(
    setup: Setup, learner: Learner, folder: RunFolder, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what ended the run, what the watch saw, and the LoRA to use."""
    best = best_step(rows, setup.trained, setup.measures)
    stopped = setup.pace.watch == "stop" and bool(alarm_at(rows, learner.step))
    saved = {int(place.name): place for place in folder.saved()}
    chosen = saved[best] if stopped and best in saved else folder.latest()
    looks = evaluated(rows)
    return {
        "stopped_by": "watch" if stopped else "steps" if learner.step >= setup.pace.steps else "minutes",
        "best_step": best,
        "alarms": [{"step": row["step"], "text": row["alarm"]} for row in looks if row.get("alarm")],
        "sign": looks[-1].get("sign", "") if looks else "",
        "lora_step": int(chosen.name),
        "lora": f"{chosen.relative_to(folder.path)}/lora.safetensors",
    }


def alarm_at(rows: Sequence[Mapping[str, Any]], step: int) -> str:
    """Return the alarm of a step's evaluation, or nothing."""
    return next((str(row["alarm"]) for row in rows if row.get("step") == step and row.get("alarm")), "")


def best_look(
    setup: Setup, folder: RunFolder, rows: Sequence[Mapping[str, Any]], before: Evaluation
) -> dict[str, Any] | None:
    """Return the best evaluation by the held-out rewards that decide: its scores, gains and checkpoint."""
    step = best_step(rows, setup.trained, setup.measures)
    if step is None:
        return None
    row = next(row for row in evaluated(rows) if row["step"] == step)
    names = [name for name, weight in judging(rows, setup.trained, setup.measures).items() if weight]
    after = Evaluation.read(folder, step)
    check_comparable(before, after)
    gains = compare(before, after)
    kept = {int(place.name): place for place in folder.saved()}.get(step)
    return {
        "step": step,
        "looks": len(evaluated(rows)),
        "scores": {
            name: {"mean": row.get(f"heldout/{name}/mean"), "ci95": row.get(f"heldout/{name}/ci95")}
            for name in names
        },
        "gains": {name: gains[name] for name in names if name in gains},
        "checkpoint": str(kept.relative_to(folder.path)) if kept else None,
    }


def best_lines(summary: Mapping[str, Any]) -> list[str]:
    """Say which evaluation was best, how sure that is, and where its checkpoint lies."""
    best = summary.get("best")
    if not best:
        return []
    if best["looks"] > 1 and best["step"] == 0:
        return [f"best by held-out: step 0, the untrained model: none of {best['looks']} evaluations beat it"]
    scores = ", ".join(
        f"{name} {number(found['mean'])} ± {number(found['ci95'])}" for name, found in best["scores"].items()
    )
    place = best["checkpoint"] or "whose checkpoint is gone"
    lines = [f"best by held-out: step {best['step']} ({scores}), {place}"]
    for name, gain in best["gains"].items():
        chance = "" if gain["p"] is None or gain["p"] != gain["p"] else f", p = {gain['p']:.2g}"
        lines.append(
            f"  {name} {gain['mean']:+.3f} ± {number(gain['ci95'])} over the untrained model{chance}"
        )
    if best["looks"] > 2:
        lines.append(
            f"  the best of {best['looks']} evaluations looks better than it is: measure it on other prompts "
            "before you trust the last digits"
        )
    return lines


def number(value: float | None) -> str:
    """Write a number in three digits, a dash for none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"


def best_evaluation(folder: RunFolder) -> int:
    """Return the step of a run's best evaluation by its held-out rewards; RunError where there is none."""
    config = folder.config().get("config")
    trained, measures = (
        weights_of(config.get(part) if isinstance(config, dict) else None)
        for part in ("rewards", "heldout_rewards")
    )
    step = best_step(folder.metrics(), trained, measures)
    if step is None:
        raise RunError(
            f"{folder.path} has no evaluation that tells which step is best; name held-out prompts and a "
            "reward that measures them, or leave --best out"
        )
    return step


def best_checkpoint(folder: RunFolder) -> Path:
    """Return the checkpoint of a run's best evaluation; RunError where there is none, or it is gone."""
    step = best_evaluation(folder)
    for place in folder.saved():
        if int(place.name) == step:
            return place
    raise RunError(
        f"{folder.path}: step {step} is the best by held-out rewards, but its checkpoint is gone; leave "
        "--best out for the result of the run"
    )


def weights_of(rewards: Any) -> dict[str, float]:
    """Read the weights of a configuration's rewards, which are sections or mere names."""
    found = {}
    for reward in rewards if isinstance(rewards, list) else []:
        named = reward if isinstance(reward, Mapping) else {"name": reward}
        found[str(named.get("name"))] = float(named.get("weight", 1.0))
    return found
