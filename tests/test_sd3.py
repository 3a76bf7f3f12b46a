"""The sd3 family on the bundled model, and the engine on a real transformer against plain loops."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import family_model as family
import pytest
import torch
from diffusers import AutoencoderTiny, SD3Transformer2DModel
from plain import PlainLoop
from some_cases import some
from torch import Tensor
from toys import small

from comfy_g2rpo.advantages import integrate
from comfy_g2rpo.kernels import log_prob
from comfy_g2rpo.objectives import OBJECTIVES
from comfy_g2rpo.plan import deterministic
from comfy_g2rpo.recipes import RECIPES, Recipe, build_plan
from comfy_g2rpo.rewards import REWARDS, Rule
from comfy_g2rpo.rollout import Rollout, roll_out, seeded_noise
from comfy_g2rpo.run.scorer import Scorer
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.speed import joint_forward
from comfy_g2rpo.update import backward, records, step_weights, update
from g2rpo_trainer.config.sections import ModelSection
from g2rpo_trainer.families import load as load_family
from g2rpo_trainer.families.cpu.sd3_forward import merged as take_apart
from g2rpo_trainer.families.cpu.taesd_decoder import folded_decoder
from g2rpo_trainer.families.sd3 import SD3, Cond, load_pipeline

TINY = Path(__file__).parent.parent / "models" / "tiny"
PROMPTS = ("two red circles", "a green square left of a blue triangle")
SHAPE, SEED = (16, 8, 8), 5
SMALL = {name: small(name, num_steps=4, group_size=3) for name in RECIPES}
BRIGHTNESS = Rule("brightness", lambda images, prompts: images.mean((1, 2, 3)), compares_across_prompts=False)
JUDGES = [REWARDS["agreement"], BRIGHTNESS]  # the second never ties, and hardly notices one level
# Floats summed in another order may round one value of a picture to the next of 256 levels; a shape's edge
# notices.
ONE_LEVEL = 2e-3

pytestmark = pytest.mark.skipif(
    not (TINY / "model_index.json").is_file(), reason="models/tiny is missing: run tools/train_tiny.py"
)


def load(guidance: float = 1.0) -> SD3:
    """Load the bundled model."""
    return SD3(load_pipeline(TINY, torch.float32), guidance=guidance)


@pytest.fixture(scope="session")
def base() -> SD3:
    """A model without adapter; tests leave it as it is."""
    return load()


@pytest.fixture(scope="session")
def policy() -> SD3:
    """A model with an adapter; tests leave it as it is."""
    return family.moved(load())


@pytest.fixture
def batch(base: SD3) -> tuple[Tensor, Tensor, list]:
    """Two latents at two noise levels, with their prompts."""
    return seeded_noise((2, *SHAPE), "latents"), torch.tensor([0.9, 0.3]), base.encode(PROMPTS)


def test_a_deterministic_rollout_is_the_pipelines_own_sampling(base):
    rollout = roll_out(base, deterministic(4), shifted_sigmas(4), base.encode(PROMPTS[:1]), [SEED], SHAPE)
    asked = {"sigmas": [1.0, 0.75, 0.5, 0.25], "guidance_scale": 1.0, "max_sequence_length": 0}
    asked["latents"] = rollout.noise(0, 0)[None]
    picture = base.pipeline(PROMPTS[0], **asked, output_type="pt").images
    assert torch.allclose(base.decode(rollout.latents[:, 0]), picture.permute(0, 2, 3, 1), atol=1e-4)


def test_guidance_moves_from_the_empty_prompt_through_the_given_one(base, batch):
    x, sigma, cond = batch
    with torch.no_grad():
        given, empty = base.velocity(x, sigma, cond), base.velocity(x, sigma, base.encode(["", ""]))
        guided = load(guidance=2.0).velocity(x, sigma, cond)
    assert torch.allclose(guided, empty + 2.0 * (given - empty), atol=1e-5)


def test_a_negative_prompt_is_the_pipelines_own_also_once_the_encoders_are_dropped(base):
    section = {"path": str(TINY), "width": 64, "height": 64, "max_sequence_length": 0, "guidance": 3.0}
    section = ModelSection(**section, negative_prompt="two blue squares")
    policy = load_family(section, TINY, "cpu")
    cond = policy.encode(PROMPTS[:1])
    policy.drop_text_encoders()
    rollout = roll_out(policy, deterministic(4), shifted_sigmas(4), cond, [SEED], SHAPE)
    asked = {"sigmas": [1.0, 0.75, 0.5, 0.25], "guidance_scale": 3.0, "max_sequence_length": 0}
    asked |= {"latents": rollout.noise(0, 0)[None], "negative_prompt": "two blue squares"}
    picture = base.pipeline(PROMPTS[0], **asked, output_type="pt").images
    assert torch.allclose(policy.decode(rollout.latents[:, 0]), picture.permute(0, 2, 3, 1), atol=1e-4)


def test_a_negative_prompt_without_guidance_is_refused():
    section = ModelSection(path=str(TINY), max_sequence_length=0, negative_prompt="blur")
    says = r"model\.negative_prompt has no effect at model\.guidance 1; set it above 1"
    with pytest.raises(ValueError, match=says):
        load_family(section, TINY, "cpu")


def test_the_reference_is_the_model_without_adapter(base, policy, batch):
    with torch.no_grad():
        with policy.reference():
            reference = policy.velocity(*batch)
        assert torch.allclose(reference, base.velocity(*batch), atol=1e-6)
        assert not torch.allclose(reference, policy.velocity(*batch), atol=1e-3)


def test_the_merged_model_is_the_model_with_its_adapter(policy, batch):
    with policy.inference():
        merged = policy.velocity(*batch)
    with torch.no_grad():
        assert torch.allclose(merged, policy.velocity(*batch), atol=1e-5)


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
@pytest.mark.parametrize("width", [8, 64], ids=["many tokens", "few tokens"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kept", [256, 0], ids=["keeping", "forgetting"])
def test_the_forward_of_rollouts_is_diffusers_own(monkeypatch, qk_norm, width, dtype, tolerance, kept):
    monkeypatch.setattr(joint_forward, "KEPT", kept)
    monkeypatch.setattr(joint_forward, "ROWS", 50)  # between the parts' numbers of tokens
    size = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": width, "sample_size": 8}
    size |= {"caption_projection_dim": 2 * width, "pos_embed_max_size": 8, "dual_attention_layers": (0, 1)}
    text = {"joint_attention_dim": 12, "pooled_projection_dim": 10}
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**size, **text, qk_norm=qk_norm).to(dtype).eval()
    prompts = [Cond(seeded_noise((7, 12), p).to(dtype), seeded_noise((10,), p).to(dtype)) for p in range(2)]
    cond, sigma = [prompts[p] for p in (0, 1, 0, 0)], torch.tensor([0.9, 0.9, 0.3, 0.9])
    x = seeded_noise((4, 16, 8, 12), "x").to(dtype)
    tokens, pooled = torch.stack([c.tokens for c in cond]), torch.stack([c.pooled for c in cond])
    with torch.no_grad():
        expected = model(x, tokens, pooled, sigma * 1000, return_dict=False)[0]
        merged = take_apart(model)
        # Pairs that are new, and such as are known in another order.
        for part in ([2], [0, 1], [0, 1, 2, 3], [3, 2]):
            found = merged(x[part], sigma[part], [cond[i] for i in part])
            assert torch.allclose(found, expected[part], rtol=0, atol=tolerance * expected.abs().max())


@pytest.mark.parametrize("blocks", [(1, 1, 1, 0), (1, 1, 1, 1)], ids=["last stage without blocks", "with"])
def test_the_folded_decoder_is_diffusers_own(blocks):
    torch.manual_seed(0)
    sizes = {"decoder_block_out_channels": (8,) * 4, "num_decoder_blocks": blocks}
    vae = AutoencoderTiny(latent_channels=16, **sizes).double().eval()
    latents = seeded_noise((2, 16, 3, 5), "latents").double()
    with torch.no_grad():
        made, theirs = folded_decoder(vae)(latents), vae.decode(latents).sample
        assert torch.allclose(made, theirs, rtol=0, atol=1e-12)
        # Numbers in 16 bit are computed with in float32.
        low = folded_decoder(vae.bfloat16())(latents)
        assert low.dtype == torch.float32 and next(vae.parameters()).dtype == torch.bfloat16
        assert torch.allclose(low, vae.float().decode(latents.float()).sample, rtol=0, atol=1e-5)


def test_merging_leaves_every_weight_as_it_was_bit_for_bit(policy):
    before = {name: value.clone() for name, value in policy.transformer.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), policy.inference():
        raise KeyboardInterrupt
    after = policy.transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_adapter_learns_again_after_a_rollout(policy, batch):
    with policy.inference():
        assert not policy.velocity(*batch).requires_grad
    assert policy.velocity(*batch).requires_grad


def test_a_fresh_adapter_changes_nothing_and_depends_on_its_seed_alone(base, batch):
    adapters = [load() for _ in range(3)]
    for adapter, seed in zip(adapters, (1, 1, 2), strict=True):
        adapter.add_lora(4, 4, seed)
    pairs = [adapter.pairs().values() for adapter in adapters]
    one, same, other = (torch.cat([down.flatten() for down, _ in given]) for given in pairs)
    assert torch.equal(one, same) and not torch.equal(one, other)
    with torch.no_grad():
        assert torch.allclose(adapters[0].velocity(*batch), base.velocity(*batch), atol=1e-6)


def test_only_the_adapter_is_trained(policy):
    trained = {id(p) for p in policy.transformer.parameters() if p.requires_grad}
    assert trained == {id(p) for p in policy.parameters()}
    assert not any(p.requires_grad for p in policy.vae.parameters())


def test_decoded_pictures_are_float32_rows_of_pixels_in_range(base):
    pictures = base.decode(3 * seeded_noise((2, *SHAPE), "latents"))
    assert pictures.shape == (2, 64, 64, 3) and pictures.dtype == torch.float32 and pictures.is_contiguous()
    assert pictures.min() >= 0 and pictures.max() <= 1


def test_a_latent_has_a_cell_per_8_pixels_and_sizes_between_patches_are_refused(base):
    assert base.latent_shape(64, 96) == (16, 12, 8)
    with pytest.raises(ValueError, match="70×64; both must be multiples of 16"):
        base.latent_shape(70, 64)


def test_known_prompts_need_no_text_encoder():
    policy = load()
    first = policy.encode(PROMPTS)
    policy.drop_text_encoders()
    assert family.same_features(first, policy.encode(PROMPTS))


def test_guidance_needs_no_text_encoder_once_it_is_dropped(batch):
    family.check_dropped(load(guidance=2.0), load(guidance=2.0), batch)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no model_index\.json there"):
        load_pipeline(tmp_path / "nowhere", torch.float32)


def truncate(path: Path) -> None:
    """Cut a file short, as an interrupted download does."""
    path.write_bytes(path.read_bytes()[:1000])


def rewritten(text: str) -> Callable[[Path], object]:
    """Write another index."""
    return lambda model: (model / "model_index.json").write_text(text)


WEIGHTS = "diffusion_pytorch_model.safetensors"
DAMAGE = {
    "index no JSON": rewritten("{"),
    "index empty": rewritten(json.dumps({"_class_name": "StableDiffusion3Pipeline"})),
    "transformer cut": lambda model: truncate(model / "transformer" / WEIGHTS),
    "vae cut": lambda model: truncate(model / "vae" / WEIGHTS),
    "weights gone": lambda model: (model / "transformer" / WEIGHTS).unlink(),
    "config gone": lambda model: (model / "transformer" / "config.json").unlink(),
    "tokenizer gone": lambda model: shutil.rmtree(model / "tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_one_clear_line(tmp_path, damage):
    model = shutil.copytree(TINY, tmp_path / "model")
    DAMAGE[damage](model)
    with pytest.raises(ValueError, match=str(model)) as error:
        load_pipeline(model, torch.float32)
    assert "\n" not in str(error.value)


def run_engine(policy: SD3, recipe: Recipe, slots: int = 64) -> tuple[Rollout, Tensor, Tensor]:
    """Roll out and score one group: rollout, rewards [R, K, G, L], advantages [K, G]."""
    plan = build_plan(recipe, iteration=30, seed=3)
    scorer = Scorer(policy.decode, JUDGES, PROMPTS[:1], len(plan.images))
    rollout = roll_out(
        policy, plan, shifted_sigmas(4), policy.encode(PROMPTS[:1]), [SEED], SHAPE, slots=slots, sink=scorer
    )
    rewards = plan.values(scorer.scores[:, 0])
    return rollout, rewards, integrate(rewards)


def gradient(policy: SD3) -> Tensor:
    """Take the adapter's gradient as one vector."""
    flat = torch.cat([p.grad.flatten() for p in policy.parameters()])
    for parameter in policy.parameters():
        parameter.grad = None
    return flat


def plain_gradient(loop: PlainLoop, advantages: Tensor, recipe: Recipe) -> Tensor:
    """Differentiate the clipped loss at ratio 1 and the velocity KL, one sample at a time."""
    plan, c, policy = loop.plan, loop.coefficients, loop.policy
    child = [next(s for s in plan.transitions if plan.states[s].parent == fork) for fork in plan.forks]
    weights = step_weights(c.v_coef[child], c.std[child], recipe.step_weight)
    weight = dict(zip(plan.forks, weights, strict=True))
    for state in plan.transitions:
        edge = plan.states[state]
        x = loop.known[edge.parent]
        velocity = policy.velocity(x, c.sigma[[edge.parent]], [loop.cond])
        mean = c.x_coef[state] * x + c.v_coef[state] * velocity
        x_next = loop.step(x, velocity.detach(), [state])
        now = log_prob(x_next, mean, c.std[state])
        dt = (c.sigma[state] - c.sigma[edge.parent]).abs()
        scale, part = (c.std[state], 1 / dt) if recipe.ratio_norm == "guard" else (1, 1)
        ratio, advantage = (scale * (now - now.detach())).exp(), advantages[edge.group, edge.member]
        loss = part * torch.maximum(
            -advantage * ratio, -advantage * ratio.clamp(1 - recipe.clip, 1 + recipe.clip)
        )
        (weight[edge.parent] * loss.sum() / len(plan.transitions)).backward()
    for fork in plan.forks if recipe.kl else ():
        velocity = policy.velocity(loop.known[fork], c.sigma[[fork]], [loop.cond])
        with torch.no_grad(), policy.reference():
            reference = policy.velocity(loop.known[fork], c.sigma[[fork]], [loop.cond])
        square, state = (velocity - reference).square().mean(), child[plan.forks.index(fork)]
        if recipe.kl_form != "velocity":
            time = c.sigma[fork] - c.sigma[state] if recipe.kl_form == "published" else 1
            variance = c.std[state].square() / time
            square = (c.v_coef[state] * (velocity - reference)).square().mean() / (2 * variance)
        (recipe.kl * square / len(plan.forks)).backward()
    return gradient(policy)


@pytest.mark.parametrize(
    "name", some([name for name in SMALL if not OBJECTIVES[SMALL[name].objective].images], 6)
)
def test_every_recipe_of_noisy_steps_equals_the_plain_loop_in_rewards_advantages_and_gradient(policy, name):
    recipe = SMALL[name]
    rollout, rewards, advantages = run_engine(policy, recipe, slots=7)
    cond = policy.encode(PROMPTS[:1])
    loop = PlainLoop(
        policy, policy.decode, JUDGES, rollout.plan, shifted_sigmas(4), PROMPTS[0], cond[0], SEED, SHAPE
    )
    plain_rewards = rollout.plan.values(loop.as_published())
    assert torch.allclose(rewards, plain_rewards, atol=ONE_LEVEL, equal_nan=True)
    assert torch.allclose(integrate(rewards[1:]), integrate(plain_rewards[1:]), atol=1e-3)
    assert advantages.any()
    made = records(rollout, [advantages], step_weight=recipe.step_weight, samples=recipe.objective == "clip")
    backward(policy, made, cond, recipe)
    ours, plain = gradient(policy), plain_gradient(loop, advantages, recipe)
    assert (ours - plain).norm() <= 1e-5 * plain.norm()


def test_rewards_do_not_depend_on_the_slots(policy):
    few, many = (run_engine(policy, SMALL["g2rpo"], slots)[1] for slots in (3, 64))
    assert torch.allclose(few, many, atol=ONE_LEVEL)


def test_the_first_ratio_is_exactly_1(policy):
    recipe = dataclasses.replace(SMALL["flow_grpo"], learning_rate=0.0)
    rollout, _, advantages = run_engine(policy, recipe)
    made = records(rollout, [advantages], samples=True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)
    metrics = update(policy, made, policy.encode(PROMPTS[:1]), optimizer, recipe, micro_batch=5)
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert metrics["ratio/max_deviation"] == 0.0 and metrics["clip_share"] == 0.0
