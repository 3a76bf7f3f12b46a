"""Write trainer/workflows/node_table.json, which says what the command line knows of nodes:
`python tools/make_node_table.py` asks the first ComfyUI that it finds.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workflow_graph import default_of, has_control, inputs_of, is_widget, type_of

from comfy_g2rpo.blocks.block_settings import ENCODERS
from g2rpo_trainer.workflows.graph_models import MAKERS
from g2rpo_trainer.workflows.graph_rewards import LOAD, MIX, REFERENCE
from g2rpo_trainer.workflows.graph_values import PRIMITIVES
from g2rpo_trainer.workflows.node_table import TABLE
from g2rpo_trainer.workflows.training_recipe import BLOCK, HANDED_OVER

ROOT = Path(__file__).resolve().parent.parent
OURS = {BLOCK, HANDED_OVER, LOAD, MIX, REFERENCE}
KINDS = sorted({*OURS, "LoadImage", *PRIMITIVES, *sum(MAKERS.values(), ())})
FILES = ("ckpt_name", "unet_name", "clip_name", "clip_name1", "clip_name2", "clip_name3", "vae_name")
FILES += ("lora_name", "image", "model", *ENCODERS, "vae")
"""Widgets whose choices are the files of a machine."""


def entry(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a node by what /object_info says of it."""
    known = inputs_of(schema)
    sockets = {name: type_of(spec) for name, spec in known.items() if not is_widget(spec)}
    widgets = {}
    for name, spec in known.items():
        if is_widget(spec):
            more = int(has_control(spec)) + bool(spec.options.get("image_upload"))
            default = None if name in FILES else default_of(spec)
            widgets[name] = {"type": type_of(spec), "default": default} | ({"more": more} if more else {})
    optional = [name for name in sockets if known[name].optional]
    outputs = [list(pair) for pair in zip(schema["output_name"], schema["output"], strict=True)]
    return {"sockets": sockets, "optional": optional, "widgets": widgets, "outputs": outputs}


def table(schemas: Mapping[str, Any]) -> dict[str, Any]:
    """Describe all nodes that the command line knows."""
    return {kind: entry(schemas[kind]) for kind in KINDS}


def written(made: Mapping[str, Any]) -> str:
    """Write a table, a node per line."""
    rows = ",\n".join(f' "{kind}": {json.dumps(each, ensure_ascii=False)}' for kind, each in made.items())
    return f"{{\n{rows}\n}}\n"


def main() -> None:
    """Write the file."""
    sys.path.insert(0, str(ROOT / "tests"))
    import comfy_host

    found = comfy_host.comfyui_roots()
    if not found:
        raise SystemExit(comfy_host.MISSING)
    with (
        tempfile.TemporaryDirectory() as folder,
        comfy_host.server(found[0], comfy_host.make_base(Path(folder))) as server,
    ):
        TABLE.write_text(written(table(server.get("/object_info"))), "utf-8")


if __name__ == "__main__":
    main()
