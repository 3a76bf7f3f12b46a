"""One training iteration on the device: the bundled model, and real architectures with random weights, at
their real size or shrunk.
"""

import time

import gpu
import pytest
import torch
from random_models import ARCHITECTURES, SMALL_SIDE, random_conds, random_policy

from comfy_g2rpo.advantages import integrate, rank_correlation
from comfy_g2rpo.plan import singular
from comfy_g2rpo.recipes import build_plan, recipe
from comfy_g2rpo.rewards import load
from comfy_g2rpo.run.scorer import Scorer
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.speed.cheap_completions import Speed
from comfy_g2rpo.speed.fitting_rollout import roll_out
from comfy_g2rpo.speed.step_cache import Shortcut
from comfy_g2rpo.update import records, update
from g2rpo_trainer.families.sd3 import SD3, load_pipeline
from g2rpo_trainer.model.cheap_forward import completions

SHORT = recipe("g2rpo", num_steps=8, group_size=6, pick="random", pick_size=2)
FIGURES = {
    "seconds",
    "forwards",
    "images",
    "forwards_per_s",
    "images_per_s",
    "utilisation",
    "peak_gb",
    "faster",
    "rank",
}


def iterate(policy, conds, made, side, slots, speed=None):
    """Make one update and return its metrics, with seconds, peak memory and the rewards."""
    begin, speed = time.perf_counter(), speed or Speed()
    plan = build_plan(made, coarsest=speed.tail_stride)
    scorer = Scorer(policy.decode, [load("colourfulness")], [""] * len(conds), len(plan.images), batch=8)
    shape, sigmas = policy.latent_shape(side, side), shifted_sigmas(made.num_steps, made.shift)
    shortcut = Shortcut(completions(policy, speed), speed.cache) if speed.on else None
    where = {"slots": slots, "sink": scorer, "device": policy.device, "shortcut": shortcut}
    rollout = roll_out(policy, plan, sigmas, conds, range(len(conds)), shape, **where)
    rewards = [plan.values(scorer.scores[:, p]) for p in range(len(conds))]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=made.learning_rate)
    before = [p.detach().clone() for p in policy.parameters()]
    metrics = update(
        policy, records(rollout, [integrate(one) for one in rewards]), conds, optimizer, made, micro_batch=1
    )
    assert scorer.scores.isfinite().all() and 0 < metrics["grad_norm"] < float("inf")
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    memory = torch.cuda.max_memory_allocated() / 2**30 if policy.device.type == "cuda" else 0.0
    known = {
        "seconds": time.perf_counter() - begin,
        "nfe": rollout.nfe,
        "images": len(plan.images),
        "memory GiB": memory,
    }
    return metrics | known | {"rewards": torch.stack(rewards)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_iteration_on_the_cpu_at_a_small_size(name):
    policy = random_policy(name, torch.device("cpu"), torch.float32, small=True)
    iterate(
        policy,
        random_conds(name, "cpu", small=True),
        recipe("g2rpo", num_steps=3, group_size=2),
        side=SMALL_SIDE // 2,
        slots=8,
    )


@pytest.fixture(scope="module")
def bench():
    return gpu.prepare("z_image_512", shrunk=True)


def test_the_plain_loop_is_counted_as_the_published_code_spends():
    # The table of the method's description: Λ={1}, {1,2}, {1,2,3} at T=16, k=0…7, G=12.
    counted = [
        gpu.published_forwards(singular(16, range(8), 12, range(1, n + 1), terminal="published"))
        for n in (1, 2, 3)
    ]
    assert counted == [1216, 1792, 2188]


def test_the_benchmark_measures_every_way_against_the_plain_loop_of_the_same_run(bench):
    assert list(gpu.ways(bench)) == ["engine", "compiled", "bf16", "cache 0.1", "tail stride 2", "together"]
    tried = {"fast": recipe("g2rpo", num_steps=5, group_size=3, pick="random", pick_size=1)}
    rows = gpu.measure(bench, tried, ["bf16", "tail stride 2"])
    assert [row["way"] for row in rows] == ["plain loop", "engine", "bf16", "tail stride 2"]
    assert all(row.keys() >= FIGURES and row["forwards"] > 0 and 0 < row["utilisation"] < 1.5 for row in rows)
    assert rows[0]["forwards"] > rows[1]["forwards"] > rows[3]["forwards"] and rows[1][
        "rank"
    ] == pytest.approx(1)


def test_flops_are_those_of_the_products_in_a_forward(bench):
    config, tokens, text = bench.policy.transformer.config, 64, 32  # Z-Image pads texts to a multiple of 32
    layer = 2 * config.dim * (4 * config.dim + 3 * int(config.dim / 3 * 8))
    refiners = config.n_refiner_layers * layer * (tokens + text)
    attention = (
        4
        * config.dim
        * (config.n_layers * (tokens + text) ** 2 + config.n_refiner_layers * (tokens**2 + text**2))
    )
    products = config.n_layers * layer * (tokens + text) + refiners + attention
    assert products < bench.flops < 1.12 * products  # the rest: adapter, embeddings, modulation


@pytest.mark.gpu
def test_the_bundled_model_trains_in_bf16():
    policy = SD3(load_pipeline("models/tiny", torch.bfloat16).to("cuda"), autocast=torch.bfloat16)
    policy.add_lora(16, 16, seed=0)
    print(
        iterate(
            policy,
            policy.encode(["a red circle", "two blue squares"]),
            recipe("g2rpo", num_steps=8, group_size=8),
            64,
            64,
        )
    )


@pytest.fixture(scope="module", params=ARCHITECTURES)
def real(request):
    """Make a model at its real size, and give its memory back."""
    yield request.param, random_policy(request.param, torch.device("cuda"), torch.bfloat16, small=False)
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("side", [512, 720])
def test_a_real_size_trains_in_bf16(real, side):
    name, policy = real
    torch.cuda.reset_peak_memory_stats()
    # 720 is no multiple of what SD3.5's and the others' tokens span, but for FLUX.1, which was published at
    # that size.
    side = side if name == "flux" or side == 512 else 768
    print(name, side, iterate(policy, random_conds(name, "cuda", small=False), SHORT, side, slots=8))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "speed",
    [Speed(cache=0.05), Speed(compile=True), Speed(precision="fp8")],
    ids=lambda speed: str(speed.precision),
)
def test_a_real_size_trains_by_cheaper_completions(real, speed):
    name, policy = real
    if speed.precision == "fp8" and gpu.multiplies_fp8(policy.device):
        pytest.skip("this card has no products in 8 bit")
    conds = random_conds(name, "cuda", small=False)
    exact, cheap = (iterate(policy, conds, SHORT, 512, 8, how) for how in (Speed(), speed))
    print(
        name,
        speed,
        cheap,
        "rank",
        rank_correlation(cheap["rewards"][0], exact["rewards"][0]).nanmean().item(),
    )
