"""fetch_rewards.py from the pack's zip, in ComfyUI's own Python, against a server that stands in for the hub
and for GitHub: what it gets, and what it says in one line.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import packed
import pytest
from comfy_host import COMFYUIS, NEWEST, environment, python_of
from reward_hub import Hub, published

from comfy_g2rpo.rewards.fetching.download import Sources
from comfy_g2rpo.rewards.fetching.prepare import EXAMPLES
from comfy_g2rpo.rewards.models.catalogue import KNOWN, Published
from comfy_g2rpo.rewards.models.installed import installed

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("fetch_rewards")]

FOLDER = "an odd.name-of 2026"


def path_of(pin: Published) -> str:
    """Return where a server has a file."""
    return unquote(Sources("", "").address(pin))


WEIGHTS = path_of(KNOWN["clipscore"].files[0])


def contents(hub: Hub) -> dict[Published, bytes]:
    """Make small files in the place of those that clipscore and aesthetic are made of."""
    head = hub.files[path_of(published(hub, "aesthetic")[-1])]
    clip = {pin.path: hub.files[path_of(pin)] for pin in published(hub, "clipscore")}
    files = {pin: clip[pin.path] for pin in KNOWN["clipscore"].files}
    files[KNOWN["aesthetic"].files[-1]] = head
    return files | {each.picture: each.picture.path.encode() for each in EXAMPLES["aesthetic"]}


class Pack:
    """An unpacked zip in a ComfyUI's custom_nodes; its pins are those of small files on a server here."""

    def __init__(self, base: Path, comfyui: Path) -> None:
        self.hub, self.comfyui = Hub(), comfyui
        self.rewards = base / "models/g2rpo_rewards"
        self.rewards.parent.mkdir(parents=True)
        self.folder = packed.install(base / "custom_nodes" / FOLDER)
        for name in ("models/catalogue.py", "fetching/prepare.py"):
            path = self.folder / "comfy_g2rpo/rewards" / name
            text = path.read_text("utf-8")
            text = re.sub(r"\n {12}\d\.\d,\n", "\n            0.0,\n", text)
            for pin, content in contents(self.hub).items():
                self.hub.files[path_of(pin)] = content
                text = text.replace(str(pin.sha256), hashlib.sha256(content).hexdigest())
                text = text.replace(str(pin.size), "1") if pin.size else text
            path.write_text(text, "utf-8")

    def start(self, *words: str, script: str = "fetch_rewards.py") -> subprocess.Popen[str]:
        """Start what a user would type, with the server for a mirror."""
        command = [python_of(self.comfyui), str(self.folder / script), *words, "--mirror", self.hub.address]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # transformers warns of the small models' word lists.
        env = environment() | {"TRANSFORMERS_VERBOSITY": "error"}
        # What runs in the background has children that are deaf to Ctrl-C.
        hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(command, cwd=self.comfyui, env=env, text=True, preexec_fn=hears, **pipes)

    def run(self, *words: str) -> tuple[int, str, str]:
        """Run it to its end; return its exit status, what it said, and its errors."""
        child = self.start(*words)
        said, wrong = child.communicate(timeout=120)
        return child.returncode, said, wrong

    def refused(self, *words: str) -> str:
        """Run it, see that it fails by one line of error, and that nothing half-written is installed."""
        code, _, wrong = self.run(*words)
        assert code == 1 and wrong.count("\n") == 1 and wrong.startswith("error: "), wrong
        left = [path for path in self.rewards.rglob("*") if path.is_file()]
        kept = {".fetching", *installed(self.rewards)}
        assert {path.relative_to(self.rewards).parts[0] for path in left} <= kept
        return wrong


@pytest.fixture
def pack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pack]:
    made = Pack(tmp_path / "base", request.param)
    yield made
    made.hub.server.shutdown()
    made.hub.server.server_close()


every = pytest.mark.parametrize("pack", COMFYUIS, indirect=True)
newest = pytest.mark.parametrize("pack", NEWEST, indirect=True)


@pytest.mark.long
@every
def test_two_at_once_are_installed_and_listed(pack: Pack) -> None:
    code, said, wrong = pack.run("clipscore", "aesthetic")
    assert (code, wrong) == (0, ""), wrong
    assert installed(pack.rewards) == sorted(os.listdir(pack.rewards)) == ["aesthetic", "clipscore"]
    assert [path for path, _ in pack.hub.asked].count(WEIGHTS) == 1  # both are made of it
    assert pack.hub.tokens == [] and "press R" in said
    code, said, wrong = pack.run()
    assert (code, wrong) == (0, "")
    lines = said.splitlines()[1:-1]
    assert [line.split()[0] for line in lines] == list(KNOWN)
    assert {line.split()[0] for line in lines if " installed " in line} == {"clipscore", "aesthetic"}
    assert all(KNOWN[line.split()[0]].licence in line and " GB " in line for line in lines)
    assert "exists already" in pack.refused("pickscore", "clipscore")


@newest
def test_another_content_than_the_pinned_one_is_one_line(pack: Pack) -> None:
    pack.hub.spoil[WEIGHTS] = lambda content: content[:-1] + b"x"
    said = pack.refused("clipscore")
    assert "clip-vit-large-patch14/model.safetensors is not the pinned file: its SHA-256 is" in said
    assert not list(pack.rewards.rglob("model.safetensors*"))


@pytest.mark.long
@newest
def test_a_lost_connection_is_one_line_and_the_same_command_goes_on(pack: Pack) -> None:
    pack.hub.spoil[WEIGHTS] = lambda content: content[:5000]
    said = pack.refused("clipscore")
    assert re.search(r"the connection ended after 5000 of \d+ bytes; try again, it goes on", said)
    pack.hub.spoil.clear()
    pack.hub.asked.clear()
    code, said, wrong = pack.run("clipscore")
    assert (code, wrong) == (0, "") and "going on with" in said
    assert pack.hub.asked[0] == (WEIGHTS, "bytes=5000-")
    assert os.listdir(pack.rewards) == ["clipscore"]


@newest
def test_ctrl_c_is_one_line(pack: Pack) -> None:
    asked, never = threading.Event(), threading.Event()

    def stall(content: bytes) -> bytes:
        asked.set()
        never.wait(60)
        return content

    pack.hub.spoil[WEIGHTS] = stall
    child = pack.start("clipscore")
    assert asked.wait(60)
    child.send_signal(signal.SIGINT)
    _, wrong = child.communicate(timeout=30)
    never.set()
    assert (child.returncode, wrong) == (130, "stopped; the same command goes on\n")
    assert installed(pack.rewards) == []


@pytest.mark.long
@newest
@pytest.mark.parametrize("kilobytes", [16, 200])
def test_a_full_disk_is_one_line(pack: Pack, kilobytes: int, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(small_disk)], check=True)
    said = pack.refused("clipscore", "--to", str(small_disk))
    assert "no space left on device; make room or choose another folder (--to)" in said
    files = [path for path in small_disk.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".part" or "ready-" in str(path)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here: that needs root on Linux")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.long
@newest
@pytest.mark.parametrize(("name", "meant"), [("HPSv2.1", "hpsv2.1"), ("../x", "")])
def test_an_unknown_name_is_one_line_with_the_nearest(pack: Pack, name: str, meant: str) -> None:
    said = pack.refused(name)
    assert f"reward model '{name}' is unknown" in said and "known: pickscore, hpsv2.1" in said
    assert (f"(did you mean '{meant}'?)" in said) == bool(meant)
    assert pack.hub.asked == []


@pytest.mark.long
@newest
def test_it_finds_its_own_folder_and_hides_no_module_of_comfyuis(pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "comfy_g2rpo").mkdir()
    (tmp_path / "comfy_g2rpo/__init__.py").write_text("raise ImportError('another copy')")
    (tmp_path / "nodes.py").write_text("whose = 'core'")
    script = str(pack.folder / "fetch_rewards.py")
    words = "import sys, runpy; sys.path[:0] = [sys.argv[2], sys.argv[3]]; sys.argv = [sys.argv[1]]\n"
    words += "try:\n  runpy.run_path(sys.argv[0], run_name='__main__')\n"
    words += "except SystemExit as ended:\n  assert not ended.code\nimport nodes; print(nodes.whose)"
    for before in ([str(pack.folder), str(tmp_path)], [str(tmp_path), str(pack.folder)]):
        command = [python_of(pack.comfyui), "-I", "-c", words, script, *before]
        ran = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=60
        )
        assert (ran.returncode, ran.stderr) == (0, "")
        assert f"reward models in {pack.rewards}:" in ran.stdout and ran.stdout.endswith("core\n")


@newest
def test_outside_of_comfyui_it_asks_where_to(pack: Pack) -> None:
    pack.folder = pack.folder.rename(pack.folder.parent.parent / "elsewhere")
    said = pack.refused("clipscore")
    assert "does not lie in a ComfyUI's custom_nodes; say where to by --to FOLDER" in said
