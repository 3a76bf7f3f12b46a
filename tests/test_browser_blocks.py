"""How the blocks behave and look in the real page: texts of a fixed height, the curve on top, names over
boxes, colours, the panel at the right, enlarged samples, and votes by keys.
"""

import json
from typing import Any

import pytest

pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install playwright, and a Chromium, to test the page"
)
from browser_fixtures import HOSTILE, MARKS, Ours, Story
from PIL import Image

pytest_plugins = ["browser_fixtures"]
pytestmark = MARKS

TEXT = ".g2rpo-text"
TABLES = {
    "a Markdown table": "| score | name |\n|---|---|\n" + "| **0.9** | *best* |\n" * 30,
    "headings and lists": "# 1. a_red_circle\n- one\n- [two](https://example.org)\n" * 12,
    "markup": HOSTILE + "\n`code` ~~struck~~ &amp; <b>bold</b>\n" * 20,
    "one line without spaces": "0123456789" * 200,
}
SIZES = "app.graph._nodes.map((node) => Array.from(node.size).map(Math.round))"
BOXES = """() => [...document.querySelectorAll('.g2rpo, .comfy-multiline-input, .lg-node textarea')]
    .filter((each) => each.closest('.dom-widget, .lg-node')).map((each) => each.getBoundingClientRect())
    .map((box) => [Math.round(box.width), Math.round(box.height)])"""
DRAWN = """async () => { const drawn = new Set(), plain = CanvasRenderingContext2D.prototype.fillText;
    CanvasRenderingContext2D.prototype.fillText = function fillText(text, ...given) { drawn.add(text); return plain.call(this, text, ...given); };
    app.canvas.setDirty(true, true);
    await new Promise((done) => setTimeout(done, 500));
    CanvasRenderingContext2D.prototype.fillText = plain;
    return [...drawn]; }"""  # noqa: E501
PANEL = "Comfy.RightSidePanel.IsOpen"
KEYS = [f"{i:016x}" for i in range(8)]


def nodes2(ours: Ours) -> bool:
    """Tell which renderer draws."""
    return bool(ours.page.evaluate("Boolean(LiteGraph.vueNodesMode)"))


def read(ours: Ours, script: str, arg: object = None) -> Any:
    """Read something as JSON: the newer renderer's own objects do not travel."""
    return json.loads(ours.page.evaluate(f"(arg) => JSON.stringify({script})", arg))


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
def test_a_text_scrolls_in_its_place_and_stays_what_it_is(ours: Ours, text: str) -> None:
    blocks = ["ScoreImages", "LoadReward", "Advantages"]
    ours.add(*(f"G2RPO_{name}" for name in blocks))
    ours.page.wait_for_timeout(600)
    before = ours.page.evaluate(SIZES)
    ours.tell("g2rpo.text", {"node": "1", "text": text})
    for node in ("2", "3"):
        told = {"node": node, "display_node": node, "prompt_id": "test", "output": {"text": [text]}}
        ours.tell("executed", told)
    places = ours.page.locator(TEXT)
    ours.page.wait_for_function(
        "(text) => [...document.querySelectorAll('.g2rpo-text')].every((each) => each.textContent === text)",
        arg=text,
    )
    ours.page.wait_for_timeout(600)
    assert ours.page.evaluate(SIZES) == before
    assert ours.page.evaluate("[...document.querySelectorAll('.g2rpo-text *')].length") == 0
    assert ours.page.evaluate("window.hit") is None
    for i in range(3):
        high, seen = places.nth(i).evaluate("(place) => [place.scrollHeight, place.clientHeight]")
        assert high > seen > 40
    ours.shoot("texts")


def test_the_wheel_scrolls_a_text_and_leaves_the_canvas(ours: Ours) -> None:
    ours.add("G2RPO_ScoreImages")
    ours.tell("g2rpo.text", {"node": "1", "text": "a line\n" * 60})
    place = ours.page.locator(TEXT)
    ours.page.wait_for_function("document.querySelector('.g2rpo-text').textContent.length > 100")
    place.click()
    ours.page.wait_for_timeout(500)
    ours.page.mouse.wheel(0, 120)
    ours.page.wait_for_function("document.querySelector('.g2rpo-text').scrollTop > 0")
    assert ours.page.evaluate("app.canvas.ds.scale") == 1
    assert (
        ours.page.evaluate("app.graph._nodes[0].widgets.filter((w) => w.name.startsWith('$$')).length") == 0
    )


def test_nothing_of_a_text_is_saved_and_undo_says_it_again(ours: Ours) -> None:
    ours.add("G2RPO_ScoreImages", "G2RPO_MixRewards")
    # Opened once, so that the workflow has a name of its own, as every one that a person opens.
    ours.page.evaluate("(made) => app.loadGraphData(made)", read(ours, "app.graph.serialize()"))
    ours.page.wait_for_timeout(800)
    ours.tell("g2rpo.text", {"node": "1", "text": "image_3 is best"})
    ours.page.locator(TEXT, has_text="image_3").wait_for()
    saved = read(ours, "app.graph.serialize()")
    assert "image_3" not in json.dumps(saved)
    ours.page.evaluate("(saved) => app.loadGraphData(saved)", saved)
    ours.page.locator(TEXT, has_text="image_3").wait_for()
    ours.page.wait_for_timeout(1200)
    again = read(ours, "app.graph.serialize()")
    kept = ("size", "pos", "widgets_values", "color", "bgcolor")
    assert [[node.get(part) for part in kept] for node in again["nodes"]] == [
        [node.get(part) for part in kept] for node in saved["nodes"]
    ]
    assert ours.page.locator(TEXT).count() == 2


def test_the_curve_stands_on_top_and_takes_no_room_later(ours: Ours, story: Story) -> None:
    ours.add("G2RPO_TrainLoRA", "G2RPO_RunMonitor")
    ours.page.wait_for_timeout(600)
    before = ours.page.evaluate(SIZES)
    story.until(25)
    ours.tell("g2rpo.text", {"node": "1", "text": "312 forwards and 40 images a step, 9 min in all. " * 6})
    ours.wait_for_step(25)
    ours.page.locator(".g2rpo-strip img").first.wait_for()
    ours.page.wait_for_timeout(600)
    assert ours.page.evaluate(SIZES) == before
    assert "312 forwards" in ours.page.locator(".g2rpo-saying").first.inner_text()
    assert ours.page.evaluate("app.graph._nodes[0].widgets[0].name") == "g2rpo_curve"
    curve = ours.page.locator(".g2rpo").first.bounding_box()
    box = ours.page.locator(".comfy-multiline-input, .lg-node textarea").first.bounding_box()
    assert curve and box and curve["y"] + curve["height"] <= box["y"]
    legend = ours.page.locator("button[data-series='reward/agreement']").first.inner_text()
    assert "Δ" in legend and "+" in legend
    ours.shoot("top")


def test_what_training_result_says_is_taken_back_once_the_run_goes_on(ours: Ours, story: Story) -> None:
    ours.add("G2RPO_TrainingResult")
    run, words = story.run.path.name, "it waits for a worker"
    ours.page.evaluate("(run) => { app.graph._nodes[0].widgets[0].value = run; }", run)
    output = {"text": [words], "g2rpo_run": [run]}
    ours.tell("executed", {"node": "1", "display_node": "1", "output": output, "prompt_id": "0"})
    place = ours.page.locator(TEXT)
    place.filter(has_text=words).wait_for()
    ours.page.wait_for_timeout(7000)  # the page looks at the run
    assert place.inner_text() == words
    story.until(3)
    place.filter(has_text="Press Run to see how it stands").wait_for()
    ours.shoot("gone-on")


def test_values_keep_their_order_under_the_curve(ours: Ours) -> None:
    """A workflow of before the curve stood on top, opened, saved, copied and opened again."""
    ours.add("G2RPO_TrainLoRA")
    values = [
        "flow_grpo",
        7,
        "a cat",
        "a dog",
        "blurry",
        2.5,
        320,
        256,
        3e-4,
        8,
        4,
        "feed_forward",
        2,
        4,
        5,
        99,
    ]
    values += ["a-run", "eta = 0.5"]
    node = read(ours, "app.graph.serialize()")["nodes"][0]
    file = {"last_node_id": 1, "last_link_id": 0, "links": [], "groups": [], "version": 0.4}
    file["nodes"] = [{**node, "widgets_values": values, "inputs": [], "outputs": []}]
    for part in ("widgets_values_named",):
        file["nodes"][0].pop(part, None)
    named = "Object.fromEntries(app.graph._nodes[0].widgets.map((each) => [each.name, each.value]))"
    ours.page.evaluate("(file) => app.loadGraphData(file)", file)
    ours.page.wait_for_timeout(800)
    first = read(ours, named)
    names = ["recipe", "steps", "prompts", "heldout_prompts", "negative", "guidance", "width", "height"]
    names += [
        "learning_rate",
        "rank",
        "alpha",
        "targets",
        "prompts_per_step",
        "slots",
        "eval_every",
        "seed",
        "run",
    ]
    assert [first[name] for name in [*names, "changes"]] == values
    saved = read(ours, "app.graph.serialize()")
    assert saved["nodes"][0]["widgets_values"][: len(values)] == values
    assert None not in saved["nodes"][0]["widgets_values"]
    ours.page.evaluate("(saved) => app.loadGraphData(saved)", saved)
    ours.page.wait_for_timeout(800)
    assert read(ours, named) == first
    copied = (
        "(() => { const copy = app.graph._nodes[0].clone(); app.graph.add(copy); "
        "return copy.serialize().widgets_values; })()"
    )
    assert read(ours, copied) == saved["nodes"][0]["widgets_values"]
    sent = ours.page.evaluate(
        "app.graphToPrompt().then((made) => made.output[app.graph._nodes[0].id].inputs)"
    )
    assert [sent[name] for name in names] == values[:-1]


def test_every_box_of_several_lines_has_its_name(ours: Ours) -> None:
    ours.add("G2RPO_TrainLoRA", "G2RPO_CompareLoRA")
    # Rarely touched inputs are folded away on newer cores.
    ours.page.evaluate("() => { for (const node of app.graph._nodes) node.showAdvanced = true; }")
    ours.page.evaluate(
        "() => { for (const node of app.graph._nodes) for (const each of node.widgets) "
        "if (each.type === 'customtext') each.value = 'filled'; }"
    )
    boxes = read(
        ours,
        "app.graph._nodes.flatMap((node) => node.widgets.filter((each) => node.isWidgetVisible(each)))"
        ".filter((each) => each.type === 'customtext')"
        ".map((each) => each.label || each.name)",
    )
    assert len(boxes) >= 6
    if nodes2(ours):
        shown = ours.page.locator(".lg-node label").all_inner_texts()
    else:
        shown = ours.page.evaluate(DRAWN)
    assert set(boxes) <= set(shown)
    ours.shoot("names")


@pytest.mark.parametrize(
    "block",
    ["G2RPO_TrainLoRA", "G2RPO_RunMonitor", "G2RPO_VoteRollout", "G2RPO_ScoreImages", "G2RPO_CompareLoRA"],
)
def test_the_panel_at_the_right_leaves_a_block_as_it_is(ours: Ours, block: str) -> None:
    if not ours.page.evaluate("(name) => Boolean(app.ui.settings.settingsLookup[name])", PANEL):
        pytest.skip("this frontend has no panel at the right")
    ours.add(block)
    ours.page.wait_for_timeout(800)
    before = ours.page.evaluate(BOXES)
    ours.set(PANEL, True)
    ours.page.evaluate("app.canvas.selectNodes([app.graph._nodes[0]])")
    ours.page.wait_for_timeout(1200)
    try:
        assert len(before) >= 1 and ours.page.evaluate(BOXES) == before
        ours.shoot("panel")
    finally:
        ours.set(PANEL, False)
    ours.page.wait_for_timeout(600)
    assert ours.page.evaluate(BOXES) == before


COLOURED = {
    "G2RPO_ScoreImages": ("#323", "#535"),
    "G2RPO_Rollout": ("#223", "#335"),
    "G2RPO_TrainLoRA": ("#232", "#353"),
    "G2RPO_RunMonitor": ("#233", "#355"),
}


def test_fresh_blocks_are_coloured_by_role_and_saved_ones_as_they_were(ours: Ours) -> None:
    ours.add(*COLOURED)
    colours = "app.graph._nodes.map((node) => [node.color ?? null, node.bgcolor ?? null])"
    assert [tuple(each) for each in read(ours, colours)] == list(COLOURED.values())
    saved = read(ours, "app.graph.serialize()")
    for part in ("color", "bgcolor"):
        saved["nodes"][0].pop(part)
        saved["nodes"][1][part] = "#432"
    ours.page.evaluate("(saved) => app.loadGraphData(saved)", saved)
    ours.page.wait_for_timeout(800)
    kept = [tuple(each) for each in read(ours, colours)]
    assert kept == [(None, None), ("#432", "#432"), *list(COLOURED.values())[2:]]


@pytest.mark.parametrize("palette", ["light", "dark"])
def test_our_wires_have_colours_in_every_theme(ours: Ours, palette: str) -> None:
    ours.set("Comfy.ColorPalette", palette)
    ours.page.wait_for_timeout(2500)
    found = ours.page.evaluate(
        """(types) => types.map((type) =>
            [app.canvas.default_connection_color_byType[type], LGraphCanvas.link_type_colors[type],
             getComputedStyle(document.documentElement).getPropertyValue(`--color-datatype-${type}`).trim()])""",
        [f"G2RPO_{name}" for name in ("ROLLOUT", "REWARD", "SCORES", "ADVANTAGES", "POLICY")],
    )
    ours.set("Comfy.ColorPalette", "dark")
    assert all(len(set(each)) == 1 and each[0].startswith("#") for each in found)
    assert len({each[0] for each in found}) == 5


def test_samples_enlarge_with_their_prompt_by_click_and_by_key(ours: Ours, story: Story) -> None:
    page = ours.page
    ours.add("G2RPO_TrainLoRA")
    story.until(20)
    page.locator(".g2rpo-strip button").nth(5).wait_for(state="attached")
    page.locator(".g2rpo-strip button").first.click()
    dialog = page.locator("dialog.g2rpo-enlarged[open]")
    dialog.wait_for()
    assert dialog.locator(".g2rpo-prompt").inner_text() == HOSTILE and page.evaluate("window.hit") is None
    assert dialog.locator("figcaption").all_inner_texts() == [
        "Step 0 · agreement 0.3",
        "Step 20 · agreement 0.5",
    ]
    page.wait_for_function(
        "[...document.querySelectorAll('.g2rpo-large img')].every((image) => image.naturalWidth > 0)"
    )
    assert page.locator(".g2rpo-large img").first.bounding_box()["width"] > 400
    ours.shoot("large")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "Delete"):
        page.keyboard.press(key)
    assert dialog.locator(".g2rpo-where").inner_text() == "2 of 6"
    # While it is open new pictures may come; the focus goes back to the same prompt's.
    story.until(30)
    ours.wait_for_step(30)
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    at = "[...document.querySelectorAll('.g2rpo-strip button')].indexOf(document.activeElement)"
    assert page.evaluate(at) == 1
    page.keyboard.press("Enter")
    dialog.wait_for()
    page.mouse.click(4, 700)
    dialog.wait_for(state="detached")
    page.locator(".g2rpo-strip button").first.click()
    page.locator(".g2rpo-large img").first.click()
    dialog.wait_for(state="detached")
    assert page.evaluate("app.graph._nodes.length") == 1


def test_run_monitor_follows_the_training_that_is_wired_to_it(ours: Ours, story: Story) -> None:
    ours.add("G2RPO_TrainLoRA", "G2RPO_RunMonitor", "G2RPO_RunMonitor")
    ours.page.evaluate("app.graph._nodes[0].connect(4, app.graph._nodes[1], 'run_name')")
    story.until(4)
    ours.page.wait_for_function(
        "(run) => [...document.querySelectorAll('.g2rpo-run')].slice(0, 2)"
        ".every((each) => each.textContent === run)",
        arg=story.run.path.name,
    )


def test_numbers_that_a_preset_replaces_are_greyed(ours: Ours) -> None:
    ours.add("G2RPO_TrainLoRA")
    grey = "app.graph._nodes[0].widgets.filter((each) => each.disabled).map((each) => each.name)"
    choose = (
        "(preset) => { app.graph._nodes[0].widgets.find((each) => each.name === 'preset').value = preset; }"
    )
    assert read(ours, grey) == []
    ours.page.evaluate(choose, "standard")
    ours.page.wait_for_timeout(1500)
    found = read(ours, grey)
    assert found[:2] == ["steps", "learning_rate"] and "prompts" not in found
    ours.shoot("preset")
    ours.page.evaluate(choose, "as typed")
    ours.page.wait_for_timeout(1500)
    assert read(ours, grey) == []


def ballot(ours: Ours) -> list[str]:
    """Give Vote a group of pictures, and wait until they are shown."""
    folder = ours.host.base / "temp"
    pictures = []
    for i, key in enumerate(KEYS):
        name = f"{key}.png"
        Image.new("RGB", (32, 32), (30 * i, 90, 160)).save(folder / name)
        pictures.append({"key": key, "filename": name, "subfolder": "", "type": "temp"})
    group = {"pictures": pictures, "prompt": "a red circle"}
    ours.tell(
        "executed",
        {"node": "1", "display_node": "1", "prompt_id": "test", "output": {"g2rpo_ballot": [group]}},
    )
    ours.page.wait_for_selector(".g2rpo-choice")
    return KEYS


def test_every_key_of_vote_is_told_and_works_and_its_action_is_brightest(ours: Ours) -> None:
    page = ours.page
    ours.add("G2RPO_VoteRollout")
    ours.page.wait_for_timeout(600)
    before = ours.page.evaluate(SIZES)
    keys = ballot(ours)
    votes = "JSON.parse(app.graph._nodes[0].widgets.find((each) => each.name === 'votes').value || 'null')"
    told = page.locator(".g2rpo-hint").inner_text()
    assert all(word in told for word in ("1–9", "0", "arrows", "Enter", "space", "Backspace"))
    page.locator(".g2rpo-choice").nth(3).click()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    page.keyboard.press("8")
    page.keyboard.press("1")
    page.keyboard.press("Backspace")
    assert read(ours, votes)["ranking"] == [keys[i] for i in (3, 4, 2, 7)]
    light = """(button) => { const brush = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        brush.fillStyle = "#000"; brush.fillRect(0, 0, 1, 1); brush.fillStyle = getComputedStyle(button).backgroundColor; brush.fillRect(0, 0, 1, 1);
        return Math.max(...brush.getImageData(0, 0, 1, 1).data.slice(0, 3)); }"""  # noqa: E501
    buttons = page.locator(".g2rpo-tools button").all()
    done = [button.evaluate(light) for button in buttons]
    assert buttons[-1].inner_text() == "Vote and go on" and done[-1] > 2 * max(done[:-1])
    assert ours.page.evaluate(SIZES) == before
    ours.shoot("keys")


JUDGED = """(batch) => { app.graph.clear();
    const make = (type, x) => { const node = LiteGraph.createNode(type); node.pos = [x, 130]; app.graph.add(node); return node; };
    const image = make("EmptyImage", 60), reward = make("G2RPO_LoadReward", 60), score = make("G2RPO_ScoreImages", 420);
    reward.pos = [60, 420];
    image.widgets.find((each) => each.name === "batch_size").value = 40;
    for (const name of ["width", "height"]) image.widgets.find((each) => each.name === name).value = 64;
    score.widgets.find((each) => each.name === "prompt").value = "a *red* | circle_ # 1";
    reward.widgets.find((each) => each.name === "batch").value = batch;
    image.connect(0, score, "images"); reward.connect(0, score, "reward");
    return JSON.parse(JSON.stringify(app.graph.serialize())); }"""  # noqa: E501


def test_a_real_run_tells_its_own_page_alone(ours: Ours) -> None:
    # Another number per renderer, for what a server has at hand it neither computes nor tells again.
    file = ours.page.evaluate(JUDGED, 11 + nodes2(ours))
    ours.page.evaluate("(file) => app.loadGraphData(file)", file)
    ours.page.wait_for_timeout(1000)
    stranger = ours.page.context.new_page()
    stranger.goto(ours.host.url)
    stranger.wait_for_function("'G2RPO_TrainLoRA' in (window.LiteGraph?.registered_node_types ?? {})")
    stranger.wait_for_timeout(2000)
    stranger.evaluate("(file) => app.loadGraphData(file)", file)
    stranger.locator(TEXT).nth(1).wait_for()
    before = ours.page.evaluate(SIZES)
    ours.page.evaluate(
        "window.ended = 0; app.api.addEventListener('execution_success', () => { ended += 1; })"
    )
    ours.page.locator("[data-testid=queue-button]").first.click()
    ours.page.wait_for_function("window.ended > 0", timeout=120_000)
    ours.page.locator(TEXT, has_text="image 0").wait_for()
    ours.page.wait_for_timeout(800)
    assert ours.page.evaluate(SIZES) == before
    assert ours.page.locator(f"{TEXT}[data-empty]").count() == 0
    assert stranger.locator(f"{TEXT}[data-empty]").count() == 2
    names = "app.graph._nodes.flatMap((node) => (node.widgets ?? []).map((each) => each.name))"
    assert not [name for name in read(ours, names) if name.startswith("$$node-text")]
    ours.shoot("judged")
    stranger.close()
