import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfy_g2rpo import kernels
from comfy_g2rpo.schedule import shifted_sigmas

STOCHASTIC = {
    "flow_sde": kernels.flow_sde,
    "dance_sde": kernels.dance_sde,
    "cps": kernels.cps,
    "ddim": kernels.ddim,
}
SIGMAS = shifted_sigmas(16, 3.0)
steps = st.integers(0, 15)


def pair(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 5, 5, generator=generator).to(dtype), torch.randn(
        2, 4, 5, 5, generator=generator
    ).to(dtype)


@pytest.mark.parametrize("kernel", STOCHASTIC)
@given(k=steps, seed=st.integers(0, 5))
def test_without_noise_every_kernel_is_euler(kernel, k, seed):
    x, v = pair(seed)
    mean, std = STOCHASTIC[kernel](x, v, SIGMAS[k], SIGMAS[k + 1], 0.0, SIGMAS[1])
    assert torch.allclose(mean, x + v * (SIGMAS[k + 1] - SIGMAS[k]), atol=1e-6) and std == 0


def test_ode_is_euler_bit_for_bit():
    x, v = pair()
    mean, std = kernels.ode(x, v, SIGMAS[3], SIGMAS[4])
    assert torch.equal(mean, x + v * (SIGMAS[4] - SIGMAS[3])) and std == 0


@given(st.floats(0.01, 2), st.floats(0.3, 10), st.integers(2, 60))
def test_the_first_flow_sde_step_has_std_eta(eta, shift, num_steps):
    sigmas = shifted_sigmas(num_steps, shift).double()
    x, v = pair(dtype=torch.float64)
    assert kernels.flow_sde(x, v, sigmas[0], sigmas[1], eta, sigmas[1])[1].item() == pytest.approx(
        eta, rel=1e-12
    )


@pytest.mark.parametrize("kernel", STOCHASTIC)
@given(k=steps, eta=st.floats(0.05, 0.95))
def test_the_clean_part_of_every_mean_is_one_minus_the_next_sigma(kernel, k, eta):
    """Put x = (1−σ)x₀ + σε and v = ε − x₀: the coefficient of x₀ is 1 − σ′ whatever the noise."""
    sigma, sigma_next, top = SIGMAS[k].double(), SIGMAS[k + 1].double(), SIGMAS[1].double()
    a, c, _ = kernels.step(kernel, sigma, sigma_next, eta, top)
    assert (a * (1 - sigma) - c).item() == pytest.approx(1 - sigma_next.item(), abs=1e-12)


@given(k=steps, eta=st.floats(0, 1))
def test_cps_keeps_the_total_noise_at_the_next_sigma(k, eta):
    sigma, sigma_next = SIGMAS[k].double(), SIGMAS[k + 1].double()
    a, c, s = kernels.step("cps", sigma, sigma_next, eta, SIGMAS[1].double())
    assert math.hypot((a * sigma + c).item(), s.item()) == pytest.approx(sigma_next.item(), abs=1e-12)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 1.7, 10.0])
@given(k=steps)
def test_ddim_keeps_the_marginal_at_any_eta(k, eta, shift):
    """The published step, (1−σ′)x̂₀ + √(σ′² − s²)·ε̂ + s·ξ, from x̂₀ = x − σv and ε̂ = x + (1−σ)v."""
    sigma, sigma_next = (level.item() for level in shifted_sigmas(16, shift).double()[k : k + 2])
    snr, snr_next = (((1 - s) / s) ** 2 if s else math.inf for s in (sigma, sigma_next))
    std = min(eta * sigma_next * math.sqrt(1 - snr / snr_next), sigma_next)
    a, c, s = (part.item() for part in kernels.step("ddim", torch.tensor(sigma).double(), sigma_next, eta, 1))
    assert s == pytest.approx(std, abs=1e-12)
    kept = math.sqrt(sigma_next**2 - std**2)
    assert a == pytest.approx(1 - sigma_next + kept, abs=1e-12)
    assert c == pytest.approx(kept * (1 - sigma) - (1 - sigma_next) * sigma, abs=1e-12)
    assert a * (1 - sigma) - c == pytest.approx(1 - sigma_next, abs=1e-12)
    assert math.hypot(a * sigma + c, s) == pytest.approx(sigma_next, abs=1e-12)


@given(k=steps, seed=st.integers(0, 5))
def test_ddim_without_noise_is_euler_to_the_last_digits(k, seed):
    x, v = pair(seed, torch.float64)
    sigma, sigma_next = SIGMAS[k].double(), SIGMAS[k + 1].double()
    mean, std = kernels.ddim(x, v, sigma, sigma_next, 0.0, SIGMAS[1])
    assert (mean - (x + v * (sigma_next - sigma))).abs().max() < 1e-12 and std == 0


def test_ddim_from_pure_noise_needs_no_bound_of_its_own():
    for eta in (0.5, 1.0, 3.0):
        assert kernels.step("ddim", 1.0, 0.9, eta, 0.9).std.item() == pytest.approx(min(eta, 1) * 0.9)


def flow_against_ddim(sigma, width, eta):
    """Divide the noise of flow_sde by that of ddim, over a step of this width."""
    here = torch.tensor(sigma, dtype=torch.float64)
    flow, ddim = (kernels.step(name, here, sigma - width, eta, 0.99).std for name in ("flow_sde", "ddim"))
    return (flow / ddim).item()


@pytest.mark.parametrize(("width", "ratio"), [(1e-2, 0.7355), (1e-3, 0.7099), (1e-4, 0.7074)])
@pytest.mark.parametrize("eta", [0.1, 0.5, 0.7])
def test_over_small_steps_flow_sde_strays_less_than_ddim_by_the_root_of_two(eta, width, ratio):
    """So flow_sde at η = .7 explores as ddim does at η = .5: .7/√2."""
    assert flow_against_ddim(0.6, width, eta) == pytest.approx(ratio, abs=5e-5)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 0.9])
def test_that_ratio_has_its_limit_at_every_noise_level(sigma):
    assert flow_against_ddim(sigma, 1e-7, 0.5) == pytest.approx(1 / math.sqrt(2), abs=1e-5)


def test_dance_sde_is_the_score_form():
    """DanceGRPO writes x + (v − ½g²∇log p)Δ with the score −(x + (1−σ)v)/σ; it is the same mean."""
    x, v = pair(dtype=torch.float64)
    sigma, sigma_next, eta = SIGMAS[5].double(), SIGMAS[6].double(), 0.3
    score = -(x + (1 - sigma) * v) / sigma
    expected = x + (v - 0.5 * eta**2 * score) * (sigma_next - sigma)
    mean, std = kernels.dance_sde(x, v, sigma, sigma_next, eta, SIGMAS[1])
    assert (mean - expected).abs().max() < 1e-15 and std.item() == pytest.approx(
        eta * math.sqrt(sigma - sigma_next), rel=1e-12
    )


@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_sigmas_may_differ_within_a_batch(kernel):
    x, v = pair()
    both, stds = STOCHASTIC[kernel](x, v, SIGMAS[[2, 7]], SIGMAS[[3, 8]], 0.5, SIGMAS[1])
    for i, k in enumerate((2, 7)):
        mean, std = STOCHASTIC[kernel](x[i : i + 1], v[i : i + 1], SIGMAS[k], SIGMAS[k + 1], 0.5, SIGMAS[1])
        assert torch.equal(both[i : i + 1], mean) and stds[i] == std


def test_log_prob_is_the_mean_over_elements():
    x, mean = pair()
    expected = torch.distributions.Normal(mean, 0.3).log_prob(x).flatten(1).mean(1)
    assert torch.allclose(kernels.log_prob(x, mean, 0.3), expected, atol=1e-6)


def test_dpm_2m_is_exact_where_the_denoised_latent_is_linear_in_the_log_snr():
    """The second-order step integrates x₀(λ) = α + βλ exactly in the limit of its midpoint rule: error
    falls with the cube of the step.
    """
    errors = []
    for width in (0.2, 0.1):
        lam = torch.tensor([0.0, width, 2 * width], dtype=torch.float64)
        sigma = 1 / (1 + lam.exp())
        fine = torch.linspace(lam[1], lam[2], 20001, dtype=torch.float64)
        x = torch.tensor(0.7, dtype=torch.float64)
        s = 1 / (1 + fine.exp())
        exact = x * s[-1] / s[0]
        weight = s[-1] * fine.exp() * (0.4 + 0.9 * fine)
        exact = exact + torch.trapezoid(weight, fine)
        d = [0.4 + 0.9 * lam[i] for i in (0, 1)]
        a, b, c = kernels.dpm_2m_step(sigma[0], sigma[1], sigma[2])
        v = (x - d[1]) / sigma[1]
        errors.append((a * x + b * v + c * d[0] - exact).abs().item())
    assert errors[1] < errors[0] / 6


@pytest.mark.parametrize("k", [0, 15])
def test_dpm_2m_is_defined_at_both_ends(k):
    assert all(
        torch.isfinite(coef) for coef in kernels.dpm_2m_step(SIGMAS[max(k - 1, 0)], SIGMAS[k], SIGMAS[k + 1])
    )
