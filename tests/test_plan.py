import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfy_g2rpo.plan import ROOT, PlanBuilder, State, count_forwards, deterministic, independent, singular
from comfy_g2rpo.schedule import completion_indices


@pytest.mark.parametrize(
    ("granularities", "published", "exact", "images"),
    [
        ((1,), 1112, 1112, 96),
        ((1, 2), 1496, 1544, 192),
        ((1, 3), 1316, 1388, 192),
        ((1, 2, 3), 1700, 1820, 288),
    ],
)
def test_the_methods_forward_counts(granularities, published, exact, images):
    assert count_forwards(16, range(8), 12, granularities, terminal="published") == published
    assert count_forwards(16, range(8), 12, granularities) == exact
    assert count_forwards(16, range(8), 12, granularities, anchor_image=True) == exact + 8
    assert len(singular(16, range(8), 12, granularities).images) == images


@given(st.data())
def test_forwards_are_the_anchor_and_the_distinct_states_of_each_branch(data):
    num_steps = data.draw(st.integers(1, 24))
    steps = data.draw(st.sets(st.integers(0, num_steps - 1), min_size=1))
    group, strides = (
        data.draw(st.integers(1, 5)),
        tuple(data.draw(st.sets(st.integers(1, 26), min_size=1, max_size=4))),
    )
    terminal = data.draw(st.sampled_from(["exact", "published"]))
    prefixes = 0
    for k in steps:
        lists = [completion_indices(num_steps, k, stride, terminal)[:-1] for stride in strides]
        prefixes += len({tuple(path[: i + 1]) for path in lists for i in range(len(path))})
    assert (
        count_forwards(num_steps, sorted(steps), group, strides, terminal=terminal)
        == max(steps) + 1 + group * prefixes
    )


@given(st.integers(1, 12), st.integers(2, 5), st.booleans())
def test_every_state_follows_its_parent_and_every_image_ends_the_schedule(num_steps, group, shared):
    for plan in (
        singular(num_steps, [0, num_steps - 1], group, (1, 2)),
        independent(num_steps, range(num_steps), group, shared_start=shared),
    ):
        assert all(
            s.parent < i and (s.parent == ROOT or plan.states[s.parent].index < s.index)
            for i, s in enumerate(plan.states)
        )
        assert all(plan.states[i].index == num_steps for i in plan.images)
        assert len(set(plan.states)) == len(plan.states)


def test_the_anchor_stops_at_the_last_branch_step():
    assert singular(16, [0, 2], 1).forwards == 3 + 15 + 13


def test_independent_trajectories_share_their_common_prefix():
    assert independent(8, [4, 5], 6, shared_start=True).forwards == 5 + 6 * 3
    assert independent(8, [4, 5], 6).forwards == 6 * 8


def test_a_window_gives_every_step_its_own_comparison():
    plan = singular(8, [2], 4, window=2)
    assert plan.shape == (2, 4, 1) and len(plan.forks) == 1 + 4


def test_antithetic_branches_mirror_their_noise():
    noises = [
        plan_state.noise for plan_state in singular(8, [1], 4, antithetic=True).states if plan_state.trained
    ]
    assert noises[0] == -noises[1] and noises[2] == -noises[3] and noises[0] != noises[2]


def test_values_put_each_leaf_in_its_place():
    plan = singular(4, [0, 1], 2, (1, 2))
    scores = torch.arange(len(plan.images)).float()[None]
    values = plan.values(scores)
    assert values.shape == (1, 2, 2, 2)
    for leaf in plan.leaves:
        state = leaf.state
        while not plan.states[state].trained:
            state = plan.states[state].parent
        edge = plan.states[state]
        assert (
            values[0, edge.group, edge.member, leaf.granularity] == scores[0, plan.images.index(leaf.state)]
        )


def test_untrained_steps_get_no_advantage():
    plan = independent(5, range(5), 3, trained_steps=[1, 3])
    assert plan.shape == (2, 3, 1) and len(plan.transitions) == 6


def test_a_tree_that_splits_again_fuses_the_scores_beneath():
    """BranchGRPO: binary splits at steps 0 and 2; an early edge is worth the mean of its leaves."""
    tree = PlanBuilder(4)
    root = tree.root()
    for i in range(2):
        early = tree.add(State(1, root, "dance_sde", 0.3, tree.draw(), 0, i))
        middle = tree.follow(early, [2])
        for j in range(2):
            late = tree.add(State(3, middle, "dance_sde", 0.3, tree.draw(), 1, 2 * i + j))
            tree.score(tree.follow(late, [4]))
    plan = tree.build()
    values = plan.values(torch.tensor([[1.0, 3.0, 10.0, 20.0]]))
    assert values[0, 0, :2, 0].tolist() == [2, 15] and values[0, 0, 2:, 0].isnan().all()
    assert values[0, 1, :, 0].tolist() == [1, 3, 10, 20]
    assert plan.forwards == 1 + 2 * 2 + 4


def test_a_probe_is_a_completion_scored_from_any_state():
    """DenseGRPO: an ODE completion hangs from every node of a stochastic trajectory.

    The probes share no state with it.
    """
    tree = PlanBuilder(3)
    state = tree.root()
    for k in range(3):
        tree.score(tree.follow(state, range(k + 1, 4)))
        state = tree.add(State(k + 1, state, "flow_sde", 0.7, tree.draw(), k, 0))
    tree.score(state)
    plan = tree.build()
    assert len(plan.images) == 4 and plan.forwards == 3 + 2 + 1


def test_a_tail_may_be_second_order():
    assert [s.kernel for s in independent(4, [1], 1, tail="dpm_2m").states[1:]] == [
        "ode",
        "flow_sde",
        "dpm_2m",
        "dpm_2m",
    ]


def test_evaluation_is_one_trajectory():
    plan = deterministic(5)
    assert plan.forwards == 5 and len(plan.images) == 1 and plan.shape == (0, 0, 0)


@pytest.mark.parametrize("steps", [[], [4], [-1]])
def test_impossible_branch_steps_are_refused(steps):
    with pytest.raises(ValueError, match=r"branch steps.*0…3"):
        singular(4, steps, 2)


def test_a_schedule_of_another_length_is_refused():
    with pytest.raises(ValueError, match="sigmas has 3 levels"):
        deterministic(5).coefficients(torch.linspace(1, 0, 3))
