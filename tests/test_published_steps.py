"""The step functions of the published methods, each written out in plain numbers from its own formula.

Where ours deviates, and why:

- The noise levels are given to the model as they are; the published code hands it int(1000σ)/1000.
- States are float32, where the published code keeps some in bfloat16 between a step and its log-probability.
- DanceGRPO draws noise at the last step and then shows the rewards the prediction before it, so that this
  noise is never seen. Ours takes the last step without noise, which is that prediction.
- MixGRPO-Flash's solver takes the state before the last noise for the past of the first step after it. Ours
  takes that step by Euler, for the noise has moved the state off that path.
- Flow-CPS writes −‖x′ − mean‖² for the log-probability. Ours is the Gaussian's own; step_weight: variance
  brings the factor 2s² between them back.
"""

import math

import pytest
import torch

from comfy_g2rpo import kernels
from comfy_g2rpo.plan import PlanBuilder
from comfy_g2rpo.recipes import RECIPES, build_plan
from comfy_g2rpo.schedule import shifted_sigmas

T, SHIFT = 16, 3.0
STEPS = [0, 1, 7, 8, T - 2, T - 1]  # the first, middle and last ones
ELEMENTS = 5


def levels(shift=SHIFT, count=T):
    """Return sd3_time_shift of linspace(1, 0, T + 1)."""
    return [shift * t / (1 + (shift - 1) * t) for t in (1 - i / count for i in range(count + 1))]


def numbers(k):
    """Return x, v and ε as plain lists."""
    generator = torch.Generator().manual_seed(100 + k)
    return torch.randn(3, ELEMENTS, generator=generator).double().tolist()


def gaussian(after, mean, std):
    """Return the mean over the elements of the Gaussian log-density."""
    terms = [
        -((a - m) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
        for a, m in zip(after, mean, strict=True)
    ]
    return sum(terms) / len(terms)


def flow_grpo(x, v, sigmas, k, eta):
    """Return mean and std of Flow-GRPO's step (arXiv 2505.05470, eq. 9), which MixGRPO's SDE step is, too."""
    sigma, after = sigmas[k], sigmas[k + 1]
    dt = after - sigma
    diffusion = math.sqrt(sigma / (1 - (sigmas[1] if k == 0 else sigma))) * eta
    drift = diffusion**2 / (2 * sigma)
    mean = [a * (1 + drift * dt) + b * (1 + drift * (1 - sigma)) * dt for a, b in zip(x, v, strict=True)]
    return mean, diffusion * math.sqrt(-dt)


def dance_grpo(x, v, sigmas, k, eta):
    """Return mean and std of DanceGRPO's step (arXiv 2505.07818): Euler, and a term in the score."""
    sigma, after = sigmas[k], sigmas[k + 1]
    dt, mean = after - sigma, []
    for a, b in zip(x, v, strict=True):
        clean = a - sigma * b
        score = -(a - clean * (1 - sigma)) / sigma**2
        mean.append(a + dt * b - 0.5 * eta**2 * score * dt)
    return mean, eta * math.sqrt(-dt)


def flow_cps(x, v, sigmas, k, eta):
    """Return mean and std of the coefficients-preserving step (arXiv 2509.05952)."""
    sigma, after = sigmas[k], sigmas[k + 1]
    std = after * math.sin(eta * math.pi / 2)
    mean = []
    for a, b in zip(x, v, strict=True):
        clean, noise = a - sigma * b, a + (1 - sigma) * b
        mean.append((1 - after) * clean + math.sqrt(max(after**2 - std**2, 0)) * noise)
    return mean, std


def flash(x, clean, clean_before, sigmas, k):
    """Return MixGRPO-Flash's deterministic step (arXiv 2507.21802): DPM-Solver++, second order, midpoint;
    first order into 0."""
    before, here, after = sigmas[k - 1], sigmas[k], sigmas[k + 1]
    if after == 0:
        return clean
    log_snr = [math.log(1 - s) - math.log(s) for s in (before, here, after)]
    h, h_before = log_snr[2] - log_snr[1], log_snr[1] - log_snr[0]
    rise = (1 - after) * (math.exp(-h) - 1)
    return [
        after / here * a - rise * c - 0.5 * rise * (c - d) * h / h_before
        for a, c, d in zip(x, clean, clean_before, strict=True)
    ]


PUBLISHED = {"flow_sde": (flow_grpo, 0.7), "dance_sde": (dance_grpo, 0.3), "cps": (flow_cps, 0.8)}


def test_the_noise_levels_are_the_published_ones():
    assert shifted_sigmas(T, SHIFT).tolist() == pytest.approx(levels(), abs=1e-7)


@pytest.mark.parametrize("kernel", PUBLISHED)
@pytest.mark.parametrize("k", STEPS)
@pytest.mark.parametrize("strength", [1.0, 0.5, 1.7])
def test_mean_std_and_log_probability_are_the_published_ones(kernel, k, strength):
    formula, eta = PUBLISHED[kernel]
    eta = min(strength * eta, 0.95) if kernel == "cps" else strength * eta
    sigmas, (x, v, noise) = levels(), numbers(k)
    mean, std = formula(x, v, sigmas, k, eta)
    tensors = [torch.tensor([part], dtype=torch.float64) for part in (x, v)]
    exact = torch.tensor(sigmas, dtype=torch.float64)
    ours, our_std = getattr(kernels, kernel)(*tensors, exact[k], exact[k + 1], eta, exact[1])
    assert ours[0].tolist() == pytest.approx(mean, abs=1e-6) and our_std.item() == pytest.approx(
        std, abs=1e-6
    )
    if std:
        after = [m + std * e for m, e in zip(mean, noise, strict=True)]
        found = kernels.log_prob(torch.tensor([after], dtype=torch.float64), ours, our_std)
        assert found.item() == pytest.approx(gaussian(after, mean, std), abs=1e-6)
    else:
        assert kernel == "cps" and k == T - 1


@pytest.mark.parametrize(
    ("kernel", "k", "mean", "std"),
    [
        # x = 1, v = −1/2 on T = 16, shift 3: worked out by hand, such as .951 + .025 · 1.245 for the second.
        ("flow_sde", 0, 0.765869565, 0.7),
        ("flow_sde", 8, 0.982125, 0.271108834),
        ("flow_sde", 15, 1.05475, 0.127801930),
        ("dance_sde", 0, 1.009891304, 0.044232587),
        ("dance_sde", 8, 1.022375, 0.067082039),
        ("dance_sde", 15, 1.057083333, 0.122474487),
        ("cps", 0, 0.334907929, 0.930381375),
    ],
)
def test_single_numbers(kernel, k, mean, std):
    formula, eta = PUBLISHED[kernel]
    (plain,), plain_std = formula([1.0], [-0.5], levels(), k, eta)
    sigmas = torch.tensor(levels(), dtype=torch.float64)
    x, v = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), -0.5, dtype=torch.float64)
    ours, our_std = getattr(kernels, kernel)(x, v, sigmas[k], sigmas[k + 1], eta, sigmas[1])
    assert (plain, plain_std) == pytest.approx((mean, std), abs=1e-6)
    assert (ours.item(), our_std.item()) == pytest.approx((mean, std), abs=1e-6)


@pytest.mark.parametrize("k", STEPS[:-1])
def test_flow_cps_counts_a_step_by_twice_its_variance(k):
    """−‖x′ − mean‖²/D is 2s² of the Gaussian log-density, up to what does not depend on the model."""
    sigmas, (x, v, noise) = levels(), numbers(k)
    mean, std = flow_cps(x, v, sigmas, k, 0.8)
    after = [m + std * e for m, e in zip(mean, noise, strict=True)]
    published = -sum((a - m) ** 2 for a, m in zip(after, mean, strict=True)) / ELEMENTS
    constant = math.log(std) + 0.5 * math.log(2 * math.pi)
    assert published == pytest.approx(2 * std**2 * (gaussian(after, mean, std) + constant), abs=1e-9)


@pytest.mark.parametrize("k", [1, 2, 8, T - 2, T - 1])
def test_the_flash_tail_is_the_published_solver(k):
    sigmas, (x, v, before) = levels(), numbers(k)
    clean = [a - sigmas[k] * b for a, b in zip(x, v, strict=True)]
    expected = flash(x, clean, before, sigmas, k) if k > 1 else None
    a, b, c = (coef.item() for coef in kernels.dpm_2m_step(sigmas[k - 1], sigmas[k], sigmas[k + 1]))
    ours = [a * one + b * two + c * past for one, two, past in zip(x, v, before, strict=True)]
    if k > 1:
        assert ours == pytest.approx(expected, abs=1e-6)
    else:
        # From σ = 1 the log-SNR is infinite: the published tail never begins there, ours takes a first-order
        # step.
        kept = sigmas[2] / sigmas[1]
        assert c == 0 and ours == pytest.approx(
            [kept * one + (1 - kept) * two for one, two in zip(x, clean, strict=True)]
        )


def test_the_first_step_after_the_noise_is_eulers():
    """A step by DPM-Solver++ from there would extrapolate from a past before the noise."""
    tree = PlanBuilder(T)
    tree.finish(tree.root(), range(1, T + 1), "dpm_2m")
    assert [state.kernel for state in tree.states[1:3]] == ["ode", "dpm_2m"]


@pytest.mark.parametrize("name", ["dance_grpo", "mix_grpo", "flow_grpo", "branch_grpo"])
def test_the_picture_is_the_prediction_of_the_last_step(name):
    """No noise at the last step: Euler to σ = 0 is x − σv, what DanceGRPO's code decodes."""
    plan = build_plan(RECIPES[name], iteration=10**4)
    assert {plan.states[image].kernel for image in plan.images} == {"ode"}
    sigmas = shifted_sigmas(T).double()
    coefficients = plan.coefficients(sigmas)
    image = plan.images[0]
    assert (coefficients.x_coef[image].item(), coefficients.std[image].item()) == (1.0, 0.0)
    assert coefficients.v_coef[image].item() == pytest.approx(-sigmas[T - 1].item(), abs=1e-7)
