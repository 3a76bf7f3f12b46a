"""The page's node search finds our blocks by the words that people type. Newer cores know search words; where
there are none, only the words in names can find a block.
"""

import shutil
from pathlib import Path

import pytest
from comfy_host import COMFYUIS, SERVED, make_base, server, version

pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install playwright, and a Chromium, to test the page"
)
from workflow_page import CHROMIUM, opened

pytestmark = [
    pytest.mark.browser,
    pytest.mark.comfyui,
    pytest.mark.xdist_group("served"),
    pytest.mark.skipif(shutil.which(CHROMIUM) is None, reason="no Chromium: apt-get install chromium"),
]

IN_NAMES = {
    "grpo": "Update LoRA (GRPO)",
    "preference": "Vote (Human Preference)",
    "score": "Score and Rank Images",
    "rank": "Score and Rank Images",
    "vote": "Vote (Human Preference)",
    "train lora": "Train LoRA on a Reward (G²RPO)",
}
IN_SEARCH_WORDS = {
    "rlhf": "Vote (Human Preference)",
    "aesthetic": "Load Reward",
    "best of n": "Select Best",
    "reinforcement": "Train LoRA on a Reward (G²RPO)",
}
FOUND = """() => [...document.querySelectorAll("[role=option], [data-testid=result-item]")]
    .filter(e => e.offsetParent && e.innerText.trim()).map(e => e.innerText.trim().split(/\\n|\\u00a0/)[0])"""


@pytest.mark.parametrize("newer_renderer", [False, True], ids=["classic", "nodes 2.0"])
@pytest.mark.parametrize("comfyui", COMFYUIS)
def test_words_find_the_right_block_among_the_first_three(
    comfyui: Path, newer_renderer: bool, tmp_path: Path
) -> None:
    words = IN_NAMES | (IN_SEARCH_WORDS if version(comfyui) >= [0, 33] else {})
    missed = {}
    with server(comfyui, make_base(tmp_path, SERVED)) as running, opened(running, newer_renderer) as page:
        page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        page.wait_for_function("document.activeElement.tagName === 'INPUT'")
        for word, block in words.items():
            page.keyboard.press("Control+A")
            page.keyboard.type(word)
            page.wait_for_timeout(1000)
            found = page.evaluate(FOUND)[:3]
            page.screenshot(path=str(tmp_path / f"{word}.png"))
            if not any(name.startswith(block) for name in found):
                missed[word] = found
    assert missed == {}
