"""The policy over a MODEL and the sampling blocks, in real ComfyUIs: against diffusers and peft, core's
sampler, and differences.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfy_host import COMFYUIS, Answer, make_base, run_script
from torch import Tensor

from comfy_g2rpo.plan import singular
from comfy_g2rpo.rollout import roll_out, seeded_noise
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.update import records
from g2rpo_trainer.families.sd3 import SD3, Cond, load_pipeline

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("training in comfyui")]

TINY = Path(__file__).parent.parent / "models" / "tiny"
PROMPTS, SEEDS, GUIDANCE = ("two red circles", "a green square left of a blue triangle"), (3, 4), 1.0
SHAPE = (16, 8, 8)


@pytest.fixture(scope="module")
def trainer() -> SD3:
    """Load the bundled model as the headless trainer does."""
    return SD3(load_pipeline(TINY, torch.float32))


@pytest.fixture(scope="module")
def given(trainer: SD3) -> dict[str, Tensor]:
    """Make the inputs of both sides."""
    conds = trainer.encode([PROMPTS[0], PROMPTS[1], PROMPTS[0], "a blue circle"])
    blank = trainer.encode([""])[0]
    return {
        "x": seeded_noise((4, *SHAPE), "x"),
        "sigma": torch.tensor([1.0, 0.8, 0.45, 0.1]),
        "cotangent": seeded_noise((4, *SHAPE), "cotangent"),
        "tokens": torch.stack([cond.tokens for cond in conds]),
        "pooled": torch.stack([cond.pooled for cond in conds]),
        "blank_tokens": blank.tokens[None],
        "blank_pooled": blank.pooled[None],
        "advantages": seeded_noise((2, 2, 4), "advantages"),
    }


@pytest.fixture(scope="module", params=COMFYUIS)
def comfy(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, given: dict[str, Tensor]
) -> Answer:
    """Run the script in a ComfyUI."""
    transformer = TINY / "transformer" / "diffusion_pytorch_model.safetensors"
    data = {"prompts": PROMPTS, "seeds": SEEDS, "guidance": GUIDANCE, "transformer": str(transformer)}
    return run_script(
        request.param,
        Path(__file__).with_name("comfy_policy.py"),
        make_base(tmp_path_factory.mktemp("policy")),
        data,
        given,
    )


def error(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return ((one - other).abs().max() / other.abs().max()).item()


def with_adapter(pairs: dict[str, tuple[Tensor, Tensor]], alpha: float, feed_forward: bool) -> SD3:
    """Load the trainer's model with a given adapter."""
    policy = SD3(load_pipeline(TINY, torch.float32))
    policy.add_lora(4, alpha, 0, feed_forward)
    assert policy.pairs().keys() == pairs.keys()
    with torch.no_grad():
        for name, own in policy.pairs().items():
            for parameter, value in zip(own, pairs[name], strict=True):
                parameter.copy_(value)
    return policy


def pairs_of(answer: Answer, kind: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Collect (down, up) by diffusers' module names."""
    names = [
        key.split("/")[1] for key in answer.tensors if key.startswith(f"{kind}/") and key.endswith("/down")
    ]
    return {
        name: (answer.tensors[f"{kind}/{name}/down"], answer.tensors[f"{kind}/{name}/up"]) for name in names
    }


def conds_of(given: dict[str, Tensor]) -> list[Cond]:
    """Return the rows' conditioning as the trainer takes it."""
    return [Cond(tokens, pooled) for tokens, pooled in zip(given["tokens"], given["pooled"], strict=True)]


def test_velocity_on_the_wire_is_that_of_diffusers(
    comfy: Answer, trainer: SD3, given: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        plain = trainer.velocity(given["x"], given["sigma"], conds_of(given))
        blank = trainer.velocity(
            given["x"], given["sigma"], [Cond(given["blank_tokens"][0], given["blank_pooled"][0])] * 4
        )
    assert error(comfy.tensors["base"], plain) < 1e-5
    assert error(comfy.tensors["guided"], blank + 3 * (plain - blank)) < 1e-5


def test_different_prompts_and_noise_levels_share_a_forward(comfy: Answer) -> None:
    found = comfy.data["velocities"]
    assert found["forwards"] == [1, 1]
    assert found["rows"] < 1e-5


def test_conditioning_with_a_schedule_is_looked_up_at_each_rows_own_level(comfy: Answer) -> None:
    assert comfy.data["velocities"]["schedule"] < 1e-5


def test_a_row_without_conditioning_takes_the_guiders(comfy: Answer) -> None:
    assert comfy.data["velocities"]["own conditioning"] == 0


def test_of_two_texts_in_one_conditioning_a_single_image_gets_the_first_as_in_core(comfy: Answer) -> None:
    assert comfy.data["velocities"]["two in one conditioning"] == 0


def test_the_anchor_is_cores_euler_image_bit_for_bit(comfy: Answer) -> None:
    found = comfy.data["sampling"]
    assert found["anchor"] and found["partial anchor"] and found["img2img anchor"]


def test_the_singular_sampler_draws_a_branch_of_the_rollout_bit_for_bit(comfy: Answer) -> None:
    found = comfy.data["sampling"]
    assert found["branch"] and found["branch differs"] and found["img2img branch"]


def test_batches_differ_from_single_rows_by_rounding_alone(comfy: Answer) -> None:
    assert comfy.data["sampling"]["slots"] < 1e-4


def test_the_rollout_hands_over_its_branches_in_order_and_not_its_anchor(comfy: Answer) -> None:
    images, planned, latents = comfy.data["sampling"]["images"]
    # Both granularities complete the branches of the third of five steps alike.
    assert images == [9, *SHAPE] and planned == 9 and latents == [1, 9, *SHAPE]
    assert comfy.data["sampling"]["ordinary tensors"]


def test_a_split_schedule_goes_on_where_cores_sampler_would(comfy: Answer) -> None:
    assert comfy.data["sampling"]["split"] < 1e-5


def test_an_interrupt_stops_between_two_forwards_and_leaves_images_as_they_were(comfy: Answer) -> None:
    found = comfy.data["interruption"]
    assert "nterrupt" in found["error"]
    assert found["forwards"] == 5
    assert found["same"]


def test_the_first_ratio_is_exactly_one(comfy: Answer) -> None:
    assert comfy.data["records"] == {"ratio": 0.0, "samples": 16}


def test_the_gradient_is_that_of_diffusers_and_peft(comfy: Answer, given: dict[str, Tensor]) -> None:
    """Fused projections share one down matrix: its gradient is the sum of those of q, k and v, which start
    from the same matrix here.
    """
    policy = with_adapter(pairs_of(comfy, "pair"), comfy.data["training"]["alpha"], feed_forward=True)
    (policy.velocity(given["x"], given["sigma"], conds_of(given)) * given["cotangent"]).sum().backward()
    found, owners = pairs_of(comfy, "gradient"), pairs_of(comfy, "pair")
    largest = max(up.grad.abs().max() for _, up in policy.pairs().values())
    for name, (_, up) in policy.pairs().items():
        sharing = [other for other in owners if torch.equal(owners[other][0], owners[name][0])]
        together = sum(policy.pairs()[other][0].grad for other in sharing)
        assert (found[name][1] - up.grad).abs().max() < 1e-5 * largest, name
        assert (found[name][0] - together).abs().max() < 1e-5 * largest, name
    assert len(found) == 33


def test_gradients_equal_differences(comfy: Answer) -> None:
    assert comfy.data["training"]["difference"] < 1e-3
    assert comfy.data["training"]["guided difference"] < 1e-3


def test_checkpoints_are_exact(comfy: Answer) -> None:
    assert comfy.data["training"]["checkpoint"] == 0


def test_the_graph_makes_the_records_of_the_headless_trainer(comfy: Answer, given: dict[str, Tensor]) -> None:
    policy = with_adapter(pairs_of(comfy, "records"), 8.0, feed_forward=False)
    rollout = roll_out(
        policy,
        singular(5, [0, 1], 4, (1, 2)),
        shifted_sigmas(5, 3.0),
        policy.encode(PROMPTS),
        SEEDS,
        SHAPE,
        slots=8,
    )
    made = records(rollout, list(given["advantages"]))
    assert error(comfy.tensors["x"], made.x) < 1e-5
    assert error(comfy.tensors["direction"], made.direction) < 1e-5
    assert (comfy.tensors["images"] - policy.decode(rollout.latents[:, 0])).abs().max() < 1e-3


@pytest.mark.parametrize("way", ["native", "diffusers", "wire", "clone"])
def test_a_loaded_lora_does_exactly_what_training_saw(comfy: Answer, way: str) -> None:
    found = comfy.data["saved"]
    assert found["effect"] > 0.05
    assert found[way] <= 1e-6
    assert found[f"{way} patched"] >= found["modules"] > 10


def test_a_model_that_carries_a_lora_can_be_trained_on_top_of_it(comfy: Answer) -> None:
    assert comfy.data["on top"] <= 1e-5


def test_models_in_fewer_bits_train(comfy: Answer) -> None:
    found = comfy.data["precisions"]
    assert found["float32"][1] == 0
    # Core merges in the bits that weights are kept in, training adds in those that it computes in: here
    # float32, as on every CPU.
    assert found["bfloat16"][0] > 0.99 and found["bfloat16"][1] < 2e-3
    assert found["float8"][0] > 0.9 and found["float8"][1] < 0.05


def test_no_key_is_left_out_by_core(comfy: Answer) -> None:
    assert "lora key not loaded" not in comfy.log and "NOT LOADED" not in comfy.log


def test_the_users_model_is_as_it_was(comfy: Answer) -> None:
    assert comfy.data["unchanged"] == {name: [] for name in comfy.data["unchanged"]}
    assert len(comfy.data["unchanged"]) == 8


def test_lists_of_numbers_are_read(comfy: Answer) -> None:
    assert comfy.data["lists"] == [[0, 1, 2, 3], [2, 0], [7], [1, 2, 5]]


def test_what_cannot_be_used_is_refused_in_one_line_that_names_the_input(comfy: Answer) -> None:
    inputs = (
        "model",
        "guider",
        "latent_image",
        "sigmas",
        "branch_steps",
        "group_size",
        "granularities",
        "policy",
        "targets",
    )
    for case, words in comfy.data["refusals"].items():
        assert words.startswith(
            tuple(f"{name}: " for name in inputs) + tuple(f"{name} is " for name in inputs)
        ), (case, words)
        assert "\n" not in words and len(words) < 250, (case, words)


@pytest.fixture(
    scope="module",
    params=[root for root in COMFYUIS if "0.33" in str(root.id)]
    or [pytest.param(None, marks=pytest.mark.skip)],
)
def others(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """Train other architectures, which newer versions load at this size."""
    script = Path(__file__).with_name("comfy_policy_architectures.py")
    return run_script(request.param, script, make_base(tmp_path_factory.mktemp("architectures")))


@pytest.mark.parametrize("name", ["flux", "wan", "ltxv"])
def test_other_architectures_train_exactly(others: Answer, name: str) -> None:
    found = others.data[name]
    assert found["modules"] == 20
    assert found["difference"] < 1e-3
    assert found["checkpoint"] == 0
    assert found["batch"] < 1e-5
    assert found["anchor"]
    assert found["changed"] == []
