"""What does one prompt cost? Real architectures with random weights: the engine, each way to make it faster,
all of them, a plain loop.

    python benchmarks/gpu.py [MODEL …] [--shrunk] [--json OUT.jsonl]

One iteration of one prompt is rolled out, decoded, judged and learnt from; on a GPU in bf16, at the published
sizes. --shrunk runs the same code with small models in float32 on the CPU, where seconds are the process's
CPU seconds.

Utilisation is that of the model: FLOPs of the forwards that ran (counted by PyTorch over one), by the seconds
of the rollout without decoding and judging, by the card's dense peak in bf16 (on other devices: by a large
product measured here). The plain loop evaluates one latent at a time, shares nothing and decodes one picture
at a time, as published code does; its seconds are those of a few forwards, pictures and updates, times how
many it takes. `rank` is the rank correlation of rewards with the exact completions of the same run: with
random weights and a simple reward it shows that the measurement works, and says little of trained models.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from random_models import SMALL_SIDE, random_conds, random_policy
from rollout import print_table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from comfy_g2rpo.advantages import integrate, rank_correlation
from comfy_g2rpo.plan import ROOT, Plan
from comfy_g2rpo.recipes import Recipe, build_plan, recipe
from comfy_g2rpo.rewards import load as load_reward
from comfy_g2rpo.rollout import seeded_noise
from comfy_g2rpo.run.scorer import Scorer, to_8_bit
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.speed.cheap_completions import Speed
from comfy_g2rpo.speed.fitting_rollout import roll_out
from comfy_g2rpo.speed.step_cache import Shortcut
from comfy_g2rpo.update import records, update
from g2rpo_trainer.model.cheap_forward import completions, multiplies_fp8
from g2rpo_trainer.model.placing import keep_freed_memory

CASES = {
    "flux_720": ("flux", 720, 12),
    "flux_512": ("flux", 512, 24),
    "sd35_medium_512": ("sd35_medium", 512, 48),
    "qwen_image_512": ("qwen_image", 512, 24),
    "z_image_512": ("z_image", 512, 24),
}
"""By name: the architecture, the side in pixels, the slots."""
SCHEDULES = {
    # arXiv 2510.01982, as its scripts have it: Λ={1,2}, T=16, k=0…7, G=12.
    "official": recipe("g2rpo"),
    # Half of the branch steps, chosen anew each iteration: recipes/flux_dev_fast.yaml.
    "fast": recipe("g2rpo", pick="random", pick_size=4),
}
QUICK = {name: replace(made, num_steps=6, group_size=4, pick_size=2) for name, made in SCHEDULES.items()}
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}  # dense bf16, NVIDIA's data sheets
PLAIN = 6  # forwards of the plain loop that are timed


@dataclass(frozen=True)
class Bench:
    """A model and how it is measured."""

    name: str
    policy: Any
    cond: Any
    shape: tuple[int, ...]
    slots: int
    flops: float
    peak: float

    @property
    def cuda(self) -> bool:
        """Say whether it runs on a GPU."""
        return self.policy.device.type == "cuda"

    def now(self) -> float:
        """Return a time: of a GPU that has finished, or the process's."""
        if self.cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def seconds(self, work: Callable[[], object], repeats: int) -> float:
        """Time work, after once to warm up, per repetition."""
        work()
        begin = self.now()
        for _ in range(repeats):
            work()
        return (self.now() - begin) / repeats


def prepare(name: str, shrunk: bool) -> Bench:
    """Make a model."""
    kind, side, slots = CASES[name]
    device = torch.device("cpu" if shrunk else "cuda")
    policy = random_policy(kind, device, torch.float32 if shrunk else torch.bfloat16, shrunk)
    shape = policy.latent_shape(*(SMALL_SIDE if shrunk else side,) * 2)
    cond = random_conds(kind, device, shrunk)[0]
    # Attention by plain products is counted on every device; a CPU's fused kernel is not.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        policy.velocity(
            seeded_noise((1, *shape), "flops").to(device), torch.full((1,), 0.5, device=device), [cond]
        )
    return Bench(name, policy, cond, shape, slots, counter.get_total_flops(), peak_flops(device))


def peak_flops(device: torch.device) -> float:
    """Return the card's dense peak in bf16, or what a large product reaches."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for name, peak in PEAKS.items():
        if name in card:
            return peak
    size, dtype, clock = (
        (8192, torch.bfloat16, time.perf_counter) if card else (1024, torch.float32, time.process_time)
    )
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        begin = clock()
        (a @ a).sum().item()
        best = max(best, 2 * size**3 / (clock() - begin))
    return best


def iterate(bench: Bench, made: Recipe, speed: Speed, velocity: Any) -> tuple[dict[str, Any], Tensor]:
    """Roll out, decode, judge and learn from one prompt; return figures, and rewards [1, K, G, L]."""
    policy, conds = bench.policy, [bench.cond]
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    begin, plan = bench.now(), build_plan(made, coarsest=speed.tail_stride)
    scorer = Scorer(policy.decode, [load_reward("colourfulness")], [""], len(plan.images), batch=8)
    shortcut = Shortcut(velocity, speed.cache) if speed.on else None
    judged = 0.0

    def judge(prompts: list[int], images: list[int], latents: Tensor) -> None:
        nonlocal judged
        start = bench.now()
        scorer(prompts, images, latents)
        judged += bench.now() - start

    sigmas, how = (
        shifted_sigmas(made.num_steps, made.shift),
        {"slots": bench.slots, "device": policy.device, "shortcut": shortcut},
    )
    rollout = roll_out(policy, plan, sigmas, conds, [0], bench.shape, sink=judge, **how)
    rolled, rewards = bench.now(), plan.values(scorer.scores[:, 0])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=made.learning_rate)
    with policy.training():
        update(policy, records(rollout, [integrate(rewards)]), conds, optimizer, made, micro_batch=1)
    done = bench.now()
    forwards, rolling = rollout.nfe, rolled - begin - judged
    figures = {
        "seconds": done - begin,
        "rollout_s": rolling,
        "decode_score_s": judged,
        "update_s": done - rolled,
        "forwards": forwards,
        "images": len(plan.images),
        "forwards_per_s": forwards / rolling,
        "images_per_s": len(plan.images) / (rolled - begin),
        "utilisation": forwards * bench.flops / rolling / bench.peak,
        "peak_gb": torch.cuda.max_memory_allocated() / 2**30 if bench.cuda else None,
    }
    return figures, rewards


def plain(bench: Bench, made: Recipe, sample: int = PLAIN) -> dict[str, Any]:
    """Time a few forwards, pictures and updates of one latent each.

    Return the figures of the whole iteration.
    """
    policy, device = bench.policy, bench.policy.device
    x = seeded_noise((1, *bench.shape), "plain").to(device)
    sigma, reward = torch.full((1,), 0.5, device=device), load_reward("colourfulness")
    with torch.no_grad():
        forward = bench.seconds(lambda: policy.velocity(x, sigma, [bench.cond]), sample)
        picture = bench.seconds(lambda: reward.score(to_8_bit(policy.decode(x)), [""]), max(sample // 2, 1))

    def learn() -> None:
        policy.velocity(x, sigma, [bench.cond]).square().mean().backward()
        for parameter in policy.parameters():
            parameter.grad = None

    backward = bench.seconds(learn, max(sample // 3, 1))
    plan = build_plan(made)
    forwards, images, forks = (
        published_forwards(build_plan(replace(made, terminal="published"))),
        len(plan.images),
        len(plan.forks),
    )
    rollout, judged, learnt = forward * forwards, picture * images, backward * forks
    return {
        "seconds": rollout + judged + learnt,
        "rollout_s": rollout,
        "decode_score_s": judged,
        "update_s": learnt,
        "forwards": forwards,
        "images": images,
        "forwards_per_s": 1 / forward,
        "images_per_s": images / (rollout + judged),
        "utilisation": bench.flops / forward / bench.peak,
        "peak_gb": None,
    }


def published_forwards(plan: Plan) -> int:
    """Count what the published structure spends: the whole anchor, and every path from the branch state on
    by itself.
    """
    count, seen = 0, set[int]()
    for leaf in plan.leaves:
        at = leaf.state
        while at != ROOT and at not in seen:
            parent = plan.states[at].parent
            if plan.states[at].noise and parent != ROOT:
                seen.add(at)
                count += 1
                break
            count += 1
            at = parent
    return plan.num_steps + count


def ways(bench: Bench) -> dict[str, Speed]:
    """List the ways that this device knows: each by itself, then all."""
    low = "bf16" if not bench.cuda else "fp8" if not multiplies_fp8(bench.policy.device) else "same"
    found = {"engine": Speed(), "compiled": Speed(compile=True), low: Speed(precision=low)}
    found |= {"cache 0.1": Speed(cache=0.1), "tail stride 2": Speed(tail_stride=2)}
    found.pop("same", None)
    return found | {"together": Speed(precision=low, compile=True, cache=0.1, tail_stride=2)}


def warm_up(bench: Bench, made: Recipe, speed: Speed, velocity: Any) -> None:
    """Let kernels be chosen and blocks be compiled: for full batches, for what is left at the end, and for
    one latent, a case apart.
    """
    x = seeded_noise((bench.slots, *bench.shape), "warm").to(bench.policy.device)
    with bench.policy.inference():
        for rows in (bench.slots, bench.slots - 1, 5, 2, 1):
            (velocity or bench.policy.velocity)(
                x[:rows], torch.full((rows,), 0.5, device=x.device), [bench.cond] * rows
            )
    iterate(bench, replace(made, group_size=3, pick="random", pick_size=1), speed, velocity)


def measure(bench: Bench, schedules: dict[str, Recipe], chosen: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Run every way at every schedule; one row each, the plain loop first."""
    rows = []
    for schedule, made in schedules.items():
        first = plain(bench, made)
        rows.append(
            {
                "model": bench.name,
                "schedule": schedule,
                "way": "plain loop",
                **first,
                "faster": 1.0,
                "rank": None,
            }
        )
        exact = None
        for way, speed in ways(bench).items():
            if chosen and way not in chosen and way != "engine":
                continue
            velocity = completions(bench.policy, speed)
            warm_up(bench, made, speed, velocity)
            figures, rewards = iterate(bench, made, speed, velocity)
            exact = rewards if exact is None else exact
            figures |= {
                "faster": first["seconds"] / figures["seconds"],
                "rank": rank_correlation(rewards, exact).nanmean().item(),
            }
            row = {"model": bench.name, "schedule": schedule, "way": way, **figures}
            rows.append(row | ({"notes": velocity.notes} if velocity and velocity.notes else {}))
    return rows


SHOWN = (
    "schedule",
    "way",
    "seconds",
    "faster",
    "forwards",
    "forwards_per_s",
    "images_per_s",
    "utilisation",
    "peak_gb",
    "rank",
)


def main() -> None:
    """Measure, print, and write JSON lines where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"of {', '.join(CASES)}; all where none is named"
    )
    parser.add_argument("--shrunk", action="store_true", help="small models in float32 on the CPU")
    parser.add_argument("--quick", action="store_true", help="six steps and groups of four: to try it")
    parser.add_argument(
        "--ways", nargs="*", default=[], help="only these, beside the plain loop and the engine"
    )
    parser.add_argument("--schedules", nargs="*", choices=list(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument("--json", type=Path, help="file for the figures, a line each, added at its end")
    options = parser.parse_args()
    if unknown := set(options.models) - set(CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are: {', '.join(CASES)}")
    if not options.shrunk and not torch.cuda.is_available():
        parser.error("no CUDA device; --shrunk runs the same code with small models on the CPU")
    diffusers.logging.set_verbosity_error()
    if options.shrunk:
        torch.set_num_threads(1)
        keep_freed_memory()
    machine = {
        "device": "cpu" if options.shrunk else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "shrunk": options.shrunk,
    }
    known = QUICK if options.quick else SCHEDULES
    for name in options.models or CASES:
        bench = prepare(name, options.shrunk)
        rows = measure(bench, {schedule: known[schedule] for schedule in options.schedules}, options.ways)
        size = "shrunk" if options.shrunk else f"{bench.flops / 1e12:.3g} TFLOP a forward"
        print_table(
            f"{name}, {machine['device']}, {size}: one prompt",
            [{key: row[key] for key in SHOWN} for row in rows],
        )
        for row in rows:
            for note in row.get("notes", ()):
                print(f"{row['way']}: {note}")
        if options.json:
            with options.json.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(machine | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
