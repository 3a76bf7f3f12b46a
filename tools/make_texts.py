"""Write the texts that repeat what the blocks say of themselves: locales/en/nodeDefs.json and the inputs and
outputs in web/docs/*.md.

python tools/make_texts.py http://127.0.0.1:8188    (a running ComfyUI that has this pack)
"""

import json
import re
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEFINITIONS = ROOT / "locales/en/nodeDefs.json"
HELP = ROOT / "web/docs"


def ours(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """Pick our blocks from what ComfyUI's /object_info answers."""
    return {name: block for name, block in sorted(object_info.items()) if name.startswith("G2RPO_")}


def inputs_of(block: Mapping[str, Any]) -> list[tuple[str, dict[str, Any], bool]]:
    """List a block's inputs: name, options, and whether it may be left open."""
    declared = [
        (name, rest, kind == "optional")
        for kind in ("required", "optional")
        for name, rest in block["input"].get(kind, {}).items()
    ]
    return [(name, dict(rest[1]) if len(rest) > 1 else {}, optional) for name, rest, optional in declared]


def outputs_of(block: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List a block's outputs with their tooltips."""
    tips = block.get("output_tooltips") or [None] * len(block["output_name"])
    return [(name, tip or "") for name, tip in zip(block["output_name"], tips, strict=True)]


def definition(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return a block's texts as ComfyUI's page wants them."""
    made = {"display_name": block["display_name"], "description": block["description"]}
    inputs = {
        name: {"name": name, "tooltip": options.get("tooltip", "")} for name, options, _ in inputs_of(block)
    }
    outputs = {str(i): {"name": name, "tooltip": tip} for i, (name, tip) in enumerate(outputs_of(block))}
    return made | ({"inputs": inputs} if inputs else {}) | {"outputs": outputs}


def definitions(object_info: Mapping[str, Any]) -> str:
    """Return the content of nodeDefs.json."""
    return (
        json.dumps(
            {name: definition(block) for name, block in ours(object_info).items()},
            indent=2,
            ensure_ascii=False,
        )
        + "\n"
    )


def rule(options: Mapping[str, Any]) -> str:
    """Return default and bounds of an input in brackets, if it has any."""
    default = options.get("default")
    parts = [f"default {default}"] if default not in (None, "") and not isinstance(default, bool) else []
    parts += [f"default {'on' if default else 'off'}"] if isinstance(default, bool) else []
    if "min" in options and not options.get("forceInput"):
        parts.append(
            " to ".join(
                str(int(n)) if float(n).is_integer() else f"{n:g}" for n in (options["min"], options["max"])
            )
        )
    return f" ({', '.join(parts)})" if parts else ""


def help_page(old: str, block: Mapping[str, Any]) -> str:
    """Return a help page with the sections Inputs and Outputs as the block declares them."""
    inputs = [
        f"- **{name}**{', optional' if optional else ''}{rule(options)}: {options.get('tooltip', '')}"
        for name, options, optional in inputs_of(block)
    ]
    outputs = [f"- **{name}**: {tip}" for name, tip in outputs_of(block)]
    for heading, lines in {"Inputs": inputs or ["None."], "Outputs": outputs}.items():
        section = f"## {heading}\n" + "\n".join(lines) + "\n"
        old, found = re.subn(
            rf"^## {heading}\n.*?(?=^## |\Z)",
            lambda _, s=section: s + "\n",
            old,
            flags=re.MULTILINE | re.DOTALL,
        )
        if not found:
            raise ValueError(
                f"the help page of {block['display_name']} has no section '## {heading}'; add it"
            )
    return old.rstrip() + "\n"


if __name__ == "__main__":
    with urllib.request.urlopen(f"{sys.argv[1].rstrip('/')}/object_info") as answer:
        info = json.load(answer)
    DEFINITIONS.parent.mkdir(parents=True, exist_ok=True)
    DEFINITIONS.write_text(definitions(info), "utf-8")
    for node_id, declared in ours(info).items():
        page = HELP / f"{node_id}.md"
        page.write_text(help_page(page.read_text("utf-8"), declared), "utf-8")
