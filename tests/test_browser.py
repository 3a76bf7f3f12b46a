"""The live curve in the real page: both renderers, events, reload, keyboard, theme, and a real training that
is run and interrupted.
"""

import json
import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install playwright, and a Chromium, to test the page"
)
from browser_fixtures import CHART, HOSTILE, MARKS, NOW, Ours, Story

from comfy_g2rpo.run.folder import RunFolder

pytest_plugins = ["browser_fixtures"]
pytestmark = MARKS

SHORT = {
    "recipe": "g2rpo",
    "steps": 3,
    "width": 64,
    "height": 64,
    "rank": 4,
    "slots": 16,
    "eval_every": 1,
    "learning_rate": 1e-3,
}
SHORT["changes"] = "num_steps = 4\ngroup_size = 4\ngranularities = 1\neval_prompts = 2\ncheckpoint_every = 1"
PROMPTS = (
    "a red circle\na blue square\na green triangle\na yellow circle\ntwo red squares\nthree blue circles"
)


def test_the_curve_moves_while_a_run_goes_and_survives_a_reload(ours: Ours, story: Story) -> None:
    ours.add("G2RPO_TrainLoRA", "G2RPO_RunMonitor")
    ours.page.locator(".g2rpo-note", has_text="when the training starts").wait_for()
    story.until(12)
    ours.wait_for_step(12)
    before = ours.page.locator("path[data-series='reward/agreement']").first.get_attribute("d")
    story.until(33)
    ours.wait_for_step(33)
    assert ours.page.locator("path[data-series='reward/agreement']").first.get_attribute("d") != before
    assert (
        "step 33 of 40 · rolling out 310 / 544 · 51 s left"
        in ours.page.locator(".g2rpo-status").first.inner_text()
    )
    ours.page.wait_for_function(
        "document.querySelectorAll('.g2rpo').length === 2 && "
        "document.querySelectorAll('.g2rpo-pair').length >= 12"
    )
    ours.page.wait_for_function(
        "[...document.querySelectorAll('.g2rpo-pair img')].slice(0, 4).every((i) => i.naturalWidth > 0)"
    )
    ours.shoot("moving")
    ours.page.wait_for_timeout(1500)
    ours.page.reload()
    ours.wait_until_ready()
    ours.wait_for_step(33)
    ours.shoot("reloaded")
    story.until(40, "done")
    ours.wait_for_step(40)
    assert "finished" in ours.page.locator(".g2rpo-status").first.inner_text()


def test_the_widget_is_neither_in_the_prompt_nor_in_the_workflow(ours: Ours, story: Story) -> None:
    ours.add("G2RPO_TrainLoRA")
    story.until(2)
    ours.wait_for_step(2)
    saved = ours.page.evaluate("app.graph.serialize().nodes[0]")
    prompt = ours.page.evaluate("app.graphToPrompt()")
    widgets = ours.page.evaluate(
        "app.graph._nodes[0].widgets.filter((w) => !['g2rpo_curve', 'g2rpo_file'].includes(w.name)).length"
    )
    assert len(saved["widgets_values"]) == widgets
    assert saved["properties"]["g2rpo_run"] == story.run.path.name
    assert not [name for name in prompt["output"]["1"]["inputs"] if "g2rpo" in name]


def test_the_curve_survives_undo_which_makes_all_nodes_anew(ours: Ours, story: Story) -> None:
    ours.add("G2RPO_TrainLoRA")
    story.until(8)
    ours.wait_for_step(8)
    ours.page.evaluate("app.loadGraphData(app.graph.serialize())")
    ours.page.wait_for_timeout(1500)
    ours.page.wait_for_selector(CHART, state="visible")
    story.until(9)
    ours.wait_for_step(9)
    assert ours.page.locator(".g2rpo").count() == 1


def test_the_keyboard_reads_the_curve_and_hides_it(ours: Ours, story: Story) -> None:
    ours.add("G2RPO_TrainLoRA")
    story.until(30)
    ours.wait_for_step(30)
    ours.page.locator(CHART).focus()
    for key, step in {"ArrowLeft": 30, "Home": 0, "ArrowRight": 1, "PageDown": 11, "End": 30}.items():
        ours.page.keyboard.press(key)
        ours.page.wait_for_function(
            "([c, s]) => document.querySelector(c).getAttribute('aria-valuenow') == s",
            arg=[CHART, step],
            timeout=5000,
        )
    ours.page.keyboard.press("PageUp")
    ours.page.wait_for_function(NOW, arg=[CHART, 20])
    assert (ours.page.locator(CHART).get_attribute("aria-valuetext") or "").startswith(
        "step 20, agreement 0."
    )
    ours.shoot("cursor")
    button = ours.page.locator("button[data-series='heldout/agreement']")
    button.focus()
    ours.page.keyboard.press("Enter")
    ours.page.wait_for_function("!document.querySelector(\"path[data-series='heldout/agreement']\")")
    assert button.get_attribute("aria-pressed") == "false"
    ours.page.keyboard.press("Space")
    ours.page.wait_for_selector("path[data-series='heldout/agreement']", state="attached")
    assert ours.page.evaluate("app.graph._nodes.length") == 1


def test_the_theme_is_followed(ours: Ours, story: Story) -> None:
    ours.add("G2RPO_TrainLoRA")
    story.until(25)
    ours.wait_for_step(25)
    luminance: Callable[[], list[float]] = lambda: ours.page.evaluate(  # noqa: E731
        """() => { const brush = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const style = getComputedStyle(document.querySelector(".g2rpo"));
        return [style.backgroundColor, style.color].map((colour) => { brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1);
          const [r, g, b] = brush.getImageData(0, 0, 1, 1).data; return (0.21 * r + 0.72 * g + 0.07 * b) / 255; }); }"""  # noqa: E501
    )
    ground, text = luminance()
    assert ground < 0.3 and text - ground > 0.5
    ours.set("Comfy.ColorPalette", "light")
    ours.page.wait_for_timeout(1000)
    ground, text = luminance()
    assert ground > 0.7 and ground - text > 0.5
    ours.shoot("light")
    ours.set("Comfy.ColorPalette", "dark")


def test_markup_in_a_prompt_stays_text(ours: Ours, story: Story) -> None:
    ours.add("G2RPO_TrainLoRA")
    story.until(10)
    ours.page.wait_for_selector(".g2rpo-pair img", state="attached")
    assert HOSTILE in (ours.page.locator(".g2rpo-pair img").first.get_attribute("alt") or "")
    assert ours.page.evaluate("window.hit") is None


def test_a_server_without_our_routes_does_no_harm(ours: Ours, story: Story) -> None:
    ours.page.route(re.compile(r"/g2rpo/"), lambda route: route.fulfill(status=404, body="nothing"))
    ours.add("G2RPO_TrainLoRA")
    story.until(3)
    ours.page.wait_for_function(
        "document.querySelector('.g2rpo-note').textContent.includes('does not answer')"
    )
    assert "step 3 of 40" in ours.page.locator(".g2rpo-status").inner_text()
    assert ours.page.evaluate("app.graphToPrompt().then(() => true)")


def test_run_monitor_shows_the_newest_run_and_then_the_chosen_one(ours: Ours, story: Story) -> None:
    story.until(5)
    RunFolder.create(story.run.path.with_name("story-0-other"), {"config": {"train": {"steps": 9}}}).append(
        story.row(7)
    )
    ours.add("G2RPO_RunMonitor")
    ours.wait_for_step(7)
    ours.page.evaluate(
        "(run) => { app.graph._nodes[0].widgets.find((w) => w.name === 'run').value = run; }",
        story.run.path.name,
    )
    ours.page.wait_for_function(
        "(run) => document.querySelector('.g2rpo-run').textContent === run", arg=story.run.path.name
    )
    ours.page.wait_for_function(
        "(c) => document.querySelector(c)?.getAttribute('aria-valuemax') === '5'", arg=CHART
    )
    shutil.rmtree(story.run.path.with_name("story-0-other"))


def test_a_template_opens_from_the_template_browser(ours: Ours) -> None:
    page = ours.page
    page.evaluate("app.graph.clear(), app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.wait_for_selector("[data-testid=template-workflows-content]")
    page.locator("input[placeholder*='earch']").last.fill("Train a LoRA on")
    page.locator("[data-testid='template-workflow-Train a LoRA on a reward - tiny demo']").click()
    page.wait_for_function("app.graph._nodes.some((node) => node.type === 'G2RPO_RunMonitor')")
    page.wait_for_selector(".g2rpo", state="attached")
    assert (
        page.evaluate("app.graph._nodes.filter((node) => node.has_errors || node.type === null).length") == 0
    )
    ours.shoot("template")


def workflow(ours: Ours) -> dict[str, Any]:
    """Make a short training with the tiny model as a workflow file."""
    return ours.page.evaluate(
        """([values, prompts]) => { app.graph.clear();
        const make = (type, x) => { const node = LiteGraph.createNode(type); node.pos = [x, 130]; app.graph.add(node); return node; };
        const demo = make("G2RPO_TinyDemoLoader", 60), reward = make("G2RPO_LoadReward", 60), train = make("G2RPO_TrainLoRA", 500);
        reward.pos = [60, 360];
        demo.connect(0, train, "model"); demo.connect(1, train, "clip"); demo.connect(2, train, "vae"); reward.connect(0, train, "reward");
        for (const [name, value] of Object.entries(values)) train.widgets.find((w) => w.name === name).value = value;
        train.widgets.find((w) => w.name === "prompts").value = prompts;
        for (const widget of train.widgets) if (widget.name === "control_after_generate") widget.value = "fixed";
        return JSON.parse(JSON.stringify(app.graph.serialize())); }""",  # noqa: E501
        [SHORT, PROMPTS],
    )


def drop(ours: Ours, file: dict[str, Any]) -> None:
    """Drop a workflow file on the canvas."""
    ours.page.evaluate("app.graph.clear()")
    transfer = ours.page.evaluate_handle(
        """(text) => { const transfer = new DataTransfer();
        transfer.items.add(new File([text], "train.json", { type: "application/json" })); return transfer; }""",  # noqa: E501
        json.dumps(file),
    )
    ours.page.dispatch_event("#graph-canvas", "drop", {"dataTransfer": transfer, "bubbles": True})
    ours.page.wait_for_function("app.graph._nodes.length === 3")


def test_a_dropped_workflow_trains_with_a_live_curve_and_can_be_interrupted(ours: Ours) -> None:
    run = "real-classic" if "classic" in ours.name else "real-nodes2"
    file = workflow(ours)
    drop(ours, file)
    train = "app.graph._nodes.find((node) => node.type === 'G2RPO_TrainLoRA')"
    ours.page.evaluate(f"(run) => {{ {train}.widgets.find((w) => w.name === 'run').value = run; }}", run)
    ours.page.evaluate("window.ended = []; for (const e of ['execution_success', 'execution_error', "
                                                                                                      "'execution_interrupted']) "  # noqa: E501
                                                                                                      "app.api.addEventListener(e, "  # noqa: E501
                                                                                                      "({ "
                                                                                                      "detail "  # noqa: E501
                                                                                                      "}) => "
                                                                                                      "ended.push([e, "  # noqa: E501
                                                                                                      "detail?.exception_message]))")  # fmt: skip  # noqa: E501
    ours.page.locator("[data-testid=queue-button]").first.click()
    ours.wait_for_step(1, timeout=120_000)
    ours.page.wait_for_function("ended.length > 0", timeout=180_000)
    assert ours.page.evaluate("ended") == [["execution_success", None]]
    ours.wait_for_step(3)
    assert "step 3 of 3 · finished" in ours.page.locator(".g2rpo-status").inner_text()
    ours.shoot("trained")
    ours.page.evaluate(
        f"() => {{ {train}.widgets.find((w) => w.name === 'steps').value = 1000; ended.length = 0; }}"
    )
    ours.page.locator("[data-testid=queue-button]").first.click()
    ours.wait_for_step(4, timeout=120_000)
    ours.page.evaluate("app.extensionManager.command.execute('Comfy.Interrupt')")
    ours.page.wait_for_function("ended.length > 0", timeout=60_000)
    assert ours.page.evaluate("ended[0][0]") == "execution_interrupted"
    ours.page.wait_for_function("document.querySelector('.g2rpo-status').textContent.includes('stopped')")
    ours.shoot("stopped")
    folder = RunFolder.open(ours.host.base / "output/g2rpo" / run)
    assert folder.metrics()[-1]["step"] >= 4


def test_another_page_hears_nothing_of_a_run_and_its_monitor_follows_it(ours: Ours) -> None:
    """Both pages hold nodes of the same ids; the run's name is wired to a Run Monitor in the first."""
    run = "heard-classic" if "classic" in ours.name else "heard-nodes2"
    listen = """() => { window.heard = []; window.ended = [];
        for (const name of ['progress_text', 'g2rpo.text', 'g2rpo.progress', 'executed', 'progress'])
          app.api.addEventListener(name, () => heard.push(name));
        for (const name of ['execution_success', 'execution_error'])
          app.api.addEventListener(name, ({ detail }) => ended.push([name, detail?.exception_message])); }"""
    wire = """(run) => { const train = app.graph._nodes.find((node) => node.type === 'G2RPO_TrainLoRA');
        train.widgets.find((widget) => widget.name === 'run').value = run;
        const monitor = LiteGraph.createNode('G2RPO_RunMonitor'); monitor.pos = [1100, 130];
        app.graph.add(monitor); return Boolean(train.connect(4, monitor, 'run_name')); }"""
    drop(ours, workflow(ours))
    context = ours.page.context.browser.new_context()
    other = Ours(context.new_page(), ours.host, ours.shots, ours.name)
    other.page.set_default_timeout(60_000)
    other.open()
    other.add("G2RPO_TrainLoRA", "G2RPO_RunMonitor")
    # What an earlier test has queued ends first.
    ours.page.wait_for_function("""async () => { const { Running, Pending } = await app.api.getQueue();
        return !Running.length && !Pending.length; }""")
    for page in (ours.page, other.page):
        page.evaluate(listen)
    assert ours.page.evaluate(wire, run)
    ours.page.locator("[data-testid=queue-button]").first.click()
    ours.page.wait_for_function("ended.length > 0", timeout=180_000)
    assert ours.page.evaluate("ended") == [["execution_success", None]]
    assert {"g2rpo.text", "g2rpo.progress", "executed"} <= set(ours.page.evaluate("heard"))
    # It asks the server now and then which run is the newest.
    other.page.wait_for_function(f"document.body.innerText.includes({run!r})", timeout=60_000)
    other.page.wait_for_function("document.body.innerText.includes('step 3 of 3')", timeout=60_000)
    assert other.page.evaluate("heard") == []
    ours.shoot("wired")
    other.shoot("followed")
    context.close()
