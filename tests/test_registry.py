"""What the registry takes and publishes: the list of the zip's files, and that none of them lacks another.

Where $G2RPO_COMFY_CLI names comfy-cli's program `comfy`, it validates the pack and packs just these files.
"""

import ast
import os
import re
import subprocess
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from comfy_host import ROOT
from packed import published

LIST = Path(__file__).parent / "snapshots/pack.txt"
RENEW = "G2RPO_RENEW_SNAPSHOT"
COMFY = os.environ.get("G2RPO_COMFY_CLI")
KINDS = {"workflows": r"[\w. -]+\.(json|jpg|webp|png)", "locales": r"[a-z]{2}(-[A-Z]{2})?/\w+\.json"}
"""Folders of many like files: the list has one line for each, and this says what may lie there."""


def test_the_zip_holds_what_is_listed_and_nothing_else() -> None:
    """Compare names with the snapshot; after a change that you mean, renew it with G2RPO_RENEW_SNAPSHOT=1."""
    names = published()
    listed = sorted({f"{name.split('/')[0]}/*" if name.split("/")[0] in KINDS else name for name in names})
    if os.environ.get(RENEW):
        LIST.write_text("\n".join(listed) + "\n", "utf-8")
    assert listed == LIST.read_text("utf-8").splitlines()


@pytest.mark.parametrize("folder", KINDS)
def test_a_folder_of_many_holds_its_kind_of_file_alone(folder: str) -> None:
    names = [name.removeprefix(f"{folder}/") for name in published() if name.startswith(f"{folder}/")]
    assert names and [name for name in names if not re.fullmatch(KINDS[folder], name)] == []


def needed(name: str) -> set[str]:
    """Name the files that a file of the zip reads or imports by a relative name, as the checkout has them."""
    path = ROOT / name
    if path.suffix in (".js", ".mjs"):
        found = re.findall(
            r"""(?:from\s+|import\s*\(?\s*|new URL\()["'](\./[^"']+)["']""", path.read_text("utf-8")
        )
        return {(path.parent / each).resolve().relative_to(ROOT).as_posix() for each in found}
    if path.suffix != ".py":
        return set()
    files = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or str(node.module).startswith("comfy_g2rpo")):
            base = path.parents[node.level - 1] if node.level else ROOT
            base = base.joinpath(*(node.module or "").split("."))
            places = [base, *(base / alias.name for alias in node.names)]
            files |= {place / "__init__.py" for place in places} | {
                place.with_suffix(".py") for place in places
            }
    return {file.relative_to(ROOT).as_posix() for file in files if file.is_file()}


def lacking(names: set[str]) -> dict[str, set[str]]:
    """Return what files need that are not among them."""
    return {name: missing for name in sorted(names) if (missing := needed(name) - names)}


def test_nothing_in_the_zip_lacks_a_file() -> None:
    assert lacking(set(published())) == {}


@pytest.mark.long
@pytest.mark.parametrize(
    ("file", "who"),
    [
        ("web/feed.mjs", "web/g2rpo.js"),
        ("web/g2rpo.css", "web/g2rpo.js"),
        ("nodes/types.py", "nodes/reward_blocks.py"),
        ("comfy_g2rpo/rewards/fetching/fetch.py", "fetch_rewards.py"),
        ("comfy_g2rpo/rewards/models/owlv2.py", "comfy_g2rpo/rewards/models/installed.py"),
    ],
)
def test_a_file_that_is_left_out_shows(file: str, who: str) -> None:
    assert who in lacking(set(published()) - {file})


def test_every_workflow_has_its_picture() -> None:
    names = [PurePosixPath(name) for name in published() if name.startswith("workflows/")]
    graphs = {name.stem for name in names if name.suffix == ".json"}
    assert graphs and graphs == {name.stem for name in names if name.suffix != ".json"}


@pytest.mark.skipif(not COMFY, reason="G2RPO_COMFY_CLI names no program of comfy-cli: .ci/run does")
def test_the_registrys_own_program_validates_and_packs_it(tmp_path: Path) -> None:
    names, clone = published(), tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    env = os.environ | {"HOME": str(tmp_path), "DO_NOT_TRACK": "1", "COMFY_NO_TELEMETRY": "1"}
    said = ""
    for verb in ("validate", "pack"):
        command = [str(COMFY), "--skip-prompt", "--no-enable-telemetry", "node", verb]
        ran = subprocess.run(
            command, cwd=clone, env=env, capture_output=True, text=True, input="", timeout=120
        )
        said += ran.stdout + ran.stderr
        assert ran.returncode == 0, said
    assert "All validation checks passed" in said
    assert not re.search("warning|error", said, re.IGNORECASE), said
    assert sorted(zipfile.ZipFile(clone / "node.zip").namelist()) == names
