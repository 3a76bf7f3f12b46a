"""How fast is the rollout? One prompt group by the engine, and by the plain loops of plain.py: same noise,
same numerics, one CPU thread.

    python benchmarks/rollout.py [--quick] [--json OUT]

Seconds are the process's CPU seconds in float32, the least of several repeats. In float32 rewards differ
where numbers that were summed in another order round to another of 256 levels: about one value in 10⁵, by one
level. With the model in float64 none does.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from plain import PlainLoop
from torch import Tensor, nn

from comfy_g2rpo.advantages import integrate
from comfy_g2rpo.plan import Plan, singular
from comfy_g2rpo.rewards import Reward
from comfy_g2rpo.rewards import load as load_reward
from comfy_g2rpo.rollout import seeded_noise
from comfy_g2rpo.run.scorer import Scorer
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.speed.fitting_rollout import roll_out
from g2rpo_trainer.families.sd3 import SD3, load_pipeline
from g2rpo_trainer.model.placing import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
PROMPT, SEED, SLOTS = "a red circle and a blue square", 7, 128
CASES = {
    "T=16, k=0…7, G=12, Λ={1,2}": {"num_steps": 16, "branch_steps": range(8), "group_size": 12},
    "T=8, k=0…3, G=8, Λ={1,2}": {"num_steps": 8, "branch_steps": range(4), "group_size": 8},
}
GROUPS, SMALLEST = (8, 16, 32, 64), 64  # slots that even the smallest group fills
TARGETS = {16: {"one by one": 9.0, "batched over G": 1.8}, 8: {"one by one": 6.0, "batched over G": 1.6}}


@dataclass
class Metered(Reward):
    """A policy, decoder and reward that count the CPU seconds spent in them."""

    policy: SD3
    decoder: Callable[[Tensor], Tensor]
    seconds: dict[str, float] = field(default_factory=lambda: {"model": 0.0, "decode": 0.0, "reward": 0.0})
    name, licence, compares_across_prompts = "agreement", "", True

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[Any]) -> Tensor:
        """Evaluate the policy."""
        return self._timed("model", lambda: self.policy.velocity(x, sigma, cond))

    def parameters(self) -> list[nn.Parameter]:
        """List the adapter's parameters."""
        return self.policy.parameters()

    def reference(self) -> AbstractContextManager[None]:
        """Switch the adapter off."""
        return self.policy.reference()

    def inference(self) -> AbstractContextManager[None]:
        """Merge the adapter."""
        return self.policy.inference()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents."""
        return self._timed("decode", lambda: self.decoder(latents))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Judge images."""
        return self._timed("reward", lambda: load_reward(self.name).score(images, prompts))

    def _timed(self, part: str, work: Callable[[], Tensor]) -> Tensor:
        begin = time.process_time()
        result = work()
        self.seconds[part] += time.process_time() - begin
        return result


@dataclass(frozen=True)
class Measured:
    """One way to run a group: its scores [1, images], CPU seconds in all and by part, forwards."""

    scores: Tensor
    seconds: float
    parts: dict[str, float]
    forwards: int


def load_policy(path: Path, dtype: torch.dtype = torch.float32) -> SD3:
    """Load the model with the demo's adapter, as it might stand after some updates."""
    policy = SD3(load_pipeline(path, dtype))
    policy.add_lora(16, 16, seed=0, feed_forward=True)
    with torch.no_grad():
        for name, (_, up) in policy.pairs().items():
            up.copy_(0.02 * seeded_noise(up.shape, "up", name))
    for parameter in policy.parameters():
        parameter.data = parameter.data.to(dtype)
    return policy


def contiguous_decoder(policy: SD3) -> Callable[[Tensor], Tensor]:
    """Decode as pipelines do, channels first."""

    def decode(latents: Tensor) -> Tensor:
        raw = latents / policy.vae.config.scaling_factor + (policy.vae.config.shift_factor or 0.0)
        return (
            (policy.vae.decode(raw.to(policy.vae_dtype), return_dict=False)[0].float() / 2 + 0.5)
            .clamp(0, 1)
            .permute(0, 2, 3, 1)
        )

    return decode


def run_engine(policy: SD3, plan: Plan, slots: int = SLOTS) -> Measured:
    """Run a group by the engine."""
    metered = Metered(policy, policy.decode)
    cond, shape = policy.encode([PROMPT]), policy.latent_shape(64, 64)
    policy.vae.to(memory_format=torch.channels_last)
    scorer = Scorer(metered.decode, [metered], [PROMPT], len(plan.images))
    begin = time.process_time()
    rollout = roll_out(
        metered, plan, shifted_sigmas(plan.num_steps), cond, [SEED], shape, slots=slots, sink=scorer
    )
    return measured(scorer.scores[:, 0], begin, metered, rollout.nfe)


def run_plain(policy: SD3, plan: Plan, way: Callable[[PlainLoop], Tensor]) -> Measured:
    """Run a group by a plain loop."""
    metered = Metered(policy, contiguous_decoder(policy))
    cond, shape = policy.encode([PROMPT])[0], policy.latent_shape(64, 64)
    policy.vae.to(memory_format=torch.contiguous_format)
    begin = time.process_time()
    loop = PlainLoop(
        metered, metered.decode, [metered], plan, shifted_sigmas(plan.num_steps), PROMPT, cond, SEED, shape
    )
    return measured(way(loop), begin, metered, loop.forwards)


def measured(scores: Tensor, begin: float, metered: Metered, forwards: int) -> Measured:
    """Close a measurement; what is in none of the parts is the loop's own."""
    seconds = time.process_time() - begin
    return Measured(
        scores, seconds, metered.seconds | {"rest": seconds - sum(metered.seconds.values())}, forwards
    )


WAYS: dict[str, Callable[[SD3, Plan], Measured]] = {
    "engine": run_engine,
    "batched over G": lambda policy, plan: run_plain(policy, plan, PlainLoop.batched),
    "one by one": lambda policy, plan: run_plain(policy, plan, PlainLoop.as_published),
}


def compare(policy: SD3, case: dict[str, Any], terminal: str, repeats: int) -> list[dict[str, Any]]:
    """Run one case in every way; rows of the table, the engine's first."""
    plan = singular(**case, granularities=(1, 2), terminal=terminal)
    rows, reference = [], None
    best: dict[str, Measured] = {}
    for _ in range(repeats):
        for name, way in WAYS.items():
            once = way(policy, plan)
            best[name] = min(best.get(name, once), once, key=lambda m: m.seconds)
    for name, found in best.items():
        reference = reference or found
        advantages = [integrate(plan.values(m.scores)) for m in (reference, found)]
        rows.append(
            {
                "way": name,
                "seconds": found.seconds,
                "forwards": found.forwards,
                "images": len(plan.images),
                "ratio": found.seconds / reference.seconds,
                "target": TARGETS[plan.num_steps].get(name),
                **found.parts,
                "reward_difference": (found.scores - reference.scores).abs().max().item(),
                "advantage_difference": (advantages[1] - advantages[0]).abs().max().item(),
            }
        )
    return rows


def differences(policy: SD3, plan: Plan) -> dict[str, float]:
    """Run a plan in every way; the largest difference of a reward from the engine's."""
    scores = {name: way(policy, plan).scores for name, way in WAYS.items()}
    return {name: (found - scores["engine"]).abs().max().item() for name, found in scores.items()}


def scale(policy: SD3, groups: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Run the engine on growing groups: time per unit of work, and how far the process's peak memory has
    grown.
    """
    rows: list[dict[str, Any]] = []
    for group in groups:
        plan = singular(8, range(4), group, (1, 2))
        found = min(
            (run_engine(policy, plan, slots=SMALLEST) for _ in range(repeats)), key=lambda m: m.seconds
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            1024 if sys.platform != "darwin" else 1024**2
        )
        row = {
            "group_size": group,
            "forwards": found.forwards,
            "images": len(plan.images),
            "seconds": found.seconds,
        }
        row |= {"ms_per_unit": 1000 * found.seconds / (found.forwards + len(plan.images)), "peak_mib": peak}
        rows.append(row | {"growth_mib": peak - (rows[0]["peak_mib"] if rows else peak)})
    return rows


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows under their keys."""
    print(f"\n{title}")
    cells = [
        [f"{v:.3g}" if isinstance(v, float) else "–" if v is None else str(v) for v in row.values()]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip([*rows[0]], *cells, strict=True)]
    for line in ([*rows[0]], *cells):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smaller case alone, once")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--model", type=Path, default=ROOT / "models/tiny", help="folder of the model")
    parser.add_argument(
        "--terminal",
        choices=("published", "exact"),
        default="published",
        help="what a stride that misses the end does",
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of everything; the fastest counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    policy = load_policy(options.model)
    repeats = 1 if options.quick else options.repeats
    for _ in range(4):  # kernels are chosen, and memory is claimed, in the first runs
        run_engine(policy, singular(8, range(4), GROUPS[0], (1, 2)), slots=SMALLEST)
    figures: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cases": {},
    }
    figures["scaling"] = scale(policy, GROUPS[:2] if options.quick else GROUPS, repeats)
    for name, case in list(CASES.items())[1 if options.quick else 0 :]:
        figures["cases"][name] = compare(policy, case, options.terminal, repeats)
        print_table(f"{name}, terminal {options.terminal}: CPU seconds", figures["cases"][name])
    # With twice the digits a difference would be one in what is computed, not in the order of its sums.
    smallest = list(CASES.values())[1]
    plan = singular(**smallest, granularities=(1, 2), terminal=options.terminal)
    figures["differences_float64"] = differences(load_policy(options.model, torch.float64), plan)
    print_table(
        "T=8, k=0…3, G=8 in float64: largest difference of a reward", [figures["differences_float64"]]
    )
    print_table("Engine, T=8, k=0…3, Λ={1,2}: growing groups", figures["scaling"])
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
