"""The page's own modules: their arithmetic by Node's test runner, and the rules that keep them safe and
readable.
"""

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
ADDRESS = re.compile(r"https?://[^\s\"'`)]+|url\(\s*[\"']?//")


@pytest.mark.parametrize(("name", "least"), [("curve", 30), ("ballot", 11), ("copy_path", 10)])
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
