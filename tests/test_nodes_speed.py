"""What makes rollouts in the graph fast, in real ComfyUIs: the same numbers, the same MODEL afterwards, and
core's own way wherever something else is on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comfy_host import COMFYUIS, make_base, run_script

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("training in comfyui")]

TINY = Path(__file__).parent.parent / "models" / "tiny"
ON_WEIGHTS = ("a LoRA", "a merge", "a shift")


@pytest.fixture(scope="module", params=COMFYUIS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the script in a ComfyUI."""
    transformer = TINY / "transformer" / "diffusion_pytorch_model.safetensors"
    script, base = (
        Path(__file__).with_name("comfy_policy_speed.py"),
        make_base(tmp_path_factory.mktemp("speed")),
    )
    return run_script(request.param, script, base, {"transformer": str(transformer)}).data


@pytest.mark.parametrize("case", ["tiny", "guided", "prompts of two lengths", "two attentions"])
def test_every_way_gives_the_velocity_of_the_model_with_the_lora_loaded(found: Any, case: str) -> None:
    made = found["ways"][case]
    assert made["apart"] < 1e-5 and made["merged"] < 1e-5 and made["small"] < 1e-5
    # Where core computes, merging once or at every call is the same bit for bit.
    assert made["same"]
    apart, merged, called, *small = made["how"]
    assert apart == {"apart": True, "merged": 0}
    assert merged == {"apart": False, "merged": made["modules"]}
    # The first forward shows in which precision core computes; without memory nothing is copied.
    assert [called, *small] == [{"apart": False, "merged": 0}] * 3


@pytest.mark.parametrize("model", ["tiny", "larger"])
@pytest.mark.parametrize("way", ["apart", "merged"])
def test_a_lora_that_changes_or_is_switched_off_inside_a_session_is_seen(
    found: Any, model: str, way: str
) -> None:
    made = found["moving"][model]
    assert made["effect"] > 1e-3
    assert len(made[way]) == 6 and max(made[way]) < 1e-5


def test_nothing_is_left_on_the_model_however_a_session_ends(found: Any) -> None:
    for left in found["left behind"].values():
        assert len(left) == 7
        assert left == {name: [] for name in left}


def test_whatever_others_have_put_on_the_model_takes_effect(found: Any) -> None:
    assert len(found["others"]) == 11
    for name, made in found["others"].items():
        assert made["error"] < 1e-5 and made["effect"] > 1e-3, (name, made)
        # What core puts into weights and levels is there before the model is taken apart.
        assert made["apart"] == (name in ON_WEIGHTS), (name, made)


def test_weights_in_few_bits_are_merged_only_where_they_can_simply_be_added_to(found: Any) -> None:
    made = found["fewer bits"]
    assert made["bfloat16"]["same"] and made["float8"]["same"]
    assert made["bfloat16"]["merged"] == made["bfloat16"]["modules"] > 10
    assert made["float8"]["merged"] == 0
    assert not made["bfloat16"]["apart"] and not made["float8"]["apart"]


def test_the_folded_decoder_draws_the_pictures_of_cores_vae(found: Any) -> None:
    made = found["decoding"]
    assert made["tiny"] < 1e-5 and made["core's size"] < 1e-5


def test_other_vaes_and_little_memory_are_left_to_core(found: Any) -> None:
    made = found["decoding"]
    assert made["fits"] and not made["fits nothing"]
    assert made["hooked"] and made["low precision"] is None and made["no VAE"] is None


@pytest.mark.parametrize("case", ["another norm", "a lost part", "no number", "another attention"])
def test_a_core_that_computes_something_else_runs_its_own_forward(found: Any, case: str) -> None:
    made = found["later cores"][case]
    assert made["error"] < 1e-5 and not made["apart"] and made["merged"] > 10


def test_a_core_that_decodes_something_else_decodes_itself(found: Any) -> None:
    made = found["later cores"]
    assert made["decoder"]["error"] < 1e-5 and made["decoder"]["folded"]
    for case in ("another decoder", "another shape", "no decoder"):
        assert made[case] == {"error": 0, "folded": False}
