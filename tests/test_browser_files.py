"""Where the LoRA lies, in the real page: named on Train LoRA and Save LoRA, copied by a button, found again.

Screenshots stay in pytest's temporary folder (see the path that -rP prints).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_host import COMFYUIS, Server, make_base, server

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install playwright, and a Chromium, to test the page"
)
workflow_page = pytest.importorskip("workflow_page")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("served"),
    pytest.mark.skipif(
        not Path(workflow_page.CHROMIUM).exists(),
        reason="no Chromium: apt-get install chromium, to test the page",
    ),
]

NODES2_SINCE = (1, 33)
VALUES = {"recipe": "g2rpo", "steps": 1, "width": 64, "height": 64, "rank": 4, "slots": 16, "eval_every": 0}
VALUES["changes"] = "num_steps = 2\ngroup_size = 2\ngranularities = 1\neval_prompts = 1"
VALUES["prompts"] = "a red circle\na blue square\na green triangle\na yellow circle\ntwo red squares"
MAKE = """(values) => { app.graph.clear(); app.canvas.ds.reset();
    const make = (type, x, y) => { const node = LiteGraph.createNode(type); node.pos = [x, y]; app.graph.add(node); return node; };
    const demo = make("G2RPO_TinyDemoLoader", 40, 130), reward = make("G2RPO_LoadReward", 40, 360);
    const train = make("G2RPO_TrainLoRA", 400, 130), save = make("G2RPO_SaveLoRA", 960, 130);
    demo.connect(0, train, "model"); demo.connect(1, train, "clip"); demo.connect(2, train, "vae");
    reward.connect(0, train, "reward"); train.connect(1, save, "lora"); train.connect(4, save, "run");
    for (const [name, value] of Object.entries(values)) train.widgets.find((w) => w.name === name).value = value;
    for (const widget of train.widgets) if (widget.name === "control_after_generate") widget.value = "fixed";
    window.ended = [];
    for (const e of ["execution_success", "execution_error"]) app.api.addEventListener(e, ({ detail }) => ended.push([e, detail?.exception_message]));
}"""  # noqa: E501
FIELDS = "[...document.querySelectorAll('.g2rpo-file input')].map((input) => input.value).sort()"


@pytest.fixture(scope="module", params=COMFYUIS)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a ComfyUI with the pack."""
    with server(request.param, make_base(tmp_path_factory.mktemp("base"), "comfy-g2rpo")) as running:
        yield running


@pytest.fixture(scope="module", params=["classic", "nodes2"])
def opened(
    request: pytest.FixtureRequest, host: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Path, str]]:
    """Open the page, and train and save once in it."""
    with workflow_page.opened(host, request.param == "nodes2") as page:
        version = str(page.evaluate("window.__COMFYUI_FRONTEND_VERSION__"))
        if request.param == "nodes2" and tuple(map(int, version.split(".")[:2])) < NODES2_SINCE:
            pytest.skip(f"frontend {version} has Nodes 2.0 only as a hidden experiment, without DOM widgets")
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.set_viewport_size({"width": 1600, "height": 1700})  # both nodes to their last line
        run = f"file-{request.param}"
        page.evaluate(MAKE, {**VALUES, "run": run})
        page.evaluate(
            "name => app.graph._nodes.find((n) => n.type === 'G2RPO_SaveLoRA').widgets[0].value = name",
            f"my-{request.param}",
        )
        page.wait_for_timeout(500)
        yield page, tmp_path_factory.mktemp("screenshots"), request.param


def shoot(opened: tuple[Any, Path, str], what: str) -> None:
    """Keep a picture of the page."""
    page, shots, renderer = opened
    page.wait_for_timeout(400)
    path = shots / f"{renderer}-{what}.png"
    page.screenshot(path=path)
    print(path)


def test_before_a_run_nothing_can_be_copied(opened: tuple[Any, Path, str]) -> None:
    page = opened[0]
    assert page.evaluate(FIELDS) == ["", ""]
    assert page.locator(".g2rpo-file button:disabled").count() == 2
    shoot(opened, "before")


def test_after_a_run_both_name_their_file_and_copy_its_path(
    opened: tuple[Any, Path, str], host: Server
) -> None:
    page, _, renderer = opened
    page.locator("[data-testid=queue-button]").first.click()
    page.wait_for_function("ended.length > 0", timeout=180_000)
    assert page.evaluate("ended") == [["execution_success", None]]
    names = [f"g2rpo/file-{renderer}.safetensors", f"g2rpo/my-{renderer}.safetensors"]
    page.wait_for_function(f"names => JSON.stringify({FIELDS}) === JSON.stringify(names)", arg=names)
    shoot(opened, "after")
    for line in page.locator(".g2rpo-file").all():
        name = line.locator("input").input_value()
        line.locator("button").click()
        page.wait_for_function(
            "button => button.textContent === 'Copied'", arg=line.locator("button").element_handle()
        )
        path = page.evaluate("navigator.clipboard.readText()")
        assert Path(path) == host.base / "models/loras" / name and Path(path).is_file()
    shoot(opened, "copied")
    page.wait_for_function(f"names => JSON.stringify({FIELDS}) === JSON.stringify(names)", arg=names)


def test_without_a_clipboard_the_path_is_selected_and_copied_as_of_old(
    opened: tuple[Any, Path, str], host: Server
) -> None:
    page = opened[0]
    page.evaluate("navigator.clipboard.writeText('before')")
    page.evaluate(
        "window.kept = navigator.clipboard; Object.defineProperty(navigator, 'clipboard', "
        "{ value: undefined, configurable: true })"
    )
    line = page.locator(".g2rpo-file").first
    name = line.locator("input").input_value()
    line.locator("button").click()
    page.wait_for_function("document.querySelector('.g2rpo-file button').textContent === 'Copied'")
    assert Path(page.evaluate("kept.readText()")) == host.base / "models/loras" / name
    # A browser that refuses this, too, leaves the path selected.
    page.evaluate("document.execCommand = () => false")
    line.locator("button").click()
    page.wait_for_function("document.querySelector('.g2rpo-file button').textContent === 'Press Ctrl+C'")
    selected = "i => i === document.activeElement && i.value.slice(i.selectionStart, i.selectionEnd)"
    chosen = line.locator("input").evaluate(selected)
    assert chosen == str(host.base / "models/loras" / name)


def test_an_opened_workflow_finds_the_files_that_are_there(
    opened: tuple[Any, Path, str], host: Server
) -> None:
    page, _, renderer = opened
    saved = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")
    for node in saved["nodes"]:
        widgets = node.get("widgets_values", [])
        assert not any("safetensors" in str(value) for value in widgets)
    (host.base / f"models/loras/g2rpo/my-{renderer}.safetensors").unlink()
    page.evaluate("async (saved) => { await app.loadGraphData(saved); }", saved)
    page.wait_for_function(
        f"name => JSON.stringify({FIELDS}) === JSON.stringify(['', name])",
        arg=f"g2rpo/file-{renderer}.safetensors",
    )
    assert page.locator(".g2rpo-file button:disabled").count() == 1
    shoot(opened, "opened-again")
