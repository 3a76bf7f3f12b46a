"""What browser tests share: ComfyUI's page in both renderers, events as nodes send them, and a run that is
written while the page watches. Loaded by `pytest_plugins` (PYTEST_DONT_REWRITE: tests import it too).

Screenshots stay in pytest's temporary folder (see the path that -rP prints).
"""

import itertools
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import COMFYUIS, Server, make_base, server

from comfy_g2rpo.run.folder import RunFolder, Sample

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install playwright, and a Chromium, to test the page"
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MARKS = [
    pytest.mark.browser,
    pytest.mark.comfyui,
    pytest.mark.xdist_group("served"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium, to test the page"),
]

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
FLAGS += ["--no-first-run", "--disable-dev-shm-usage"]
RENDERERS = ["classic", "nodes2"]
NODES2_SINCE = (1, 33)
TOTAL = 40
NUMBERS = itertools.count()
CHART = ".g2rpo-chart[role=slider]"
NOW = "([chart, step]) => Number(document.querySelector(chart).getAttribute('aria-valuenow')) === step"
HOSTILE = "<img src=x onerror='window.hit=1'>&lt;b&gt;"


@pytest.fixture(scope="module", params=COMFYUIS)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a ComfyUI with the pack, and with a way to send events."""
    events = Path(__file__).with_name("browser_pack.py")
    base = make_base(tmp_path_factory.mktemp("base"), "comfy-g2rpo", {"g2rpo_test_events.py": events})
    with server(request.param, base) as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Start a Chromium."""
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder of the screenshots."""
    return tmp_path_factory.mktemp("screenshots")


@dataclass
class Ours:
    """A page with ComfyUI in it."""

    page: Any
    host: Server
    shots: Path
    name: str
    errors: list[str] = field(default_factory=list)

    def open(self) -> None:
        """Load the page."""
        self.page.goto(self.host.url)
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until the page can be worked with."""
        self.page.wait_for_function(
            "Boolean(window.app?.extensionManager && window.app.canvas?.ds)", timeout=90_000
        )
        self.page.wait_for_function("'G2RPO_TrainLoRA' in LiteGraph.registered_node_types", timeout=60_000)
        self.page.wait_for_timeout(1500)

    def add(self, *nodes: str) -> None:
        """Put nodes side by side on an empty canvas."""
        self.page.evaluate(
            """(types) => { app.graph.clear(); app.canvas.ds.reset();
            types.forEach((type, i) => { const node = LiteGraph.createNode(type); node.pos = [80 + 560 * i, 130]; app.graph.add(node); });
            app.canvas.setDirty(true, true); }""",  # noqa: E501
            list(nodes),
        )
        self.page.wait_for_selector(".g2rpo", state="visible")

    def tell(self, name: str, data: dict[str, Any]) -> None:
        """Send an event to the page, as a node would."""
        assert self.host.request("POST", "/g2rpo_test/event", {"name": name, "data": data})[0] == 200

    def value(self, attribute: str = "aria-valuemax") -> float:
        """Read a number of the chart."""
        return float(self.page.locator(CHART).first.get_attribute(attribute) or "nan")

    def wait_for_step(self, step: int, attribute: str = "aria-valuemax", timeout: float = 60_000) -> None:
        """Wait until the chart reaches a step."""
        self.page.wait_for_function(
            "([chart, name, step]) => Number(document.querySelector(chart)?.getAttribute(name)) >= step",
            arg=[CHART, attribute, step],
            timeout=timeout,
        )

    def shoot(self, what: str) -> None:
        """Keep a picture of the page."""
        self.page.wait_for_timeout(400)
        path = self.shots / f"{self.name}-{what}.png"
        self.page.screenshot(path=path)
        print(path)

    def set(self, setting: str, value: object) -> None:
        """Change a setting in the open page."""
        self.page.evaluate(
            "([name, value]) => app.extensionManager.setting.set(name, value)", [setting, value]
        )


@pytest.fixture(scope="module", params=RENDERERS)
def opened(request: pytest.FixtureRequest, host: Server, chromium: Any, pictures: Path) -> Iterator[Ours]:
    """Open the page with a renderer."""
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.VueNodes.Enabled": request.param == "nodes2",
        "Comfy.ColorPalette": "dark",
    }
    host.request("POST", "/settings", settings)
    context = chromium.new_context(viewport={"width": 1280, "height": 1250})
    made = Ours(context.new_page(), host, pictures, request.param)
    made.page.set_default_timeout(60_000)
    made.page.on("pageerror", lambda error: made.errors.append(str(error)))
    made.open()
    version = str(made.page.evaluate("window.__COMFYUI_FRONTEND_VERSION__"))
    if request.param == "nodes2" and tuple(map(int, version.split(".")[:2])) < NODES2_SINCE:
        context.close()
        pytest.skip(f"frontend {version} has Nodes 2.0 only as a hidden experiment, without DOM widgets")
    yield made
    context.close()


@pytest.fixture
def ours(opened: Ours, request: pytest.FixtureRequest) -> Iterator[Ours]:
    """Give a test the page; afterwards nothing in it may have failed."""
    opened.name = re.sub(r"\W+", "-", request.node.name)
    yield opened
    opened.page.unroute_all()
    toasts = opened.page.locator(".p-toast-message").all_inner_texts()
    assert [error for error in opened.errors if "g2rpo" in error.lower() or "Invalid workflow" in error] == []
    assert [text for text in toasts if "zod" in text or "g2rpo" in text.lower()] == []


@dataclass
class Story:
    """A run that is written step by step while the page watches."""

    ours: Ours
    run: RunFolder
    rows: int = 0

    def row(self, step: int) -> dict[str, float]:
        """Make a row of two rewards, with held-out values every tenth step."""
        made: dict[str, float] = {"step": step}
        for name, scale in {"agreement": 1.0, "brightness": 0.2}.items():
            value = scale * (0.3 + 0.4 * (1 - math.exp(-step / 15)))
            if step:
                made |= {
                    f"reward/{name}/mean": value + 0.02 * scale * math.sin(7 * step),
                    f"reward/{name}/std": 0.08 * scale,
                }
            if step % 10 == 0:
                made |= {f"heldout/{name}/mean": 0.97 * value, f"heldout/{name}/ci95": 0.02 * scale}
        return made

    def until(self, last: int, phase: str = "rollout", node: str = "1") -> None:
        """Write the rows up to a step, samples every tenth, and tell the page."""
        for step in range(self.rows, last + 1):
            self.run.append(self.row(step))
            self.rows += 1
            if step % 10 == 0:
                self.run.save_samples(step, [self.sample(step, i) for i in range(6)])
        event = {
            "node": node,
            "run": self.run.path.name,
            "step": last,
            "total": TOTAL,
            "phase": phase,
            "done": 310,
            "of": 544,
        }
        self.ours.tell("g2rpo.progress", {**event, "seconds_left": 7.2 * (TOTAL - last), "row": self.rows})

    def sample(self, step: int, i: int) -> Sample:
        """Make a picture that changes with the step."""
        ramp = torch.linspace(0, 1, 32)
        red, green = (
            ramp[None].expand(32, 32) * (0.3 + 0.1 * i),
            ramp[:, None].expand(32, 32) * (step + 10) / 60,
        )
        return Sample(
            HOSTILE if i == 0 else f"picture {i}",
            i,
            {"agreement": 0.3 + 0.01 * step},
            torch.stack([red, green, 1 - green], -1),
        )


@pytest.fixture
def story(ours: Ours) -> Iterator[Story]:
    """Begin a run under the output folder."""
    place = ours.host.base / f"output/g2rpo/story-{next(NUMBERS)}"
    yield Story(ours, RunFolder.create(place, {"config": {"train": {"steps": TOTAL}}, "recipe": {}}))
    shutil.rmtree(place)
