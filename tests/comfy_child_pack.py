"""Run inside ComfyUI by test_pack.py: what a ComfyUI looks like after its start, with or without the pack."""

import asyncio
import gc
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import comfy.model_management
import comfy_side
import server
import torch
from aiohttp.web import Application
from aiohttp.web_urldispatcher import UrlDispatcher


def router() -> UrlDispatcher:
    """Return the server's own routes as it has registered them."""
    app: Application = server.PromptServer.instance.app
    return app.router


def object_info() -> dict:
    """Ask the server's own handler what the page is told about every node."""
    handler = next(
        route.handler
        for route in router().routes()
        if route.resource and route.resource.canonical == "/object_info"
    )
    return json.loads(asyncio.run(handler(None)).body)


def price_of_import(folder: Path) -> float:
    """Import the pack once more under another name, everything beneath it being loaded.

    Return its CPU time in units of what it takes to compile the same files, the best of three: the same on
    a fast machine and on a slow one.
    """
    best = math.inf
    for turn in range(3):
        name = f"g2rpo_again_{turn}"
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        before = time.process_time()
        spec.loader.exec_module(module)
        asyncio.run(module.comfy_entrypoint())
        taken = time.process_time() - before
        files = [Path(part.__file__) for key, part in sys.modules.items() if key.startswith(f"{name}.")]
        before = time.process_time()
        for file in files:
            compile(file.read_bytes(), str(file), "exec")
        best = min(best, taken / (time.process_time() - before))
    return best


top_level = {name.partition(".")[0] for name in sys.modules if not name.startswith("/")}
networks = sum(isinstance(thing, torch.nn.Module) for thing in gc.get_objects())
routes = [[route.method, route.resource.canonical] for route in router().routes() if route.resource]
loaded_models = len(comfy.model_management.current_loaded_models)
pack = comfy_side.given()["pack"]
comfy_side.answer(
    {
        "object_info": object_info(),
        "modules": sorted(top_level),
        "networks": networks,
        "loaded_models": loaded_models,
        "routes": routes,
        "price": price_of_import(Path(pack)) if pack else 0.0,
    }
)
