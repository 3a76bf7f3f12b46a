"""Workflows that somebody has made to do harm: one line of error, soon, in little memory, no file opened.

A process of its own reads them, and hears of every file that is opened there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from graph_forms import NONE, Page, api_of, folded, plain, rewire

from g2rpo_trainer.workflows.graph_file import WorkflowError
from g2rpo_trainer.workflows.training_recipe import graph_of, recipe_of, training_block

ESCAPES = "4\n\x1b[31m\x9b\u202e"
SECONDS, MEGABYTES = 2.0, 300
CHILD = """
import json, os, resource, sys, time
from pathlib import Path
from g2rpo_trainer.workflows.model_files import ModelFolders
from g2rpo_trainer.workflows.training_recipe import read_workflow
from g2rpo_trainer.config.reading import from_dict

opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event in ("open", "exec") else None)
for name in json.loads(sys.argv[1]):
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        print(os.fdopen(reading).read(), flush=True)
        os.wait()
        continue
    opened.clear()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        found = from_dict(read_workflow(Path(name), ModelFolders()).tree)
        said = "nothing"
    except ValueError as error:
        said = str(error)
    except BaseException as error:
        said = "not ours: " + repr(error)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    told = {"said": said, "seconds": time.process_time() - began, "megabytes": more / 1024}
    told["opened"] = [each for each in opened if each != name]
    os.write(writing, json.dumps(told).encode())
    os._exit(0)
"""


def text(change: Callable[[Page], Any] = lambda page: None, old: str = "", new: str = "") -> str:
    """Return the plain graph's JSON, changed as a graph and then as a text."""
    page = plain()
    change(page)
    return json.dumps(page.tree()).replace(old, new, 1) if old else json.dumps(page.tree())


def circle(page: Page) -> None:
    """Lead a reroute into itself."""
    page.add("Reroute", input=(5, 0))
    rewire(page, "model", (5, 0))


def chain(page: Page) -> None:
    """Lead the model through as many reroutes as fit into a file."""
    for i in range(50_000):
        page.nodes.append({"id": 1000 + i, "type": "Reroute", "inputs": [{"link": 200_000 + i + 1}]})
        page.links.append([200_000 + i, 1000 + i, 0, 1, 0, "X"])
    rewire(page, "model", (1000, 0))


def folded_into(count: int, last: list[dict[str, Any]]) -> str:
    """Fold graphs into each other, each holding the next one twice."""
    graphs: list[dict[str, Any]] = [
        {"id": f"g{i}", "name": f"g{i}", "nodes": [{"id": k, "type": f"g{i + 1}"} for k in (1, 2)]}
        for i in range(count)
    ]
    graphs.append({"id": f"g{count}", "name": "last", "nodes": last})
    page = Page()
    page.nodes.append({"id": 1, "type": "g0"})
    return json.dumps(page.tree(definitions={"subgraphs": graphs}))


def mixes() -> str:
    """Mix mixes of mixes, six wires from each to the next."""
    graph = api_of(plain())
    for i in range(3000):
        wires = {f"reward_{k}": [f"m{i + 1}", 0] for k in range(1, 7)}
        graph[f"m{i}"] = {"class_type": "G2RPO_MixRewards", "inputs": wires}
    graph["4"]["inputs"]["reward"] = ["m0", 0]
    return json.dumps(graph)


def own_loop(kind: str, name: str, into: str) -> str:
    """Let a node feed itself, in the API format."""
    graph = api_of(plain())
    graph["x"] = {"class_type": kind, "inputs": {name: ["x", 0], "reward_2": ["x", 0], "strength_model": 0}}
    graph["4"]["inputs"][into] = ["x", 0]
    return json.dumps(graph)


def names_without_end(page: Page) -> None:
    """Call a Get node, and what is around it, by lists in lists."""
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    page.add("GetNode", name=deep)
    page.add("SetNode", name=[deep, 1])
    page.nodes[5]["widgets_values"] = [None]
    page.nodes[3]["properties"] = {"proxyWidgets": [[deep, deep]]}
    page.nodes[4]["widgets_values"] = ["x"]
    rewire(page, "model", (5, 0))


def many_outside() -> str:
    """Type more into a folded node than anybody does, around as many mixes as fit."""
    inner, last = plain(), (2, 0)
    for _ in range(60):
        last = (inner.add("G2RPO_MixRewards", reward_1=last, reward_2=(3, 0)), 0)
    rewire(inner, "reward", last)
    page = Page(1000)
    host = {"id": 1000, "type": "t", "properties": {"proxyWidgets": [["4", "x"]] * 180_000}}
    page.nodes.append({**host, "widgets_values": [1] * 180_000})
    return json.dumps(page.tree(definitions={"subgraphs": [folded(inner, "t")]}))


def long_names() -> str:
    """Wire one long text into the names of many rewards."""
    graph, last = api_of(plain()), "2"
    graph["p"] = {"class_type": "PrimitiveString", "inputs": {"value": "x" * 999_999}}
    for i in range(90):
        inputs = {"reward": ["p", 0], "precision": ["p", 0], "batch": 1}
        graph[f"r{i}"] = {"class_type": "G2RPO_LoadReward", "inputs": inputs}
        wires = {"reward_1": [last, 0], "reward_2": [f"r{i}", 0]}
        graph[f"m{i}"] = {"class_type": "G2RPO_MixRewards", "inputs": wires}
        last = f"m{i}"
    graph["4"]["inputs"]["reward"] = [last, 0]
    return json.dumps(graph)


def steps(page: Page, value: Any) -> None:
    """Type something into the widget steps."""
    page.nodes[3]["widgets_values"][1] = value


ODD: list[Any] = [5, None, {}, ["x"], [[1], [2], 3, 4, 5], [1, 2, "3", 4, 5], {"id": 5, "origin_id": True}]
TRAINS = {"id": 1, "type": "G2RPO_TrainLoRA"}
MANY = [{"id": i, "type": "Foo"} for i in range(100_000)]
FILES: dict[str, tuple[Callable[[], str], str]] = {
    "nested lists": (lambda: "[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "nested tables": (lambda: '{"nodes": ' + '{"a":' * 100_000 + "1" + "}" * 100_001, "nested too deeply"),
    "not a number": (
        lambda: text(lambda page: steps(page, float("nan"))),
        "G2RPO_TrainLoRA, id 4): steps is nan",
    ),
    "infinite": (lambda: text(lambda page: steps(page, 777), "777", "1e999"), "steps is inf"),
    "huge": (lambda: text(lambda page: steps(page, 777), "777", "9" * 4000), "more than 60 digits"),
    "huger": (lambda: text(lambda page: steps(page, 777), "777", "9" * 9000), "thousands of digits"),
    "a hundred thousand nodes": (lambda: json.dumps({"nodes": MANY, "links": []}), "no block"),
    "and the block": (lambda: text(lambda page: page.nodes.extend(MANY)), "two nodes of the id 1"),
    "empty lists": (lambda: "[" + "[]," * 2_000_000 + "[]]", "lists and tables"),
    "short texts": (lambda: '{"nodes": [' + '"ab",' * 1_500_000 + '"ab"]}', "no table"),
    "keys": (lambda: json.dumps({f"{i:x}": 0 for i in range(600_000)}), "no workflow"),
    "too large": (lambda: " " * (8 * 2**20) + text(), "larger than 8 MiB"),
    "a circle of reroutes": (lambda: text(circle), "circle"),
    "a chain of reroutes": (lambda: text(chain), "more than 50000 sockets"),
    "a graph in itself": (lambda: folded_into(0, [{"id": 1, "type": "g0"}, {**TRAINS, "id": 2}]), "itself"),
    "graphs without end": (lambda: folded_into(90, [TRAINS]), "blocks train"),
    "graphs without end, off": (lambda: folded_into(90, [{**TRAINS, "mode": 4}]), "muted or bypassed"),
    "graphs too deep": (lambda: folded_into(200, [TRAINS]), "more than 100 deep"),
    "widgets without end": (many_outside, "more than 50000 sockets and widgets"),
    "long names": (long_names, "reward has 999999 characters; at most 1000"),
    "mixes without end": (mixes, "more than 200 blocks"),
    "a mix of itself": (lambda: own_loop("G2RPO_MixRewards", "reward_1", "reward"), "circle"),
    "a LoRA on itself": (lambda: own_loop("LoraLoaderModelOnly", "model", "model"), "circle"),
    "a number by itself": (lambda: own_loop("PrimitiveInt", "value", "steps"), "circle"),
    "half a letter": (lambda: text(old="a red circle", new="a \\ud800 circle"), "U+D800"),
    "two of one id": (lambda: text(lambda page: page.nodes.append(page.nodes[0])), "two nodes of the id 1"),
    "two of one wire": (
        lambda: text(lambda page: page.links.append([*page.links[0][:2], 7, *page.links[0][3:]])),
        "two wires of the number",
    ),
    "wires of nothing": (lambda: text(lambda page: page.links.clear()), "lacks wire"),
    "odd wires": (lambda: text(lambda page: page.links.extend(ODD)), "nothing"),
    "no text": (lambda: "\ufffe\x00", "not JSON"),
    "nothing": (lambda: "", "not JSON"),
    "a number": (lambda: "5", "no workflow"),
    "an empty table": (lambda: "{}", "no workflow"),
    "inputs of numbers": (lambda: text(old='"inputs": [{', new='"inputs": [5, {'), "no table"),
    "a list for a text": (lambda: text(old='"a yellow circle"', new="[1]"), "must be a text"),
    "a list for a type": (
        lambda: text(old='"type": "G2RPO_LoadReward"', new='"type": []'),
        "put Load Reward",
    ),
    "names without end": (lambda: text(names_without_end), "no Set node is called"),
    "a table for a mode": (lambda: text(old='"mode": 0', new='"mode": {}'), "nothing"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Let one process read all files, each in a fork."""
    place = tmp_path_factory.mktemp("hostile")
    files = [place / f"{i}.json" for i in range(len(FILES))]
    for file, (make, _) in zip(files, FILES.values(), strict=True):
        file.write_text(make(), "utf-8")
    words = [sys.executable, "-c", CHILD, json.dumps([str(file) for file in files])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(FILES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.xdist_group("hostile graphs")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="every file is read in a fork")
@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_one_line_soon_and_opens_nothing(
    name: str, told: dict[str, dict[str, Any]]
) -> None:
    found = told[name]
    assert FILES[name][1] in found["said"] and "\n" not in found["said"], found
    assert len(found["said"]) < 700 and found["said"].isprintable()
    assert found["seconds"] < SECONDS and found["megabytes"] < MEGABYTES, found
    assert found["opened"] == []


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where a tree's values are."""
    if not isinstance(tree, (dict, list)):
        yield path
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from leaves(value, (*path, key))


@pytest.mark.parametrize("written", [Page.tree, api_of])
def test_nothing_of_a_file_moves_the_cursor(written: Callable[[Page], dict[str, Any]]) -> None:
    page = plain()
    page.add("G2RPO_LoadReward", reward="jpeg")
    page.add("G2RPO_MixRewards", reward_1=(2, 0), reward_2=(5, 0), gates="jpeg = 20")
    page.add("G2RPO_MixRewards", reward_1=(6, 0), reward_2=(3, 0), weight_2=0.0)
    rewire(page, "reward", (7, 0))
    whole = json.dumps(written(page))
    tried = [json.loads(whole) for _ in leaves(json.loads(whole))]
    for tree, path in zip(tried, leaves(json.loads(whole)), strict=True):
        within: Any = tree
        for key in path[:-1]:
            within = within[key]
        within[path[-1]] = ESCAPES
    if written is api_of:
        tried += [
            {ESCAPES if key == odd else key: node for key, node in written(page).items()} for odd in "46"
        ]
    told = 0
    for tree in tried:
        try:
            graph = graph_of(tree)
            said = " ".join(recipe_of(graph, training_block(graph), NONE).notes)
        except WorkflowError as error:
            said = str(error)
            told += 1
        assert said.isprintable(), (said, tree)
    assert told > 30


@pytest.mark.parametrize("place", ["", "no.json", os.devnull])
def test_what_is_no_file_is_said(place: str, tmp_path: Path) -> None:
    from g2rpo_trainer.workflows.graph_file import read_file

    with pytest.raises(WorkflowError, match=r"give a workflow|check the path"):
        read_file(tmp_path / place)
