"""The wrong things on wires, for comfy_child_hostile.py: other objects, wrong shapes and types, NaN,
models that are no flow models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.samplers
import comfy.sd
import comfy_side
import torch
from comfy.taesd.taesd import TAESD
from comfy_hostile_tools import Court
from torch import Tensor

Inputs = Mapping[str, Mapping[str, Any]]
Execute = Callable[[str, Mapping[str, Any]], Any]
Case = tuple[str, Any, bool | None]
"""What it is, the object, and whether it must be refused (None: it may be)."""

# What an error may name besides the input: what the wrong thing came with, or does not go with.
ALSO = {
    "MODEL": ("model", "targets", "rewards"),
    "CLIP": ("rewards",),
    "SIGMAS": ("branch_steps", "num_steps"),
    "IMAGE": ("threshold",),
}

JUNK: list[Any] = [None, "x", 7, [], {}, object(), torch.zeros(1)]


class WrongClip:
    """Encodes every text as the given tensors: another model's text encoder, or a broken one."""

    def __init__(self, features: Tensor, pooled: Tensor) -> None:
        self.made = [[features, {"pooled_output": pooled}]]

    def tokenize(self, text: str) -> str:
        """Pass the text on."""
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> Any:
        """Ignore it."""
        return self.made


class WrongNoise:
    """A NOISE with the given tensor."""

    def __init__(self, made: Any, seed: int = 0) -> None:
        self.made, self.seed = made, seed

    def generate_noise(self, latent: dict[str, Any]) -> Any:
        """Return it whatever the latent is."""
        return self.made


def not_flow(model: Any, sampling: str) -> Any:
    """Make a model of another kind by core's own node."""
    return comfy_side.node_class("ModelSamplingDiscrete")().patch(model, sampling, False)[0]


def broken_weights(model: Any) -> Any:
    """Patch NaN into a model."""
    patched = model.clone()
    key = next(
        key for key in model.model.state_dict() if key.endswith("joint_blocks.0.x_block.attn.qkv.weight")
    )
    shape = model.model.state_dict()[key].shape
    patched.add_patches({key: ("diff", (torch.full(shape, torch.nan),))})
    return patched


def models(model: Any) -> list[Case]:
    """List wrong MODELs."""
    kinds = [(kind, not_flow(model, kind), True) for kind in ("eps", "v_prediction", "lcm", "x0")]
    # A model with broken weights makes broken pictures, which no block may take for a result.
    return [*kinds, ("a model with NaN in its weights", broken_weights(model), None)]


def clips() -> list[Case]:
    """List wrong CLIPs."""
    return [
        ("text features of another width", WrongClip(torch.zeros(1, 7, 64), torch.zeros(1, 128)), True),
        ("pooled features of another width", WrongClip(torch.zeros(1, 7, 128), torch.zeros(1, 9)), True),
        (
            "NaN in the text features",
            WrongClip(torch.full((1, 7, 128), torch.nan), torch.zeros(1, 128)),
            None,
        ),
        ("no text features", WrongClip(torch.zeros(0, 0, 0), torch.zeros(0)), True),
    ]


def vaes() -> list[Case]:
    """List wrong VAEs."""
    four = comfy.sd.VAE(sd=TAESD(latent_channels=4).state_dict())
    shell = copy.copy(four)
    shell.first_stage_model = None
    return [("a VAE of four channels", four, True), ("a checkpoint without VAE", shell, True)]


def latents() -> list[Case]:
    """List wrong LATENTs; the model has 16 channels and at most 32 × 32 positions."""
    whole = torch.zeros(1, 16, 8, 8)
    shapes = [(0, 16, 8, 8), (2, 16, 8, 8), (1, 16, 1, 8, 8), (1, 16, 3, 8, 8)]
    shapes += [(1, 16, 8), (16, 8, 8), (1, 16, 0, 8), (1, 16, 8, 0), (), (0,)]
    refused = {f"a latent {shape}": torch.zeros(shape) for shape in shapes}
    refused |= {f"numbers of {kind}": whole.to(kind) for kind in (torch.int64, torch.bool, torch.complex64)}
    refused |= {f"a latent of {bad}": torch.full_like(whole, bad) for bad in (torch.nan, torch.inf)}
    refused["four channels that are not empty"] = torch.ones(1, 4, 8, 8)
    refused["more positions than the model has"] = torch.zeros(1, 16, 80, 80)
    refused["more than anybody can wait for"] = torch.zeros(1, 1, 1, 1).expand(1, 16, 60_000, 60_000)
    taken = {f"numbers of {kind}": whole.to(kind) for kind in (torch.float16, torch.bfloat16, torch.float64)}
    taken["four channels that are empty"] = torch.zeros(1, 4, 8, 8)
    taken |= {"one position": torch.zeros(1, 16, 1, 1), "odd sides": torch.zeros(1, 16, 7, 5)}
    return [
        *((what, {"samples": made}, True) for what, made in refused.items()),
        *((what, {"samples": made}, False) for what, made in taken.items()),
        ("a mask", {"samples": whole, "noise_mask": torch.ones(1, 1, 64, 64)}, True),
        ("no samples", {"x": whole}, True),
    ]


def schedules() -> list[Case]:
    """List wrong SIGMAS."""
    rows = [[], [1.0], [0.0], [0.0, 1.0], [1.0, 1.0, 0.0], [2.0, 1.0, 0.0]]
    rows += [[1.0, torch.nan, 0.0], [torch.inf, 0.0], [1.0, 0.5, -0.1]]
    return [
        *((f"sigmas {row}", torch.tensor(row), True) for row in rows),
        ("sigmas in two rows", torch.tensor([[1.0, 0.0]] * 2), True),
        ("a lone number", torch.tensor(1.0), True),
        ("whole numbers", torch.tensor([1, 0]), True),
        ("complex numbers", torch.tensor([1 + 0j, 0j]), True),
        ("a million levels", torch.linspace(1, 0, 10**6), True),
        ("levels that end early", torch.tensor([1.0, 0.5]), True),
        ("levels that hardly differ", torch.tensor([1.0, 1 - 1e-7, 1e-7, 0.0]), None),
        ("one step", torch.tensor([1.0, 0.0]), None),
        ("half precision", torch.tensor([1.0, 0.75, 0.5, 0.0]).half(), None),
    ]


def noises() -> list[Case]:
    """List wrong NOISEs."""
    whole = torch.zeros(1, 16, 8, 8)
    made = {
        f"noise {shape}": torch.zeros(shape) for shape in ((1, 4, 8, 8), (2, 16, 8, 8), (1, 16, 9, 9), (3,))
    }
    made |= {f"noise of {bad}": torch.full_like(whole, bad) for bad in (torch.nan, torch.inf)}
    made |= {"noise that is none": None, "noise of whole numbers": whole.long()}
    seeds = [(f"the seed {seed}", WrongNoise(whole, seed), False) for seed in (-1, 2**64 - 1)]
    return [*((what, WrongNoise(noise), True) for what, noise in made.items()), *seeds]


def images() -> list[Case]:
    """List wrong IMAGEs."""
    shapes = [
        (0, 4, 4, 3),
        (4, 4, 3),
        (1, 4, 4, 2),
        (1, 4, 4, 5),
        (1, 0, 4, 3),
        (1, 4, 0, 3),
        (1, 1, 4, 4, 3),
        (),
    ]
    kinds = (torch.uint8, torch.int64, torch.bool, torch.complex64)
    return [
        *((f"an image {shape}", torch.zeros(shape), True) for shape in shapes),
        *((f"pixels of {kind}", torch.zeros(4, 4, 4, 3).to(kind), True) for kind in kinds),
        ("megapixels that are not there", torch.zeros(1, 1, 1, 1).expand(2000, 4096, 4096, 3), True),
    ]


def loras(good: Mapping[str, Tensor]) -> list[Case]:
    """List wrong LORA_MODELs."""
    module = next(iter(good)).rsplit(".", 2)[0]
    down, up, alpha = (f"{module}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha"))

    def layers(names: Iterable[str]) -> dict[str, Tensor]:
        parts = ("lora_down.weight", "lora_up.weight")
        return {f"diffusion_model.{name}.{part}": torch.zeros(1, 1) for name in names for part in parts}

    changed: dict[str, dict[Any, Any]] = {
        "a foreign key": {"text_encoder.x.lora_down.weight": torch.zeros(1)},
        "a key that climbs": {"diffusion_model.../../x.alpha": torch.tensor(1.0)},
        "a key of markup": {"diffusion_model.<script>.alpha": torch.tensor(1.0)},
        "a key that is too long": layers(["a" * 10**5]),
        "a key that is none": {7: torch.zeros(1)},
        "a surrogate in a key": {"diffusion_model.\ud800.alpha": torch.tensor(1.0)},
        "NaN weights": {up: torch.full_like(good[up], torch.nan)},
        "infinite weights": {down: torch.full_like(good[down], torch.inf)},
        "mismatched shapes": {up: torch.zeros(3, 7)},
        "a vector": {down: torch.zeros(3)},
        "no numbers": {down: torch.zeros(0, 3), up: torch.zeros(3, 0)},
        "a strange alpha": {alpha: torch.tensor([1.0, 2.0])},
        "NaN alpha": {alpha: torch.tensor(torch.nan)},
        "a complex alpha": {alpha: torch.tensor(1j)},
        "a huge alpha": {alpha: torch.tensor(1e38), up: good[up] + 1e20},
        "a list for a tensor": {down: [[0.0]]},
        "a sparse tensor": {down: torch.zeros(2, 3).to_sparse()},
        "a tensor without storage": {down: torch.zeros(2, 3, device="meta")},
    }
    return [
        *((what, {**good, **change}, True) for what, change in changed.items()),
        ("20 002 tensors", layers(f"m{i}" for i in range(10_001)), True),
        ("a missing half", {key: tensor for key, tensor in good.items() if key != up}, True),
        ("nothing but an alpha", {alpha: good[alpha]}, True),
    ]


def wrong_scores(scores: Any) -> Iterator[Case]:
    """Yield broken scores."""
    values = scores.values
    nan = torch.full_like(values, torch.nan)
    for table in (values[:, :1], values[0], nan, values + torch.inf, torch.zeros(0, 0)):
        yield f"scores {list(table.shape)} {table.flatten()[:1]}", replace(scores, values=table), True
    yield "scores that are all equal", replace(scores, values=torch.ones_like(values)), False
    yield "scores near the largest number", replace(scores, values=values * 0 + 3e38), None
    yield "NaN as a weight", replace(scores, weights=(torch.nan,)), True


def wrong_rollouts(data: Any) -> Iterator[Case]:
    """Yield rollouts with broken completions."""
    rollout, latents = data.rollout, data.rollout.latents
    broken = torch.full_like(latents, torch.nan)
    yield "completions of NaN", replace(data, rollout=replace(rollout, latents=broken)), None
    for bad in (None, latents[:, :1], latents[..., 0], latents[:, :, :4]):
        what = f"completions {None if bad is None else list(bad.shape)}"
        yield what, replace(data, rollout=replace(rollout, latents=bad)), True


def wrong_advantages(data: Any) -> Iterator[Case]:
    """Yield broken advantages."""
    nan = torch.full_like(data.table, torch.nan)
    for table in (nan, data.table[:1], data.table[:, :1], torch.zeros(3, 3, 3)):
        yield f"advantages {list(table.shape)} {table.flatten()[:1]}", replace(data, table=table), True


def wrong_policies(policy: Any) -> Iterator[Case]:
    """Yield policies with broken LoRAs and of runs that are not there."""
    adapter = policy.adapter
    pairs = {name: (torch.full_like(down, torch.nan), up) for name, (down, up) in adapter.pairs.items()}
    yield "a LoRA of NaN", replace(policy, adapter=replace(adapter, pairs=pairs)), True
    yield "another model's LoRA", replace(policy, adapter=replace(adapter, pairs={})), True
    yield "a run that is gone", replace(policy, run="gone", step=0), True
    yield "a run outside", replace(policy, run="../../x"), True


def attack_wires(
    court: Court, real: Inputs, execute: Execute, blocks: Mapping[str, Any], lists: Collection[str]
) -> None:
    """Put every wrong object on every wire."""
    cases: dict[str, list[Case]] = {
        "MODEL": models(real["TrainLoRA"]["model"]),
        "CLIP": clips(),
        "VAE": vaes(),
        "LATENT": latents(),
        "SIGMAS": schedules(),
        "NOISE": noises(),
        "IMAGE": images(),
        "LORA_MODEL": loras(real["SaveLoRA"]["lora"]),
    }
    for name, inputs in real.items():
        for one in blocks[name].define_schema().inputs:
            kind = str(one.get_io_type())
            if kind in ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO"):
                continue
            junk = [(f"{thing!r:.40}", thing, True) for thing in JUNK if not (thing is None and one.optional)]
            junk_things = [id(thing) for _, thing, _ in junk]
            for what, thing, refuse in [*junk, *cases.get(kind, [])]:
                if kind == "IMAGE" and isinstance(thing, list):
                    continue
                sent = {**inputs, one.id: [thing] if name in lists else thing}
                if name == "TrainLoRA":
                    # Every training begins anew.
                    sent["run"] = f"wire-{len(court.counts)}-{court.counts[name]['attacks']}"
                if name == "ApplyNoisePrior" and kind == "NOISE":
                    # What a noise makes shows when it is drawn.
                    refuse = refuse if id(thing) in junk_things else None
                if name == "SaveLoRA" and kind == "MODEL":
                    # A file under native names needs no model; only the names of its layers count there.
                    sent["key_names"] = "diffusers"
                    refuse = refuse if id(thing) in junk_things else None
                if name == "TrainingResult":
                    # Nobody trains what is handed over here: there is no LoRA that the model could get.
                    refuse = refuse if id(thing) in junk_things else None
                if name == "SearchSampler" and what.startswith("a latent (2,"):
                    # Each image of a batch is searched for.
                    refuse = False
                # Names that say enough: a size that does not fit may be the picture's, a LoRA's file is named
                # by its key.
                names = [one.id, *ALSO.get(kind, ())]
                court.attack(name, f"{one.id}: {what}", names, partial(execute, name, sent), refuse)
    for name, wire, wrong in (
        ("Advantages", "scores", wrong_scores),
        ("ScoreRollout", "rollout", wrong_rollouts),
        ("UpdateLoRA", "advantages", wrong_advantages),
        ("UpdateLoRA", "policy", wrong_policies),
    ):
        for what, thing, refuse in wrong(real[name][wire]):
            act = partial(execute, name, {**real[name], wire: thing})
            court.attack(name, f"{wire}: {what}", [wire, "weights", "run"], act, refuse)
    attack_lists(court, real, execute)
    attack_guiders(court, real, execute)
    attack_searches(court, real, execute, blocks["SearchSampler"])
    attack_demo(court, execute)


def attack_demo(court: Court, execute: Execute) -> None:
    """Take the bundled model's files away."""
    demo = comfy_side.pack_module("nodes.demo")
    whole, demo.TINY = demo.TINY, demo.TINY / "nowhere"
    court.attack(
        "TinyDemoLoader", "its files are gone", ["models/tiny"], partial(execute, "TinyDemoLoader", {}), True
    )
    demo.TINY = whole


def attack_lists(court: Court, real: Inputs, execute: Execute) -> None:
    """Send lists of the wrong length, or with a wrong entry, to the blocks that take lists."""

    def attack(
        name: str, key: str, sent: Any, what: str, names: Sequence[str] = (), nan: bool = False
    ) -> None:
        # So large a k asks for every picture.
        more = {"k": [100]} if (name, key) == ("SelectBest", "images") and nan else {}
        act = partial(execute, name, {**real[name], key: sent, **more})
        court.attack(name, f"{key}: {what}", [key, *names], act, allow_nan=nan)

    lists = ["images", "scores", "votes", "values", "names", "prompts", "details"]
    for name in ("ScoreImages", "SelectBest", "ScoresFromValues", "SaveScoredImages"):
        for key, value in real[name].items():
            for sent in ([], [*value, *value]):
                attack(name, key, sent, f"{len(sent)} entries", lists)
    pictures = {"ScoreImages": "images", "SelectBest": "images", "SaveScoredImages": "images"}
    pictures["ScoresFromValues"] = "pictures"
    numbers = {"SelectBest": "scores", "SaveScoredImages": "scores", "ScoresFromValues": "values"}
    for bad in (float("nan"), float("inf"), 1e300, None, "0.5", True):
        for name, key in numbers.items():
            attack(name, key, [bad, *real["SelectBest"]["scores"][1:]], f"{bad}")
    picture = real["SelectBest"]["images"][0]
    for what, batch in {
        "another size": torch.zeros(1, 5, 5, 3),
        "another type": picture[:1].half(),
        "NaN": picture[:1] * torch.nan,
        "a large value": picture[:1] + 9,
    }.items():
        for name, key in pictures.items():
            attack(name, key, [picture[:-1], batch], f"one of {what}", nan=True)


def attack_guiders(court: Court, real: Inputs, execute: Execute) -> None:
    """Send guiders with the wrong conditioning or model to blocks that sample, and wrong latents to the
    sampler in core's own sampling.
    """
    guider = real["Rollout"]["guider"]
    model = real["TrainLoRA"]["model"]
    for what, thing, refuse in [
        *((w, comfy_guider(model, c.made), r) for w, c, r in clips()),
        *((w, comfy_guider(m, guider), r) for w, m, r in models(model)),
    ]:
        for name in ("Rollout", "SearchSampler", "OptimizeNoise"):
            act = partial(execute, name, {**real[name], "guider": thing})
            court.attack(name, f"guider: {what}", ["guider", "model"], act, refuse, allow_nan=True)
    samplers = {name: execute(name, real[name]).args[0] for name in ("SingularSDESampler", "EarlyFilter")}
    custom = comfy_side.node_class("SamplerCustomAdvanced")
    for what, latent, refuse in latents():
        if (
            refuse is None
            or not isinstance(latent.get("samples"), Tensor)
            or latent["samples"].numel() > 10**6
            # Core itself fails at these before any sampler is asked, or takes them.
            or what.startswith(
                ("a latent (2", "a latent ()", "a latent (0", "numbers of torch.int", "numbers of torch.bool")
            )
        ):
            continue
        noise = real["Rollout"]["noise"]
        levels = real["Rollout"]["sigmas"]
        draw = getattr(custom, "execute", None) or custom().sample
        for name, sampler in samplers.items():
            act = partial(draw, noise, guider, sampler, levels, latent)
            court.attack(name, f"latent_image: {what}", ["latent_image"], act)


def attack_searches(court: Court, real: Inputs, execute: Execute, block: Any) -> None:
    """Search by every method with short schedules, and with every setting that it reads at its bounds."""
    reads = comfy_side.pack_module("comfy_g2rpo.sampling.search_settings").READS
    inputs = {one.id: one for one in block.define_schema().inputs}
    cases: dict[str, list[Any]] = {
        name: [one.min, one.max] for name, one in inputs.items() if hasattr(one, "min")
    }
    cases |= {"kernel": inputs["kernel"].options, "steps": ["0", "999", "0-999"], "judge_at": ["0", "0-999"]}
    cases["score"] = ["reward"]
    cases["sigmas"] = [made for _, made, refuse in schedules() if refuse is None]
    for method, settings in reads.items():
        for name in ("sigmas", "keep", *settings):
            for value in cases[name]:
                sent = {**real["SearchSampler"], "method": method.replace("_", " "), name: value}
                act = partial(execute, "SearchSampler", sent)
                court.attack("SearchSampler", f"{method}, {name}: {value!s:.40}", [name], act, False)
    sent = {**real["SearchSampler"], "method": "coarse first", "score": "guidance_gap"}
    act = partial(execute, "SearchSampler", sent)
    court.attack("SearchSampler", "score: a gap without guidance", ["score"], act, True)


def comfy_guider(model: Any, conditioning: Any) -> Any:
    """Make core's BasicGuider, with another guider's conditioning or the given one."""
    made = comfy.samplers.CFGGuider(model)
    if isinstance(conditioning, comfy.samplers.CFGGuider):
        made.original_conds = conditioning.original_conds
    else:
        made.set_conds(conditioning, conditioning)
    return made
