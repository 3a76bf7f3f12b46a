"""Run tests inside real ComfyUIs: scripts in a booted one, or a server over HTTP. The pack is linked under a
base directory of its own.

ComfyUI's root has a module `nodes` and so has ours, therefore nothing here imports ComfyUI: its own Python
does, in a child process that starts in its root. `run_script` boots it once and runs a script file there
(comfy_side.py is the script's half), forked from a process that has its libraries loaded (comfy_nursery.py);
`server` starts main.py on a free port.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).parent.parent
SIDE, NURSERY = (Path(__file__).with_name(f"comfy_{name}.py") for name in ("side", "nursery"))
FLAGS = ("--cpu", "--disable-api-nodes", "--database-url", "sqlite:///:memory:")
MISSING = (
    "no ComfyUI found: set COMFYUI_PATH to its folder, or put it at ~/comfy/ComfyUI, with its venv/ inside"
)
BOOT_SECONDS = 180
# without a space: ComfyUI itself does not serve the web files of a pack whose folder name has one
SERVED = "another-odd_name"


def traced(log: str) -> bool:
    """Say whether a server's log traces an error through a pack; ComfyUI's own libraries leave some, too."""
    return re.search(r'File "[^"]*custom_nodes', log) is not None


def comfyui_roots() -> list[Path]:
    """List the ComfyUI folders to test in: COMFYUI_PATH alone where it is set.

    Else ~/comfy/ComfyUI*, newest last, and that around us.
    """
    named = os.environ.get("COMFYUI_PATH")
    around = [ROOT.parent.parent] if ROOT.parent.name == "custom_nodes" else []
    candidates = (
        [Path(named).expanduser().resolve()]
        if named
        else [*sorted(Path.home().glob("comfy/ComfyUI*"), key=version), *around]
    )
    return [path for path in candidates if (path / "comfy/sd.py").is_file()]


def version(comfyui: Path) -> list[int]:
    """Return the numbers of a ComfyUI's version; nothing where it does not say."""
    file = comfyui / "comfyui_version.py"
    said = re.search(r'__version__ = "([\d.]+)', file.read_text("utf-8")) if file.is_file() else None
    return [int(number) for number in said[1].split(".")] if said else []


ASKED = os.environ.get("G2RPO_EVERY_COMFYUI", "")
EVERY = ASKED == "1"
ROOTS = comfyui_roots() if ASKED else comfyui_roots()[-1:]
COMFYUIS = [pytest.param(root, id=root.name) for root in ROOTS] or [
    pytest.param(None, id="none", marks=pytest.mark.skip(reason=MISSING))
]
"""Where is tested: the ComfyUI around the pack or else the newest that is found.

Every one with G2RPO_EVERY_COMFYUI=1; with G2RPO_EVERY_COMFYUI=core the others for tests of `CORE` alone.
"""
CORE = ("test_pack", "test_comfyui", "test_nodes_policy", "test_workflows")
"""What a ComfyUI of another version would break first."""


def older(item: pytest.Item) -> bool:
    """Say whether a test runs in a ComfyUI that is not the newest, and is left out there."""
    given = getattr(item, "callspec", None)
    where = {value for value in given.params.values() if isinstance(value, Path)} if given else set()
    return ASKED == "core" and item.path.stem not in CORE and bool(where & {*ROOTS[:-1]})


NEWEST = COMFYUIS[-1:]
"""Where is tested what our code alone decides: what is learned from a reward, not how a model is called."""


def python_of(comfyui: Path) -> str:
    """Return the interpreter that a ComfyUI folder brings, or ours."""
    candidates = [
        comfyui / folder / name
        for folder in ("venv", ".venv")
        for name in ("bin/python", "Scripts/python.exe")
    ]
    return str(next((path for path in candidates if path.is_file()), sys.executable))


def environment() -> dict[str, str]:
    """Return the environment of a child: offline, one thread, and without a path that leads to this
    repository.
    """
    kept = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "COVERAGE_PROCESS_START")
    }
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def make_base(
    folder: Path, name: str | None = "an odd.name-of 2026", others: Mapping[str, Path] | None = None
) -> Path:
    """Make a base directory with this pack linked as custom_nodes/<name> (None: without it), and other
    packs beside it.
    """
    for part in ("custom_nodes", "models/loras", "input", "output", "temp", "user/default"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    packs = {**({name: ROOT} if name else {}), **(others or {})}
    for link, target in packs.items():
        (folder / "custom_nodes" / link).symlink_to(target, target_is_directory=True)
    return folder


@dataclass(frozen=True)
class Answer:
    """What a script in ComfyUI gave back, and everything that it printed."""

    data: Any
    tensors: dict[str, Tensor]
    log: str = field(repr=False)


def run_script(
    comfyui: Path,
    script: Path,
    base: Path,
    data: object = None,
    tensors: Mapping[str, Tensor] | None = None,
    timeout: float = 600,
) -> Answer:
    """Run a script file in a booted ComfyUI.

    It reads `data` and `tensors` with comfy_side.given() and replies with comfy_side.answer().
    """
    exchange = base / "exchange" / f"{time.monotonic_ns()}"
    exchange.mkdir(parents=True)
    (exchange / "given.json").write_text(json.dumps(data), "utf-8")
    save_file(
        {name: tensor.contiguous() for name, tensor in (tensors or {}).items()},
        exchange / "given.safetensors",
    )
    log = exchange / "log.txt"
    command = [str(SIDE), str(exchange), str(script), *FLAGS, "--base-directory", str(base)]
    code = (_run_forked if sys.platform == "linux" else _run)(comfyui, command, log, timeout)
    printed = log.read_text("utf-8", errors="replace")
    assert code == 0, f"{script.name} failed in {comfyui} with code {code}:\n{printed[-8000:]}"
    reply = exchange / "answer.json"
    replied = exchange / "answer.safetensors"
    return Answer(
        json.loads(reply.read_text("utf-8")) if reply.is_file() else None,
        load_file(replied) if replied.is_file() else {},
        printed,
    )


def _run(comfyui: Path, command: list[str], log: Path, timeout: float) -> int:
    with log.open("wb") as out:
        whole = [python_of(comfyui), *command]
        return subprocess.run(
            whole, cwd=comfyui, env=environment(), stdout=out, stderr=subprocess.STDOUT, timeout=timeout
        ).returncode


@cache
def _nursery(comfyui: Path) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(
        [python_of(comfyui), str(NURSERY)], cwd=comfyui, env=environment(), text=True, **pipes
    )


def _run_forked(comfyui: Path, command: list[str], log: Path, timeout: float) -> int:
    """Do as _run does, with a third of the start's work; a child that runs out of time ends with -9."""
    nursery = _nursery(comfyui)
    print(
        json.dumps({"command": command, "folder": str(comfyui), "log": str(log)}),
        file=nursery.stdin,
        flush=True,
    )
    late = threading.Timer(timeout, os.kill, (int(nursery.stdout.readline()), signal.SIGKILL))
    late.start()
    try:
        return int(nursery.stdout.readline())
    finally:
        late.cancel()


@dataclass(frozen=True)
class Server:
    """A running ComfyUI."""

    root: Path
    url: str
    base: Path
    log_path: Path
    pid: int = 0

    @property
    def log(self) -> str:
        """Return what the server has printed so far."""
        return self.log_path.read_text("utf-8", errors="replace")

    def get(self, path: str) -> Any:
        """GET a JSON document."""
        return json.loads(self.request("GET", path)[1])

    def request(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Send any request; return its status and its body."""
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, content, {"Content-Type": "application/json", **(headers or {})}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def post_prompt(self, graph: Mapping[str, Any]) -> str:
        """Queue an API graph; return its prompt id. A refused graph raises with the server's words."""
        status, body = self.request("POST", "/prompt", {"prompt": graph})
        if status != 200:
            raise ValueError(body.decode())
        return str(json.loads(body)["prompt_id"])

    def wait(self, prompt_id: str, timeout: float = 300) -> dict[str, Any]:
        """Wait until a prompt has ended; return its history entry (`status` and `outputs`)."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return dict(history[prompt_id])
            time.sleep(0.1)
        raise TimeoutError(f"prompt {prompt_id} did not end in {timeout} s:\n{self.log[-4000:]}")


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(comfyui: Path, base: Path, flags: tuple[str, ...] = ()) -> Iterator[Server]:
    """Start main.py on a free port; leave when it is gone."""
    port = free_port()
    running = Server(comfyui, f"http://127.0.0.1:{port}", base, base / f"server-{port}.log")
    command = [
        python_of(comfyui),
        "main.py",
        *FLAGS,
        "--listen",
        "127.0.0.1",
        "--port",
        str(port),
        "--base-directory",
        str(base),
        *flags,
    ]
    with running.log_path.open("wb") as log:
        child = subprocess.Popen(
            command, cwd=comfyui, env=environment(), stdout=log, stderr=subprocess.STDOUT
        )
    running = replace(running, pid=child.pid)
    try:
        _wait_until_ready(running, child)
        yield running
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _wait_until_ready(running: Server, child: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < end and child.poll() is None:
        try:
            if running.request("GET", "/system_stats")[0] == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"ComfyUI did not start:\n{running.log[-8000:]}")


@pytest.fixture(scope="session", params=COMFYUIS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a ComfyUI with the pack, for all tests of the group "served"."""
    with server(request.param, make_base(tmp_path_factory.mktemp("served"), SERVED)) as running:
        yield running


@pytest.fixture(scope="module", params=COMFYUIS)
def comfyui(request: pytest.FixtureRequest) -> Path:
    """Name a ComfyUI."""
    return request.param


@pytest.fixture(scope="module", params=NEWEST, name="comfyui")
def newest_comfyui(request: pytest.FixtureRequest) -> Path:
    """Name the newest ComfyUI alone, for a module that imports this."""
    return request.param


@pytest.fixture(scope="module")
def base(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a base directory for its scripts."""
    return make_base(tmp_path_factory.mktemp(comfyui.name))
