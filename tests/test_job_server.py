"""The service for a remote GPU: every address × method × mark of a stranger, every body that is no job.

And each check weakened once, which must show.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from http.client import HTTPConnection
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from guarded import METHODS, STRANGERS, TOKEN, UPGRADE, send, send_for_answer
from job_host import DEMO, grown_run, job, service

from comfy_g2rpo.files.spool import Spool
from g2rpo_trainer.service import http_guard, job_schema, job_server
from g2rpo_trainer.service.api_document import ROUTES
from g2rpo_trainer.service.job_views import job_view, short_view

KNOWN = {"/health": 200, "/openapi.json": 200, "/jobs": 200, "/jobs/one": 200, "/jobs/one/report": 404}
KNOWN |= {"/jobs/one/metrics": 200, "/jobs/one/samples/3": 404, "/jobs/one/samples/3/000.png": 404}
KNOWN |= {"/jobs/one/lora": 404, "/jobs/one/pictures/curves.png": 404, "/jobs/done/events": 200}
ADDRESSES = (*KNOWN, "/", "/jobs/", "//jobs", "/jobs?x=1", "/JOBS", "/%6aobs", "/jobs/one?after=1", "*")
ADDRESSES += ("/jobs/../health", "/jobs/one/pictures/..%2f..%2fsecret.png", "/jobs/ONE", "/jobs/one/nothing")
ADDRESSES += ("/jobs/one/samples/x", "/jobs/one/samples/3/..%2fsecret.png", "/jobs/one/samples/3/index.json")
ALLOWED = {"/jobs": ("GET", "POST"), "/jobs/one": ("GET", "DELETE")}


def edited(**changes: Any) -> bytes:
    """Write a job with other fields beside its recipe."""
    return json.dumps({"recipe": DEMO} | changes).encode()


def graph(*way: str, value: Any = None, **more: Any) -> bytes:
    """Write a job of a graph with another value at a place of it, and with other fields beside it."""
    made = copy.deepcopy(GRAPH)
    part: Any = made
    for step in way[:-1]:
        part = part[step]
    if way:
        part[way[-1]] = value
    return json.dumps({"id": "two", "graph": made} | more).encode()


def lines(text: bytes) -> bytes:
    """Write a sound job with raw text at its start."""
    return b"{" + text + b", " + job("raw")[1:]


GRAPH = {
    "recipe": {
        "model": {"family": "sd3", "width": 64, "height": 64},
        "rewards": [{"name": "agreement"}],
        "prompts": {"train": ["a circle"], "heldout": []},
    },
    "settings": [],
    "models": {"folder": "tiny demo model", "model": "tiny demo model", "text_encoders": [], "vae": ""},
    "source": "graph",
}
BAD: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, "not JSON"),
    "no JSON": (b"{", 400, "not JSON"),
    "no UTF-8": (b'{"id": "\xff"}', 400, "not JSON"),
    "a list": (b"[]", 400, "object"),
    "depth": (b"[" * 100_000, 400, "nested more than 8"),
    "some depth": (b'{"recipe": ' + b"[" * 8 + b"]" * 8 + b"}", 400, "nested more than 8"),
    "half a sign": (b'{"id": "\\ud800"}', 400, ""),
    "a key twice": (lines(b'"id": "x"'), 400, "stands twice"),
    "NaN": (lines(b'"source": NaN'), 400, "no number of JSON"),
    "infinity": (lines(b'"source": -Infinity'), 400, "no number of JSON"),
    "a number beyond floats": (lines(b'"source": 1e999'), 400, "too large"),
    "a long number": (lines(b'"source": ' + b"9" * 100_000), 400, "not JSON"),
    "no recipe": (b'{"id": "x"}', 400, "recipe"),
    "another key": (edited(run="rm"), 400, "run"),
    "another section": (job(shell={}), 400, "recipe.shell"),
    "a key within": (job(train={"stepz": 1}), 400, "recipe.train.stepz"),
    "text for a number": (job(train={"steps": "5"}), 400, "recipe.train.steps"),
    "true for a number": (job(train={"steps": True}), 400, "recipe.train.steps"),
    "out of bounds": (job(train={"steps": 10**7}), 400, "recipe.train.steps"),
    "a place to write to": (job(out="/tmp/x"), 400, "recipe.out"),
    "a tracker elsewhere": (job(report={"trackers": ["wandb"]}), 400, "recipe.report.trackers"),
    "foreign code": (job(rewards=[{"name": "a", "path": "x.py:f"}]), 400, "recipe.rewards.0.path"),
    "foreign code, held out": (
        job(heldout_rewards=[{"name": "a", "path": "os:getcwd"}]),
        400,
        "recipe.heldout_rewards.0.path",
    ),
    "a judge": (job(rewards=[{"name": "a", "url": "http://x"}]), 400, "recipe.rewards.0.url"),
    "votes": (job(rewards=["votes"]), 400, "nobody votes here"),
    "a name with a slash": (job(rewards=["../agreement"]), 400, "recipe.rewards.0"),
    "an unknown reward": (job(rewards=["nothing"]), 400, "unknown"),
    "a path": (job(model={"path": "/etc"}), 400, "should match pattern"),
    "a path upwards": (job(model={"path": "../models/tiny"}), 400, "should match pattern"),
    "a path upwards within": (job(model={"path": "a/../../x"}), 400, "should match pattern"),
    "a hidden name": (job(lora={"init": ".ssh/id"}), 400, "should match pattern"),
    "a link out": (job(lora={"init": "link/secret.safetensors"}), 400, "in no folder of this service"),
    "a name that is not there": (job(prompts={"train": "mine.txt"}), 400, "in no folder of this service"),
    "a model that is not there": (job(model={"path": "no/where"}), 400, "does not have"),
    "no setting": (edited(settings=["train.steps"]), 400, "settings has"),
    "a setting too deep": (edited(settings=["a.b.c.d.e.f=1"]), 400, "settings has"),
    "a setting of another kind": (edited(settings=[3]), 400, "settings.0"),
    "a setting that is a path": (job(settings=("model.path=/etc",)), 400, "should match pattern"),
    "a setting that is code": (job(settings=("rewards.0.path=x.py:f",)), 400, "rewards.0.path"),
    "a setting that grows": (job(settings=("model.sizes=[&a 64x64, *a]",)), 400, "plain value"),
    "a deep setting": (job(settings=(f"model.sizes={'[' * 9}{']' * 9}",)), 400, "plain value"),
    "a setting that is no YAML": (job(settings=("train.steps='",)), 400, "not YAML"),
    "a date": (job(settings=("train.steps=2020-01-01",)), 400, "no word for"),
    "a tag": (job(settings=("train.steps=!!python/name:os.system x",)), 400, "not YAML"),
    "too many settings": (edited(settings=["train.steps=1"] * 65), 400, "settings"),
    "a long setting": (edited(settings=["train.steps=" + "1" * 2000]), 400, "settings.0"),
    "a name for Windows": (job("nul"), 400, "cannot be called"),
    "a name in capitals": (job("A"), 400, "id: "),
    "a name upwards": (job("../x"), 400, "id: "),
    "another job of that name": (job("one", ("train.steps=3",)), 409, "with other content"),
    "a name of a device": (job("com1"), 400, "cannot be called"),
    "a graph without a name": (json.dumps({"graph": GRAPH}).encode(), 400, "id"),
    "a graph and a recipe": (graph(recipe=DEMO), 400, "recipe"),
    "a graph with settings": (graph("settings", value=["train.steps=1"]), 400, "graph.settings"),
    "a graph of a path": (graph("recipe", "model", "path", value="a"), 400, "graph.recipe.model.path"),
    "a graph that writes": (graph("recipe", "out", value="/tmp/x"), 400, "graph.recipe.out"),
    "a graph of code": (graph("recipe", "rewards", value=[{"name": "a", "path": "x.py:f"}]), 400, "0.path"),
    "a graph of a file": (graph("recipe", "prompts", "train", value="/etc/passwd"), 400, "prompts.train"),
    "a graph of votes": (graph("recipe", "rewards", value=[{"name": "votes"}]), 400, "has votes"),
    "a graph of a name": (graph("recipe", "rewards", value=["agreement"]), 400, "holds no fields"),
    "a graph of nothing": (graph("recipe", "prompts", "train", value=[]), 400, "prompts.train"),
    "a graph of another kind": (graph("models", "folder", value="loras"), 400, "graph.models.folder"),
    "a graph upwards": (
        graph("models", value={"folder": "checkpoints", "model": "../outside/secret.safetensors"}),
        *(400, "which is no name of a file"),
    ),
    "a graph of a link": (
        graph("models", value={"folder": "checkpoints", "model": "link/secret.safetensors"}),
        *(400, "which lies outside the folders"),
    ),
    "a graph that was another job": (
        json.dumps({"id": "one", "graph": GRAPH}).encode(),
        409,
        "other content",
    ),
}
ODD: dict[str, tuple[str, str, dict[str, Any], bytes, int]] = {
    "an upgrade": ("POST", "/jobs", UPGRADE, job("odd"), 400),
    "text": ("POST", "/jobs", {"Content-Type": "text/plain"}, job("odd"), 415),
    "JSON with more": ("POST", "/jobs", {"Content-Type": "application/json; charset=utf-8"}, job("odd"), 415),
    "a form": ("POST", "/jobs", {"Content-Type": "application/x-www-form-urlencoded"}, b"a=b", 415),
    "no type": ("POST", "/jobs", {"Content-Type": None}, job("odd"), 415),
    "packed": ("POST", "/jobs", {"Content-Encoding": "gzip"}, job("odd"), 415),
    "no length": (
        *("POST", "/jobs", {"Content-Length": None, "Transfer-Encoding": "chunked"}),
        *(b"2\r\n{}\r\n0\r\n\r\n", 411),
    ),
    "a gigabyte": ("POST", "/jobs", {"Content-Length": str(10**9)}, b"{", 413),
    "a little too long": ("POST", "/jobs", {}, job("odd") + b" " * 2**18, 413),
    "a body with GET": ("GET", "/jobs", {"Content-Length": "2"}, b"{}", 400),
    "a body with DELETE": ("DELETE", "/jobs/one", {"Content-Length": "2"}, b"{}", 400),
    "a line that is none": ("GET", "/jobs/done/events?after=x", {}, b"", 400),
    "a line below nothing": ("GET", "/jobs/done/events?after=-1", {}, b"", 400),
    "more than a line": ("GET", "/jobs/done/events?after=1&x=2", {}, b"", 400),
    "a file beside the pictures": ("GET", "/jobs/one/pictures/secret.png", {}, b"", 404),
    "the end of what has ended": ("DELETE", "/jobs/done", {}, b"", 409),
    "nobody's job": ("GET", "/jobs/nobody", {}, b"", 404),
    "nobody's events": ("GET", "/jobs/nobody/events", {}, b"", 404),
    "nobody's LoRA": ("GET", "/jobs/nobody/lora", {}, b"", 404),
}


def prepared(place: Path) -> Path:
    """Make a folder with a job that waits, one that has ended, and files that nobody may have."""
    folder, models = place / "served", place / "models"
    models.mkdir(parents=True)
    (place / "outside").mkdir()
    (place / "outside/secret.safetensors").write_bytes(b"secret")
    (models / "checkpoints").mkdir()
    for each in (models, models / "checkpoints"):
        (each / "link").symlink_to(place / "outside")
    spool = Spool(folder / "spool")
    spool.submit("done", {"recipe": DEMO, "settings": [], "source": ""})
    spool.end("done", "done")
    return folder


def audit(
    place: Path,
    guard: ModuleType = http_guard,
    server: ModuleType = job_server,
    methods: Sequence[str] = METHODS,
    addresses: Sequence[str] = ADDRESSES,
) -> Iterator[str]:
    """Ask for everything in every way; say what is answered otherwise than it should be."""
    with service(prepared(place), False, guard, server, (place / "models",), queue=2) as (port, made):
        if (got := send(port, "POST", "/jobs", body=job("one"))) != 200:
            yield f"a sound job: {got}"
        grown_run(made, "one", 3).path.joinpath("secret.png").write_bytes(b"secret")
        for method, path in product(methods, addresses):
            for name, (headers, status) in STRANGERS.items():
                # Where HTTP itself breaks off, which the parser sees to, 400 comes first.
                if (got := send(port, method, path, headers)) not in (status, 400):
                    yield f"{method} {path} by {name}: {got}"
            if method == "DELETE" and path == "/jobs/one":
                continue
            known = path.partition("?")[0] in KNOWN and "?" not in path
            wanted = (405, 400) if known else (404, 400)
            if known and method in ALLOWED.get(path, ("GET",)):
                wanted = (KNOWN[path],)
            body = job("one") if method == "POST" else b""
            if (got := send(port, method, path, body=body)) not in wanted:
                yield f"{method} {path}: {got}"
        yield from refused(port)
        if made.spool.ids() != ["done", "one"]:
            yield f"jobs are {made.spool.ids()}"
        if (got := send(port, "POST", "/jobs", body=graph())) != 200:
            yield f"a second job, of a graph: {got}"
        if (got := send(port, "POST", "/jobs", body=job("three"))) != 429:
            yield f"a third job of two: {got}"
    with service(place / "small", False, guard, server, gigabytes=1e-9) as (port, made):
        (made.runs.parent / "much").write_bytes(b"x")  # as much as there is room for
        if (got := send(port, "POST", "/jobs", body=job("one"))) != 429:
            yield f"a job beyond the disk: {got}"


def refused(port: int) -> Iterator[str]:
    """Send what is to be refused; say what is not, or in other words."""
    for name, (method, path, headers, body, status) in ODD.items():
        if (got := send(port, method, path, headers, body, patience=2)) != status:
            yield f"{name}: {got}"
    for name, (body, status, words) in BAD.items():
        got, answer = send_for_answer(port, "POST", "/jobs", body=body)
        if got != status or words not in answer or "Traceback" in answer or "/tmp" in answer:
            yield f"{name}: {got} {answer[-300:]}"


MATRIX = [
    pytest.param(METHODS, ADDRESSES, marks=pytest.mark.long, id="all"),
    pytest.param(("GET", "POST"), ADDRESSES, id="every address"),
    pytest.param(METHODS, ("/jobs", "/jobs/one", "/nothing"), id="every method"),
]


@pytest.mark.parametrize(("methods", "addresses"), MATRIX)
def test_nobody_but_the_holder_of_the_token_gets_anything_at_any_address(
    methods: Sequence[str], addresses: Sequence[str], tmp_path: Path
) -> None:
    assert len(STRANGERS) * len(METHODS) * len(ADDRESSES) > 3000
    assert list(audit(tmp_path, methods=methods, addresses=addresses)) == []


def test_every_route_is_asked_for(tmp_path: Path) -> None:
    asked = [(method, path) for path in KNOWN for method in ALLOWED.get(path, ("GET",))]
    for route in ROUTES:
        assert any(method == route.method and route.pattern.fullmatch(path) for method, path in asked)


COMPARE, ADMIT = "hmac.compare_digest", "            self.admit(request)"
METHODS_OF = "            methods = self._find(request.raw_path)"
GUARD = {
    "any host": ("len(hosts) != 1 or hosts[0].lower() not in self.hosts", "False"),
    "any page": ("any(mark in request.headers for mark in BROWSER)", "False"),
    "no marks of fetch": ("*FETCH, ", ""),
    "any token": (f"len(sent) != 1 or not {COMPARE}", f"len(sent) > 1 or None is {COMPARE}"),
    "half a token": ("compare_digest(sent[0], self._token)", "compare_digest(sent[0][:9], self._token[:9])"),
    "addresses before the token": (f"{ADMIT}\n{METHODS_OF}\n", f"{METHODS_OF}\n{ADMIT}\n"),
    "any method": ("if request.method not in methods:", "if request.method == 'BREW':"),
    "upgrades": ('"Upgrade" in request.headers', "False"),
    "any type": ('request.headers.get("Content-Type", "").lower() != "application/json"', "False"),
    "packed bodies": ('"Content-Encoding" in request.headers', "False"),
    "bodies of unknown length": ("request.content_length is None", "False"),
    "bodies of any length": ("request.content_length > limit", "False"),
}
SCHEMA = {
    "any depth": ("_depth(text) > MAX_DEPTH", "False"),
    "keys that come twice": ("len(found) < len(pairs)", "False"),
    "NaN": ("parse_constant=_refuse", "parse_constant=float"),
    "infinity": ("not math.isfinite(number := float(text))", "(number := float(text)) is None"),
    "lax types": ("strict=True", "strict=False"),
    "unknown fields": ('extra="forbid"', 'extra="ignore"'),
    "judges": ('JUDGE = ("path", "url",', 'JUDGE = ("path",'),
    "foreign code": ('JUDGE = ("path", "url",', 'JUDGE = ("url",'),
    "places to write to": ('("out", "report.project")', '("report.project",)'),
    "other trackers": ('Literal["tensorboard"]', 'Literal["tensorboard", "wandb"]'),
    "names upwards": ('PART = r"[A-Za-z0-9_]', 'PART = r"[A-Za-z0-9_.]'),
    "links out": (" and place.is_relative_to(root.resolve())", ""),
    "votes": ("reward.name == VOTES", "False"),
    "names for Windows": ("asked.id is not None", "False"),
    "any setting": ("not SETTING.fullmatch(text)", "False"),
    "settings that grow": ("isinstance(event, yaml.AliasEvent) or ", ""),
    "deep settings": (" or deepest > MAX_DEPTH", ""),
    "settings unchecked": ("        validated(RecipeForm, tree)\n", ""),
}
SERVER = {
    "any queue": ("count >= self.quotas.queue", "False"),
    "any disk": ("self._used() >= self.quotas.gigabytes * 1e9", "False"),
    "bodies of no use": ('route.method != "POST" and request.body_exists', "False"),
    "any picture": ("name not in PICTURES", "False"),
    "any query": ("sign and not after", "False"),
    "the end of what has ended": ("(status := self.spool.state(job_id)) in ENDS", "False"),
    "large bodies": ("MAX_BODY = 256 * 2**10", "MAX_BODY = 2**24"),
}
WEAKENED = [
    (module, name)
    for module, table in ((http_guard, GUARD), (job_schema, SCHEMA), (job_server, SERVER))
    for name in table
]


@pytest.mark.parametrize(("module", "name"), WEAKENED, ids=lambda part: getattr(part, "__name__", part))
def test_a_weakened_check_shows(
    module: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = {http_guard: GUARD, job_schema: SCHEMA, job_server: SERVER}[module][name]
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    (tmp_path / "weak.py").write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("g2rpo_trainer.service.weak", tmp_path / "weak.py")
    weak = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, weak)  # where its dataclasses look themselves up
    spec.loader.exec_module(weak)
    parts = {http_guard: ("read_body",), job_schema: ("job_request", "ready_job", "check_job")}.get(
        module, ()
    )
    for part in parts:
        monkeypatch.setattr(job_server, part, getattr(weak, part))
    # A refusal is what the others know as one.
    for kind in ("Refusal", "RequestError"):
        if module is not job_server and hasattr(weak, kind):
            setattr(weak, kind, getattr(module, kind))
    guard, server = (weak if module is each else each for each in (http_guard, job_server))
    few = ("/jobs", "/jobs/one", "/nothing") if module is http_guard else ()
    holes = audit(tmp_path / "audit", guard, server, ("GET", "POST", "BREW"), few)
    assert next(holes, None)
    holes.close()


def test_the_token_is_in_no_answer_and_in_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with service(tmp_path) as (port, _):
        answers = [send_for_answer(port, "GET", path)[1] for path in ("/health", "/jobs", "/nothing")]
    assert TOKEN not in "".join(answers) + caplog.text


class EndsMeanwhile(Spool):
    """A spool whose jobs end just after somebody has looked whether they have."""

    def ended(self, job_id: str) -> dict[str, Any] | None:
        found = super().ended(job_id)
        if found is None:
            self.end(job_id, "failed", error="no room")
        return found


@pytest.mark.parametrize("view", ["short", "whole"])
def test_a_job_that_ends_meanwhile_is_told_of_one_moment(view: str, tmp_path: Path) -> None:
    spool = EndsMeanwhile(tmp_path)
    spool.submit("one", {"recipe": "demo"})
    told = short_view(spool, tmp_path, "one") if view == "short" else job_view(spool, tmp_path, "one", [])
    if view == "whole":
        assert told["error"] == "no room" and told["ended"]
    assert told["status"] == "failed"


def test_a_job_is_tried_again_for_its_newest_end_alone(tmp_path: Path) -> None:
    def sent(again: str) -> str:
        assert send(port, "POST", "/jobs", body=graph(again=again)) == 200
        return made.spool.state("two")

    with service(tmp_path) as (port, made):
        assert sent("") == "waiting" and sent("2026-01-01T00:00:00") == "waiting"  # it has not ended
        made.spool.end("two", "failed")
        first = made.spool.ended("two")["at"]
        assert sent("") == "failed" and sent("2026-01-01T00:00:00") == "failed"
        assert sent(first) == "waiting" and sent(first) == "waiting"
        made.spool.end("two", "failed")
        assert sent(first) == "failed" and sent(made.spool.ended("two")["at"]) == "waiting"


def test_what_is_told_of_a_job_that_has_ended_ends(tmp_path: Path) -> None:
    with service(prepared(tmp_path)) as (port, _):
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/jobs/done/events", headers={"Authorization": f"Bearer {TOKEN}"})
        assert b"event: end" in connection.getresponse().read()


def test_what_is_told_of_a_job_that_is_removed_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_server, "POLL_SECONDS", 0.05)
    with service(tmp_path) as (port, made):
        assert send(port, "POST", "/jobs", body=job("one")) == 200
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            head = f"GET /jobs/one/events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {TOKEN}"
            connection.sendall(f"{head}\r\n\r\n".encode())
            answer = connection.recv(65536)
            (made.spool.path / "one.job.json").unlink()
            with suppress(ConnectionResetError):
                while part := connection.recv(65536):
                    answer += part
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1


def test_a_job_is_made_ready_by_its_kind_and_ends_beyond_hours_and_disk(tmp_path: Path) -> None:
    with service(tmp_path) as (_, made):
        rules = made._rules("two")
        by_graph, by_recipe = (rules.prepare(each) for each in (GRAPH, json.loads(job())))
        assert "models" not in by_graph and Path(by_graph["recipe"]["model"]["path"]).is_dir()
        assert Path(by_recipe["recipe"]["model"]["path"]).is_dir() and not rules.over(tmp_path)
    with service(tmp_path, hours=0) as (_, made):
        assert "the limit of this service (--hours)" in made._rules("two").over(tmp_path)
    (tmp_path / "much").write_bytes(b"xx")
    with service(tmp_path, gigabytes=1e-9) as (_, made):
        assert "the limit of this service (--gigabytes)" in made._rules("two").over(tmp_path)


def test_a_service_without_jobs_waits_for_one(tmp_path: Path) -> None:
    with service(tmp_path, works=True) as (_, made):
        made._more.set()
        deadline = time.monotonic() + 20
        while made._more.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not made._more.is_set()
