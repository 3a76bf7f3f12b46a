"""How fast are pictures scored? Images per second of every kind of reward, one by one and 32 at once; what
overlap with decoding saves.

    python benchmarks/scoring.py [--quick] [--threads 1] [--json OUT]

Reward models have the published sizes and random weights: speed does not depend on what they have learned. In
each round every way runs once, in turn, and the least time of each counts: CPU seconds on the CPU, which a
busy machine hardly changes, elapsed ones on a GPU and where something waits.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from comfy_g2rpo.rewards import Reward, load
from comfy_g2rpo.rewards.models.catalogue import KNOWN
from comfy_g2rpo.rewards.models.clip import CONTEXT, Clip, ModelReward
from comfy_g2rpo.rewards.models.preprocess import Pictures
from comfy_g2rpo.run.scorer import Scorer

SIDE, BATCH = 512, 32
VOCABULARY = 49408
# width, layers, heads, feed-forward, patch of the vision tower; width, layers, heads of the text tower; of
# the embedding
SIZES = {
    "ViT-B/32": ((768, 12, 12, 3072, 32), (512, 8, 12), 512),
    "ViT-L/14": ((1024, 24, 16, 4096, 14), (768, 12, 12), 768),
    "ViT-H/14": ((1280, 32, 16, 5120, 14), (1024, 16, 24), 1024),
}
WHO = {"ViT-B/32": "CLIP", "ViT-L/14": "CLIPScore, aesthetic", "ViT-H/14": "PickScore, HPS v2.1"}
WAIT = 0.02  # seconds that a judge elsewhere takes for a picture


@dataclass(frozen=True)
class Rate:
    """Images per second, one by one and in batches: of one prompt (a group's), and of as many prompts as
    images.
    """

    name: str
    alone: float
    group: float
    prompts: float

    def line(self) -> str:
        """Write it as a row of a table."""
        return (
            f"| {self.name} | {self.alone:.3g} | {self.group:.3g} ({self.group / self.alone:.2f}×) | "
            f"{self.prompts:.3g} ({self.prompts / self.alone:.2f}×) |"
        )


class Words:
    """A tokenizer that needs no files: each word is a number, the end of the text the highest."""

    def __call__(self, prompts: Sequence[str], **how: Any) -> SimpleNamespace:
        """Number the words: [B, 77]."""
        words = [
            [sum(map(ord, word)) % 40000 for word in prompt.split()[: CONTEXT - 2]] for prompt in prompts
        ]
        rows = [[VOCABULARY - 2, *row, VOCABULARY - 1, *[0] * (CONTEXT - 2 - len(row))] for row in words]
        return SimpleNamespace(input_ids=torch.tensor(rows))


def clip(size: str, device: str, dtype: torch.dtype) -> ModelReward:
    """Make CLIPScore of a published size with random weights."""
    (width, layers, heads, inner, patch), (text_width, text_heads, text_layers), embed = SIZES[size]
    vision = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    text = {"hidden_size": text_width, "num_hidden_layers": text_layers, "num_attention_heads": text_heads}
    text |= {
        "intermediate_size": 4 * text_width,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
    }
    torch.manual_seed(0)
    config = {
        "vision_config": {**vision, "image_size": 224, "patch_size": patch},
        "text_config": text,
        "projection_dim": embed,
    }
    module = Clip(config, Words()).eval().requires_grad_(False)
    return ModelReward.of(KNOWN["clipscore"], size, module, Pictures(224), dtype, BATCH).to(device)


def rate(name: str, reward: Reward, images: Tensor, rounds: int, clock: Callable[[], float]) -> Rate:
    """Time a reward in its three ways; every round runs all of them."""
    count = len(images)
    one, many = (
        ["a red circle and a blue square"] * count,
        [f"a picture of {i} red circles" for i in range(count)],
    )

    def by(size: int, prompts: Sequence[str]) -> Callable[[], None]:
        return lambda: (
            [reward.score(images[i : i + size], prompts[i : i + size]) for i in range(0, count, size)]
            and None
        )

    ways = {"alone": by(1, one), "group": by(BATCH, one), "prompts": by(BATCH, many)}
    reward.score(images[:2], one[:2])
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for way, run in ways.items():
            begin = clock()
            run()
            seconds[way] = min(seconds[way], clock() - begin)
    return Rate(name, *(count / seconds[way] for way in ("alone", "group", "prompts")))


@dataclass
class Elsewhere(Reward):
    """A judge that lives elsewhere: this machine waits for it."""

    runs_elsewhere: bool
    name: str = "elsewhere"
    licence: str = ""
    compares_across_prompts: bool = True
    seen: list[int] = field(default_factory=list)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Wait as long as an answer takes."""
        time.sleep(WAIT * len(images))
        self.seen.append(len(images))
        return images.mean((1, 2, 3))


def overlap(pictures: int, rounds: int) -> dict[str, float]:
    """Time decoding and a judge elsewhere, one after the other and beside each other: seconds, and those
    of each part alone.
    """
    torch.manual_seed(0)
    weights = torch.randn(1, 1, 512, 512) / 23

    def decode(latents: Tensor) -> Tensor:
        # About as long for a picture as the judge takes: a decoder keeps this machine busy.
        end = time.perf_counter() + WAIT * len(latents)
        noise = torch.zeros(len(latents), 1, 512, 512)
        while time.perf_counter() < end:
            noise = (noise + 1) @ weights[0, 0]
            noise = noise / noise.abs().amax().clamp(min=1)
        return torch.rand(len(latents), 64, 64, 3)

    seconds = {"one after the other": float("inf"), "beside each other": float("inf")}
    for _ in range(rounds):
        for way in seconds:
            scorer = Scorer(decode, [Elsewhere(way == "beside each other")], ["x"], pictures, batch=8)
            begin = time.perf_counter()
            with scorer:
                scorer([0] * pictures, list(range(pictures)), torch.zeros(pictures, 4))
            seconds[way] = min(seconds[way], time.perf_counter() - begin)
            assert not scorer.scores.isnan().any()
    return seconds | {"decoding alone": pictures * WAIT, "the judge alone": pictures * WAIT}


def measure(quick: bool, device: str) -> dict[str, Any]:
    """Measure everything on a device."""
    rounds, clock = 2 if quick else 5, time.process_time if device == "cpu" else time.perf_counter
    sizes = ("ViT-B/32",) if quick else ("ViT-B/32", "ViT-L/14") if device == "cpu" else tuple(SIZES)
    dtypes = {"fp32": torch.float32} | ({} if device == "cpu" else {"bf16": torch.bfloat16})
    images = torch.rand(BATCH, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0))
    rates = []
    for size in sizes:
        for kind, dtype in dtypes.items():
            # One round of the larger ones is minutes on a CPU, and long enough to be steady.
            turns = rounds if device != "cpu" else 3 if size == "ViT-B/32" else 1
            rates.append(
                rate(f"{size} ({WHO[size]}), {kind}", clip(size, device, dtype), images, turns, clock)
            )
            print(rates[-1].line(), flush=True)
    if device == "cpu":
        for name in ("colourfulness", "sharpness", "jpeg", "webp", "exposure", "symmetry"):
            rates.append(rate(f"{name}, {SIDE}²", load(name), images, rounds, clock))
            print(rates[-1].line(), flush=True)
        rates.append(rate("agreement, 64²", load("agreement"), images[:, :64, :64], rounds, clock))
        print(rates[-1].line(), flush=True)
    return {"rates": [vars(each) for each in rates], "overlap": overlap(64, rounds)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="the smallest model and few rounds: half a minute"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        name = (
            torch.cuda.get_device_name()
            if args.device == "cuda"
            else f"CPU, {args.threads} thread{'s' * (args.threads > 1)}"
        )
        print(
            f"{name}, torch {torch.__version__}, Python {platform.python_version()}; images of "
            f"{SIDE}², images per second"
        )
        print(
            f"| reward | one by one | {BATCH} at once, one prompt | {BATCH} at once, {BATCH} prompts "
            "|\n|---|---|---|---|"
        )
        found = measure(args.quick, args.device)
    for way, seconds in found["overlap"].items():
        print(f"64 pictures, {way}: {seconds:.2f} s")
    if args.json:
        args.json.write_text(json.dumps({"device": name, "command": sys.argv[1:], **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
