"""One training iteration on the device: the bundled model, and Stable Diffusion 3.5 medium's real size with random weights."""

import time

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from comfy_g2rpo.advantages import integrate
from comfy_g2rpo.recipes import build_plan, recipe
from comfy_g2rpo.rewards import load
from comfy_g2rpo.rollout import roll_out, seeded_noise
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.scoring import Scorer
from comfy_g2rpo.update import records, update
from g2rpo_trainer.families.sd3 import SD3, Cond, load_pipeline

MEDIUM = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}
SMALL = {
    "sample_size": 8,
    "num_layers": 2,
    "num_attention_heads": 2,
    "caption_projection_dim": 128,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0,),
}


def random_pipeline(size, vae, device, dtype):
    """Build a pipeline of untrained weights on the device, without text encoders."""
    with torch.device(device):
        transformer = SD3Transformer2DModel(
            patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64, qk_norm="rms_norm", **size
        ).to(dtype)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae.to(device, dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")),
    )


def large_vae():
    """Build SD3's autoencoder."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    channels = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
    return AutoencoderKL(**blocks, **channels, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)


def iterate(policy, conds, made, side, slots):
    """Make one update and return its metrics, with seconds and peak memory."""
    begin, plan = time.perf_counter(), build_plan(made)
    scorer = Scorer(policy.decode, [load("colourfulness")], [""] * len(conds), len(plan.images), batch=8)
    shape, sigmas = policy.latent_shape(side, side), shifted_sigmas(made.num_steps, made.shift)
    rollout = roll_out(policy, plan, sigmas, conds, range(len(conds)), shape, slots=slots, sink=scorer, device=policy.device)
    advantages = [integrate(plan.values(scorer.scores[:, p])) for p in range(len(conds))]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=made.learning_rate)
    before = [p.detach().clone() for p in policy.parameters()]
    metrics = update(policy, records(rollout, advantages), conds, optimizer, made, micro_batch=2)
    assert scorer.scores.isfinite().all() and 0 < metrics["grad_norm"] < float("inf")
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    memory = torch.cuda.max_memory_allocated() / 2**30 if policy.device.type == "cuda" else 0.0
    return metrics | {"seconds": time.perf_counter() - begin, "nfe": rollout.nfe, "images": len(plan.images), "memory GiB": memory}


def random_conds(policy, size, tokens):
    """Make text features of one prompt out of noise."""
    width, pooled = size["joint_attention_dim"], size["pooled_projection_dim"]
    return [Cond(seeded_noise((tokens, width), "tokens").to(policy.device), seeded_noise((pooled,), "pooled").to(policy.device))]


def test_the_same_iteration_on_the_cpu_at_a_small_size():
    policy = SD3(random_pipeline(SMALL, AutoencoderTiny(latent_channels=16, decoder_block_out_channels=(16,) * 4), "cpu", torch.float32))
    policy.add_lora(4, 4, seed=0)
    iterate(policy, random_conds(policy, SMALL, 8), recipe("g2rpo", num_steps=4, group_size=3), side=64, slots=8)


@pytest.mark.gpu
def test_the_bundled_model_trains_in_bf16():
    policy = SD3(load_pipeline("models/tiny", torch.bfloat16).to("cuda"), autocast=torch.bfloat16)
    policy.add_lora(16, 16, seed=0)
    print(iterate(policy, policy.encode(["a red circle", "two blue squares"]), recipe("g2rpo", num_steps=8, group_size=8), 64, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("side", [512, 1024])
def test_sd35_medium_at_its_real_size_trains_in_bf16(side):
    torch.cuda.reset_peak_memory_stats()
    policy = SD3(random_pipeline(MEDIUM, large_vae(), "cuda", torch.bfloat16), autocast=torch.bfloat16)
    policy.add_lora(64, 128, seed=0)
    print(iterate(policy, random_conds(policy, MEDIUM, 333), recipe("g2rpo", num_steps=8, group_size=6), side, slots=8))
