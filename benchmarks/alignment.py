"""What does a search find for its budget? All searches side by side on the bundled model, without training.

Every search gets the same forwards for the same prompts from the same start noises, which no two prompts
share. The searched reward is `agreement`; `strict`, which nobody searched, says whether only the score got
better. Guidance is held fixed, and stands in the table as a rival. Unless all are asked for, searches run on
hard prompts, the third of a list on which plain images score least. One single-thread process per worker; a
stopped benchmark goes on where it was. searches.json has settings that were tried beside the defaults.

    python benchmarks/alignment.py run                        # hard held-out prompts, 3 seeds, 32/64/128
    python benchmarks/alignment.py run --prompts all --guidance 1 --budgets 64 --arms particles 'best of n'
    python benchmarks/alignment.py pools                      # early filter and budgeted draws
    python benchmarks/alignment.py run --split tune --runs alignment_tune --arms 'particles, strength 5'
    python benchmarks/alignment.py report --plot docs/alignment.png
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from alignment_noise import optimised
from alignment_pools import distance, plus_minus, pool_job, pool_jobs, pools_report
from learning_report import table
from learning_runs import ROOT, read

Row = dict[str, Any]
PLAIN, CHOOSING = 9, 6
"""Ordinary images of a prompt, and how many of them say how hard it is; the table has the others."""
RIVALS = ("plain", "best of n")
"""What stands with more guidance beside the searches without."""

ARMS: dict[str, dict[str, Any]] = {
    "best of n": {"method": "best_of_n"},
    "coarse first": {"method": "coarse_first"},
    "branch search": {"method": "branch_search"},
    "particles": {"method": "particles"},
    "particles, 4 looks": {"method": "particles", "judge_at": (2, 3, 4, 5)},
    "funnel": {"method": "funnel"},
    "funnel, 1 look": {"method": "funnel", "judge_at": (3,)},
    "particle gibbs": {"method": "particle_gibbs"},
    "noise search": {"method": "noise_search"},
    "ensemble": {"method": "ensemble"},
    "optimize noise": {"method": "optimize_noise"},
}
"""Searches with the settings that differ from the defaults. Those with other looks judge as many images as
their rival: 40 beside the funnel's 42 of 64 forwards, and 28 beside the particles' 32.
"""
TRIED: dict[str, dict[str, Any]] = {
    name: {key: tuple(value) if isinstance(value, list) else value for key, value in made.items()}
    for name, made in json.loads((ROOT / "benchmarks/searches.json").read_text()).items()
}
"""Searches that run when they are named."""


@cache
def searcher(guidance: float, split: str) -> Any:
    """Load the model and the rewards, once per process."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from accelerate import Accelerator

    from comfy_g2rpo.sampling.prompt_search import Searcher
    from g2rpo_trainer.config.reading import load
    from g2rpo_trainer.run import prepare

    torch.set_num_threads(1)
    changes = [f"model.guidance={guidance}", f"prompts.heldout={prompts_of(split)}", "train.eval_prompts=0"]
    return Searcher(prepare(load("demo", changes), Accelerator(cpu=True)))


def prompts_of(split: str) -> Path:
    """Return a list of prompts: the held-out ones are more than those of training's evaluations."""
    return ROOT / ("benchmarks/more_heldout.txt" if split == "heldout" else f"prompts/shapes_{split}.txt")


def seed_of(*key: str | int) -> int:
    """Return a seed for ComfyUI's noise. Prompts have noises of their own: the interval over them is one over
    noises, too.
    """
    from comfy_g2rpo.rollout import stream

    return stream("alignment", *key)


def run_job(job: Row) -> Row:
    """Search for one prompt with every seed; return scores, what was spent, and how far results differ."""
    import torch

    from comfy_g2rpo.sampling.search_settings import SearchSettings

    host, made = searcher(job["guidance"], job["split"]), dict((ARMS | TRIED)[job["arm"]])
    method, judges = made.pop("method"), host.setup.judges
    spent: dict[str, list[float]] = {"forwards": [], "scored": [], "cpu": []}
    latents = []
    for number in job["seeds"]:
        seed = seed_of(job["prompt"], number)
        begin = time.process_time()
        if method == "optimize_noise":
            latent, forwards, scored = optimised(host, job["prompt"], seed, job["budget"])
        else:
            result = host.find(method, SearchSettings(**made), job["budget"], job["prompt"], seed)
            latent, forwards, scored = result.found[0].latent, result.forwards, result.scored
        spent["cpu"].append(time.process_time() - begin)
        spent["forwards"].append(forwards * host.price)
        spent["scored"].append(scored)
        latents.append(latent)
    found = torch.stack(latents)
    scores = host.scores(judges, found, job["prompt"])
    names = {judge.name: row.tolist() for judge, row in zip(judges, scores, strict=True)}
    return {**job, **names, **spent, "distance": distance(host.images(found))}


def plain_job(job: Row) -> Row:
    """Score ordinary images of a prompt, from noises that no search begins with."""
    import torch

    from comfy_g2rpo.sampling.search import Ask, answer

    host = searcher(job["guidance"], job["split"])
    setup = host.setup
    generator = torch.Generator().manual_seed(seed_of(job["prompt"], "plain"))
    noise = torch.randn((PLAIN, *setup.shape), generator=generator)
    walk = tuple(range(len(setup.sigmas)))
    cond = setup.policy.encode([job["prompt"]])[0]
    told = answer(Ask(noise, walk), setup.policy, cond, setup.sigmas, lambda latents: torch.zeros(PLAIN))
    scores = host.scores(setup.judges, told.latents, job["prompt"])
    return {**job, **{judge.name: row.tolist() for judge, row in zip(setup.judges, scores, strict=True)}}


def answer_job(job: Row) -> Row:
    """Run a job of any kind."""
    if job["arm"] == "pool":
        # Just above 1, a policy weighs up both prompts, and its images are those of guidance 1.
        host = searcher(max(job["guidance"], 1 + 1e-6), job["split"])
        return pool_job(job, host, seed_of(job["prompt"], "pool"))
    return plain_job(job) if job["arm"] == "plain" else run_job(job)


def identity(job: Row) -> str:
    """Return what makes a job the same."""
    return json.dumps({key: job[key] for key in ("arm", "split", "guidance", "budget", "prompt", "seeds")})


def plain_jobs(options: argparse.Namespace, prompts: Iterable[str] = (), guidance: float = 1.0) -> list[Row]:
    """List the jobs that make ordinary images; without prompts, of the whole list."""
    texts = list(prompts) or prompts_of(options.split).read_text("utf-8").splitlines()
    common = {"arm": "plain", "split": options.split, "budget": 0, "seeds": [], "guidance": guidance}
    return [{**common, "prompt": text} for text in texts]


def search_jobs(options: argparse.Namespace, hard: Iterable[str]) -> list[Row]:
    """List the searches, prompt after prompt through all arms."""
    common = {"split": options.split, "seeds": list(range(*options.seeds))}
    hard = sorted(hard)
    plain = [job for guidance in options.guidance for job in plain_jobs(options, hard, guidance)]
    return plain + [
        {"arm": arm, **common, "guidance": guidance, "budget": budget, "prompt": prompt}
        for prompt in hard
        for guidance in options.guidance
        for budget in options.budgets
        for arm in options.arms or ARMS
    ]


def run_all(jobs: Iterable[Row], path: Path, workers: int) -> None:
    """Run what the results file does not hold yet, each written as it comes."""
    done = {identity(row) for row in read(path)}
    left = [job for job in jobs if identity(job) not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, path.open("a") as file:
        for number, future in enumerate(as_completed([pool.submit(answer_job, job) for job in left]), 1):
            file.write(json.dumps(future.result()) + "\n")
            file.flush()
            if number % 50 == 0:
                print(f"{number} of {len(left)}", flush=True)


def hard_prompts(rows: Sequence[Row]) -> set[str]:
    """Return the third of the prompts on which plain images without guidance score least."""
    plain = {
        row["prompt"]: statistics.mean(row["agreement"][:CHOOSING])
        for row in rows
        if row["arm"] == "plain" and row["guidance"] == 1
    }
    return set(sorted(plain, key=lambda prompt: plain[prompt])[: len(plain) // 3])


def by_prompt(rows: Sequence[Row], reward: str) -> dict[str, float]:
    """Return the mean score over seeds, by prompt: prompts are what is drawn from."""
    return {row["prompt"]: statistics.mean(row[reward]) for row in rows}


def gain(rows: Sequence[Row], base: Sequence[Row], reward: str) -> str:
    """Write the paired difference of two arms, with its interval over prompts."""
    found, other = by_prompt(rows, reward), by_prompt(base, reward)
    pairs = [found[prompt] - other[prompt] for prompt in found if prompt in other]
    return plus_minus(pairs) if pairs else "–"


def mean_of(rows: Sequence[Row], name: str) -> float:
    """Return the mean of a column, whose cells are numbers or one per seed."""
    cells = [row[name] if isinstance(row[name], list) else [row[name]] for row in rows]
    return statistics.mean(statistics.mean(cell) for cell in cells)


HEADS = (
    "search",
    "agreement",
    "minus best of n",
    "strict",
    "minus best of n ",
    "images judged",
    "distance",
    "CPU s",
)


def section(rows: Sequence[Row], guidance: float, budget: int) -> list[str]:
    """Tabulate all arms at one guidance and budget, and beside them what more guidance does."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["guidance"]):
        if row["guidance"] == guidance and row["budget"] in (0, budget):
            found.setdefault(row["arm"], []).append(row)
        elif row["guidance"] > guidance and row["budget"] in (0, budget) and row["arm"] in RIVALS:
            found.setdefault(f"{row['arm']}, guidance {row['guidance']:g}", []).append(row)
    base, lines = found.get("best of n", []), []
    for arm, some in found.items():
        cells = [arm, f"{mean_of(some, 'agreement'):.3f}", gain(some, base, "agreement")]
        cells += [f"{mean_of(some, 'strict'):.3f}", gain(some, base, "strict")]
        if some[0]["arm"] == "plain":
            cells += ["1", "–", "–"]
        else:
            apart = f"{mean_of(some, 'distance'):.3f}" if len(some[0]["seeds"]) > 1 else "–"
            cells += [f"{mean_of(some, 'scored'):.0f}", apart, f"{mean_of(some, 'cpu'):.2f}"]
        lines.append(cells)
    return table(HEADS, lines)


COMPARED = (
    ("funnel", "particles"),
    ("funnel", "particles, 4 looks"),
    ("funnel, 1 look", "particles"),
    ("funnel", "coarse first"),
)
"""Searches whose difference is asked for, beside that from best of n."""
HALVES = ("coarse first", "branch search", "particles", "funnel")
"""Those that stand beside best of n with twice the forwards, too."""


def differences(rows: Sequence[Row], budget: int) -> list[str]:
    """Tabulate paired differences between searches at one budget, without guidance."""

    def of(arm: str, budget: int = budget) -> list[Row]:
        return [row for row in rows if kind(row) == (arm, 1, budget)]

    pairs = [(f"{one} minus {other}", of(one), of(other)) for one, other in COMPARED]
    twice = f"best of n with {2 * budget} forwards"
    pairs += [(f"{arm} minus {twice}", of(arm), of("best of n", 2 * budget)) for arm in HALVES]
    lines = [
        [name, *(gain(found, other, reward) for reward in ("agreement", "strict"))]
        for name, found, other in pairs
        if found and other
    ]
    return ["", *table(("paired by prompt", "agreement", "strict"), lines)] if lines else []


def shown(row: Row) -> Row:
    """Leave out of a row the plain images by which its prompt was chosen."""
    if row["arm"] != "plain":
        return row
    return {**row, **{name: row[name][CHOOSING:] for name in ("agreement", "strict")}}


def tables(rows: Sequence[Row], prompts: str) -> list[str]:
    """Tabulate all budgets, without and with guidance."""
    lines = []
    for guidance, budget in sorted({(row["guidance"], row["budget"]) for row in rows if row["budget"]}):
        lines += ["", f"**{budget} forwards, guidance {guidance:g}, {prompts}**", ""]
        lines += section(rows, guidance, budget)
        lines += differences(rows, budget) if guidance == 1 else []
    return lines


def kind(row: Row) -> tuple[str, float, int]:
    """Return what makes rows one line of a table."""
    return row["arm"], row["guidance"], row["budget"]


def report(rows: Sequence[Row], out: Path, plot: Path) -> None:
    """Print the tables as Markdown, keep them in a file, and draw the plot."""
    hard = hard_prompts(rows)
    pools = [row for row in rows if row["arm"] == "pool"]
    lines = pools_report(pools, hard) if pools else []
    rows = [shown(row) for row in rows if row["arm"] != "pool"]
    here = [row for row in rows if row["prompt"] in hard]
    lines += tables(here, f"{len(hard)} hard prompts")
    # What was run on the other prompts, too.
    wide = {kind(row) for row in rows if row["prompt"] not in hard}
    everywhere = [row for row in rows if kind(row) in wide]
    lines += tables(everywhere, f"all {len({row['prompt'] for row in rows})} prompts")
    print("\n".join(lines))
    out.write_text("\n".join(lines) + "\n")
    draw([row for row in here if row["guidance"] == 1 and row["budget"]], plot)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw what each search finds on hard prompts, by forwards and by CPU seconds; not its variants."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    budgets = sorted({row["budget"] for row in rows})
    there = {row["arm"] for row in rows}
    for number, arm in enumerate(arm for arm in ARMS if arm in there and "," not in arm):
        parts = [[row for row in rows if row["arm"] == arm and row["budget"] == budget] for budget in budgets]
        parts = [part for part in parts if part]
        score = [mean_of(part, "agreement") for part in parts]
        how = {"marker": "osD^vPX*"[number % 8], "label": arm, "linewidth": 1.5}
        axes[0].plot([mean_of(part, "forwards") for part in parts], score, **how)
        axes[1].plot([mean_of(part, "cpu") for part in parts], score, **how)
    for axis, name in zip(axes, ("forwards", "CPU seconds"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xlabel(name, fontsize=12)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("agreement of the best image", fontsize=12)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("stage", choices=("run", "pools", "report"))
    add("--out", type=Path, default=ROOT / "benchmarks/results")
    add("--runs", default="alignment", help="results file, without .jsonl")
    add("--split", default="heldout", choices=("heldout", "tune"))
    add("--seeds", type=int, nargs=2, default=(0, 3), help="first seed, and the one after the last")
    add("--budgets", type=int, nargs="+", default=[32, 64, 128], help="forwards of a search")
    add("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    add("--arms", nargs="*", choices=[*ARMS, *TRIED], help="searches (default: all but those tried)")
    add("--prompts", default="hard", choices=("hard", "all"))
    add("--workers", type=int, default=1)
    add("--plot", type=Path, help="file of the report's plot (default: beside its table)")
    options = parser.parse_args(arguments)
    path = options.out / f"{options.runs}.jsonl"
    if options.stage != "report":
        run_all(plain_jobs(options), path, options.workers)
    rows = [row for row in read(path) if row["split"] == options.split]
    if options.stage != "report":
        jobs = search_jobs if options.stage == "run" else pool_jobs
        every = {row["prompt"] for row in rows}
        chosen = every if options.prompts == "all" else hard_prompts(rows)
        run_all(jobs(options, chosen), path, options.workers)
    else:
        report(rows, path.with_suffix(".md"), options.plot or path.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
