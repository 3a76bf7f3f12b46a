"""Every input of every block gets what a stranger's workflow, a broken file or a careless hand could send,
inside real ComfyUIs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comfy_host import COMFYUIS, Answer, make_base, run_script
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from some_cases import ALL

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("scripts in comfyui")]

STRINGS = [
    "",
    " ",
    "../../x",
    "..",
    ".",
    "/etc/passwd",
    "C:\\x",
    "\\\\host\\share",
    "~root",
    "a/b",
    "<script>alert(1)</script>",
    "{{7*7}} ${x} %s %n",
    "a\0b",
    "x" * 10**5,
    "x" * (10**5 + 1),
    "\ud800",
    "a\udfffb",
    "\u202egnp.exe",
    "CON",
    "nul.txt",
    "COM1",
    "a\nb",
    "a\r\n\tb",
    "-rf",
    ".hidden",
    "trailing.",
    "file:///etc/passwd",
    "__import__('os').system('x')",
    "名前",
    "1e999, nan, -inf",
    "0-999999",
    "9" * 5000,
    "eta = nan",
    "group_size = 1024\nnum_steps = 1000",
    "steps = 1e9",
    "unknown = 1",
]
NUMBERS: list[Any] = [
    0,
    -1,
    2**31,
    2**63,
    -(2**63),
    2**64,
    10**400,
    float("nan"),
    float("inf"),
    -float("inf"),
    1e308,
    -0.5,
    5e-324,
    0.5,
]


def drawn(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """Have hypothesis draw examples, the same ones every time: ComfyUI's own Python, which runs them, has
    no hypothesis.
    """
    found: list[Any] = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(example: Any) -> None:
        found.append(example)

    draw()
    return found


@pytest.fixture(scope="module", params=COMFYUIS)
def answer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """Boot a ComfyUI once and carry all attacks out."""
    strange = st.text(st.characters(codec=None, exclude_categories=()), max_size=80)
    data = {
        "strings": [*STRINGS, *drawn(strange, 25 if ALL else 8)],
        "numbers": [*NUMBERS, *drawn(st.integers() | st.floats(width=64), 40 if ALL else 10)],
    }
    base = make_base(tmp_path_factory.mktemp("hostile"))
    return run_script(
        request.param, Path(__file__).with_name("comfy_child_hostile.py"), base, data=data, timeout=900
    )


def test_every_attack_ends_in_a_named_error_or_a_correct_result(answer: Answer) -> None:
    faults = answer.data["faults"]
    assert not faults, f"{len(faults)} weaknesses:\n" + "\n".join(faults[:100])


def test_every_block_was_attacked(answer: Answer) -> None:
    counts = answer.data["counts"]
    # The loader has no inputs: it was attacked once.
    attacked = {
        name for name, count in counts.items() if count["refused"] >= (1 if name == "TinyDemoLoader" else 40)
    }
    assert attacked == set(answer.data["blocks"])
    assert sum(count["attacks"] for count in counts.values()) > 2000


def test_nothing_was_written_outside_and_nothing_was_called(answer: Answer) -> None:
    assert answer.data["seen"] == []
    assert answer.data["outside"] == ["secret.txt"]
    # The hook did see something: the runs that were made.
    assert answer.data["events"] > 100


def test_afterwards_everything_is_as_before(answer: Answer) -> None:
    assert answer.data["different"] == []
    assert answer.data["grown"] < 2**20
