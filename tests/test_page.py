"""The page's own modules: their arithmetic by Node's test runner, and the rules that keep them safe and
readable.
"""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for path in (ROOT / "web").iterdir() if path.suffix in (".js", ".mjs", ".css"))
UNSAFE = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new "
    r"Function|DOMParser|srcdoc|setTimeout\(\s*[\"'`]"
)
SAYS = re.compile(r"\b(show|announce)$")
ADDRESS = re.compile(r"https?://[^\s\"'`)]+|url\(\s*[\"']?//")


@pytest.mark.parametrize(("name", "least"), [("curve", 30), ("ballot", 11), ("copy_path", 10), ("grow", 9)])
def test_arithmetic_and_fetching_of_the_page(name: str, least: int) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node: install Node 20 or newer to test the page's modules")
    child = subprocess.run(
        [node, "--test", str(Path(__file__).with_name(f"{name}.test.mjs"))],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stdout[-6000:]
    assert int(re.findall(r"^# pass (\d+)", child.stdout, re.MULTILINE)[0]) >= least


def test_comfyui_loads_one_file_by_itself() -> None:
    assert [path.name for path in (ROOT / "web").rglob("*.js")] == ["g2rpo.js"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_text_goes_into_the_page_as_text_and_nothing_comes_from_elsewhere(path: Path) -> None:
    source = path.read_text("utf-8")
    assert not UNSAFE.findall(source)
    assert set(ADDRESS.findall(source)) <= {"http://www.w3.org/2000/svg"}
    assert len(source.splitlines()) <= 500


def literal(name: str) -> str:
    """Return the source of a constant of web/roles.mjs."""
    source = (ROOT / "web/roles.mjs").read_text("utf-8")
    return source[source.index(f" {name} = ") :].split("\n};")[0]


def test_every_block_has_a_role_and_every_wire_a_colour() -> None:
    blocks = {re.sub(r"^G2RPO_", "", path.stem) for path in (ROOT / "web/docs").glob("G2RPO_*.md")}
    named = re.findall(r'"([A-Za-z]+)"', literal("NODES").split("=", 1)[1])
    assert sorted(named) == sorted(blocks) and len(blocks) >= 20
    wires = set(re.findall(r'Custom\("(G2RPO_[A-Z]+)"\)', (ROOT / "nodes/types.py").read_text("utf-8")))
    assert set(re.findall(r"(G2RPO_[A-Z]+):", literal("WIRES"))) == wires


def block_of(node: ast.ClassDef | ast.FunctionDef) -> str:
    """Return the id of a block's class without its prefix, else the name."""
    found = re.search(r"node_id='G2RPO_(\w+)'", ast.unparse(node))
    return found[1] if found else node.name


def test_blocks_that_tell_something_have_a_place_for_it() -> None:
    """Train LoRA tells it over its curve, and Save LoRA's file is what it makes."""
    telling = set()
    for path in (ROOT / "nodes").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        called = {
            block_of(node): {ast.unparse(each.func) for each in ast.walk(node) if isinstance(each, ast.Call)}
            for node in tree.body
            if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        }
        tells = {name for name, calls in called.items() if any(SAYS.search(call) for call in calls)}
        telling |= {name for name, calls in called.items() if name in tells or tells & calls}
    blocks = {path.stem.removeprefix("G2RPO_") for path in (ROOT / "web/docs").glob("G2RPO_*.md")}
    placed = set(re.findall(r"G2RPO_(\w+):", literal("TEXT_LINES")))
    assert placed == telling & blocks - {"TrainLoRA"}


def test_the_page_greys_the_widgets_that_a_preset_replaces() -> None:
    presets = ROOT / "comfy_g2rpo/blocks/train_presets.py"
    known = {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse(presets.read_text("utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name)
        if target.id in ("AS_TYPED", "WIDGETS")
    }
    said = re.findall(r'"([\w ]+)"', literal("PRESET"))
    assert said[:2] == ["preset", known["AS_TYPED"]]
    assert tuple(said[2:]) == known.get("WIDGETS", tuple(said[2:]))
