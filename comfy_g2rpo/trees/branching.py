"""Trees whose branches split again: BranchGRPO (arXiv 2509.06040) and TreeGRPO (arXiv 2512.08153)."""

from __future__ import annotations

from collections.abc import Sequence

from ..methods.step_choice import split_factor
from ..plan import Plan, PlanBuilder, State, check_steps, eta_at
from ..schedule import completion_indices


def branching(
    num_steps: int,
    stochastic_steps: Sequence[int],
    split_steps: Sequence[int],
    group_size: int,
    *,
    kernel: str = "flow_sde",
    eta: float | Sequence[float] = 0.7,
    trained_steps: Sequence[int] | None = None,
    starts: int = 1,
    coarsest: int = 1,
) -> Plan:
    """Plan a tree per start noise in which every branch splits at the split steps, down to G images.

    All other stochastic steps go on with one draw per branch; the rest is deterministic. A split makes
    `split_factor` children of each branch. The nodes that a trained step leads to are one comparison group:
    their values are the mean reward of the images beneath (`Plan.values`), so that groups grow with the depth
    (2, 4, 8, 16). `coarsest` > 1 approximates the steps after the last stochastic one, as in `independent`.
    """
    stochastic = sorted({*stochastic_steps, *split_steps})
    check_steps(num_steps, stochastic)
    factor = split_factor(group_size, len(set(split_steps)))
    trained = stochastic if trained_steps is None else sorted(set(trained_steps))
    tree, last = PlanBuilder(num_steps), stochastic[-1]
    for start in range(starts):
        nodes = [tree.root()]
        for j in range(num_steps if coarsest == 1 else last + 1):
            if j not in stochastic:
                nodes = [tree.follow(node, [j + 1]) for node in nodes]
                continue
            parents = [node for node in nodes for _ in range(factor if j in split_steps else 1)]
            group = start * len(trained) + trained.index(j) if j in trained else -1
            nodes = [
                tree.add(State(j + 1, parent, kernel, eta_at(eta, j), tree.draw(), group, member))
                for member, parent in enumerate(parents)
            ]
        for node in nodes:
            if coarsest > 1:
                node = tree.finish(node, completion_indices(num_steps, last, coarsest)[1:], "dpm_2m")
            tree.score(node)
    return tree.build()
