"""Voting in the real page, in both renderers: click, type, take back, go on; and on the page that `g2rpo
vote` writes, offline.

Screenshots stay in pytest's temporary folder (see the path that -rP prints).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import COMFYUIS, ROOT, Server, make_base, server
from program import call

from comfy_g2rpo.run.folder import RunFolder
from comfy_g2rpo.votes import ballots
from comfy_g2rpo.votes.strengths import Votes, from_table

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

WORKFLOW = ROOT / "workflows/Train on my votes - tiny demo.json"
NODES2_SINCE = (1, 33)
CHOICE = ".g2rpo-choice"
VOTE = "app.graph.nodes.find((node) => node.type === 'G2RPO_VoteRollout')"
SHOWN = "[...document.querySelectorAll('.g2rpo-choice')].map((choice) => choice.dataset.key)"
OTHER = (
    f"([count, but]) => {{ const keys = {SHOWN}; return keys.length === count && !keys.some((key) => "
    f"but.includes(key)); }}"
)
PREPARE = f"""(run) => {{
    // A folded part of the graph shows the run's name by its label.
    for (const node of app.graph.nodes) for (const widget of node.widgets ?? []) if ([widget.name, widget.label].includes("run")) widget.value = run;
    const [x, y] = {VOTE}.pos, view = app.canvas.ds;
    view.scale = 1;
    view.offset = [120 - x, 160 - y];
    app.canvas.setDirty(true, true);
}}"""  # noqa: E501
HOSTILE = "</script><img src=x onerror='window.hit=1'><b>"


@pytest.fixture(scope="module", params=COMFYUIS)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a ComfyUI with the pack."""
    with server(request.param, make_base(tmp_path_factory.mktemp("base"), "comfy-g2rpo")) as running:
        yield running


@dataclass
class Page:
    """ComfyUI's page with the workflow in it, the run that it trains, and what failed."""

    page: Any
    run: Path
    shots: Path
    errors: list[str] = field(default_factory=list)

    def press_run(self) -> None:
        """Queue the graph as a user does."""
        self.page.locator("[data-testid=queue-button]").first.click()

    def group(self, count: int = 12, but: list[str] | None = None) -> list[str]:
        """Wait for a group, and for another than `but`; return its keys."""
        self.page.wait_for_function(OTHER, arg=[count, but or []], timeout=180_000)
        self.page.wait_for_function(
            "[...document.querySelectorAll('.g2rpo-choice img')].every((image) => image.naturalWidth > 0)"
        )
        return list(self.page.evaluate(SHOWN))

    def votes(self) -> dict[str, Any] | None:
        """Read the widget."""
        text = self.page.evaluate(f"{VOTE}.widgets.find((widget) => widget.name === 'votes').value")
        return json.loads(text) if text else None

    def click(self, *places: int) -> None:
        """Click pictures."""
        for place in places:
            self.page.locator(CHOICE).nth(place).click()

    def tool(self, label: str) -> Any:
        """Find a button under the pictures."""
        return self.page.locator(".g2rpo-tools button", has_text=label)

    def wait_for_step(self, step: int) -> None:
        """Wait until an update is kept."""
        for _ in range(900):
            if self.run.joinpath("checkpoints", f"{step:06d}").is_dir():
                return
            self.page.wait_for_timeout(200)
        raise TimeoutError(f"no update {step}")

    def shoot(self, what: str) -> None:
        """Keep a picture of the page."""
        self.page.wait_for_timeout(400)
        self.page.screenshot(path=self.shots / f"{what}.png")
        print(self.shots / f"{what}.png")


@contextmanager
def opened(host: Server, renderer: str, shots: Path) -> Iterator[Page]:
    """Open the page with the workflow and a run of its own."""
    with workflow_page.opened(host, renderer == "nodes2") as page:
        version = str(page.evaluate("window.__COMFYUI_FRONTEND_VERSION__"))
        if renderer == "nodes2" and tuple(map(int, version.split(".")[:2])) < NODES2_SINCE:
            pytest.skip(f"frontend {version} has Nodes 2.0 only as a hidden experiment, without DOM widgets")
        ours = Page(page, host.base / f"output/g2rpo/voted-{renderer}", shots)
        page.on("pageerror", lambda error: ours.errors.append(str(error)))
        workflow_page.load(page, WORKFLOW)
        page.evaluate(PREPARE, ours.run.name)
        page.wait_for_selector(".g2rpo-ballot", state="visible")
        yield ours


@pytest.mark.comfyui
@pytest.mark.parametrize("renderer", ["classic", "nodes2"])
def test_a_group_is_clicked_through_and_the_model_learns_from_it(
    host: Server, renderer: str, tmp_path: Path
) -> None:
    with opened(host, renderer, tmp_path) as ours:
        page = ours.page
        assert "Press Run" in page.locator(".g2rpo-choices").inner_text()
        ours.press_run()
        keys = ours.group()
        assert ours.votes() is None and ours.tool("Vote and go on").is_disabled()

        check_ranking(ours, keys)
        ours.shoot(f"{renderer}-voted")

        assert page.get_by_text('{"pictures"').count() == 0 == page.locator("input[value*=pictures]").count()

        # The page keeps the votes in the workflow and in the prompt, and nothing else of the ballot.
        saved = page.evaluate(f"{VOTE}.serialize().widgets_values")
        prompt = page.evaluate(f"app.graphToPrompt().then((made) => made.output[{VOTE}.id].inputs)")
        assert len(saved) == 3 and json.loads(saved[1]) == ours.votes() == json.loads(prompt["votes"])
        assert not [name for name in prompt if "g2rpo" in name]
        assert page.evaluate("app.graph.nodes.length") == len(
            json.loads(WORKFLOW.read_text("utf-8"))["nodes"]
        )

        # One button: an update from these votes, then the next group, whose votes are blank.
        given = ours.votes() or {}
        ours.tool("Vote and go on").click()
        ours.wait_for_step(1)
        second = ours.group(but=keys)
        assert ours.votes() is None
        assert ballots.read(ours.run) == [from_table({**given, "prompt": "a red circle above a blue square"})]

        # Pairs, and one that is begun and given up.
        ours.tool("Pairs").click()
        ours.click(0, 5, 5, 1, 2)
        page.keyboard.press("Backspace")
        assert ours.votes() == {"pictures": second, "pairs": [[second[0], second[5]], [second[5], second[1]]]}
        ours.tool("Undo").click()
        assert (ours.votes() or {})["pairs"] == [[second[0], second[5]]]
        ours.shoot(f"{renderer}-pairs")
        check_undo(ours, second)
        ours.tool("Vote and go on").click()
        ours.wait_for_step(2)
        ours.group(but=second)
        assert len(ballots.read(ours.run)) == 2
        assert [error for error in ours.errors if "g2rpo" in error.lower()] == []
        assert not workflow_page.refused(page)


def check_ranking(ours: Page, keys: list[str]) -> None:
    """Click and type a ranking: the first click is the best; what was clicked can be taken back."""
    page = ours.page
    ours.click(4, 2)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.keyboard.press("7")
    best = [keys[i] for i in (4, 2, 3, 6)]
    assert ours.votes() == {"pictures": keys, "ranking": best, "winners": best}
    page.keyboard.press("Backspace")
    ours.click(2)
    assert (ours.votes() or {})["ranking"] == [keys[4], keys[3]]
    assert page.locator(CHOICE).nth(4).get_attribute("aria-label") == "Picture 5, 1"
    page.locator(".g2rpo-tools input").uncheck()
    assert ours.votes() == {"pictures": keys, "ranking": [keys[4], keys[3]]}
    page.locator(".g2rpo-tools input").check()


def check_undo(ours: Page, keys: list[str]) -> None:
    """Make all nodes anew, as undo does: the group and the votes on it stay."""
    page, before = ours.page, ours.votes()
    page.evaluate("app.loadGraphData(app.graph.serialize())")
    page.wait_for_timeout(1500)
    page.wait_for_selector(".g2rpo-ballot", state="visible")
    assert page.locator(".g2rpo-ballot").count() == 1 and ours.votes() == before
    assert ours.group() == keys and page.locator(".g2rpo-choice[data-chosen]").count() == 2


BOXES = """(part) => [...document.querySelectorAll(part)].map((each) => {
    const { left, top, right, bottom } = each.getBoundingClientRect();
    return [left, top, right, bottom];
})"""
SQUEEZED = "place => { place.style.cssText = 'flex: none; height: 120px; overflow: auto'; }"


def apart(one: list[float], other: list[float]) -> bool:
    """Say whether two boxes (left, top, right, bottom) share nothing."""
    return min(one[2], other[2]) <= max(one[0], other[0]) or min(one[3], other[3]) <= max(one[1], other[1])


def check_whole(page: Any, shape: tuple[int, int]) -> None:
    """See that every picture has its own place and its own shape, and covers nothing."""
    choices = page.evaluate(BOXES, CHOICE)
    for i, box in enumerate(choices):
        assert all(apart(box, other) for other in choices[:i])
        assert (box[3] - box[1]) / (box[2] - box[0]) == pytest.approx(shape[0] / shape[1], rel=0.02)


@contextmanager
def offline(run: Path, window: tuple[int, int]) -> Iterator[Any]:
    """Open the page that the command writes for a run, in a window of (width, height)."""
    call("vote", run)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=workflow_page.CHROMIUM, args=workflow_page.ARGUMENTS
        )
        page = browser.new_page(viewport={"width": window[0], "height": window[1]})
        page.goto((run / "vote.html").as_uri())
        page.wait_for_selector(CHOICE)
        yield page
        browser.close()


@pytest.mark.parametrize("window", [(1280, 800), (800, 600), (400, 700), (1900, 500)])
@pytest.mark.parametrize(
    "count, shape",
    [(2, (24, 24)), (4, (16, 40)), (8, (24, 24)), (8, (40, 16)), (12, (24, 24)), (30, (24, 24))],
)
def test_no_picture_of_the_offline_page_is_cut_off_or_covered(
    tmp_path: Path, count: int, shape: tuple[int, int], window: tuple[int, int]
) -> None:
    run = RunFolder.create(tmp_path / "votes", {"config": {}}).path
    ballots.write_ballot(run, torch.rand(count, *shape, 3), "a red cat", 1)
    with offline(run, window) as page:
        page.wait_for_timeout(200)
        check_whole(page, shape)
        (ballot,), (tools,) = page.evaluate(BOXES, ".g2rpo-ballot"), page.evaluate(BOXES, ".g2rpo-tools")
        for left, top, right, bottom in page.evaluate(BOXES, CHOICE):
            assert ballot[0] <= left and right <= ballot[2] and ballot[1] <= top and bottom <= tools[1]
        assert tools[3] <= ballot[3]
        # Up to twelve, the whole group is seen at once, beneath its title and above the foot.
        (foot,) = page.evaluate(BOXES, "footer")
        if count <= 12 and window[1] >= 600:
            assert tools[3] - ballot[1] <= window[1] - (foot[3] - foot[1])
        assert foot[2] <= window[0]
        if shape == (24, 24):
            # As in a block of the graph that has been made too small: the pictures are scrolled to.
            page.locator(".g2rpo-choices").evaluate(SQUEEZED)
            page.wait_for_timeout(100)
            check_whole(page, shape)


def test_the_offline_page_asks_and_names_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.create(tmp_path / "votes", {"config": {}}).path
    ballots.write_ballot(run, torch.rand(2, 8, 8, 3), "a red cat", 1)
    monkeypatch.chdir(run)
    call("vote", ".")
    with offline(run, (800, 600)) as page:
        assert page.locator("h1").inner_text() == "Which pictures are best?"
        assert page.locator("header p").inner_text().startswith("Run votes. Click the best picture first")


@pytest.fixture
def voted_page(tmp_path: Path) -> Iterator[tuple[Any, Path, list[str]]]:
    """Open the page that the command writes, from a file."""
    run = RunFolder.create(tmp_path / "run", {"config": {}}).path
    for i, prompt in enumerate(("a red cat", HOSTILE)):
        pictures = torch.rand(5, 24, 24, 3, generator=torch.Generator().manual_seed(i))
        ballots.write_ballot(run, pictures, prompt, 1)
    call("vote", run)
    asked: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=workflow_page.CHROMIUM, args=workflow_page.ARGUMENTS
        )
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        page.on(
            "console",
            lambda message: asked.append(f"console: {message.text}") if message.type == "error" else None,
        )
        page.goto((run / "vote.html").as_uri())
        page.wait_for_selector(CHOICE)
        yield page, run, asked
        browser.close()


def test_the_offline_page_saves_votes_that_the_run_takes(
    voted_page: tuple[Any, Path, list[str]], tmp_path: Path
) -> None:
    page, run, asked = voted_page
    assert page.locator("h2").all_inner_texts() == ["1 of 2: a red cat", f"2 of 2: {HOSTILE}"]
    assert page.evaluate("window.hit") is None
    assert page.evaluate("[...document.images].every((image) => image.naturalWidth === 24)")
    assert page.locator("#save").is_disabled()
    for place in (3, 1):
        page.locator(CHOICE).nth(place).click()
    page.locator(CHOICE).nth(5).focus()
    page.keyboard.press("2")
    page.keyboard.press("Backspace")
    page.keyboard.press("1")
    page.locator("#voter").fill("Ann")
    page.screenshot(path=tmp_path / "page.png")
    print(tmp_path / "page.png")
    assert page.locator("#state").inner_text() == "2 of 2 groups voted on, not saved yet"
    with page.expect_download() as download:
        page.locator("#save").click()
    download.value.save_as(tmp_path / "votes.json")
    first, second = (list(ballot.files) for ballot in ballots.read_ballots(run))
    call("vote", run, "--take", tmp_path / "votes.json")
    ranked = (first[3], first[1])
    assert ballots.read(run) == [
        Votes(tuple(first), ranked, ranked, prompt="a red cat", voter="Ann"),
        Votes(tuple(second), (), (second[0],), prompt=HOSTILE, voter="Ann"),
    ]
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
