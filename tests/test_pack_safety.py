"""What the files of the pack can do, read from their text, so that no stranger's workflow can make them do
more; and what is published.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
from comfy_host import ROOT
from packed import published
from PIL import Image

SHIPPED_CODE = [
    ROOT / "__init__.py",
    ROOT / "fetch_rewards.py",
    *sorted((ROOT / "nodes").rglob("*.py")),
    *sorted((ROOT / "comfy_g2rpo").rglob("*.py")),
]
FETCHING = "comfy_g2rpo/rewards/fetching"
ON_A_COMMAND_LINE = {
    "fetch_rewards.py": set(),
    f"{FETCHING}/__init__.py": set(),
    f"{FETCHING}/fetch.py": set(),
    f"{FETCHING}/rewrite_weights.py": set(),
    f"{FETCHING}/prepare.py": {"torch.load"},
    f"{FETCHING}/download.py": {
        *("http.client", "ssl", "urllib.error", "urllib.parse", "urllib.request"),
        *("https://", "http://", "https://huggingface.co", "https://raw.githubusercontent.com"),
    },
}
"""What the pack's one command does that no block may do, nor get at: see tests/test_boundaries.py."""
PROGRAMS = {
    "subprocess",
    "multiprocessing",
    "pty",
    "ctypes",
    "cffi",
    "code",
    "codeop",
    "runpy",
    "pip",
    "ensurepip",
}
CONNECTIONS = {
    "socket",
    "socketserver",
    "ssl",
    "http",
    "urllib",
    "urllib3",
    "requests",
    "httpx",
    "ftplib",
    "smtplib",
    "webbrowser",
}
DOWNLOADS_AND_PICKLES = {"huggingface_hub", "pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS_NOT_MADE = {"eval", "exec", "compile", "__import__", "breakpoint", "importlib.import_module"}
METHODS_NOT_CALLED = re.compile(
    r"(os\.(system|popen|exec\w*|spawn\w*|fork\w*|kill\w*|startfile)|torch\.(load|hub\.\w+|jit\.\w+)|(np|numpy)\.load"
    r"|asyncio\.(create_subprocess|start_server)\w*)"
)
OTHER_THAN_GET = re.compile(
    r"\broutes\.(?!get$)\w+$(?<!\.register)|\.add_(post|put|patch|delete|route|view|static)$"
)


def findings(source: str) -> list[str]:
    """List what a source text does that no shipped file may do."""
    tree = list(ast.walk(ast.parse(source)))
    froms = [node for node in tree if isinstance(node, ast.ImportFrom) and node.level == 0]
    members = [(str(node.module), alias.name) for node in froms for alias in node.names]
    modules = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names} | {
        module for module, _ in members
    }
    calls = [node for node in tree if isinstance(node, ast.Call)]
    used = {ast.unparse(call.func) for call in calls} | {f"{module}.{name}" for module, name in members}
    words = [node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [
        *(
            name
            for name in modules
            if name.partition(".")[0] in PROGRAMS | CONNECTIONS | DOWNLOADS_AND_PICKLES
        ),
        *(name for name in used if name in CALLS_NOT_MADE or METHODS_NOT_CALLED.fullmatch(name)),
        *(name for name in used if OTHER_THAN_GET.search(name)),
        *(
            ast.unparse(call)
            for call in calls
            if ast.unparse(call.func).endswith("from_pretrained") and not _stays_here(call)
        ),
        *(text for text in words if re.match(r"(https?|ftp|wss?)://", text)),
    ]


def _stays_here(call: ast.Call) -> bool:
    settings = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return (
        settings.get("local_files_only") == "True" and settings.get("trust_remote_code", "False") == "False"
    )


@pytest.mark.parametrize("path", SHIPPED_CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_code_runs_no_program_opens_no_connection_and_reads_no_code(path: Path) -> None:
    allowed = ON_A_COMMAND_LINE.get(path.relative_to(ROOT).as_posix(), set())
    assert set(findings(path.read_text("utf-8"))) == allowed


def test_the_exceptions_are_all_looked_at() -> None:
    looked_at = {path.relative_to(ROOT).as_posix() for path in SHIPPED_CODE}
    assert {name for name in looked_at if "fetch" in name} == set(ON_A_COMMAND_LINE)


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "from os import system",
        "import os\nos.execv('x', [])",
        "import torch\ntorch.load('x')",
        "from torch import load as read",
        "import http.client",
        "from urllib import request",
        "import pickle as p",
        "eval('1')",
        "import importlib\nimportlib.import_module('x')",
        "server.routes.post('/g2rpo/x')",
        "app.router.add_post('/g2rpo/x', f)",
        "AutoModel.from_pretrained('x')",
        "AutoModel.from_pretrained('x', local_files_only=True, trust_remote_code=True)",
        "place = 'https://example.com/x'",
    ],
)
def test_the_rule_above_sees(source: str) -> None:
    assert findings(source) != []


def test_the_door_brings_nothing_in_when_something_else_imports_it() -> None:
    door = str(ROOT / "__init__.py")
    words = f"""
import importlib.util, json, sys, typing, collections.abc
before = set(sys.modules)
spec = importlib.util.spec_from_file_location("pack", {door!r})
sys.modules["pack"] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
print(json.dumps([sorted(vars(pack)), sorted(set(sys.modules) - before)]))
"""
    said = subprocess.run(
        [sys.executable, "-c", words], cwd="/", capture_output=True, text=True, check=True, timeout=60
    ).stdout
    names, modules = json.loads(said)
    assert {"comfy_entrypoint", "WEB_DIRECTORY"} <= set(names)
    # Where this name exists, ComfyUI ignores the entry point.
    assert "NODE_CLASS_MAPPINGS" not in names
    assert modules == ["pack"]


def project() -> dict[str, Any]:
    """Read pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_installing_the_pack_installs_nothing() -> None:
    lines = [line.strip() for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines()]
    assert (
        project()["project"]["dependencies"]
        == [line for line in lines if line and not line.startswith("#")]
        == []
    )


def test_the_registry_finds_what_it_asks_for() -> None:
    about, comfy = project()["project"], project()["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]*", about["name"]) and re.fullmatch(
        r"\d+\.\d+\.\d+", about["version"]
    )
    assert about["license"] == "Apache-2.0"
    assert about["urls"]["Repository"].startswith("https://")
    assert {"PublisherId", "DisplayName", "Icon", "requires-comfyui"} <= comfy.keys()
    assert comfy["requires-comfyui"] == ">=0.3.64"
    with Image.open(ROOT / comfy["Icon"].partition("/main/")[2]) as icon:
        assert icon.format == "PNG"
        assert icon.width == icon.height <= 400


def test_the_registry_publishes_the_pack_and_nothing_else() -> None:
    files = published()
    heads = {name.partition("/")[0] for name in files}
    must = {
        "__init__.py",
        "fetch_rewards.py",
        "comfy_g2rpo",
        "nodes",
        "models",
        "pyproject.toml",
        "requirements.txt",
        "README.md",
        "LICENSE",
    }
    assert must <= heads <= must | {"web", "workflows", "locales"}
    assert {name.split("/")[1] for name in files if name.startswith("models/")} == {"tiny"}
    assert not {name for name in files if name.endswith((".pt", ".pth", ".bin", ".ckpt", ".pkl"))}
    assert sum((ROOT / name).stat().st_size for name in files if (ROOT / name).is_file()) < 20e6
