import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfy_g2rpo.schedule import completion_indices, shifted_sigmas

PAPER = [
    1,
    0.97826,
    0.95455,
    0.92857,
    0.9,
    0.86842,
    0.83333,
    0.79412,
    0.75,
    0.7,
    0.64286,
    0.57692,
    0.5,
    0.40909,
    0.3,
    0.16667,
    0,
]


def test_the_papers_schedule():
    sigmas = shifted_sigmas(16, 3.0)
    assert sigmas.dtype == torch.float32
    assert torch.allclose(sigmas, torch.tensor(PAPER), atol=5e-6)


@given(st.integers(1, 200), st.floats(0.1, 20))
def test_sigmas_fall_strictly_from_one_to_zero(num_steps, shift):
    sigmas = shifted_sigmas(num_steps, shift)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


@pytest.mark.parametrize(
    ("branch_step", "granularity", "published", "exact"),
    [
        (0, 2, [1, 2, 4, 6, 8, 10, 12, 14, 16], [1, 2, 4, 6, 8, 10, 12, 14, 16]),
        (1, 2, [2, 3, 5, 7, 9, 11, 13, 16], [2, 3, 5, 7, 9, 11, 13, 15, 16]),
        (0, 3, [1, 2, 5, 8, 11, 16], [1, 2, 5, 8, 11, 14, 16]),
        (15, 2, [16], [16]),
        (14, 5, [15, 16], [15, 16]),
        (13, 5, [14, 16], [14, 15, 16]),
    ],
)
def test_suffixes_as_published_and_exact(branch_step, granularity, published, exact):
    assert completion_indices(16, branch_step, granularity, "published") == published
    assert completion_indices(16, branch_step, granularity) == exact


@given(st.integers(1, 60), st.integers(0, 59), st.integers(1, 70), st.sampled_from(["exact", "published"]))
def test_suffixes_rise_from_the_branch_to_the_end(num_steps, branch_step, granularity, terminal):
    branch_step = min(branch_step, num_steps - 1)
    indices = completion_indices(num_steps, branch_step, granularity, terminal)
    assert indices[0] == branch_step + 1 and indices[-1] == num_steps and indices == sorted(set(indices))


@pytest.mark.parametrize(
    "call",
    [
        lambda: shifted_sigmas(0),
        lambda: shifted_sigmas(4, 0),
        lambda: completion_indices(4, 4, 1),
        lambda: completion_indices(4, 0, 0),
    ],
)
def test_impossible_schedules_are_refused(call):
    with pytest.raises(ValueError, match=r"num_steps|shift|branch_step|granularity"):
        call()
