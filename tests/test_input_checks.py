"""What every block checks first, inside ComfyUI: which values are taken, and how others are refused."""

from pathlib import Path

import pytest
from comfy_host import COMFYUIS, Answer, make_base, run_script

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("scripts in comfyui")]


@pytest.fixture(scope="module", params=COMFYUIS)
def answer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """Boot a ComfyUI once and check everything there."""
    base = make_base(tmp_path_factory.mktemp("checks"))
    return run_script(request.param, Path(__file__).with_name("comfy_child_checks.py"), base, timeout=300)


@pytest.mark.parametrize("kind", ["taken", "lists taken"])
def test_what_a_block_allows_is_taken(answer: Answer, kind: str) -> None:
    assert [case for case in answer.data[kind] if case[2]] == []
    assert len(answer.data[kind]) >= 6


@pytest.mark.parametrize("kind", ["refused", "lists refused"])
def test_what_a_block_does_not_allow_is_refused_by_the_name_of_its_input(answer: Answer, kind: str) -> None:
    assert [case for case in answer.data[kind] if not case[2].startswith(case[0])] == []
    assert [case for case in answer.data[kind] if "\n" in case[2] or len(case[2]) > 300] == []


def test_every_kind_of_input_was_tried(answer: Answer) -> None:
    for kind in ("taken", "refused"):
        assert {name for name, _, _ in answer.data[kind]} == set(answer.data["inputs"])


def test_a_block_gets_its_own_inputs_alone(answer: Answer) -> None:
    assert answer.data["extra"] == sorted(answer.data["inputs"])


def test_a_latent_of_several_streams_is_named_as_such(answer: Answer) -> None:
    assert all("several streams in one latent" in words for words in answer.data["streams"])


CULPRIT = "vae: it does not fit"
BLAMED = {
    "runtime": ["ValueError", f"{CULPRIT} (RuntimeError: sizes differ)", "RuntimeError"],
    "lookup": ["ValueError", f"{CULPRIT} (KeyError: 'x')", "KeyError"],
    "long": ["ValueError", f"{CULPRIT} (TypeError: {'x' * 160})", "TypeError"],
    "memory by kind": ["OutOfMemoryError", "Allocation on device", "NoneType"],
    "memory by words": ["RuntimeError", "DefaultCPUAllocator: Out of memory", "NoneType"],
    "memory of another kind": ["RuntimeError", "MPS backend OUT OF MEMORY", "NoneType"],
    "interrupt": ["KeyboardInterrupt", "stop", "NoneType"],
}


@pytest.mark.parametrize("name", BLAMED)
def test_a_failure_in_a_model_is_blamed_but_for_want_of_memory(answer: Answer, name: str) -> None:
    assert answer.data["blamed"][name] == BLAMED[name]
