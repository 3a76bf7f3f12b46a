"""When does a second granularity pay? A noisy judge, few steps, coarse completions.

    python benchmarks/granularity.py forks  --out results/    # branches completed at every stride, judged
    python benchmarks/granularity.py train  --out results/    # arms under a noisy judge, seeds × noise × Λ
    python benchmarks/granularity.py report --out results/ --plot docs/granularity.png

**Without training.** Branches of one stochastic step are completed at every stride and, for the truth, by
Euler steps a quarter as long. A judge's noise is drawn afterwards, per picture, in units of the group's own
spread. What counts is the correlation ρ of the advantage with the true one. An update of G branches sums
G vectors A_i ε_i, whose part along the true gradient grows as ρG and whose rest grows as √G, so that ρ²G is
what an update knows: G branches whose advantage correlates by ρ are worth ρ²G perfect ones. ρ² over the price
of a branch is therefore what a granularity has to be compared by: the same money buys more branches.

**The model** (`predicted`). Clean scores at stride λ correlate t_λ with the truth and K_λμ with one another;
the judge adds noise of n times the spread to each picture. z-scores summed over Λ then have

    ρ² = (Σ_λ t_λ)² / (Σ_λμ K_λμ + n² Σ_λμ M_λμ),    M_λμ = 1 where both are one picture, else 0

so that {1,2} with t = (1, r), K_12 = r has ρ² = (1+r)² / (2(1+r+n²)) against 1/(1+n²) of {1}: at most
(1+r)/2 < 1 of it without noise, at most (1+r)²/2 < 2 times as much with a great deal of noise. It pays where
that gain exceeds the ratio of the prices.

**With training.** Arms that differ in Λ alone, under judges that add noise to agreement. The noise is a
function of the picture, as the faults of a reward model are: asking twice gives the same answer.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from brief import ROOT, add, configure, evaluated, one_thread, read, train
from torch import Tensor

from comfy_g2rpo.advantages import integrate
from comfy_g2rpo.plan import Plan, PlanBuilder, State, singular
from comfy_g2rpo.rollout import state_noise, stream
from comfy_g2rpo.schedule import completion_indices, shifted_sigmas

STEPS = (4, 8, 16)
SPREAD = 0.21
"""Standard deviation of agreement within a group, the unit of noise of the judges that are trained on."""
STRIDES = (1, 2, 3, 4)
SETS = ((1,), (2,), (1, 2), (1, 3), (2, 4))
NOISE = (0.0, 0.5, 1.0, 2.0)
GROUP, REFINED, DRAWS = 16, 4, 32
PRICES = ("forward", "judgement", "CPU s")
TRUTHS = ("sampled", "fine")
"""What an advantage should be: by the picture that these steps draw (stride 1), or the finely solved one."""


def levels(num_steps: int) -> Tensor:
    """Return σ_0 … σ_T, followed by the levels between them that fine completions visit."""
    fine = shifted_sigmas(num_steps * REFINED)
    between = [i for i in range(len(fine)) if i % REFINED]
    return torch.cat([shifted_sigmas(num_steps), fine[between]])


def fine_indices(num_steps: int, branch_step: int) -> list[int]:
    """List the places in `levels` that the fine completion of a branch at step k visits after k+1."""
    return [
        i // REFINED if i % REFINED == 0 else num_steps + i - i // REFINED
        for i in range((branch_step + 1) * REFINED + 1, num_steps * REFINED + 1)
    ]


def forks(num_steps: int, branch_step: int, group_size: int, eta: float = 0.7) -> Plan:
    """Plan branches of one step, completed at every stride and finely (the last granularity)."""
    tree = PlanBuilder(len(levels(num_steps)) - 1)
    anchor = tree.follow(tree.root(), range(1, branch_step + 1))
    for member in range(group_size):
        edge = State(branch_step + 1, anchor, "flow_sde", eta, tree.draw(), 0, member)
        branch = tree.add(edge)
        for level, stride in enumerate(STRIDES):
            tree.score(tree.follow(branch, completion_indices(num_steps, branch_step, stride)[1:]), level)
        tree.score(tree.follow(branch, fine_indices(num_steps, branch_step)), len(STRIDES))
    return tree.build()


def shared(num_steps: int, branch_step: int) -> Tensor:
    """Return which strides draw one and the same picture [L, L], as 0 and 1."""
    paths = [completion_indices(num_steps, branch_step, stride) for stride in STRIDES]
    return torch.tensor([[float(one == other) for other in paths] for one in paths])


def collect(path: Path, prompts: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Judge the branches of one step of every prompt; rows that the file holds are not made again."""
    from credit import SD3, load_pipeline

    from comfy_g2rpo.rewards import load as load_reward
    from comfy_g2rpo.rollout import roll_out
    from comfy_g2rpo.run.scorer import Scorer

    one_thread()
    rows = read(path)
    known = {(row["steps"], row["prompt"], row["seed"]) for row in rows}
    policy = SD3(load_pipeline(ROOT / "models/tiny", torch.float32))
    for num_steps, prompt in ((steps, prompt) for steps in STEPS for prompt in prompts):
        if (num_steps, prompt, seed) in known:
            continue
        step = stream("granularity step", seed, num_steps, prompt) % (num_steps // 2)
        plan, begin = forks(num_steps, step, GROUP), time.process_time()
        scorer = Scorer(policy.decode, [load_reward("agreement")], [prompt], len(plan.images))
        start = [stream("granularity", seed, prompt)]
        shape, conds = policy.latent_shape(64, 64), policy.encode([prompt])
        roll_out(policy, plan, levels(num_steps), conds, start, shape, sink=scorer)
        spent, judging = time.process_time() - begin, sum(scorer.seconds.values())
        scores = plan.values(scorer.scores[:, 0])[0, 0]
        row = {"steps": num_steps, "prompt": prompt, "seed": seed, "step": step}
        row["scores"] = [[round(score, 3) for score in member] for member in scores.tolist()]
        row["forward"] = round((spent - judging) / plan.forwards, 6)
        row["picture"] = round(judging / len(plan.images), 6)
        add(path, row)
        rows.append(row)
    return rows


def in_groups(one: Tensor, other: Tensor) -> Tensor:
    """Return the correlation over the members of two tables [..., G]: [...], 0 where one does not vary."""
    one, other = (table - table.mean(-1, keepdim=True) for table in (one, other))
    scale = (one.square().sum(-1) * other.square().sum(-1)).sqrt()
    return torch.where(scale > 1e-9, (one * other).sum(-1) / scale.clamp(min=1e-9), 0.0)


class Judged:
    """The judged branches of one number of steps: scores [N, G, strides and the fine one]."""

    def __init__(self, rows: Sequence[dict[str, Any]], num_steps: int) -> None:
        rows = [row for row in rows if row["steps"] == num_steps]
        scores = torch.tensor([row["scores"] for row in rows], dtype=torch.float64)
        # Groups whose pictures all score alike teach nothing, whoever judges them.
        useful = (scores[..., [0, -1]].std(1) > 1e-3).all(1)
        self.rows = [row for row, kept in zip(rows, useful.tolist(), strict=True) if kept]
        self.scores, self.num_steps = scores[useful], num_steps
        self.same = torch.stack([shared(num_steps, row["step"]) for row in self.rows]).double()
        self.pictures = self.same.argmax(2)
        """The first stride that draws the same picture [N, L]: a picture is judged once."""
        self.truth = {"sampled": self.scores[..., 0], "fine": self.scores[..., -1]}
        clean = self.scores[..., :-1].transpose(1, 2)
        among, same = in_groups(clean[:, :, None], clean[:, None]).mean(0), self.same.mean(0)
        self.moments = {
            name: (in_groups(clean, truth[:, None]).mean(0), among, same)
            for name, truth in self.truth.items()
        }
        """t [L], K [L, L] and M [L, L] of the model by truth, pooled over the groups."""
        self.prices = {strides: self.price(strides) for strides in SETS}

    def noisy(self, noise: float, seed: int = 0, again: int = 1) -> Tensor:
        """Return what a noisy judge says [draws · N, G, L · again]: once, or several times over."""
        generator = torch.Generator().manual_seed(stream("judge", seed, self.num_steps))
        clean = self.scores[..., :-1]
        drawn = torch.randn(again, DRAWS, *clean.shape, generator=generator, dtype=torch.float64)
        place = self.pictures[None, None, :, None].expand_as(drawn)
        spread = clean[..., :1].std(1, keepdim=True)
        return torch.cat([*(clean + noise * spread * drawn.gather(-1, place))], -1).flatten(0, 1)

    def advantages(self, strides: Sequence[int], noise: float, again: int = 1) -> Tensor:
        """Return the product's advantages under a noisy judge [draws, N, G]."""
        levels = [STRIDES.index(stride) + len(STRIDES) * i for i in range(again) for stride in strides]
        table = integrate(self.noisy(noise, again=again)[None][..., levels], clamp=1e9)
        return table.double().unflatten(0, (DRAWS, -1))

    def correlation(self, advantages: Tensor, truth: str) -> Tensor:
        """Return the mean correlation of advantages with the true ones by group [N]."""
        return in_groups(advantages, self.truth[truth]).mean(0)

    def cosine(self, advantages: Tensor, truth: str) -> Tensor:
        """Return the mean cosine of the directions Σ A_i ε_i and Σ A*_i ε_i by group [N]."""
        true = self.truth[truth] - self.truth[truth].mean(1, keepdim=True)
        across = torch.einsum("dng,ngh,nh->dn", advantages, self.gram, true)
        own = torch.einsum("dng,ngh,dnh->dn", advantages, self.gram, advantages)
        best = torch.einsum("ng,ngh,nh->n", true, self.gram, true)
        return (across / (own * best).clamp(min=1e-12).sqrt()).mean(0)

    @cached_property
    def gram(self) -> Tensor:
        """Return ⟨ε_i, ε_j⟩ of the branches of every group [N, G, G], drawn again from their seeds."""
        plan, found = forks(self.num_steps, 0, GROUP), []
        for row in self.rows:
            seed = stream("granularity", row["seed"], row["prompt"])
            drawn = torch.stack([state_noise(plan, i, seed, (16, 8, 8)) for i in plan.transitions])
            found.append(drawn.flatten(1).double() @ drawn.flatten(1).double().T)
        return torch.stack(found)

    def price(self, strides: Sequence[int]) -> tuple[float, float]:
        """Return forwards and pictures of one more branch, on average."""
        steps = [row["step"] for row in self.rows]
        plans = {k: [singular(self.num_steps, [k], g, strides) for g in (1, 2)] for k in set(steps)}
        forwards = {k: two.forwards - one.forwards for k, (one, two) in plans.items()}
        pictures = {k: len(two.images) - len(one.images) for k, (one, two) in plans.items()}
        return tuple(sum(found[k] for k in steps) / len(steps) for found in (forwards, pictures))

    def picture_price(self) -> float:
        """Return what decoding and judging a picture costs, in forwards."""
        rates = sorted(row["picture"] / row["forward"] for row in self.rows)
        return rates[len(rates) // 2]


def predicted(t: Tensor, k: Tensor, m: Tensor, strides: Sequence[int], noise: float, again: int = 1) -> float:
    """Return ρ by the model (see above) for strides out of STRIDES, each judged `again` times."""
    levels = [STRIDES.index(stride) for stride in strides]
    truth, scores, chance = t[levels].sum(), k[levels][:, levels].sum(), m[levels][:, levels].sum()
    return (truth / (scores + noise**2 * chance / again).sqrt()).item()


def noisy(images: Tensor, prompts: Sequence[str], noise: float) -> Tensor:
    """Judge pictures [B, H, W, 3] by agreement plus noise that is a function of the picture alone."""
    from comfy_g2rpo.rewards import load

    errors = []
    for image in (images * 255).round().byte().cpu():
        seed = int.from_bytes(hashlib.blake2b(image.numpy().tobytes(), digest_size=7).digest(), "big")
        errors.append(torch.randn((), generator=torch.Generator().manual_seed(seed)).item())
    return load("agreement").score(images, prompts) + noise * SPREAD * torch.tensor(errors)


def noisy_05(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Judge with noise of half the spread within a group."""
    return noisy(images, prompts, 0.5)


def noisy_1(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Judge with noise as large as the spread within a group."""
    return noisy(images, prompts, 1.0)


def noisy_2(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Judge with noise twice as large as the spread within a group."""
    return noisy(images, prompts, 2.0)


JUDGES = {
    0.0: {"name": "agreement"},
    **{
        noise: {"name": name, "path": f"{Path(__file__).resolve()}:{name}"}
        for noise, name in ((0.5, "noisy_05"), (1.0, "noisy_1"), (2.0, "noisy_2"))
    },
}
ARMS: dict[str, dict[str, Any]] = {
    **{named: {"granularities": list(s)} for s, named in ((s, f"{{{','.join(map(str, s))}}}") for s in SETS)},
    # What {1,2} with 8 branches costs, to a forward and a picture: here both buy more branches.
    "{2}, G=16": {"granularities": [2], "group_size": 16},
}


def look(setup: Any, learner: Any) -> dict[str, float]:
    """Measure agreement along the run's steps and along four times as many, and strict."""
    found = evaluated(setup, learner, 3).means()
    fine = evaluated(setup, learner, 1, REFINED * setup.recipe.num_steps).means()
    return {"agreement": found["agreement"], "strict": found["strict"], "fine": fine["agreement"]}


def train_arms(path: Path, options: argparse.Namespace) -> None:
    """Train the arms, seed after seed through all of them; the file's runs are not run again."""
    wanted = ("arm", "steps", "noise", "seed", "split", "cpu_seconds", "goal_work")
    done = read(path)
    known = {tuple(row[name] for name in wanted) for row in done}
    # All runs of so many steps begin with the same model, and are measured from the same noises.
    before = {(row["split"], row["steps"]): row["before"] for row in done}
    budgets = {"cpu": options.cpu_seconds, "work": options.work}
    goals = [{name: goal} for name, goal in budgets.items() if goal]
    tries = itertools.product(range(*options.seeds), options.steps, options.noise, options.arms)
    for seed, steps, noise, arm in tries:
        values = (arm, steps, noise, seed, options.split, *budgets.values())
        if values in known:
            continue
        measured = ["strict"] if noise == 0 else ["agreement", "strict"]
        method = {**ARMS[arm], "num_steps": steps}
        config = configure(method, [JUDGES[noise]], measured, options.split, seed)
        found = train(config, goals, look, before.get((options.split, steps)))
        before[options.split, steps] = found["before"]
        add(path, {**dict(zip(wanted, values, strict=True)), **found})
        print(arm, steps, noise, seed, found["points"][-1], flush=True)


def named(strides: Sequence[int], again: int = 1) -> str:
    """Name a set of granularities."""
    return f"{{{','.join(map(str, strides))}}}" + (", asked twice" if again > 1 else "")


def worth(judged: Judged, truth: str, strides: Sequence[int], noise: float, picture: float) -> float:
    """Return by the model what a branch's cost buys: ρ² per forward, a picture being so many forwards."""
    forwards, pictures = judged.prices[strides]
    return predicted(*judged.moments[truth], strides, noise) ** 2 / (forwards + picture * pictures)


def pays_from(
    judged: Judged, truth: str, strides: Sequence[int], other: Sequence[int], picture: float
) -> float:
    """Return the least noise, in spreads, from which strides are worth more than others by the model."""
    steps = (i / 100 for i in range(1001))
    found = (
        n
        for n in steps
        if worth(judged, truth, strides, n, picture) > worth(judged, truth, other, n, picture)
    )
    return next(found, math.inf)


def header(*heads: str) -> list[str]:
    """Begin a Markdown table."""
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]


def forks_report(tables: Mapping[int, Judged], truth: str = "sampled") -> list[str]:
    """Tabulate correlations and what they are worth, and from which noise on {1,2} pays."""
    noises = [f"n = {noise:g}" for noise in NOISE]
    found, fine = (header("T", "Λ", *noises) for _ in range(2))
    value = header("T", "Λ", "forwards", "judged", *(f"per {what}, {n}" for what in PRICES for n in noises))
    rules = header("T", "a picture costs", "beats {1} from n", "beats {2} from n")
    apart = 0.0
    for steps, judged in tables.items():
        here = judged.picture_price()
        for strides, again in [*((one, 1) for one in SETS), ((1,), 2), ((2,), 2)]:
            made = [judged.advantages(strides, noise, again) for noise in NOISE]
            rho = [judged.correlation(one, truth).mean().item() for one in made]
            cosines = [judged.cosine(one, truth).mean().item() for one in made]
            apart = max(apart, *(abs(a - b) for a, b in zip(rho, cosines, strict=True)))
            model = [predicted(*judged.moments[truth], strides, noise, again) for noise in NOISE]
            if strides == (1,) and again == 1:
                alone, least = rho, judged.prices[strides]
            forwards, pictures = judged.prices[strides]
            dear = [forwards / least[0], pictures * again / least[1]]
            dear.append((forwards + here * pictures) / (least[0] + here * least[1]))
            gains = [(one / other) ** 2 for one, other in zip(rho, alone, strict=True)]
            about = f"| {steps} | {named(strides, again)} |"
            both = (f"{one:.3f} ({other:.3f})" for one, other in zip(rho, model, strict=True))
            found.append(f"{about} {' | '.join(both)} |")
            ratios = [f"{gain / price:.2f}" for price in dear for gain in gains]
            value.append(f"{about} {forwards:.1f} | {pictures * again:.2f} | {' | '.join(ratios)} |")
            other = (f"{judged.correlation(one, 'fine').mean():.3f}" for one in made)
            fine.append(f"{about} {' | '.join(other)} |")
        for picture, said in ((0.0, "nothing"), (here, f"{here:.1f} forwards"), (5.0, "5 forwards")):
            first = [pays_from(judged, truth, (1, 2), one, picture) for one in ((1,), (2,))]
            told = ["never" if noise == math.inf else f"{noise:.1f}" for noise in first]
            rules.append(f"| {steps} | {said} | {' | '.join(told)} |")
    groups = ", ".join(str(len(judged.rows)) for judged in tables.values())
    return [
        f"ρ with the picture of stride 1, measured (by the model); {groups} groups of {GROUP}:",
        *("", *found, ""),
        f"The cosine of Σ A ε with the true direction differs from ρ by {apart:.3f} at most.",
        *("", "ρ² per price of a branch, beside that of {1} at the same noise:", "", *value),
        *("", "Where {1,2} pays, by the model:", "", *rules),
        *("", "ρ with the finely solved picture:", "", *fine),
    ]


def train_report(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tabulate the gains of the trained arms, and the leader's by seed over them."""
    from comfy_g2rpo.run.evaluation import interval

    lines = ["| T | noise | arm | budget | seeds | updates | agreement | strict | fine | {2} minus it |"]
    lines.append("|---" * 10 + "|")
    found: dict[tuple[Any, ...], dict[int, dict[str, float]]] = {}
    for row in rows:
        for budget, goal in (("cpu", row["cpu_seconds"]), ("work", row["goal_work"])):
            points = [point for point in row["points"] if goal and point[budget] >= goal]
            if points:
                place = (row["steps"], row["noise"], f"{goal:g} {'CPU s' if budget == 'cpu' else budget}")
                gains = {name: points[0][name] - row["before"][name] for name in row["before"]}
                found.setdefault((*place, row["arm"]), {})[row["seed"]] = gains | points[0] | {"gain": gains}
    for (steps, noise, budget, arm), runs in sorted(found.items(), key=str):
        leader = found.get((steps, noise, budget, "{2}"), {})
        names = ("agreement", "strict", "fine")
        cells = [[run["gain"][name] for run in runs.values()] for name in names]
        cells.append(
            [leader[s]["gain"]["agreement"] - runs[s]["gain"]["agreement"] for s in runs if s in leader]
        )
        told = ("{:+.3f} ± {:.3f}".format(*interval(torch.tensor(c))) if c else "–" for c in cells)
        updates = sum(run["updates"] for run in runs.values()) / len(runs)
        lines.append(
            f"| {steps} | {noise:g} | {arm} | {budget} | {len(runs)} | {updates:.0f} | {' | '.join(told)} |"
        )
    return lines


def draw(tables: Mapping[int, Judged], path: Path, truth: str = "sampled") -> None:
    """Draw what every Λ is worth beside {1} by the judge's noise: the model, and what was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(1, len(tables), figsize=(9, 3.3), sharey=True, layout="constrained")
    generator = torch.Generator().manual_seed(0)
    along = [i / 20 for i in range(61)]
    for axis, (steps, judged) in zip(axes, tables.items(), strict=True):
        price = judged.picture_price()
        rows = torch.randint(len(judged.rows), (400, len(judged.rows)), generator=generator)
        for place, strides in enumerate(SETS):
            colour = ("#555555", "#0072B2", "#D55E00", "#E69F00", "#009E73")[place]
            line = [
                worth(judged, truth, strides, n, price) / worth(judged, truth, (1,), n, price) for n in along
            ]
            axis.plot(along, line, color=colour, linewidth=1.3, label=f"Λ = {named(strides)}")
            dear = [
                sum(a * b for a, b in zip(judged.prices[one], (1, price), strict=True))
                for one in (strides, (1,))
            ]
            for noise in NOISE if place else ():
                ours, base = (
                    judged.correlation(judged.advantages(one, noise), truth) for one in (strides, (1,))
                )
                drawn = (ours[rows].mean(1) / base[rows].mean(1)).square() * dear[1] / dear[0]
                low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
                middle = (ours.mean() / base.mean()).item() ** 2 * dear[1] / dear[0]
                error = [[middle - low], [high - middle]]
                axis.errorbar(noise, middle, yerr=error, fmt="o", markersize=3.5, capsize=2, color=colour)
        axis.set_title(f"{steps} steps", fontsize=10)
        axis.set_xlabel("judge's noise ÷ spread of a group")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("worth of a CPU second\nbeside Λ = {1}")
    axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("forks", "train", "report"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--plot", type=Path, help="file for the plot (PNG) of the report")
    parser.add_argument("--prompts", type=Path, default=ROOT / "prompts/shapes_tune.txt")
    parser.add_argument(
        "--seeds", type=int, nargs=2, default=(0, 2), help="first seed, and the one after the last"
    )
    parser.add_argument(
        "--split", choices=("tune", "heldout"), default="heldout", help="prompts to measure on"
    )
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--steps", type=int, nargs="*", choices=STEPS, default=[8])
    parser.add_argument("--noise", type=float, nargs="*", choices=NOISE, default=list(NOISE))
    parser.add_argument("--cpu-seconds", type=float, default=12.0)
    parser.add_argument("--work", type=float, default=5000, help="model work of a run; 0 is none")
    options = parser.parse_args(arguments)
    judged, trained = (options.out / f"granularity_{name}.jsonl" for name in ("forks", "train"))
    if options.stage == "forks":
        prompts = [line for line in options.prompts.read_text(encoding="utf-8").split("\n") if line]
        for seed in range(*options.seeds):
            collect(judged, prompts, seed)
    elif options.stage == "train":
        train_arms(trained, options)
    else:
        tables = {steps: Judged(read(judged), steps) for steps in STEPS}
        print("\n".join([*forks_report(tables), "", *train_report(read(trained))]))
        if options.plot:
            draw(tables, options.plot)


if __name__ == "__main__":
    sys.exit(main())
