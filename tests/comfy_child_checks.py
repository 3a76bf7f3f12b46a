"""Run inside ComfyUI by test_input_checks.py: what every block checks first gets what it should take, and
what it should not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import comfy.samplers
import comfy_side
import numpy as np
import torch
from comfy_api.latest import io

checks = comfy_side.pack_module("nodes.inputs.checks")
types = comfy_side.pack_module("nodes.types")

WHOLE, HALF = torch.zeros(1, 16, 8, 8), torch.zeros(2, 3)
INPUTS = [
    io.Int.Input("count", min=1, max=9),
    io.Float.Input("share", min=0.0, max=0.5),
    io.Boolean.Input("deep"),
    io.Combo.Input("mix", options=["sum", "zscore"]),
    io.String.Input("prompt"),
    io.Latent.Input("latent"),
    io.Sigmas.Input("sigmas"),
    io.LoraModel.Input("lora"),
    types.RewardWire.Input("reward", optional=True),
    io.Model.Input("model", optional=True),
    io.Clip.Input("clip", optional=True),
    io.Vae.Input("vae", optional=True),
    io.Guider.Input("guider", optional=True),
    io.Noise.Input("noise", optional=True),
]


class Single(io.ComfyNode):
    """A block that takes one value for each input."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        return io.Schema(node_id="ChecksSingle", category="tests", inputs=INPUTS)


class Lists(io.ComfyNode):
    """A block that takes lists."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        return io.Schema(node_id="ChecksLists", category="tests", inputs=INPUTS, is_input_list=True)


class Streams:
    """Several streams in one latent, as core has them for video with sound."""

    is_nested = True


class Odd:
    """A thing with the members that are given."""

    def __init__(self, **members: Any) -> None:
        self.__dict__.update(members)


REWARD = types.RewardSet((), ())
SOUND: dict[str, Any] = {
    "count": 1,
    "share": 0.0,
    "deep": False,
    "mix": "sum",
    "prompt": "a red circle",
    "latent": {"samples": WHOLE},
    "sigmas": torch.tensor([1.0, 0.0]),
    "lora": {"x.lora_down.weight": HALF},
}
TAKEN: dict[str, list[Any]] = {
    "count": [1, 9],
    "share": [0, 0.0, 0.5],
    "deep": [True, False],
    "mix": ["sum", "zscore"],
    "prompt": ["", "名前", "x" * checks.MAX_TEXT],
    "latent": [{"samples": WHOLE.half()}],
    "sigmas": [torch.zeros(0), torch.zeros(3).bfloat16()],
    "lora": [{"a": HALF.bfloat16(), "b": torch.tensor(1.0)}],
    "reward": [None, REWARD],
    "clip": [None, Odd(tokenize=len)],
    "vae": [None, Odd(decode=len), Odd(decode=len, first_stage_model=1)],
    "guider": [None, object.__new__(comfy.samplers.CFGGuider)],
    "noise": [None, Odd(generate_noise=len, seed=1)],
    "model": [None],
}
JUNK: list[Any] = ["x", 7.5, [1], object(), HALF, REWARD]
REFUSED: dict[str, list[Any]] = {
    "count": [None, True, 0, 10, 1.0, "1", 10**400, math.nan, [1], HALF[0, 0]],
    "share": [None, False, -1e-9, 0.5000001, math.nan, math.inf, -math.inf, "0.1", 0j],
    "deep": [None, 0, 1, "true", HALF, np.True_],
    "mix": [None, "", "SUM", 0, ["sum"], np.array(["sum"]), np.array(["sum", "zscore"]), HALF],
    "prompt": [None, 7, b"x", ["x"], "x" * (checks.MAX_TEXT + 1), "a\0b", "\ud800", "a\udfff"],
    "latent": [
        *(None, WHOLE, {}, {"samples": None}, {"samples": WHOLE.long()}, {"samples": WHOLE.cfloat()}),
        {"samples": Streams()},
        {"samples": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])},
    ],
    "sigmas": [None, [1.0, 0.0], torch.tensor([1, 0]), torch.tensor([1j, 0j])],
    "lora": [
        *(None, [], ["x"], "x", HALF, {}, {7: HALF}, {"x": None}, {"x": [[0.0]]}, {"x": 1.0}),
        *({"y": HALF, "x": HALF.to_sparse()}, {"x": HALF.cfloat()}, {"x": HALF.to("meta")}),
    ],
    "reward": [*JUNK[:-1], types.ScoresData],
    "model": JUNK,
    "clip": JUNK,
    "vae": [*JUNK, Odd(decode=len, first_stage_model=None)],
    "guider": JUNK,
    "noise": [*JUNK, Odd(generate_noise=len), Odd(generate_noise=len, seed="1"), Odd(seed=1)],
}
LISTS_TAKEN: dict[str, list[Any]] = {
    "prompt": [["a", "b"], [], ["x" * (checks.MAX_TEXT + 1)]],
    "reward": [[REWARD, REWARD], None],
    # Elements of these are looked at by the block itself.
    "count": [["x"], [0]],
}
LISTS_REFUSED: dict[str, list[Any]] = {
    "prompt": [[7], ["a", None], [b"a"], ["a", ["b"]]],
    "reward": [["x"], [REWARD, None], [REWARD, 7]],
}


def said(act: Callable[[], Any]) -> str:
    """Return the words of a refusal, blank if there is none; any other error by its kind."""
    try:
        act()
    except ValueError as error:
        return str(error)
    except BaseException as error:
        return f"!{type(error).__name__}: {error}"
    return ""


def ask(block: type[io.ComfyNode], usual: dict[str, Any], name: str, value: Any) -> str:
    """Return the words with which a block refuses a value."""
    return said(lambda: checks.check_inputs(block, {**usual, name: value}))


def answers(block: type[io.ComfyNode], usual: dict[str, Any], cases: dict[str, list[Any]]) -> list[list[str]]:
    """Return the name, a value in short, and the words for every case."""
    return [
        [name, f"{value!a}"[:60], ask(block, usual, name, value)]
        for name, values in cases.items()
        for value in values
    ]


def failing(error: BaseException) -> list[str]:
    """Return what becomes of an error inside blamed()."""
    try:
        with checks.blamed("vae: it does not fit"):
            raise error
    except BaseException as left:
        return [type(left).__name__, str(left), type(left.__cause__).__name__]
    return []


wide = {key: [value] for key, value in SOUND.items()}
comfy_side.answer(
    {
        "extra": sorted(checks.check_inputs(Single, {**SOUND, "other": 1})),
        "taken": answers(Single, SOUND, TAKEN),
        "refused": answers(Single, SOUND, REFUSED),
        "lists taken": answers(Lists, wide, LISTS_TAKEN),
        "lists refused": answers(Lists, wide, LISTS_REFUSED),
        "inputs": [one.id for one in INPUTS],
        "streams": [ask(Single, SOUND, "latent", value) for value in REFUSED["latent"][-2:]],
        "blamed": {
            "runtime": failing(RuntimeError("sizes\n  differ")),
            "lookup": failing(KeyError("x")),
            "long": failing(TypeError("x" * 1000)),
            "memory by kind": failing(torch.cuda.OutOfMemoryError("Allocation on device")),
            "memory by words": failing(RuntimeError("DefaultCPUAllocator: Out of memory")),
            "memory of another kind": failing(RuntimeError("MPS backend OUT OF MEMORY")),
            "interrupt": failing(KeyboardInterrupt("stop")),
        },
    }
)
