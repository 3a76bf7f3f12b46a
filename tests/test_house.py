"""The plan of the house: where a reader finds the method, how small things are, and that nothing runs in
circles.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("comfy_g2rpo", "nodes", "trainer")
METHOD = ("schedule", "kernels", "plan", "rollout", "policy", "advantages", "update", "recipes")
BRANCHES = (
    ast.If,
    ast.For,
    ast.While,
    ast.IfExp,
    ast.ExceptHandler,
    ast.comprehension,
    ast.BoolOp,
    ast.Assert,
)


@cache
def tree(path: Path) -> ast.Module:
    """Parse a source file."""
    return ast.parse(path.read_text("utf-8"), str(path))


def sources(root: Path = ROOT) -> dict[str, Path]:
    """List the product's files by module name, a package by that of its folder."""
    files = [path for room in ROOMS for path in sorted((root / room).rglob("*.py"))]
    parts = {path: path.relative_to(root).with_suffix("").parts for path in files}
    return {".".join(p[:-1] if p[-1] == "__init__" else p): path for path, p in parts.items()}


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """Name the product's modules that a file imports, lazily and under TYPE_CHECKING too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            wanted = [f"{stem}.{alias.name}" for alias in node.names]
            wanted = [whole if whole in known else stem for whole in wanted]
        else:
            continue
        found |= {each.replace("g2rpo_trainer", "trainer", 1) for each in wanted}
    return found & known - {name}


def circles(root: Path = ROOT) -> list[str]:
    """Name the modules that import themselves by way of others."""
    files = sources(root)
    graph = {name: imports(name, path, set(files)) for name, path in files.items()}
    while leaves := [name for name, others in graph.items() if not others & set(graph)]:
        for name in leaves:
            del graph[name]
    # What is left depends on a circle; what nothing left depends on is not part of one.
    while tops := set(graph) - {other for others in graph.values() for other in others}:
        for name in tops:
            del graph[name]
    return sorted(graph)


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert len(sources()) > 150
    assert circles() == []


@pytest.mark.parametrize("lazily", [False, True])
def test_a_circle_shows(tmp_path: Path, lazily: bool) -> None:
    for room in ROOMS:
        (tmp_path / room).mkdir()
    indent = "def later():\n    " if lazily else ""
    (tmp_path / "trainer/one.py").write_text("from .two import x\n")
    (tmp_path / "trainer/three.py").write_text("from .one import y\nfrom .leaf import z\n")
    (tmp_path / "trainer/leaf.py").write_text("")
    (tmp_path / "trainer/top.py").write_text("from .one import y\n")
    (tmp_path / "trainer/two.py").write_text(f"{indent}from .three import x\n")
    assert circles(tmp_path) == ["trainer.one", "trainer.three", "trainer.two"]


def test_the_top_of_the_method_is_the_paper() -> None:
    top = sorted(path.stem for path in (ROOT / "comfy_g2rpo").glob("*.py"))
    assert top == sorted([*METHOD, "__init__", "options", "prompts"])
    assert (
        sum(len((ROOT / (f"comfy_g2rpo/{name}.py")).read_text("utf-8").splitlines()) for name in METHOD)
        <= 1450
    )


@pytest.mark.parametrize(("room", "most"), [("comfy_g2rpo", 12), ("nodes", 14), ("trainer", 14)])
def test_no_folder_shows_more_than_a_reader_can_take_in(room: str, most: int) -> None:
    folders = [ROOT / room, *(path for path in (ROOT / room).rglob("*") if path.is_dir())]
    counts = {folder: len(list(folder.glob("*.py"))) for folder in folders}
    assert counts[ROOT / room] <= most
    assert {folder for folder, count in counts.items() if count > 16} == set()


def test_a_files_name_tells_it_from_every_other() -> None:
    names = Counter(path.name for path in sources().values())
    assert {name for name, count in names.items() if count > 1} == {"__init__.py"}


def test_an_iteration_fits_on_one_screen() -> None:
    body = tree(ROOT / "comfy_g2rpo/run/iteration.py").body
    iterate = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == "iterate")
    assert iterate.end_lineno - iterate.lineno + 1 <= 30
    assert 1 + sum(isinstance(node, BRANCHES) for node in ast.walk(iterate)) <= 8
    called = [
        node.func.id
        for node in ast.walk(iterate)
        if isinstance(node, ast.Call) and hasattr(node.func, ("id"))
    ]
    assert [name for name in called if name in (("explore"), "score", "update")] == [
        "explore",
        "score",
        "update",
    ]


def test_a_familys_name_stands_in_its_file_its_line_and_its_lora_names_alone() -> None:
    families = {path.stem for path in (ROOT / "trainer/families").glob("*.py")} - {"__init__"}
    own = {ROOT / f"trainer/families/{name}.py" for name in families}
    own |= {ROOT / "trainer/config/family_names.py", *(ROOT / "comfy_g2rpo/lora").glob("*.py")}
    for path in set(sources().values()) - own:
        texts = {node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Constant)}
        assert not texts & families, path


@pytest.mark.long
def test_every_module_imports_where_the_system_lacks_what_only_unix_has() -> None:
    script = """
import builtins, importlib, pkgutil, sys, types
import typer, torch  # their own imports are not ours to change
import g2rpo_trainer, comfy_g2rpo

real = builtins.__import__

def without_unix(name, globals=None, locals=None, fromlist=(), level=0):
    ours = (globals or {}).get("__name__", "").startswith(("g2rpo_trainer", "comfy_g2rpo"))
    if name in ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty") and ours:
        raise ImportError(f"no module named {name}")
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = without_unix
sys.modules["msvcrt"] = types.ModuleType("msvcrt")  # what Windows has in their place
for package in (g2rpo_trainer, comfy_g2rpo):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
import torch
from comfy_g2rpo.files import one_writer
from comfy_g2rpo.speed import peak_memory
assert one_writer.fcntl is None
assert peak_memory.resource is None
print(peak_memory.peak_memory(torch.device("cpu")))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.split()[-1]) >= 0
