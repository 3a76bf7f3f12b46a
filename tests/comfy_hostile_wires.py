"""The wrong things on wires, for comfy_child_hostile.py: other objects, wrong shapes and types, NaN,
models that are no flow models.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import comfy.samplers
import comfy.sd
import comfy_side
import torch
from comfy.taesd.taesd import TAESD
from comfy_hostile_tools import Court
from torch import Tensor

types = comfy_side.pack_module("nodes.types")
rollouts = comfy_side.pack_module("comfy_g2rpo.rollout")

Inputs = Mapping[str, Mapping[str, Any]]
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
    shapes = [
        (0, 16, 8, 8),
        (2, 16, 8, 8),
        (1, 16, 1, 8, 8),
        (1, 16, 3, 8, 8),
        (1, 16, 8),
        (16, 8, 8),
        (1, 16, 0, 8),
        (1, 16, 8, 0),
        (),
        (0,),
    ]
    cases: list[Case] = [(f"a latent {shape}", {"samples": torch.zeros(shape)}, True) for shape in shapes]
    cases += [
        (f"numbers of {kind}", {"samples": whole.to(kind)}, True)
        for kind in (torch.int64, torch.bool, torch.complex64)
    ]
    cases += [
        (f"numbers of {kind}", {"samples": whole.to(kind)}, False)
        for kind in (torch.float16, torch.bfloat16, torch.float64)
    ]
    cases += [
        (f"a latent of {bad}", {"samples": torch.full((1, 16, 8, 8), bad)}, True)
        for bad in (torch.nan, torch.inf)
    ]
    cases += [("four channels that are not empty", {"samples": torch.ones(1, 4, 8, 8)}, True)]
    cases += [("four channels that are empty", {"samples": torch.zeros(1, 4, 8, 8)}, False)]
    cases += [
        ("a mask", {"samples": whole, "noise_mask": torch.ones(1, 1, 64, 64)}, True),
        ("no samples", {"x": whole}, True),
    ]
    cases += [("more positions than the model has", {"samples": torch.zeros(1, 16, 80, 80)}, True)]
    cases += [
        (
            "more than anybody can wait for",
            {"samples": torch.zeros(1, 1, 1, 1).expand(1, 16, 60_000, 60_000)},
            True,
        )
    ]
    return [
        *cases,
        ("one position", {"samples": torch.zeros(1, 16, 1, 1)}, False),
        ("odd sides", {"samples": torch.zeros(1, 16, 7, 5)}, False),
    ]


def schedules() -> list[Case]:
    """List wrong SIGMAS."""
    rows = [
        [],
        [1.0],
        [0.0],
        [0.0, 1.0],
        [1.0, 1.0, 0.0],
        [2.0, 1.0, 0.0],
        [1.0, torch.nan, 0.0],
        [torch.inf, 0.0],
        [1.0, 0.5, -0.1],
    ]
    cases: list[Case] = [(f"sigmas {row}", torch.tensor(row), True) for row in rows]
    cases += [
        ("sigmas in two rows", torch.tensor([[1.0, 0.0]] * 2), True),
        ("a lone number", torch.tensor(1.0), True),
    ]
    cases += [
        ("whole numbers", torch.tensor([1, 0]), True),
        ("complex numbers", torch.tensor([1 + 0j, 0j]), True),
    ]
    cases += [
        ("a million levels", torch.linspace(1, 0, 10**6), True),
        ("levels that end early", torch.tensor([1.0, 0.5]), True),
    ]
    cases += [
        ("levels that hardly differ", torch.tensor([1.0, 1 - 1e-7, 1e-7, 0.0]), None),
        ("one step", torch.tensor([1.0, 0.0]), None),
    ]
    return [*cases, ("half precision", torch.tensor([1.0, 0.75, 0.5, 0.0]).half(), None)]


def noises() -> list[Case]:
    """List wrong NOISEs."""
    whole = torch.zeros(1, 16, 8, 8)
    cases: list[Case] = [
        (f"noise {shape}", WrongNoise(torch.zeros(shape)), True)
        for shape in ((1, 4, 8, 8), (2, 16, 8, 8), (1, 16, 9, 9), (3,))
    ]
    cases += [
        (f"noise of {bad}", WrongNoise(torch.full_like(whole, bad)), True) for bad in (torch.nan, torch.inf)
    ]
    cases += [
        ("noise that is none", WrongNoise(None), True),
        ("noise of whole numbers", WrongNoise(whole.long()), True),
    ]
    return [*cases, *((f"the seed {seed}", WrongNoise(whole, seed), False) for seed in (-1, 2**64 - 1))]


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
    cases: list[Case] = [(f"an image {shape}", torch.zeros(shape), True) for shape in shapes]
    cases += [
        (f"pixels of {kind}", torch.zeros(4, 4, 4, 3).to(kind), True)
        for kind in (torch.uint8, torch.int64, torch.bool, torch.complex64)
    ]
    return [
        *cases,
        ("megapixels that are not there", torch.zeros(1, 1, 1, 1).expand(2000, 4096, 4096, 3), True),
    ]


def loras(good: Mapping[str, Tensor]) -> list[Case]:
    """List wrong LORA_MODELs."""
    module = next(iter(good)).rsplit(".", 2)[0]
    down, up, alpha = (f"{module}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    changed: dict[str, dict[Any, Any]] = {
        "a foreign key": {"text_encoder.x.lora_down.weight": torch.zeros(1)},
        "a key that climbs": {"diffusion_model.../../x.alpha": torch.tensor(1.0)},
        "a key of markup": {"diffusion_model.<script>.alpha": torch.tensor(1.0)},
        "a key that is too long": {
            f"diffusion_model.{'a' * 10**5}.{part}": torch.zeros(1, 1)
            for part in ("lora_down.weight", "lora_up.weight")
        },
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
    cases: list[Case] = [(what, {**good, **change}, True) for what, change in changed.items()]
    many = {
        f"diffusion_model.m{i}.{part}": torch.zeros(1, 1)
        for i in range(10_001)
        for part in ("lora_down.weight", "lora_up.weight")
    }
    half = {key: tensor for key, tensor in good.items() if key != up}
    return [
        *cases,
        ("20 002 tensors", many, True),
        ("a missing half", half, True),
        ("nothing but an alpha", {alpha: good[alpha]}, True),
    ]


def ours(real: Inputs) -> Iterator[tuple[str, str, Case]]:
    """Yield (block, input, case) for our own wires with broken content."""
    rollout = real["Advantages"]["rollout"]
    scores, advantages = real["Advantages"]["scores"], real["UpdateLoRA"]["advantages"]
    policy = real["UpdateLoRA"]["policy"]
    tables = [
        scores.values[:, :1],
        scores.values[0],
        torch.full_like(scores.values, torch.nan),
        scores.values + torch.inf,
        torch.zeros(0, 0),
    ]
    for table in tables:
        yield (
            "Advantages",
            "scores",
            (
                f"scores {list(table.shape)} {table.flatten()[:1]}",
                dataclasses.replace(scores, values=table),
                True,
            ),
        )
    equal = dataclasses.replace(scores, values=torch.ones_like(scores.values))
    yield "Advantages", "scores", ("scores that are all equal", equal, False)
    yield (
        "Advantages",
        "scores",
        (
            "scores near the largest number",
            dataclasses.replace(scores, values=scores.values * 0 + 3e38),
            None,
        ),
    )
    yield "Advantages", "scores", ("NaN as a weight", dataclasses.replace(scores, weights=(torch.nan,)), True)
    broken = dataclasses.replace(rollout.rollout, latents=torch.full_like(rollout.rollout.latents, torch.nan))
    yield (
        "ScoreRollout",
        "rollout",
        ("completions of NaN", dataclasses.replace(rollout, rollout=broken), None),
    )
    for bad in (
        None,
        rollout.rollout.latents[:, :1],
        rollout.rollout.latents[..., 0],
        rollout.rollout.latents[:, :, :4],
    ):
        changed = dataclasses.replace(rollout, rollout=dataclasses.replace(rollout.rollout, latents=bad))
        yield (
            "ScoreRollout",
            "rollout",
            (f"completions {None if bad is None else list(bad.shape)}", changed, True),
        )
    for table in (
        torch.full_like(advantages.table, torch.nan),
        advantages.table[:1],
        advantages.table[:, :1],
        torch.zeros(3, 3, 3),
    ):
        changed = dataclasses.replace(advantages, table=table)
        yield (
            "UpdateLoRA",
            "advantages",
            (f"advantages {list(table.shape)} {table.flatten()[:1]}", changed, True),
        )
    adapter = policy.adapter
    pairs = {name: (torch.full_like(down, torch.nan), up) for name, (down, up) in adapter.pairs.items()}
    yield (
        "UpdateLoRA",
        "policy",
        (
            "a LoRA of NaN",
            dataclasses.replace(policy, adapter=dataclasses.replace(adapter, pairs=pairs)),
            True,
        ),
    )
    yield (
        "UpdateLoRA",
        "policy",
        (
            "another model's LoRA",
            dataclasses.replace(policy, adapter=dataclasses.replace(adapter, pairs={})),
            True,
        ),
    )
    yield (
        "UpdateLoRA",
        "policy",
        ("a run that is gone", dataclasses.replace(policy, run="gone", step=0), True),
    )
    yield "UpdateLoRA", "policy", ("a run outside", dataclasses.replace(policy, run="../../x"), True)


def attack_wires(
    court: Court,
    real: Inputs,
    execute: Callable[[str, Mapping[str, Any]], Any],
    blocks: Mapping[str, Any],
    lists: Collection[str],
) -> None:
    """Put every wrong object on every wire."""
    cases: dict[str, list[Case]] = {
        "MODEL": models(real["TrainLoRA"]["model"]),
        "CLIP": clips(),
        "VAE": vaes(),
        "LATENT": latents(),
    }
    cases |= {
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
                # Every training begins anew; a file under native names needs no model.
                sent |= (
                    {"run": f"wire-{len(court.counts)}-{court.counts[name]['attacks']}"}
                    if name == "TrainLoRA"
                    else {}
                )
                if name == "SaveLoRA" and kind == "MODEL":
                    # Only the names of its layers count there.
                    sent, refuse = (
                        {**sent, "key_names": "diffusers"},
                        refuse if id(thing) in junk_things else None,
                    )
                # Names that say enough: a size that does not fit may be the picture's, a LoRA's file is named
                # by its key.
                names = [one.id, *ALSO.get(kind, ())]
                court.attack(name, f"{one.id}: {what}", names, lambda n=name, s=sent: execute(n, s), refuse)
    for name, wire, (what, thing, refuse) in ours(real):
        court.attack(
            name,
            f"{wire}: {what}",
            [wire, "weights", "run"],
            lambda n=name, w=wire, t=thing: execute(n, {**real[n], w: t}),
            refuse,
        )
    attack_lists(court, real, execute)
    attack_guiders(court, real, execute)
    demo = comfy_side.pack_module("nodes.demo")
    whole, demo.TINY = demo.TINY, demo.TINY / "nowhere"
    court.attack(
        "TinyDemoLoader", "its files are gone", ["models/tiny"], lambda: execute("TinyDemoLoader", {}), True
    )
    demo.TINY = whole


def attack_lists(court: Court, real: Inputs, execute: Callable[[str, Mapping[str, Any]], Any]) -> None:
    """Send lists of the wrong length to the blocks that take lists."""
    for name in ("ScoreImages", "SelectBest", "ScoresFromValues", "SaveScoredImages"):
        for key, value in real[name].items():
            for sent in ([], [*value, *value]):
                court.attack(
                    name,
                    f"{key}: {len(sent)} entries",
                    [key, "images", "scores", "votes", "values", "names", "prompts", "details"],
                    lambda n=name, k=key, s=sent: execute(n, {**real[n], k: s}),
                )
    for bad in (float("nan"), float("inf"), 1e300, None, "0.5", True):
        values = [bad, *real["SelectBest"]["scores"][1:]]
        for name, key in (
            ("SelectBest", "scores"),
            ("SaveScoredImages", "scores"),
            ("ScoresFromValues", "values"),
        ):
            court.attack(
                name, f"{key}: {bad}", [key], lambda n=name, k=key, v=values: execute(n, {**real[n], k: v})
            )
    picture = real["SelectBest"]["images"][0]
    for what, batch in (
        ("another size", torch.zeros(1, 5, 5, 3)),
        ("another type", picture[:1].half()),
        ("NaN", picture[:1] * torch.nan),
        ("a large value", picture[:1] + 9),
    ):
        sent = [picture[:-1], batch]
        for name, key in (
            ("ScoreImages", "images"),
            ("SelectBest", "images"),
            ("SaveScoredImages", "images"),
            ("ScoresFromValues", "pictures"),
        ):
            k = {**real[name], key: sent} | ({"k": [100]} if name == "SelectBest" else {})
            court.attack(
                name, f"{key}: one of {what}", [key], lambda n=name, s=k: execute(n, s), allow_nan=True
            )


def attack_guiders(court: Court, real: Inputs, execute: Callable[[str, Mapping[str, Any]], Any]) -> None:
    """Send guiders with the wrong conditioning or model to Rollout, and wrong latents to the sampler in
    core's own sampling.
    """
    guider = real["Rollout"]["guider"]
    model = real["TrainLoRA"]["model"]
    for what, thing, refuse in [
        *((w, comfy_guider(model, c.made), r) for w, c, r in clips()),
        *((w, comfy_guider(m, guider), r) for w, m, r in models(model)),
    ]:
        court.attack(
            "Rollout",
            f"guider: {what}",
            ["guider", "model"],
            lambda g=thing: execute("Rollout", {**real["Rollout"], "guider": g}),
            refuse,
            allow_nan=True,
        )
    sampler = execute("SingularSDESampler", real["SingularSDESampler"]).args[0]
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
        act = partial(draw, noise, guider, sampler, levels, latent)
        court.attack("SingularSDESampler", f"latent_image: {what}", ["latent_image"], act)


def comfy_guider(model: Any, conditioning: Any) -> Any:
    """Make core's BasicGuider, with another guider's conditioning or the given one."""
    made = comfy.samplers.CFGGuider(model)
    if isinstance(conditioning, comfy.samplers.CFGGuider):
        made.original_conds = conditioning.original_conds
    else:
        made.set_conds(conditioning, conditioning)
    return made
