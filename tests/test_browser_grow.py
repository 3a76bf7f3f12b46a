"""Mix Rewards in the real page: it shows the rewards that are linked and one free one, and what is saved,
sent and undone is what six sockets would give.
"""

import json
from typing import Any

import pytest

pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install playwright, and a Chromium, to test the page"
)
from browser_fixtures import MARKS, Ours
from test_browser_blocks import read

pytest_plugins = ["browser_fixtures"]
pytestmark = MARKS

MIX = "app.graph._nodes.find((node) => node.type === 'G2RPO_MixRewards')"
REWARD = "app.graph._nodes.find((node) => node.type === 'G2RPO_LoadReward')"
SOCKETS = f"{MIX}.inputs.filter((input) => input.name.startsWith('reward_')).map((input) => Number(input.name.slice(7)))"  # noqa: E501
HIDDEN = f"{MIX}.widgets.filter((widget) => widget.hidden).map((widget) => widget.name)"
LINK = f"(number) => {{ {REWARD}.connect(0, {MIX}, {MIX}.findInputSlot(`reward_${{number}}`)); }}"
UNLINK = f"(number) => {{ {MIX}.disconnectInput({MIX}.findInputSlot(`reward_${{number}}`)); }}"
WEIGHTS = f"{MIX}.widgets.filter((widget) => widget.name.startsWith('weight_')).map((widget) => widget.value)"


def prompt(ours: Ours) -> Any:
    """Return what the page would send of Mix Rewards."""
    return json.loads(
        ours.page.evaluate(f"async () => JSON.stringify((await app.graphToPrompt()).output[{MIX}.id].inputs)")
    )


def begin(ours: Ours) -> None:
    """Put both blocks on a graph that was opened."""
    ours.add("G2RPO_LoadReward", "G2RPO_MixRewards")
    ours.page.evaluate("(made) => app.loadGraphData(made)", read(ours, "app.graph.serialize()"))
    ours.page.wait_for_timeout(800)


def link(ours: Ours, *numbers: int) -> None:
    """Link the reward to sockets, one after another."""
    for number in numbers:
        ours.page.wait_for_function(f"(number) => {SOCKETS}.includes(number)", arg=number)
        ours.page.evaluate(LINK, number)
    ours.page.wait_for_timeout(300)


def reopened(ours: Ours, saved: Any) -> None:
    """Open a saved workflow."""
    ours.page.evaluate("(saved) => app.loadGraphData(saved)", saved)
    ours.page.wait_for_timeout(1200)


def test_sockets_and_weights_come_and_go_with_the_links(ours: Ours) -> None:
    begin(ours)
    assert (read(ours, SOCKETS), read(ours, HIDDEN)) == ([1, 2], [f"weight_{n}" for n in range(3, 7)])
    link(ours, 1, 2, 3)
    assert (read(ours, SOCKETS), read(ours, HIDDEN)) == ([1, 2, 3, 4], ["weight_5", "weight_6"])
    ours.shoot("grown")
    ours.page.evaluate(UNLINK, 2)
    ours.page.wait_for_timeout(300)
    assert read(ours, SOCKETS) == [1, 2, 3, 4]
    ours.page.evaluate(UNLINK, 3)
    ours.page.wait_for_timeout(300)
    assert read(ours, SOCKETS) == [1, 2]
    link(ours, 2, 3, 4, 5, 6)
    assert (read(ours, SOCKETS), read(ours, HIDDEN)) == ([1, 2, 3, 4, 5, 6], [])


def test_saved_and_opened_again_it_is_the_same(ours: Ours) -> None:
    begin(ours)
    link(ours, 1, 2, 3)
    ours.page.evaluate(f"() => {{ {MIX}.widgets.find((w) => w.name === 'weight_3').value = 0.25; }}")
    sent, saved = prompt(ours), read(ours, "app.graph.serialize()")
    assert sent["weight_3"] == 0.25 and {f"weight_{n}" for n in range(1, 7)} <= set(sent)
    reopened(ours, saved)
    assert prompt(ours) == sent and read(ours, SOCKETS) == [1, 2, 3, 4]
    again = read(ours, "app.graph.serialize()")
    kept = ("id", "size", "widgets_values")
    assert [[node[part] for part in kept] for node in again["nodes"]] == [
        [node[part] for part in kept] for node in saved["nodes"]
    ]


def test_a_workflow_with_six_sockets_keeps_its_links_and_its_height(ours: Ours) -> None:
    begin(ours)
    link(ours, 1, 2, 3, 4, 5, 6)
    ours.page.evaluate(f"() => {{ {MIX}.widgets.find((w) => w.name === 'weight_6').value = 0.5; }}")
    whole = read(ours, "app.graph.serialize()")
    sent = prompt(ours)
    # As saved by a pack without growing sockets: six of them, the middle ones free, a node made taller.
    mix = next(node for node in whole["nodes"] if node["type"] == "G2RPO_MixRewards")
    mix["size"][1] += 150
    free = {entry["link"] for entry in mix["inputs"] if entry["name"] in ("reward_3", "reward_4")}
    for entry in mix["inputs"]:
        entry["link"] = None if entry["link"] in free else entry["link"]
    whole["links"] = [one for one in whole["links"] if one[0] not in free]
    source = next(node for node in whole["nodes"] if node["type"] == "G2RPO_LoadReward")
    for entry in source["outputs"]:
        entry["links"] = [one for one in entry["links"] or [] if one not in free]
    reopened(ours, whole)
    assert read(ours, SOCKETS) == [1, 2, 3, 4, 5, 6]
    assert prompt(ours) == {
        name: value for name, value in sent.items() if name not in ("reward_3", "reward_4")
    }
    assert read(ours, f"{MIX}.size[1]") == pytest.approx(mix["size"][1], abs=2)
    ours.page.evaluate(UNLINK, 6)
    ours.page.wait_for_timeout(300)
    ours.page.evaluate(UNLINK, 5)
    ours.page.wait_for_timeout(300)
    assert (read(ours, SOCKETS), read(ours, WEIGHTS)[5]) == ([1, 2, 3], 0.5)


def test_a_copy_has_the_sockets_of_its_own_links(ours: Ours) -> None:
    begin(ours)
    link(ours, 1, 2, 3)
    ours.page.evaluate(f"() => {{ const copy = {MIX}.clone(); copy.pos = [900, 500]; app.graph.add(copy); }}")
    ours.page.wait_for_timeout(300)
    numbers = "app.graph._nodes.filter((node) => node.type === 'G2RPO_MixRewards').map((node) => node.inputs.filter((input) => input.name.startsWith('reward_')).length)"  # noqa: E501
    assert read(ours, numbers) == [4, 2]


def test_undo_and_redo_bring_the_sockets_of_then(ours: Ours) -> None:
    begin(ours)
    tracker = "app.extensionManager.workflow.activeWorkflow.changeTracker"
    take = f"() => {{ const it = {tracker}; (it.captureCanvasState ?? it.checkState).call(it); }}"
    ours.page.evaluate(take)
    linked = [[]]
    for number in (1, 2, 3):
        link(ours, number)
        ours.page.evaluate(take)
        linked.append(prompt(ours))
    for step in ("undo", "undo", "redo"):
        ours.page.evaluate(f"async () => {{ await {tracker}.{step}(); }}")
        ours.page.wait_for_timeout(1200)
    assert read(ours, SOCKETS) == [1, 2, 3] and prompt(ours) == linked[2]


def test_opening_a_workflow_changes_nothing_in_it(ours: Ours) -> None:
    begin(ours)
    link(ours, 1, 2)
    reopened(ours, read(ours, "app.graph.serialize()"))
    tracker = "app.extensionManager.workflow.activeWorkflow.changeTracker"
    then, now = read(ours, f"{tracker}.activeState"), read(ours, "app.graph.serialize()")
    assert then["nodes"] == now["nodes"]
