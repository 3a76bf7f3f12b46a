"""`g2rpo run`: what is off, folded away or of another pack is said or followed as on ComfyUI's page."""

from __future__ import annotations

from typing import Any

import pytest
from graph_forms import Page, folded, plain, recipe_in, refusal, rewire


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


FOLLOWED = {
    "rgthree": lambda: through("Reroute (rgthree)"),
    "pysssss": lambda: through("ReroutePrimitive|pysssss"),
    "Easy-Use": easy,
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_an_odd_page_is_the_recipe_of_its_plain_twin(name: str) -> None:
    assert recipe_in(FOLLOWED[name]()) == recipe_in(plain().tree())
