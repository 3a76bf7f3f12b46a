"""DenseGRPO's plan (arXiv 2601.20218): chains of stochastic steps, and a probe of every state on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..plan import Plan, PlanBuilder, State, check_steps, eta_at
from ..schedule import Terminal, completion_indices


def dense(
    num_steps: int,
    stochastic_steps: Sequence[int],
    group_size: int,
    stride: int = 1,
    terminal: Terminal = "exact",
    *,
    kernel: str = "flow_sde",
    eta: float | Sequence[float] = 0.7,
    trained_steps: Sequence[int] | None = None,
    starts: int = 1,
    shared_start: bool = False,
    coarsest: int = 1,
) -> Plan:
    """Plan G chains per start that are stochastic on the given steps, each trained step probed on both sides.

    All completions have one `stride`, for a gain across two strides would hold the error of both. `starts`
    counts groups, with a start of their own each; `shared_start` lets a group's chains leave one. With stride
    1 a chain of T stochastic steps takes T(T+1)/2 forwards. `coarsest` is that of `plan.singular`.
    """
    check_steps(num_steps, stochastic_steps)
    trained = sorted(stochastic_steps if trained_steps is None else trained_steps)
    tree = PlanBuilder(num_steps)
    for start in range(starts):
        roots = [tree.root()] * group_size if shared_start else [tree.root() for _ in range(group_size)]
        for member, state in enumerate(roots):
            for j in range(max(stochastic_steps) + 1):
                if j in stochastic_steps:
                    group = start * len(trained) + trained.index(j) if j in trained else -1
                    place = (group, member if j in trained else -1)
                    state = tree.add(State(j + 1, state, kernel, eta_at(eta, j), tree.draw(), *place))
                else:
                    state = tree.follow(state, [j + 1])
            tree.score(complete(tree, state, stride, terminal, coarsest))
    plan = tree.build()
    return probed(plan, {*plan.forks, *plan.transitions}, stride, terminal, coarsest)


def probed(
    plan: Plan, states: Iterable[int], stride: int = 1, terminal: Terminal = "exact", coarsest: int = 1
) -> Plan:
    """Add the completion of every given state as a probe; what the plan already holds of it is shared."""
    tree = PlanBuilder.of(plan)
    for state in sorted(states):
        tree.score(complete(tree, state, stride, terminal, coarsest), of=state)
    return tree.build()


def complete(
    tree: PlanBuilder, state: int, stride: int, terminal: Terminal = "exact", coarsest: int = 1
) -> int:
    """Finish a state as `plan.singular` finishes its branches; return the finished one."""
    solver, end = ("dpm_2m", "exact") if stride < coarsest else ("ode", terminal)
    index = tree.states[state].index
    # Counted one higher, so that a start, too, has a step before it.
    rest = completion_indices(tree.num_steps + 1, index, max(stride, coarsest), end)[1:]
    return tree.finish(state, [i - 1 for i in rest], solver)
