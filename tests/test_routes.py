"""The routes of the live page: what they answer about a run folder, and what they refuse."""

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from aiohttp import web
from comfy_host import Server, traced
from hypothesis import given
from hypothesis import strategies as st

from comfy_g2rpo.run.folder import RunFolder, Sample

ROOT = Path(__file__).parent.parent


def load_routes() -> ModuleType:
    """Import nodes/host/routes.py as part of a pack whose door, which needs a ComfyUI, stays shut."""
    for name, path in {"g2rpo_pack_for_routes": ROOT, "g2rpo_pack_for_routes.nodes": ROOT / "nodes"}.items():
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    return importlib.import_module("g2rpo_pack_for_routes.nodes.host.routes")


def load_tool(name: str) -> ModuleType:
    """Import a module of tools/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


routes = load_routes()
make_texts = load_tool("make_texts")


def comfyui(test: Any) -> Any:
    """Mark a test that needs a ComfyUI."""
    return pytest.mark.xdist_group("served")(pytest.mark.comfyui(test))


HOSTILE_IDS = [
    "",
    ".",
    "..",
    "../secret",
    "..\\secret",
    "/etc",
    "C:\\Windows",
    "run/../../secret",
    "run\0",
    "run\n",
    "-run",
    ".hidden",
    "run%2f..",
    "rün",
    "ｒｕｎ",
    "١٢٣",
    "\u202erun",
    "\ud800",
    "<img src=x onerror=alert(1)>",
    "r" * 65,
    "r" * 100_000,
]
HOSTILE_AFTER = [
    "",
    "-1",
    "+1",
    "1.0",
    "1e3",
    "0x10",
    " 1",
    "1\n",
    "١",
    "²",
    "NaN",
    "null",
    "1;2",
    "1000000001",
    "9" * 10,
    "9" * 11,
    "9" * 100_000,
    "1\0",
]


def make_run(root: Path, name: str = "run", rows: int = 3, steps: int = 10) -> RunFolder:
    """Write a run of the first `rows` steps of `steps`."""
    run = RunFolder.create(root / name, {"config": {"train": {"steps": steps}}, "recipe": {}})
    for step in range(1, rows + 1):
        run.append({"step": step, "reward/brightness/mean": step / 10})
    return run


def refused(root: Path, run: str, after: str = "0") -> str:
    """Return the words with which a question is refused."""
    with pytest.raises(ValueError, match=r".") as caught:
        routes.read_metrics(root, run, after)
    return str(caught.value)


def test_metrics_of_a_run_come_after_those_the_page_has(tmp_path: Path) -> None:
    make_run(tmp_path, rows=3)
    answer = routes.read_metrics(tmp_path, "run", "1")
    assert [row["step"] for row in answer["rows"]] == [2, 3]
    assert (answer["next"], answer["total"], answer["total_steps"], answer["finished"]) == (3, 3, 10, False)
    assert "reset" not in answer


def test_a_page_that_has_more_rows_than_the_run_is_told_to_start_over(tmp_path: Path) -> None:
    make_run(tmp_path, rows=3)
    answer = routes.read_metrics(tmp_path, "run", "4")
    assert (answer["reset"], answer["rows"], answer["next"]) == (True, [], 3)


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    make_run(tmp_path).save_summary({})
    assert routes.read_metrics(tmp_path, "run")["finished"]


def test_a_line_that_is_still_being_written_is_not_a_row_yet(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=2)
    with open(run.metrics_file, "a", encoding="utf-8") as file:
        file.write('{"step": 3, "rew')
    assert routes.read_metrics(tmp_path, "run")["total"] == 2
    assert routes.list_runs(tmp_path)[0]["step"] == 2


@pytest.mark.parametrize("line", ["{", "[1]", "null", "[" * 10_000, '"' + "x" * 200_000 + '"', "\xff\xfe"])
def test_a_damaged_line_keeps_its_place_and_hides_no_other(tmp_path: Path, line: str) -> None:
    run = make_run(tmp_path, rows=1)
    with open(run.metrics_file, "ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    run.append({"step": 3})
    answer = routes.read_metrics(tmp_path, "run")
    assert answer["rows"] == [{"step": 1, "reward/brightness/mean": 0.1}, {}, {"step": 3}]


def test_the_answer_is_json_that_a_browser_reads(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=0)
    with open(run.metrics_file, "a", encoding="utf-8") as file:
        file.write('{"step": 1, "a": NaN, "b": Infinity, "c": null, "d": "<b>", "e": [1], "f": true}\n')
    answer = routes.read_metrics(tmp_path, "run")
    assert json.loads(json.dumps(answer, allow_nan=False))["rows"] == [{"step": 1, "a": None, "b": None}]


def test_a_long_run_comes_in_bounded_pieces(tmp_path: Path) -> None:
    make_run(tmp_path, rows=0)
    lines = "".join(f'{{"step": {step}}}\n' for step in range(1, routes.MAX_ROWS + 8))
    with open(tmp_path / "run/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(lines)
    first = routes.read_metrics(tmp_path, "run")
    second = routes.read_metrics(tmp_path, "run", str(first["next"]))
    assert (len(first["rows"]), first["next"], first["total"]) == (
        routes.MAX_ROWS,
        routes.MAX_ROWS,
        routes.MAX_ROWS + 7,
    )
    assert [row["step"] for row in second["rows"]] == list(range(routes.MAX_ROWS + 1, routes.MAX_ROWS + 8))


def test_wide_rows_are_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, rows=20)
    monkeypatch.setattr(routes, "MAX_ANSWER_BYTES", 200)
    seen: list[int] = []
    while len(seen) < 20:
        answer = routes.read_metrics(tmp_path, "run", str(len(seen)))
        assert 1 <= len(answer["rows"]) < 20
        seen += [row["step"] for row in answer["rows"]]
    assert seen == list(range(1, 21))


def test_samples_are_those_of_the_first_step_and_the_newest(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for step in range(0, 60, 10):
        run.save_samples(step, [Sample("<b>a tree</b>", 1, {"brightness": 0.5}, torch.zeros(2, 2, 3))])
    samples = routes.read_metrics(tmp_path, "run")["samples"]
    assert [sample["step"] for sample in samples] == [0, 30, 40, 50]
    assert samples[-1]["folder"] == "000050"
    assert samples[-1]["files"] == [
        {"file": "000.png", "prompt": "<b>a tree</b>", "scores": {"brightness": 0.5}}
    ]


@pytest.mark.parametrize(
    "file", ["../../x.png", "/etc/passwd", "a b.png", "x.svg", "x.png\n", "", None, 3, [], "x" * 99 + ".png"]
)
def test_a_poisoned_index_of_pictures_names_nothing(tmp_path: Path, file: Any) -> None:
    run = make_run(tmp_path)
    folder = run.path / "images/000000"
    folder.mkdir(parents=True)
    (folder / "index.json").write_text(
        json.dumps([{"file": file, "prompt": {"a": 1}, "scores": [1]}, 3, None])
    )
    assert routes.read_metrics(tmp_path, "run")["samples"] == []


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"config": 3}',
        '{"config": {"train": {"steps": "9"}}}',
        '{"config": {"train": {"steps": true}}}',
    ],
)
def test_an_odd_configuration_leaves_the_number_of_steps_open(tmp_path: Path, content: str) -> None:
    make_run(tmp_path).config_file.write_text(content)
    assert routes.read_metrics(tmp_path, "run")["total_steps"] is None


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    for age, name in enumerate(["young", "middle", "old"]):
        os.utime(make_run(tmp_path, name, rows=3 - age).metrics_file, (1e9 - age, 1e9 - age))
    runs = routes.list_runs(tmp_path)
    assert [(run["id"], run["step"]) for run in runs] == [("young", 3), ("middle", 2), ("old", 1)]
    assert runs[0] == {"id": "young", "steps": 10, "step": 3, "modified": 1e9, "finished": False}


def test_the_list_is_bounded_and_holds_only_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MAX_RUNS", 2)
    for name in ("a", "b", "c"):
        make_run(tmp_path, name)
    make_run(tmp_path, ".hidden")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    assert len(routes.list_runs(tmp_path)) == 2
    assert {run["id"] for run in routes.list_runs(tmp_path)} <= {"a", "b", "c"}


def test_there_may_be_no_runs_at_all(tmp_path: Path) -> None:
    assert routes.list_runs(tmp_path / "nowhere") == []
    assert "no run of this name" in refused(tmp_path / "nowhere", "run")


@pytest.mark.parametrize("run", HOSTILE_IDS)
def test_hostile_ids_are_refused_by_their_form(tmp_path: Path, run: str) -> None:
    make_run(tmp_path / "g2rpo")
    make_run(tmp_path, "secret")
    assert "1 to 64 letters" in refused(tmp_path / "g2rpo", run)


@pytest.mark.parametrize("after", HOSTILE_AFTER)
def test_hostile_positions_are_refused(tmp_path: Path, after: str) -> None:
    make_run(tmp_path)
    assert "after must be a whole number" in refused(tmp_path, "run", after)


@given(run=st.text(), after=st.text())
def test_whatever_is_asked_the_answer_is_one_line(
    tmp_path_factory: pytest.TempPathFactory, run: str, after: str
) -> None:
    message = refused(tmp_path_factory.getbasetemp(), run, after)
    assert "\n" not in message
    assert str(tmp_path_factory.getbasetemp()) not in message


def test_an_unknown_run_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(routes.NotFoundError, match="no run of this name"):
        routes.read_metrics(tmp_path, "nobody")


FOREIGN = {"of no schema": '{"step": 1}', "of another": '{"schema": "x/1"}', "no JSON": "{", "empty": ""}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_is_no_run_of_ours_is_not_found(tmp_path: Path, name: str) -> None:
    make_run(tmp_path).metrics_file.write_text(FOREIGN[name] + '\n{"step": 1}\n')
    assert "no run of this name" in refused(tmp_path, "run")
    assert routes.list_runs(tmp_path) == []


def test_metrics_beyond_all_measure_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = make_run(tmp_path).metrics_file.stat().st_size
    monkeypatch.setattr(routes, "MAX_METRICS_BYTES", size)
    assert routes.read_metrics(tmp_path, "run")["total"] == 3
    monkeypatch.setattr(routes, "MAX_METRICS_BYTES", size - 1)
    assert "the page reads no more" in refused(tmp_path, "run")


def test_json_beyond_all_measure_is_not_read(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    content = run.config_file.read_text("utf-8")
    run.config_file.write_text(content + " " * routes.MAX_JSON_BYTES, "utf-8")
    assert routes.read_metrics(tmp_path, "run")["total_steps"] is None


def test_a_run_linked_from_outside_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "elsewhere", "secret")
    (tmp_path / "g2rpo").mkdir()
    (tmp_path / "g2rpo/link").symlink_to(tmp_path / "elsewhere/secret")
    assert "no run of this name" in refused(tmp_path / "g2rpo", "link")
    assert routes.list_runs(tmp_path / "g2rpo") == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "images"])
def test_a_link_within_a_run_leads_nowhere(tmp_path: Path, name: str) -> None:
    secret = make_run(tmp_path / "elsewhere", "secret", steps=77)
    secret.save_samples(0, [Sample("secret", 1, {}, torch.zeros(2, 2, 3))])
    run = make_run(tmp_path / "g2rpo")
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(secret.path / name)
    if name == "metrics.jsonl":
        assert "no run of this name" in refused(tmp_path / "g2rpo", "run")
    else:
        answer = routes.read_metrics(tmp_path / "g2rpo", "run")
        assert (answer["total_steps"], answer["samples"]) == (None if name == "config.json" else 10, [])


def test_a_linked_output_folder_still_works(tmp_path: Path) -> None:
    make_run(tmp_path / "disk")
    (tmp_path / "g2rpo").symlink_to(tmp_path / "disk")
    assert routes.read_metrics(tmp_path / "g2rpo", "run")["total"] == 3


def test_nothing_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.save_samples(0, [Sample("a", 1, {}, torch.zeros(2, 2, 3))])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    routes.list_runs(tmp_path)
    routes.read_metrics(tmp_path, "run")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_without_a_server_there_is_nothing_to_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace()))
    routes.register()


def test_a_second_copy_of_the_pack_adds_no_second_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    table = web.RouteTableDef()
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace(routes=table)))
    monkeypatch.setitem(sys.modules, "server", server)
    for _ in range(2):
        routes.register()
    assert [route.path for route in table] == ["/g2rpo/runs", "/g2rpo/runs/{id}/metrics"]


@pytest.fixture(scope="module")
def host(served: Server) -> Server:
    """Put a run of three rows into a ComfyUI, and one where none belongs."""
    make_run(served.base / "output/g2rpo")
    make_run(served.base / "output", "secret")
    return served


@comfyui
@pytest.mark.parametrize("prefix", ["", "/api"])
def test_the_routes_answer_over_http(host: Server, prefix: str) -> None:
    assert {run["id"] for run in host.get(f"{prefix}/g2rpo/runs")["runs"]} & {"run", "secret"} == {"run"}
    assert [row["step"] for row in host.get(f"{prefix}/g2rpo/runs/run/metrics?after=2")["rows"]] == [3]


@comfyui
@pytest.mark.parametrize(
    "path", ["/g2rpo/runs", "/g2rpo/runs/run/metrics", "/api/g2rpo/runs", "/api/g2rpo/runs/run/metrics"]
)
def test_the_routes_take_get_and_nothing_else(host: Server, path: str) -> None:
    statuses = {
        method: host.request(method, path, body={})[0]
        for method in ("POST", "PUT", "DELETE", "PATCH", "HEAD")
    }
    assert set(statuses.values()) <= {404, 405}, statuses
    # Core answers OPTIONS itself, with nothing.
    assert host.request("OPTIONS", path)[1] in (b"", b"405: Method Not Allowed")


@comfyui
@pytest.mark.parametrize(
    "asked",
    [
        "..%2Fsecret",
        "%2e%2e%2fsecret",
        "run%00",
        "run%0A",
        "%F0%9F%98%80",
        "r" * 5000,
        "%ED%A0%80",
        "%2Fetc",
        "-x",
    ],
)
def test_hostile_ids_over_http_are_refused_without_a_trace(host: Server, asked: str) -> None:
    before = len(host.log)
    status, body = host.request("GET", f"/g2rpo/runs/{asked}/metrics")
    assert status in (400, 404)
    assert b"Traceback" not in body and str(host.base).encode() not in body
    assert not traced(host.log[before:])


@comfyui
@pytest.mark.parametrize("after", ["-1", "1e3", "%00", "9" * 5000, "%D9%A1", "", "1&after=-1"])
def test_hostile_positions_over_http_are_refused_in_words(host: Server, after: str) -> None:
    status, body = host.request("GET", f"/g2rpo/runs/run/metrics?after={after}")
    if after == "1&after=-1":
        assert status == 200
    else:
        assert (status, "whole number" in json.loads(body)["error"]) == (400, True)


@comfyui
def test_an_unknown_run_is_404_over_http(host: Server) -> None:
    status, body = host.request("GET", "/g2rpo/runs/nobody/metrics")
    assert (status, list(json.loads(body))) == (404, ["error"])


def with_output_names(info: dict[str, Any]) -> dict[str, Any]:
    """Give outputs their names back, where an older core shows their types instead."""
    known = json.loads(make_texts.DEFINITIONS.read_text("utf-8"))
    for name, block in make_texts.ours(info).items():
        for i, (shown, kind) in enumerate(zip(block["output_name"], block["output"], strict=True)):
            block["output_name"][i] = known[name]["outputs"][str(i)]["name"] if shown == kind else shown
    return info


@comfyui
def test_texts_of_the_blocks_are_up_to_date(host: Server) -> None:
    info = with_output_names(host.get("/object_info"))
    remedy = "run tools/make_texts.py with the address of a running ComfyUI"
    assert make_texts.DEFINITIONS.read_text("utf-8") == make_texts.definitions(info), remedy
    pages = {name: (make_texts.HELP / f"{name}.md").read_text("utf-8") for name in make_texts.ours(info)}
    made = {name: make_texts.help_page(pages[name], block) for name, block in make_texts.ours(info).items()}
    assert [name for name in pages if made[name] != pages[name]] == [], remedy
    assert {path.stem for path in make_texts.HELP.glob("*.md")} == set(make_texts.ours(info))
