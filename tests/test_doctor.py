"""The check-up: a line for everything, never an exception, and an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from program import leave

from comfy_g2rpo.files.spool import Spool
from g2rpo_trainer.doctor import machine_checks
from g2rpo_trainer.doctor.findings import OK, PROBLEM, WARNING, Finding, apart
from g2rpo_trainer.doctor.hand_over import SPOOL, check_service, check_spool
from g2rpo_trainer.doctor.machine_checks import check_disk, check_libraries, check_python, needed
from g2rpo_trainer.doctor.recipe_health import check_recipe

ROOT = Path(__file__).parent.parent


def states(findings: Iterator[Finding]) -> dict[str, str]:
    """Return the state of each finding by its name."""
    return {found.name: found.state for found in findings}


def test_a_sound_installation_has_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = leave(capsys, "doctor", "demo")
    lines = printed.splitlines()
    assert code == 0 and lines[-1] == "no problem"
    assert all(line.startswith(("ok ", "warning ")) for line in lines[:-1])
    for name in ("python", "torch", "diffusers", "safetensors", "disk, runs", "model", "memory", "prompts"):
        assert any(line.split(None, 1)[1].startswith(f"{name}: ") for line in lines[:-1]), name


def test_without_its_libraries_each_missing_one_is_a_line(tmp_path: Path) -> None:
    """Run it where there is nothing but what the command line itself is made of."""
    site = Path(sysconfig.get_paths()["purelib"])
    program = ("typer", "click", "rich", "packaging", "shellingham", "annotated_doc", "pygments")
    program += ("pydantic", "pydantic_core", "annotated_types", "typing_inspection")  # which typer needs
    for name in program:
        if (site / name).exists():
            (tmp_path / name).symlink_to(site / name)
    for file in site.glob("typing_extensions.py"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "comfy_g2rpo").symlink_to(ROOT / "comfy_g2rpo")
    (tmp_path / "g2rpo_trainer").symlink_to(ROOT / "trainer")
    words = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; from g2rpo_trainer import cli; cli.main()"
    ended = subprocess.run(
        [sys.executable, "-S", "-I", "-c", words, "doctor", "demo", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = json.loads(ended.stdout)
    said = {check["name"]: check for check in found["checks"]}
    assert ended.returncode == 1 and found["ok"] is False and "Traceback" not in ended.stderr
    for name in ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors"):
        assert said[name]["state"] == PROBLEM and "pip install" in said[name]["remedy"]
    assert said["card"]["state"] == said["recipe"]["state"] == PROBLEM


def test_a_library_that_does_not_load_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    found = {each.name: each for each in check_libraries()}
    assert found["peft"].state == PROBLEM and "does not load: ModuleNotFoundError" in found["peft"].text
    assert found["torch"].state == OK


def test_bounds_are_those_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    python, wanted = needed()
    monkeypatch.setattr(machine_checks, "PROJECT", "no such project")
    assert needed()[0] == python and {name.split(";")[0] for name in needed()[1]} <= {
        each.split(";")[0].strip() for each in wanted
    }
    monkeypatch.setattr(machine_checks, "needed", lambda: (">=99", ["numpy>=99; extra == 'trainer'"]))
    assert states(check_python()) == {"python": PROBLEM}
    (found,) = check_libraries()
    assert found.state == PROBLEM and found.remedy.endswith("pip install 'numpy>=99'")


def test_what_breaks_one_check_breaks_no_other() -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("one", OK, "is there")
        raise RuntimeError("driver\nis odd")

    found = [*apart("all", broken), *apart("next", lambda: [Finding("next", OK, "is there")])]
    assert [each.line() for each in found] == [
        "ok       one: is there",
        "problem  all: RuntimeError: driver is odd",
        "ok       next: is there",
    ]


def test_a_place_that_cannot_be_written_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("G2RPO_PROMPTS", "/proc/g2rpo")
    monkeypatch.setenv("G2RPO_REWARDS", "/sys/g2rpo")
    monkeypatch.setattr(os, "access", lambda place, mode: not str(place).startswith(("/proc", "/sys")))
    found = states(check_disk())
    assert found["disk, prompts"] == found["disk, rewards"] == PROBLEM


RECIPES = {
    "no recipe": ("dmeo", (), {"recipe": PROBLEM}),
    "no model": ("demo", ("model.path=/nowhere",), {"recipe": PROBLEM}),
    "no prompts": ("demo", ("prompts.train=/nowhere.txt",), {"recipe": PROBLEM}),
    "no reward": ("demo", ("rewards=[pickscore]",), {"reward pickscore": PROBLEM, "model": OK}),
    "few to measure": ("demo", ("prompts.heldout=null",), {"prompts": WARNING}),
    "not asked": ("demo", ("rewards=[{name: j, url: 'http://127.0.0.1:9'}]",), {"reward j": OK}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_looked_at_part_by_part(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("G2RPO_REWARDS", str(tmp_path))
    recipe, settings, wanted = RECIPES[name]
    found = states(apart("recipe", lambda: check_recipe(recipe, settings, reach=False)))
    assert found.items() >= wanted.items(), found


def test_a_judge_is_asked_if_wished() -> None:
    settings = ["rewards=[{name: j, url: 'http://127.0.0.1:9'}]"]
    found = {each.name: each for each in check_recipe("demo", settings, reach=True)}
    assert found["reward j"].state == PROBLEM and "does not answer" in found["reward j"].text


# What is handed over


def test_jobs_are_counted_and_abandoned_ones_named(tmp_path: Path) -> None:
    place = tmp_path / SPOOL
    assert states(check_spool(tmp_path)) == {"spool": OK}
    place.mkdir(parents=True)
    spool = Spool(place)
    for job in ("one", "two", "three", "four"):
        spool.submit(job, {"recipe": job})
    spool.end("one", "done")
    (place / "three.job.json").write_text("{")
    hold = (
        f"from pathlib import Path; from comfy_g2rpo.files.spool import Spool; import os\n"
        f"with Spool(Path({str(place)!r})).take('two'): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", hold]).returncode == 9
    found = {each.name: each for each in check_spool(tmp_path)}
    assert found["job three"].state == PROBLEM
    assert found["job two"].state == WARNING and "gone" in found["job two"].text
    assert found["spool"].text.startswith("1 done, 2 waiting in ")
    with spool.take("two"):
        assert {each.name for each in check_spool(tmp_path)} == {"spool", "job three"}


def test_a_comfyui_that_is_none_is_named(tmp_path: Path) -> None:
    assert states(check_spool(tmp_path / "nowhere")) == {"spool": PROBLEM}


class Service(BaseHTTPRequestHandler):
    """Answers as the service does."""

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == "Bearer secret"
        status = 200 if self.path == "/health" else 302 if self.path.startswith("/elsewhere") else 404
        self.send_response(status if known else 401)
        self.send_header("Location", "/health")
        self.end_headers()
        self.wfile.write(b'{"status": "ready"}' if known else b"")

    def log_message(self, *given: object) -> None:
        """Say nothing."""


@pytest.fixture
def service() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("token", "where", "state", "says"),
    [
        ("secret", "", OK, "ready"),
        ("wrong", "", PROBLEM, "refuses this token (401)"),
        ("wrong\nline", "", PROBLEM, "refuses this token (401)"),
        ("secret", "/elsewhere", PROBLEM, "answers with status 302"),
        ("secret", "/nothing", PROBLEM, "answers with status 404"),
    ],
)
def test_a_service_is_asked_with_the_token(
    token: str, where: str, state: str, says: str, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("G2RPO_REMOTE_TOKEN", token)
    found = [*check_service(service + where)][-1]
    assert found.state == state and says in found.text and token not in found.text


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "ftp://x", "x", "http://me:secret@x/", "http://[", ""])
def test_an_address_that_leads_nowhere_is_a_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("G2RPO_REMOTE_TOKEN", "secret")
    (found,) = apart("service", lambda: check_service(url))
    assert found.state == PROBLEM and len(found.line().splitlines()) == 1
