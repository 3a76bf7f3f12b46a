"""Tables and plot of the learning benchmark, from recorded runs alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from learning_arms import ARMS, OWN, bare, setting_of
from learning_runs import seconds_of
from learning_tuning import tried

Run = dict[str, Any]
BLUE, ORANGE, GREEN = "#0072B2", "#C04A00", "#00785A"


class Measure(NamedTuple):
    """What is read off a run's curve: the gain in a reward where a budget, "cpu", "work" or "updates", was
    spent.
    """

    reward: str
    budget: str
    goal: float

    @property
    def title(self) -> str:
        """Name the column."""
        return f"{self.reward}, " + (
            f"{self.goal:g} CPU s" if self.budget == "cpu" else f"{self.goal:,.0f} {self.budget}"
        )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half width of the 95 % interval (Student's t)."""
    from scipy.stats import t

    mean, count = sum(values) / len(values), len(values)
    if count < 2:
        return mean, math.nan
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    return mean, float(t.ppf(0.975, count - 1)) * spread / math.sqrt(count)


def reached(run: Run, budget: str, goal: float) -> dict[str, float]:
    """Return the first point of a run's curve at which a budget, "cpu", "work" or "updates", was spent."""
    return next(point for point in run["curve"] if point[budget] >= goal)


def holds(run: Run, measure: Measure) -> bool:
    """Say whether a run had the budget."""
    return measure.goal in (seconds_of(run) if measure.budget == "cpu" else [run.get(measure.budget)])


def value(run: Run, measure: Measure) -> float:
    """Read a measure off a run."""
    return reached(run, measure.budget, measure.goal)[measure.reward]


def measures(runs: Sequence[Run]) -> list[Measure]:
    """List what the runs have: agreement at every budget of CPU time, work and updates, strict at those of
    time.
    """
    seconds = sorted({goal for run in runs for goal in seconds_of(run)})
    found = [Measure("agreement", "cpu", goal) for goal in seconds]
    for budget in ("work", "updates"):
        goals = sorted({run[budget] for run in runs if run.get(budget)})
        found += [Measure("agreement", budget, goal) for goal in goals]
    return found + [Measure("strict", "cpu", goal) for goal in seconds]


def by_arm(runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Sort runs by arm and seed; of two of the same seed the one with more budgets stays."""
    found: dict[str, dict[int, Run]] = {}
    for run in sorted(runs, key=lambda run: len(seconds_of(run))):
        found.setdefault(run["arm"], {})[run["seed"]] = run
    return found


def cell(values: Sequence[float], seeds: int) -> str:
    """Write mean and interval, and the number of seeds where it is not that of the row."""
    if not values:
        return "–"
    mean, width = interval(values)
    return f"{mean:+.3f} ± {width:.3f}" + ("" if len(values) == seeds else f" ({len(values)})")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Write a Markdown table."""
    return [
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def gains(arms: Mapping[str, Mapping[int, Run]], columns: Sequence[Measure]) -> list[str]:
    """Tabulate the gain of every arm by every measure, and where its mean agreement is highest."""
    times = [measure for measure in columns if (measure.reward, measure.budget) == ("agreement", "cpu")]
    plateau = ["best mean agreement, at"] if len(times) > 1 else []
    rows = []
    for arm, runs in arms.items():
        held = [[value(run, m) for run in runs.values() if holds(run, m)] for m in columns]
        cells = [cell(values, len(runs)) for values in held]
        if plateau:
            means = {m.goal: sum(v) / len(v) for m, v in zip(columns, held, strict=True) if m in times and v}
            best = max(means, key=lambda goal: means[goal])
            cells.append(f"{means[best]:+.3f}, {best:g} CPU s")
        rows.append([arm, str(len(runs)), *cells])
    return table(["arm", "seeds", *(measure.title for measure in columns), *plateau], rows)


def settings(arms: Mapping[str, Mapping[int, Run]], tuning: Sequence[Run]) -> list[str]:
    """Tabulate what each arm was and did: setting, tries, and updates and work at the first budget."""
    rows = []
    for arm, runs in arms.items():
        some = list(runs.values())
        rate, weights, prompts, average, form = setting_of(some[0])
        first = min(goal for run in some for goal in seconds_of(run))
        at = [reached(run, "cpu", first) for run in some if first in seconds_of(run)]
        updates, work = (sum(point[name] for point in at) / len(at) for name in ("updates", "work"))
        tries = str(len(tried(tuning, arm)) or "–")
        kept = [arm, form, f"{rate:g}", weights, str(prompts), f"{average:g}", tries, str(len(runs))]
        rows.append([*kept, f"{updates:.0f}", f"{work:,.0f}"])
    heads = ["arm", "form", "lr", "weights", "prompts", "average", "tries", "seeds", "updates", "work"]
    return table(heads, rows)


def differences(
    arms: Mapping[str, Mapping[int, Run]], one: str, others: Sequence[str], columns: Sequence[Measure]
) -> list[str]:
    """Tabulate one arm minus others on the seeds that both have: same prompts, same start noises."""
    rows = [[other, *paired(arms[one], arms[other], columns)] for other in others]
    return table([f"{one} minus", "seeds", *(measure.title for measure in columns)], rows)


def paired(one: Mapping[int, Run], other: Mapping[int, Run], columns: Sequence[Measure]) -> list[str]:
    """Write the number of common seeds, and the paired difference by every measure."""
    seeds = [seed for seed in one if seed in other]
    cells = []
    for measure in columns:
        both = [(one[s], other[s]) for s in seeds if holds(one[s], measure) and holds(other[s], measure)]
        cells.append(cell([value(a, measure) - value(b, measure) for a, b in both], len(seeds)))
    return [str(len(seeds)), *cells]


def same(arms: Mapping[str, Mapping[int, Run]], leader: str) -> list[str]:
    """Name the arms whose form is the leader's own recipe."""
    first = {arm: bare(next(iter(runs.values()))) for arm, runs in arms.items()}
    twins = [arm for arm in arms if arm != leader and first[arm] == first[leader]]
    return ["", f"The same recipe as {leader}, but for what was tuned: {', '.join(twins)}."] if twins else []


def tries(tuning: Sequence[Run], arms: Sequence[str]) -> list[str]:
    """Say how much was tuned, and tabulate each arm's best tuning gain by form, with its tries."""
    found = {arm: tried(tuning, arm) for arm in arms}
    counts = sorted({len(gain) for gain in found.values()})
    seeds = sorted({run["seed"] for run in tuning})
    times = ", ".join(sorted({f"{seconds_of(run)[-1]:g}" for run in tuning}))
    each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} (unequal)"
    total = sum(len(gain) for gain in found.values())
    rows = []
    for arm, gain in found.items():
        forms = list(dict.fromkeys(setting.form for setting in gain))
        best = {form: max(g for setting, g in gain.items() if setting.form == form) for form in forms}
        count = {form: sum(setting.form == form for setting in gain) for form in forms}
        ranked = sorted(forms, key=lambda form: -best[form])
        rows.append(
            [arm, str(len(gain)), "; ".join(f"{form} {best[form]:+.3f} ({count[form]})" for form in ranked)]
        )
    said = f"Tuning: {each} settings per arm, {total} in all, each on the seeds {seeds[0]} to {seeds[-1]} "
    said += f"of the tuning prompts at {times} CPU s; the best mean gain in agreement decides."
    return [said, "", *table(["arm", "tries", "best tuning gain by form (tries)"], rows)]


def report(final: Sequence[Run], tuning: Sequence[Run], out: Path, plot: Path, leader: str | None) -> None:
    """Print the tables as Markdown, keep them in a file, and draw the plot.

    The third table compares the leader, the best arm at the first budget unless named, with the others.
    """
    columns, arms = measures(final), by_arm(final)
    first = columns[0]
    order = {
        arm: -interval([value(run, first) for run in runs.values() if holds(run, first)] or [-math.inf])[0]
        for arm, runs in arms.items()
    }
    arms = {arm: arms[arm] for arm in sorted(arms, key=lambda arm: order[arm])}
    leader = leader or next(iter(arms))
    lines = [*settings(arms, tuning), "", *gains(arms, columns)]
    lines += ["", *differences(arms, leader, [arm for arm in arms if arm != leader], columns)]
    lines += same(arms, leader)
    if known := [arm for arm in arms if tried(tuning, arm)]:
        lines += ["", *tries(tuning, known)]
    print("\n".join(lines))
    out.write_text("\n".join(lines) + "\n")
    draw(arms, columns, plot)


def draw(arms: Mapping[str, Mapping[int, Run]], columns: Sequence[Measure], path: Path) -> None:
    """Draw the gains with their intervals, a panel per measure, the best arm at the top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [measure for measure in columns if measure.reward == "agreement"] or list(columns)
    height = 1.5 + 0.3 * len(arms)
    figure, axes = pyplot.subplots(
        1,
        len(shown),
        figsize=(4.0 + 2.0 * len(shown), height),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    names = list(arms)[::-1]
    forms = [setting_of(next(iter(arms[arm].values()))).form for arm in names]
    colors = [
        BLUE if ours(a) else ORANGE if form == OWN else GREEN for a, form in zip(names, forms, strict=True)
    ]
    for axis, measure in zip(axes[0], shown, strict=True):
        for place, arm in enumerate(names):
            held = [value(run, measure) for run in arms[arm].values() if holds(run, measure)]
            if held:
                mean, width = interval(held)
                how = {"fmt": "o", "markersize": 5, "capsize": 3, "color": colors[place]}
                axis.errorbar(mean, place, xerr=width, **how)
        axis.set_title(measure.title.partition(", ")[2], fontsize=13)
        axis.axvline(0, color="0.7", linewidth=1)
        axis.grid(axis="both", alpha=0.3)
        axis.tick_params(labelsize=12)
        axis.locator_params(axis="x", nbins=4)
    labels = [arm if form == OWN else f"{arm} · {form}" for arm, form in zip(names, forms, strict=True)]
    axes[0][0].set_yticks(range(len(names)), labels)
    for color, label in zip(colors, axes[0][0].get_yticklabels(), strict=True):
        label.set_color(color)
    said = "held-out gain in agreement, mean and 95 % interval over seeds\n"
    said += "blue: ours, orange: as published, green: published methods with freedoms of ours"
    figure.supxlabel(said, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def ours(arm: str) -> bool:
    """Say whether an arm is this project's, not one that others published."""
    return arm in ARMS and ARMS[arm].ours


def ideas_report(runs: Sequence[Run], leader: str, known: int) -> list[str]:
    """Tabulate every idea minus the leader, or minus the idea that it names, all of the same interleaved run,
    and say how many were tried.
    """
    columns, arms = measures(runs), by_arm(runs)
    ideas = [arm for arm in arms if arm != leader]
    rows = []
    for idea in ideas:
        change = next(iter(arms[idea].values()))["idea"]
        other = change.get("minus", leader)
        rows.append([idea, f"`{json.dumps(change)}`", *paired(arms[idea], arms[other], columns)])
    split = next(iter(runs))["split"]
    said = (
        f"{len(ideas)} ideas on the {split} prompts, of {known} that were tried; each minus {leader}, paired "
    )
    said += "by seed, mean ± half of a 95 % interval."
    heads = ["idea", "change", "seeds", *(measure.title for measure in columns)]
    return [said, "", *table(heads, rows), "", *gains(arms, columns)]
