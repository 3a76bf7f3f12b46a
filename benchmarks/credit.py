"""Whose noise earned the reward? How much of it one stochastic step explains, and how well coarse completions
rank what fine ones show.

    python benchmarks/credit.py [--quick] [--out docs/credit.png] [--json OUT]

When every step is stochastic, as in Flow-GRPO, a step is credited with a reward that mostly other steps'
noise decided. The share that step k decides is Var(E[R | ε_k]) / Var(R), the first-order Sobol index,
estimated by one-way analysis of variance: values of ε_k × repeats of all other noise, start noise held fixed.
With one stochastic step alone (G²RPO) the share is 1 by construction.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from comfy_g2rpo.advantages import rank_agreement
from comfy_g2rpo.plan import Plan, PlanBuilder, State, singular
from comfy_g2rpo.rewards import load as load_reward
from comfy_g2rpo.rollout import roll_out, stream
from comfy_g2rpo.run.scorer import Scorer
from comfy_g2rpo.schedule import shifted_sigmas
from g2rpo_trainer.families.sd3 import SD3, load_pipeline

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
GRANULARITIES = (1, 2, 3, 4, 8)
ETA = 0.7
RESAMPLES = 400


def nested(num_steps: int, step: int, values: int, repeats: int) -> Plan:
    """Plan values × repeats trajectories, stochastic at all steps but the last.

    At `step` the repeats of one value share their noise.
    """
    tree = PlanBuilder(num_steps)
    root = tree.root()
    for _ in range(values):
        shared = tree.draw()
        for _ in range(repeats):
            state = root
            for j in range(num_steps - 1):
                state = tree.add(State(j + 1, state, "flow_sde", ETA, shared if j == step else tree.draw()))
            tree.score(tree.follow(state, [num_steps]))
    return tree.build()


def explained(rewards: Tensor) -> Tensor:
    """Return the share of variance that values explain: rewards [P, values, repeats] → scalar, pooled over
    prompts.

    The variance between means of n repeats exceeds that of the true means by (variance within)/n, which is
    taken off.
    """
    within = rewards.var(2).mean(1)
    between = rewards.mean(2).var(1) - within / rewards.shape[2]
    return between.sum() / (between + within).sum()


def interval(rewards: Tensor, statistic: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
    """Evaluate a statistic on rewards [P, …], with its 95 % bootstrap interval over prompts."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(rewards), (RESAMPLES, len(rewards)), generator=generator)
    drawn = torch.stack([statistic(rewards[row]).flatten() for row in rows])
    low, high = drawn.nanquantile(torch.tensor([0.025, 0.975]), 0)
    return {"estimate": statistic(rewards).flatten().tolist(), "low": low.tolist(), "high": high.tolist()}


def score(policy: SD3, plan: Plan, prompts: Sequence[str], seed: int) -> Scorer:
    """Run a plan for every prompt and judge its pictures."""
    scorer = Scorer(policy.decode, [load_reward("agreement")], prompts, len(plan.images))
    seeds = [stream("credit", seed, place) for place in range(len(prompts))]
    sigmas = shifted_sigmas(plan.num_steps)
    roll_out(policy, plan, sigmas, policy.encode(prompts), seeds, policy.latent_shape(64, 64), sink=scorer)
    return scorer


def measure_shares(
    policy: SD3, prompts: Sequence[str], num_steps: int, values: int, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """Measure what each step of an all-step SDE explains."""
    rows = []
    for step in range(num_steps - 1):
        scores = score(policy, nested(num_steps, step, values, repeats), prompts, seed).scores[0]
        rewards = scores.view(len(prompts), values, repeats)
        share = {key: found[0] for key, found in interval(rewards, explained).items()}
        rows.append({"step": step, **share, "reward_std": rewards.flatten(1).var(1).mean().sqrt().item()})
        print(
            (
                f"step {step} explains {share['estimate']:6.1%} [{share['low']:.1%}, {share['high']:.1%}] "
                "of the variance"
            ),
            flush=True,
        )
    return rows


def measure_ranks(
    policy: SD3, prompts: Sequence[str], num_steps: int, group_size: int, seed: int
) -> list[dict[str, Any]]:
    """Measure how coarse completions rank the branches of one stochastic step, against the fine
    completion.
    """
    plan = singular(num_steps, range(num_steps // 2), group_size, GRANULARITIES, eta=ETA)
    scores = score(policy, plan, prompts, seed).scores
    rewards = torch.cat([plan.values(scores[:, p]) for p in range(len(prompts))])
    rows = []
    for step in range(num_steps // 2):
        found = interval(rewards[:, step : step + 1], rank_agreement)
        std = rewards[:, step].var(1).mean(0).sqrt()
        rows.append({"step": step, "granularities": GRANULARITIES, **found, "reward_std": std.tolist()})
        print(
            f"step {step}: "
            + "  ".join(f"λ={s} {r:.2f}" for s, r in zip(GRANULARITIES, found["estimate"], strict=True)),
            flush=True,
        )
    return rows


def draw(shares: Sequence[dict[str, Any]], ranks: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw both results side by side."""
    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(7, 3.1), layout="constrained")
    steps = [row["step"] for row in shares]
    left.axhline(100, color="#0072B2", linewidth=2)
    left.annotate(
        "only step k stochastic (G²RPO)", (steps[-1] + 0.4, 97), ha="right", va="top", color="#0072B2"
    )
    error = [
        [max(100 * sign * (row[end] - row["estimate"]), 0) for row in shares]
        for sign, end in ((-1, "low"), (1, "high"))
    ]
    left.bar(
        steps,
        [100 * row["estimate"] for row in shares],
        yerr=error,
        color="#D55E00",
        ecolor="#555555",
        capsize=2,
    )
    top = 100 * max(row["high"] for row in shares)
    left.annotate("every step stochastic", (steps[-1] + 0.4, min(top + 5, 85)), ha="right", color="#D55E00")
    left.set(
        xlabel="step k",
        ylabel="% of reward variance\nexplained by step k's noise",
        ylim=(0, 105),
        xticks=steps,
    )
    colours, markers = ("#009E73", "#E69F00", "#CC79A7", "#56B4E9"), "osD^"
    for level in range(1, len(GRANULARITIES)):
        values = [row["estimate"][level] for row in ranks]
        label = f"λ = {GRANULARITIES[level]}"
        right.plot(
            [row["step"] for row in ranks],
            values,
            color=colours[level - 1],
            marker=markers[level - 1],
            label=label,
        )
    right.set(
        xlabel="step k",
        ylabel="rank agreement with λ = 1\n(Spearman)",
        ylim=(min(0, right.get_ylim()[0]), 1.05),
    )
    right.set_xticks([row["step"] for row in ranks])
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    pyplot.close(figure)


def main() -> None:
    """Measure, print, draw, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few prompts and samples: seconds instead of minutes, wide intervals",
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models/tiny", help="folder of the model")
    parser.add_argument(
        "--prompts", type=Path, default=ROOT / "prompts/shapes_tune.txt", help="file of prompts"
    )
    parser.add_argument("--steps", type=int, default=8, help="steps of a trajectory")
    parser.add_argument("--seed", type=int, default=0, help="seed of noise and of the choice of prompts")
    parser.add_argument("--out", type=Path, help="file for the plot (PNG)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count, values, repeats, group = (4, 4, 2, 6) if options.quick else (32, 8, 4, 16)
    lines = options.prompts.read_text(encoding="utf-8").split("\n")
    prompts = random.Random(options.seed).sample([line for line in lines if line], count)
    policy = SD3(load_pipeline(options.model, torch.float32))
    shares = measure_shares(policy, prompts, options.steps, values, repeats, options.seed)
    ranks = measure_ranks(policy, prompts, options.steps, group, options.seed)
    if options.out:
        draw(shares, ranks, options.out)
    if options.json:
        options.json.write_text(
            json.dumps({"prompts": prompts, "shares": shares, "ranks": ranks}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
