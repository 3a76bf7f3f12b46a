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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from independent import Step, trajectories, update
from plain import PlainLoop
from torch import Tensor, nn

from comfy_g2rpo.advantages import integrate
from comfy_g2rpo.plan import Plan, singular
from comfy_g2rpo.recipes import build_plan
from comfy_g2rpo.rewards import Reward
from comfy_g2rpo.rewards import load as load_reward
from comfy_g2rpo.rollout import seeded_noise
from comfy_g2rpo.run.iteration import iterate
from comfy_g2rpo.run.scorer import Scorer
from comfy_g2rpo.run.setup import make_learner
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.speed.fitting_rollout import roll_out
from g2rpo_trainer.config.reading import load
from g2rpo_trainer.families.sd3 import SD3, load_pipeline
from g2rpo_trainer.families.shared.peft_policy import PeftPolicy
from g2rpo_trainer.model.placing import keep_freed_memory
from g2rpo_trainer.run import prepare

ROOT = Path(__file__).resolve().parent.parent
PROMPT, SEED, SLOTS = "a red circle and a blue square", 7, 128
CASES = {
    "T=16, k=0…7, G=12, Λ={1,2}": {"num_steps": 16, "branch_steps": range(8), "group_size": 12},
    "T=8, k=0…3, G=8, Λ={1,2}": {"num_steps": 8, "branch_steps": range(4), "group_size": 8},
}
PICTURES = 64
"""Of a step of independent trajectories."""
GROUPS, SMALLEST = (8, 16, 32, 64), 64  # slots that even the smallest group fills
SAME = {"one by one, our forward": 5.5, "batched over G, our forward": 1.5}
TARGETS = {
    16: {"one by one": 9.0, "batched over G": 1.8, **SAME},
    8: {"one by one": 6.0, "batched over G": 1.6},
}


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


class Unmerged(SD3):
    """The model with the forward that rollouts in 16 bit have, and those of all other families.

    In float32: processors without products in bf16 emulate them, and show neither.
    """

    inference = PeftPolicy.inference


def load_policy(path: Path, dtype: torch.dtype = torch.float32, kind: type[SD3] = SD3) -> SD3:
    """Load the model with the demo's adapter, as it might stand after some updates."""
    policy = kind(load_pipeline(path, dtype), autocast=dtype if dtype == torch.bfloat16 else None)
    policy.add_lora(16, 16, seed=0, feed_forward=True)
    with torch.no_grad():
        for name, (_, up) in policy.pairs().items():
            up.copy_(0.02 * seeded_noise(up.shape, "up", name))
    for parameter in policy.parameters():
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
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


def run_plain(policy: SD3, plan: Plan, way: Callable[[PlainLoop], Tensor], ours: bool = False) -> Measured:
    """Run a group by a plain loop, with peft's layers and the VAE's own decoder, or with `ours`."""
    metered = Metered(policy, policy.decode if ours else contiguous_decoder(policy))
    cond, shape = policy.encode([PROMPT])[0], policy.latent_shape(64, 64)
    policy.vae.to(memory_format=torch.channels_last if ours else torch.contiguous_format)
    begin = time.process_time()
    loop = PlainLoop(
        metered, metered.decode, [metered], plan, shifted_sigmas(plan.num_steps), PROMPT, cond, SEED, shape
    )
    with policy.inference() if ours else nullcontext():
        scores = way(loop)
    return measured(scores, begin, metered, loop.forwards)


def measured(scores: Tensor, begin: float, metered: Metered, forwards: int) -> Measured:
    """Close a measurement; what is in none of the parts is the loop's own."""
    seconds = time.process_time() - begin
    return Measured(
        scores, seconds, metered.seconds | {"rest": seconds - sum(metered.seconds.values())}, forwards
    )


LOOPS = {"batched over G": PlainLoop.batched, "one by one": PlainLoop.as_published}
WAYS: dict[str, Callable[[SD3, Plan], Measured]] = {
    "engine": run_engine,
    **{name: lambda policy, plan, way=way: run_plain(policy, plan, way) for name, way in LOOPS.items()},
    **{
        f"{name}, our forward": lambda policy, plan, way=way: run_plain(policy, plan, way, ours=True)
        for name, way in LOOPS.items()
    },
}
"""Ways to run a group; those with our forward and decoder have no tree, and nothing else less."""


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


def plain_step(policy: SD3, batch: int, optimizer: torch.optim.Optimizer) -> int:
    """Take a step on 64 pictures of a prompt, as trainers on diffusers and peft do; return their number."""
    prompts, decode = [PROMPT] * batch, contiguous_decoder(policy)
    policy.vae.to(memory_format=torch.contiguous_format)
    found = [
        trajectories(policy, decode, load_reward("agreement"), prompts, 8, i)
        for i in range(PICTURES // batch)
    ]
    scores = torch.stack([each for each, _ in found])
    advantages = (scores - scores.mean()) / (scores.std() + 1e-4)
    steps = [
        Step(
            *(
                torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]
                for parts in zip(*same, strict=True)
            )
        )
        for same in zip(*(kept for _, kept in found), strict=True)
    ]
    update(policy, steps, [PROMPT] * PICTURES, advantages.flatten(), optimizer)
    return PICTURES


def our_step(setup: Any, learner: Any) -> int:
    """Take one of our steps; return the number of pictures."""
    iterate(setup, learner, lambda phase: None)
    return len(build_plan(setup.recipe).images) * setup.pace.prompts_per_step


def training(path: Path, dtype: str, *changes: str) -> Callable[[], int]:
    """Return our step on the demo's recipe with changes."""
    size = [f"model.path={path}", f"model.dtype={dtype}", "prompts.train=prompts/shapes_train.txt"]
    setup = prepare(load("demo", [*size, *changes]), Accelerator(cpu=True))
    return partial(our_step, setup, make_learner(setup))


def plain_training(policy: SD3, batch: int) -> Callable[[], int]:
    """Return the step of trainers on diffusers and peft."""
    return partial(plain_step, policy, batch, torch.optim.AdamW(policy.parameters(), lr=1e-3))


CHAINS = (
    "method.name=flow_grpo",
    "method.num_steps=8",
    f"method.group_size={PICTURES}",
    "method.kl=0",
    "method.granularities=[1]",
)


def whole_steps(path: Path, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Compare scored pictures per CPU second of whole training steps at the demo's schedule."""
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    ways = {
        "the demo's tree": training(path, name),
        "independent, ours": training(path, name, *CHAINS, "train.prompts_per_step=1", "train.slots=64"),
        "independent, diffusers + peft, batch 16": plain_training(load_policy(path, dtype), 16),
        "independent, diffusers + peft, batch 64": plain_training(load_policy(path, dtype), 64),
    }
    rates = dict.fromkeys(ways, 0.0)
    for _ in range(repeats + 1):  # the first of each warms up
        for way, step in ways.items():
            begin = time.process_time()
            count = step()
            rates[way] = max(rates[way], count / (time.process_time() - begin))
    tree, ours = list(rates.values())[:2]
    return [
        {"way": way, "pictures per second": rate, "tree is times": tree / rate, "ours is times": ours / rate}
        for way, rate in rates.items()
    ]


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
    forwards = {"merged": policy, "as in 16 bit": load_policy(options.model, kind=Unmerged)}
    for forward, same in forwards.items():
        for name, case in list(CASES.items())[1 if options.quick else 0 :]:
            rows = compare(same, case, options.terminal, repeats)
            figures["cases"][f"{name}, {forward}"] = rows
            print_table(f"{name}, terminal {options.terminal}, our forward {forward}: CPU seconds", rows)
    for dtype in (torch.float32, torch.bfloat16):
        rows = whole_steps(options.model, dtype, repeats if dtype == torch.float32 else 1)
        figures[f"whole steps, {dtype}"] = rows
        print_table(
            f"Whole training steps of 64 pictures, T=8, {dtype}: scored pictures per CPU second", rows
        )
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
