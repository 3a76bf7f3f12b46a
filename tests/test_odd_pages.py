"""`g2rpo run`: what is off, folded away or of another pack is said or followed as on ComfyUI's page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from graph_forms import NONE, Page, api_of, folded, plain, recipe_in, refusal, rewire
from PIL import Image

from g2rpo_trainer.workflows.graph_file import WorkflowError
from g2rpo_trainer.workflows.training_recipe import graph_of, read_workflow, recipe_of, training_block


def inside(mode: int) -> dict[str, Any]:
    """Fold the block away, twice, in a node that is off."""
    around, page = Page(50), Page(100)
    around.nodes.append({"id": 50, "type": "train", "title": "My training", "mode": mode, "inputs": []})
    page.nodes.append({"id": 102, "type": "around", "mode": 0, "inputs": []})
    graphs = [folded(plain(), "train"), folded(around, "around")]
    return page.tree(definitions={"subgraphs": graphs})


def grouped() -> dict[str, Any]:
    """Group the block as old pages did."""
    page = Page()
    page.nodes.append({"id": 1, "type": "workflow>training", "inputs": [], "widgets_values": []})
    return page.tree(extra={"groupNodes": {"training": {"nodes": plain().nodes, "links": []}}})


def off(node: int) -> dict[str, Any]:
    """Bypass a node that has nothing to hand on."""
    page = plain()
    page.nodes[node - 1]["mode"] = 4
    return page.tree()


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (inside(2), "'My training' (train, id 102:50), which is muted; switch it on"),
        (inside(4), "'My training' (train, id 102:50), which is bypassed; switch it on"),
        (grouped(), "(workflow>training, id 1), a group of an old kind; ungroup it"),
        (off(1), "(G2RPO_TinyDemoLoader, id 1) is bypassed; switch it on"),
        (off(2), "(G2RPO_LoadReward, id 2) is bypassed; switch it on"),
    ],
)
def test_what_is_off_is_said(tree: dict[str, Any], says: str) -> None:
    assert says in refusal(tree)


def test_a_held_out_reward_that_is_bypassed_is_none() -> None:
    assert recipe_in(off(3)).get("heldout_rewards") is None


def through(kind: str) -> dict[str, Any]:
    """Lead the model through a node of another pack."""
    page = plain()
    entry = {"name": "", "type": "*", "link": page.wire((1, 0), 9, 0, "*")}
    page.nodes.append({"id": 9, "type": kind, "mode": 0, "inputs": [entry]})
    rewire(page, "model", (9, 0))
    return page.tree()


def easy() -> dict[str, Any]:
    """Send the model by Easy-Use's nodes, beside KJNodes' of the same name."""
    page = plain()
    page.add("SetNode", value=(1, 1), name="x")
    for kind, name in (("easy setNode", "SetNode"), ("easy getNode", "GetNode")):
        page.add(name, **({"value": (1, 0)} if name == "SetNode" else {}), name="x")
        page.nodes[-1]["type"] = kind
    rewire(page, "model", (7, 0))
    return page.tree()


def any_before_model() -> dict[str, Any]:
    """Bypass a node whose first input takes anything, and the second the model."""
    page = plain()
    entries = [
        {"name": "a", "type": "*", "link": page.wire((2, 0), 9, 0, "*")},
        {"name": "m", "type": "MODEL", "link": page.wire((1, 0), 9, 1, "MODEL")},
    ]
    page.nodes.append({"id": 9, "type": "Any", "mode": 4, "inputs": entries})
    rewire(page, "model", (9, 2))
    return page.tree()


def muted_primitive() -> dict[str, Any]:
    """Mute one of the page's own primitives, which sets its widget nevertheless."""
    page = plain(steps=99)
    page.add("PrimitiveNode", mode=2, value=3)
    rewire(page, "steps", (5, 0))
    return page.tree()


def listed_as_text(listing: str) -> dict[str, Any]:
    """Write the list of what a folded node shows as JSON in JSON."""
    page = Page(100)
    host = {"id": 102, "type": "train", "mode": 0, "properties": {"proxyWidgets": listing}}
    page.nodes.append({**host, "widgets_values": [3]})
    return page.tree(definitions={"subgraphs": [folded(plain(steps=99), "train")]})


def showing(host: int, kind: str, number: int, name: str, value: int | None) -> dict[str, Any]:
    """Return a folded node that shows the widget of a node in it, as older pages saved it."""
    properties = {"proxyWidgets": [[str(number), name]]}
    values = [] if value is None else [value]
    return {"id": host, "type": kind, "mode": 0, "properties": properties, "widgets_values": values}


def shown_through_two(name: str, inner: int | None = 98, outer: int | None = 3) -> dict[str, Any]:
    """Show a widget on a folded node, and on the one around that."""
    around, page = Page(50), Page(100)
    around.nodes.append(showing(51, "train", 4, "steps", inner))
    page.nodes.append(showing(102, "around", 51, name, outer))
    graphs = [folded(plain(steps=99), "train"), folded(around, "around")]
    return page.tree(definitions={"subgraphs": graphs})


def primitive_shown() -> dict[str, Any]:
    """Show the value of one of the page's own primitives on the folded node around it."""
    inner, page = plain(steps=99), Page(100)
    inner.add("PrimitiveNode", value=98)
    rewire(inner, "steps", (5, 0))
    page.nodes.append(showing(102, "train", 5, "steps", 3))
    return page.tree(definitions={"subgraphs": [folded(inner, "train")]})


def older_with_control() -> dict[str, Any]:
    """Leave out the widgets that came later, and add what the page puts behind a seed."""
    page = plain()
    values = page.nodes[3]["widgets_values"]
    del values[-2:]
    values.insert(values.index(7) + 1, "randomize")
    return page.tree()


FOLLOWED = {
    "any before the model": any_before_model,
    "muted primitive": muted_primitive,
    "listed as text": lambda: listed_as_text('[["4", "steps"]]'),
    "shown through two": lambda: shown_through_two("steps"),
    "shown through two, with the node's name": lambda: shown_through_two("4: steps"),
    "shown through two, typed on the outer": lambda: shown_through_two("steps", None),
    "shown through two, typed on the inner": lambda: shown_through_two("steps", 3, None),
    "another one shown": lambda: shown_through_two("seed", 3, 98),
    "primitive shown": primitive_shown,
    "older with control": older_with_control,
    "wrapped": lambda: {"workflow": plain().tree()},
    "wrapped with its output": lambda: {"workflow": plain().tree(), "output": api_of(plain())},
    "rgthree": lambda: through("Reroute (rgthree)"),
    "pysssss": lambda: through("ReroutePrimitive|pysssss"),
    "Easy-Use": easy,
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_an_odd_page_is_the_recipe_of_its_plain_twin(name: str) -> None:
    assert recipe_in(FOLLOWED[name]()) == recipe_in(plain().tree())


@pytest.mark.parametrize("listing", ["[" * 40_000, "x", '{"a": 1}', "9" * 9000])
def test_a_list_that_is_none_shows_nothing(listing: str) -> None:
    assert recipe_in(listed_as_text(listing))["train"]["steps"] == 99


def test_a_long_list_as_text_is_refused_before_it_is_read() -> None:
    assert "more than 50000 sockets and widgets" in refusal(listed_as_text("[" + "[]," * 60_000 + "[]]"))


def test_a_run_called_as_a_control_keeps_its_name() -> None:
    page = plain(run="fixed")
    del page.nodes[3]["widgets_values"][-2:]
    graph = graph_of(page.tree())
    assert recipe_of(graph, training_block(graph), NONE).run == "fixed"


def test_a_picture_is_no_workflow(tmp_path: Path) -> None:
    file = tmp_path / "mine.png"
    Image.new("RGB", (8, 8)).save(file)
    with pytest.raises(WorkflowError, match="drag it into ComfyUI"):
        read_workflow(file, NONE)
