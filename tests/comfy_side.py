"""The half of comfy_host.py that runs inside ComfyUI, with ComfyUI's own Python: boots it, then runs a script
file.

A script does `import comfy_side`, reads `comfy_side.given()`, runs graphs with `comfy_side.run_prompt(...)`
and replies with `comfy_side.answer(...)`. It may import comfy, nodes, folder_paths …: everything is loaded as
the server loads it, custom nodes included.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import logging
import os
import runpy
import sys
import traceback
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

CATCH = "CatchForTests"
_exchange = Path()
_server: Any = None
_executor: Any = None


def given() -> Any:
    """Return the data that the test gave."""
    return json.loads((_exchange / "given.json").read_text("utf-8"))


def given_tensors() -> dict[str, Any]:
    """Return the tensors that the test gave."""
    from safetensors.torch import load_file

    return load_file(_exchange / "given.safetensors")


def answer(data: object = None, tensors: Mapping[str, Any] | None = None) -> None:
    """Give data (JSON) and tensors back to the test."""
    from safetensors.torch import save_file

    # Outside inference mode, as clones: what nodes return may be inference tensors, or share memory.
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in (tensors or {}).items()}
    save_file(plain, _exchange / "answer.safetensors")
    (_exchange / "answer.json").write_text(json.dumps(data), "utf-8")


def boot(flags: Sequence[str]) -> None:
    """Start ComfyUI as main.py does, short of listening. Call it once, from ComfyUI's root."""
    global _server
    sys.path.insert(0, os.getcwd())
    sys.argv = ["main.py", *flags]
    import main

    _, _server, _ = main.start_comfyui()
    main.nodes.NODE_CLASS_MAPPINGS[CATCH] = _Catch


def server() -> Any:
    """Return the server."""
    return _server


def node_class(node_id: str) -> Any:
    """Return a node's class."""
    import nodes

    return nodes.NODE_CLASS_MAPPINGS[node_id]


def pack_module(name: str) -> ModuleType:
    """Return a module of the pack as ComfyUI has loaded it: pack_module("nodes.model.comfy_policy"),
    pack_module("comfy_g2rpo.lora").
    """
    root = next(
        key for key in sys.modules if "custom_nodes" in key and key.endswith(".nodes.demo")
    ).removesuffix(".nodes.demo")
    return importlib.import_module(f"{root}.{name}")


def hear_warnings() -> list[str]:
    """Collect from now on what core only says in its log, such as a LoRA key that it does not take."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    return messages


class Anything(str):
    """A type that goes with every other."""

    def __ne__(self, other: object) -> bool:
        return False


class _Catch:
    """An output node that keeps whatever arrives."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"value": (Anything("*"), {}), "name": ("STRING", {"default": ""})}}
    )
    RETURN_TYPES = ()
    FUNCTION = "keep"
    CATEGORY = "tests"
    OUTPUT_NODE = True
    caught: ClassVar[dict[str, Any]] = {}

    def keep(self, value: object, name: str) -> dict[str, Any]:
        self.caught[name] = value
        return {}


@dataclass(frozen=True)
class Ran:
    """The end of a prompt: refused (problems), failed (error) or done (values asked for by name, and
    nodes' ui outputs by node id).
    """

    values: dict[str, Any] = field(default_factory=dict)
    ui: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    error_node: str = ""
    problems: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Tell whether the prompt was accepted and ran to its end."""
        return not (self.error or self.problems)


def run_prompt(
    graph: Mapping[str, Any], want: Mapping[str, tuple[str, int]] | None = None, fresh: bool = True
) -> Ran:
    """Validate and run an API graph: {"1": {"class_type": …, "inputs": {"seed": 0, "model": ["2", 0]}}}.

    `want` names node outputs whose values shall come back: {"image": ("7", 0)}. `fresh` forgets the results
    of earlier prompts; without it they stay cached as in the server.
    """
    whole = {key: dict(node) for key, node in graph.items()}
    for name, (node_id, slot) in (want or {}).items():
        whole[f"catch {name}"] = {"class_type": CATCH, "inputs": {"value": [node_id, slot], "name": name}}
    _Catch.caught.clear()
    return asyncio.run(_run(whole, fresh))


async def _run(graph: dict[str, Any], fresh: bool) -> Ran:
    import execution

    prompt_id = uuid.uuid4().hex
    valid, error, outputs, problems = await execution.validate_prompt(prompt_id, graph, None)
    if not valid or problems:
        return Ran(problems={"error": error, "nodes": problems})
    executor = _executor_for(fresh)
    await executor.execute_async(graph, prompt_id, {"client_id": "tests"}, outputs)
    failure = next(
        (
            data
            for event, data in executor.status_messages
            if event in ("execution_error", "execution_interrupted")
        ),
        None,
    )
    if failure is not None:
        words = (
            f"{failure.get('exception_type', 'interrupted')}: {failure.get('exception_message', '')}".strip()
        )
        return Ran(dict(_Catch.caught), error=words, error_node=str(failure.get("node_id")))
    return Ran(dict(_Catch.caught), ui=dict(executor.history_result.get("outputs", {})))


def _executor_for(fresh: bool) -> Any:
    global _executor
    import execution

    if fresh or _executor is None:
        sizes = {"cache_args": {"lru": 0, "ram": 0, "ram_inactive": 0}}
        newer = "cache_args" in inspect.signature(execution.PromptExecutor).parameters
        _executor = execution.PromptExecutor(
            _server, cache_type=execution.CacheType.CLASSIC, **(sizes if newer else {})
        )
    return _executor


def _main(exchange: str, script: str, *flags: str) -> None:
    global _exchange
    # The script imports this very module, not a second copy of it.
    sys.modules["comfy_side"] = sys.modules["__main__"]
    _exchange = Path(exchange)
    code = 1
    try:
        boot(flags)
        print("comfy_side: booted", flush=True)
        runpy.run_path(script, run_name="comfy_script")
        code = 0
    except BaseException:
        traceback.print_exc()
    # Core keeps threads; leave without waiting for them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _main(*sys.argv[1:])
