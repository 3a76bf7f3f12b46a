"""The rules that keep the rooms apart and the code readable; CONTRIBUTING.md lists them."""

import ast
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

import comfy_g2rpo
from g2rpo_trainer.commands.vote import MODULES

pytestmark = pytest.mark.xdist_group("boundaries")  # one process makes what they share

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
COMFYUI_BRINGS = {"torch", "numpy", "scipy", "PIL", "safetensors", "psutil"}
COMFYUI_MODULES = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "execution",
    "node_helpers",
    "server",
    "nodes",
}
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen"}
HEAVY = {
    "transformers",
    "skimage",
    "diffusers",
    "peft",
    "accelerate",
    "matplotlib",
    "pydantic",
    "scipy.stats",
    "torchvision",
    "aiohttp",
}
ROOMS = ["comfy_g2rpo", "trainer", "nodes", "tools", "benchmarks", "tests"]


def sources(*rooms: str) -> list[Path]:
    """List the Python files of some rooms."""
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """List every node of a source file's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))


def imported(nodes: Sequence[ast.AST]) -> set[str]:
    """Name the top-level modules that are imported absolutely."""
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    members = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.partition(".")[0] for name in plain | members}


def imported_relatively(path: Path) -> set[str]:
    """Name the modules of other rooms that are reached by `from ..room import`."""
    froms = [node for node in nodes_of(path) if isinstance(node, ast.ImportFrom) and node.level > 0]
    return {
        str(node.module).partition(".")[0]
        for node in froms
        if node.level == len(path.relative_to(ROOT).parts)
    }


def test_the_rules_below_see_the_source() -> None:
    assert len(sources("comfy_g2rpo")) >= 10
    assert len(sources("trainer")) >= 5


def test_method_imports_only_what_comfyui_brings() -> None:
    for path in sources("comfy_g2rpo"):
        lazily_allowed = {"transformers", "skimage"} if "rewards" in path.parts else set()
        lazily_allowed |= {"certifi"} if "fetching" in path.parts else set()
        foreign = imported(nodes_of(path)) - set(sys.stdlib_module_names) - COMFYUI_BRINGS
        assert foreign <= lazily_allowed, path
        assert not imported_relatively(path), path


def test_trainer_never_imports_comfyui_or_the_graph_blocks() -> None:
    for path in sources("trainer"):
        assert not imported(nodes_of(path)) & (COMFYUI_MODULES | {"trainer", "g2rpo_trainer"}), path
        assert not imported_relatively(path), path


def test_graph_blocks_know_only_comfyui_and_the_method() -> None:
    for path in sources("nodes"):
        foreign = imported(nodes_of(path)) - set(sys.stdlib_module_names)
        assert foreign <= COMFYUI_BRINGS | {"aiohttp"} | COMFYUI_MODULES - {"nodes"}, path
        assert imported_relatively(path) <= {"comfy_g2rpo"}, path


def reads_only_tensors(path: Path, call: ast.Call) -> bool:
    """Say whether a call is the one place that converts a published pickle, by PyTorch's restricted
    reader.
    """
    restricted = any(
        word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords
    )
    return (
        path == ROOT / "comfy_g2rpo" / "rewards" / "fetching" / "prepare.py"
        and ast.unparse(call.func) == "torch.load"
        and restricted
    )


def test_nothing_shipped_can_run_code_from_a_file() -> None:
    for path in sources("comfy_g2rpo", "trainer", "nodes"):
        nodes = nodes_of(path)
        called = {
            ast.unparse(node.func)
            for node in nodes
            if isinstance(node, ast.Call) and not reads_only_tensors(path, node)
        }
        assert not called & UNSAFE_CALLS, path
        assert not imported(nodes) & UNSAFE_MODULES, path


def test_nothing_that_comfyui_loads_can_fetch_or_read_a_pickle() -> None:
    for path in [ROOT / "__init__.py", *sources("comfy_g2rpo", "nodes")]:
        froms = [node for node in nodes_of(path) if isinstance(node, ast.ImportFrom)]
        names = {part for node in froms for part in str(node.module).split(".")}
        names |= {alias.name for node in froms for alias in node.names}
        assert "fetching" in path.parts or not names & {"fetching", "fetch_rewards"}, path
        # The other forms of an import would hide from the lines above.
        assert not imported(nodes_of(path)) & {"comfy_g2rpo", "importlib"}, path


def test_exceptions_are_caught_by_name() -> None:
    for path in sources(*ROOMS):
        handlers = [node for node in nodes_of(path) if isinstance(node, ast.ExceptHandler)]
        assert [node.lineno for node in handlers if node.type is None] == [], path


def test_arguments_are_passed_by_name_not_as_kwargs() -> None:
    for path in sources(*ROOMS):
        functions = [
            node for node in nodes_of(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        assert [
            node.name for node in functions if node.args.kwarg and node.args.kwarg.arg == "kwargs"
        ] == [], path


def test_files_and_functions_stay_short() -> None:
    for path in sources(*ROOMS):
        functions = [
            node for node in nodes_of(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES, path
        assert [
            node.name for node in functions if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
        ] == [], path


def modules_from(statements: str, before: str = "") -> set[str]:
    """Run statements in a fresh Python; name every module that they load, beyond what loads `before` them."""
    child = [
        sys.executable,
        "-c",
        f"import sys\n{before}\nknown = set(sys.modules)\n{statements}\nprint(*set(sys.modules) - known)",
    ]
    return set(subprocess.run(child, capture_output=True, text=True, check=True, timeout=120).stdout.split())


def test_importing_the_method_loads_nothing_heavy_beyond_torch() -> None:
    walk = "import comfy_g2rpo, importlib, pkgutil\n"
    walk += (
        "for m in pkgutil.walk_packages(comfy_g2rpo.__path__, 'comfy_g2rpo.'): "
        "importlib.import_module(m.name)"
    )
    assert not modules_from(walk, before="import torch") & HEAVY


def test_the_command_line_starts_without_torch() -> None:
    assert not modules_from("import g2rpo_trainer.cli") & {"torch", "diffusers", "transformers", "matplotlib"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the tree, so that nothing is left in it and nothing stale gets in."""
    copy, out = tmp_path_factory.mktemp("source") / "g2rpo", tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    )
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(out)], cwd=copy, check=True, capture_output=True, timeout=300
    )
    return next(out.glob("*.whl"))


def test_wheel_brings_no_generic_names_and_one_version(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {
        "comfy_g2rpo",
        "g2rpo_trainer",
        f"g2rpo-{comfy_g2rpo.__version__}.dist-info",
    }


def test_wheel_brings_what_the_page_of_votes_is_made_of(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"g2rpo_trainer/web/{name}" for name in (*MODULES, "g2rpo.css")} <= names


def test_wheel_brings_the_facts_about_published_models(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        f"g2rpo_trainer/families/facts/{file.name}"
        for file in (ROOT / "trainer/families/facts").glob("*.json")
    } <= names


def test_wheel_finds_its_own_recipes_prompts_and_model(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    path = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})"
    load = f"{path}; from g2rpo_trainer.config.reading import load; print(load('demo', []))"
    child = subprocess.run(
        [sys.executable, "-c", load], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
    assert str(tmp_path / "site/g2rpo_trainer/models/tiny") in child.stdout
