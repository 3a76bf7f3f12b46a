"""What a rollout runs for one prompt group: a trie of states, known before anything runs.

A state is (schedule index, parent, edge). An edge is deterministic ("ode", "dpm_2m") or stochastic (a kernel,
its eta, a noise id). A leaf is a finished state to score. Every tree of the literature is such a trie, and
each distinct state is evaluated once. Stochastic edges that are trained carry their place (group, member) in
the comparison that yields their advantage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
from torch import Tensor

from .kernels import dpm_2m_step, step
from .schedule import Terminal, completion_indices

ROOT = -1
DETERMINISTIC = ("ode", "dpm_2m")


@dataclass(frozen=True)
class State:
    """One state and the edge that leads to it; `noise` identifies its draw: mirrored below 0, none at 0."""

    index: int
    parent: int = ROOT
    kernel: str = "ode"
    eta: float = 0.0
    noise: int = 0
    group: int = -1
    member: int = -1

    @property
    def trained(self) -> bool:
        """Return whether the edge to this state gets an advantage: of a root, its start noise."""
        return self.group >= 0


@dataclass(frozen=True)
class Leaf:
    """A finished state to score, and which granularity (position in Λ) it stands for.

    A probe is the finished state of a completion that says what another state is worth: `of`.
    """

    state: int
    granularity: int = 0
    of: int = ROOT


class Coefficients:
    """Tensors [N] of the edges x′ = x_coef·x + v_coef·v + past_coef·denoised_before + std·ε, and sigmas.

    A root is pure noise: std 1, the rest 0. `table` [N, 4] holds the coefficients side by side.
    """

    def __init__(self, plan: Plan, sigmas: Tensor) -> None:
        exact = sigmas.double()

        @cache
        def edge(kernel: str, eta: float, before: int, here: int, there: int) -> tuple[float, ...]:
            if kernel == "dpm_2m":
                return *map(float, dpm_2m_step(exact[before], exact[here], exact[there])), 0.0
            x_coef, v_coef, std = map(float, step(kernel, exact[here], exact[there], eta, exact[1]))
            return x_coef, v_coef, 0.0, std

        rows = [(0.0, 0.0, 0.0, 1.0)] * len(plan.states)
        for i, state in enumerate(plan.states):
            if state.parent != ROOT:
                parent = plan.states[state.parent]
                before = plan.states[parent.parent].index if parent.parent != ROOT else 0
                rows[i] = edge(state.kernel, state.eta, before, parent.index, state.index)
        self.table = torch.tensor(rows, dtype=torch.float64).float()
        self.x_coef, self.v_coef, self.past_coef, self.std = self.table.T
        self.sigma = sigmas[torch.tensor([s.index for s in plan.states])].float()


@dataclass(frozen=True)
class Plan:
    """The states of one prompt group in topological order (parents first), and its leaves."""

    num_steps: int
    states: tuple[State, ...]
    leaves: tuple[Leaf, ...]

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """List every state's children."""
        found: list[list[int]] = [[] for _ in self.states]
        for i, state in enumerate(self.states):
            if state.parent != ROOT:
                found[state.parent].append(i)
        return tuple(map(tuple, found))

    @cached_property
    def forwards(self) -> int:
        """Count the velocity evaluations: one per state that something follows."""
        return sum(map(bool, self.children))

    @cached_property
    def images(self) -> tuple[int, ...]:
        """List the distinct finished states, in order: what is decoded and scored."""
        return tuple(sorted({leaf.state for leaf in self.leaves}))

    @property
    def pictures(self) -> int:
        """Count the pictures that are decoded and judged."""
        return len(self.images)

    @property
    def rows(self) -> int:
        """Count the states at which an update differentiates."""
        return len(self.forks)

    @cached_property
    def transitions(self) -> tuple[int, ...]:
        """List the trained stochastic edges by the state they lead to; a start noise is no edge."""
        return tuple(i for i, state in enumerate(self.states) if state.trained and state.parent != ROOT)

    @cached_property
    def forks(self) -> tuple[int, ...]:
        """List the states that trained edges leave: what the learner needs."""
        return tuple(sorted({self.states[i].parent for i in self.transitions}))

    @cached_property
    def trunk(self) -> tuple[bool, ...]:
        """Mark the states with a stochastic edge beneath them: run first, they open the most work."""
        marks = [False] * len(self.states)
        for i in range(len(self.states) - 1, 0, -1):
            state = self.states[i]
            if state.parent != ROOT and (marks[i] or state.kernel not in DETERMINISTIC):
                marks[state.parent] = True
        return tuple(marks)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (K, G, L): comparison groups, members, granularities."""
        trained = [state for state in self.states if state.trained]
        if not trained:
            return 0, 0, 0
        level = max(leaf.granularity for leaf in self.leaves)
        return 1 + max(s.group for s in trained), 1 + max(s.member for s in trained), 1 + level

    def coefficients(self, sigmas: Tensor) -> Coefficients:
        """Compute every edge's coefficients once, for rollout and learner alike; sigmas: [T+1]."""
        if len(sigmas) != self.num_steps + 1:
            count = self.num_steps
            raise ValueError(f"sigmas has {len(sigmas)} levels; a plan of {count} steps needs {count + 1}")
        return Coefficients(self, sigmas)

    def values(self, scores: Tensor) -> Tensor:
        """Give each trained edge the mean score of the leaves beneath it: [R, images] → [R, K, G, L].

        Leaves without a score (NaN) are left out; NaN where there is no other; probes do not count. In the
        singular tree that is one leaf per granularity; in a tree that splits again it is BranchGRPO's fusion
        (arXiv 2509.06040).
        """
        column = {state: i for i, state in enumerate(self.images)}
        places, sources = [], []
        _, members, levels = self.shape
        for leaf in self.leaves:
            at = leaf.state if leaf.of == ROOT else ROOT
            while at != ROOT:
                state = self.states[at]
                if state.trained:
                    places.append((state.group * members + state.member) * levels + leaf.granularity)
                    sources.append(column[leaf.state])
                at = state.parent
        place = torch.tensor(places, dtype=torch.long, device=scores.device)
        size = self.shape[0] * members * levels
        found, none = scores[:, sources], scores.new_zeros(scores.shape[0], size)
        total = none.index_add(1, place, found.nan_to_num(0.0, torch.inf, -torch.inf))
        count = none.index_add(1, place, (~found.isnan()).to(scores.dtype))
        return (total / count).reshape(scores.shape[0], *self.shape)

    def final_values(self, scores: Tensor) -> Tensor:
        """Give each trained edge the scores that its advantage comes from; here all of them."""
        return self.values(scores)

    def gains(self, scores: Tensor) -> Tensor:
        """Give each trained edge what it raised the score by: [R, images] → [R, K, G, 1].

        The score of the state that it leads to minus that of the state it leaves, as their probes finished
        them (DenseGRPO, arXiv 2601.20218); NaN where either has no probe.
        """
        column = {state: i for i, state in enumerate(self.images)}
        worth = {leaf.of: column[leaf.state] for leaf in self.leaves if leaf.of != ROOT}
        made = scores.new_full((scores.shape[0], *self.shape[:2], 1), torch.nan)
        for i in self.transitions:
            edge = self.states[i]
            if i in worth and edge.parent in worth:
                made[:, edge.group, edge.member, 0] = scores[:, worth[i]] - scores[:, worth[edge.parent]]
        return made

    def credited(self, scores: Tensor, credit: str = "final") -> Tensor:
        """Return what trained edges are credited with: `final_values`, or `gains` where credit is "gain"."""
        return self.gains(scores) if credit == "gain" else self.final_values(scores)


@dataclass
class PlanBuilder:
    """Grow a plan; a state that already stands in the trie is returned, not added again."""

    num_steps: int
    states: list[State] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
    _known: dict[State, int] = field(default_factory=dict)
    _draws: int = 0

    @classmethod
    def of(cls, plan: Plan) -> PlanBuilder:
        """Go on with a plan."""
        known = {state: i for i, state in enumerate(plan.states)}
        draws = max((abs(state.noise) for state in plan.states), default=0)
        return cls(plan.num_steps, [*plan.states], [*plan.leaves], known, draws)

    def draw(self) -> int:
        """Reserve a fresh noise id."""
        self._draws += 1
        return self._draws

    def add(self, state: State) -> int:
        """Return the state's number, adding it if it is new."""
        if state not in self._known:
            self._known[state] = len(self.states)
            self.states.append(state)
        return self._known[state]

    def root(self) -> int:
        """Add a start state with noise of its own."""
        return self.add(State(0, noise=self.draw()))

    def follow(self, start: int, indices: Iterable[int], kernel: str = "ode") -> int:
        """Walk deterministically from `start` over schedule indices; return the last state."""
        for index in indices:
            start = self.add(State(index, start, kernel))
        return start

    def finish(self, start: int, indices: Sequence[int], solver: str) -> int:
        # The first step by Euler: a multistep solver's past would be that before the noise.
        return self.follow(self.follow(start, indices[:1]), indices[1:], solver)

    def score(self, state: int, granularity: int = 0, of: int = ROOT) -> None:
        """Make a finished state a leaf; `of` names the state that it is a probe of."""
        self.leaves.append(Leaf(state, granularity, of))

    def build(self) -> Plan:
        """Freeze the trie."""
        return Plan(self.num_steps, tuple(self.states), tuple(self.leaves))


def eta_at(eta: float | Sequence[float], step: int) -> float:
    """Return a step's exploration strength: the one for all steps, or its own of one per step."""
    return eta[step] if isinstance(eta, Sequence) else eta


def singular(
    num_steps: int,
    branch_steps: Sequence[int],
    group_size: int,
    granularities: Sequence[int] = (1,),
    *,
    kernel: str = "flow_sde",
    eta: float | Sequence[float] = 0.7,
    terminal: Terminal = "exact",
    window: int = 1,
    starts: int = 1,
    antithetic: bool = False,
    anchor_image: bool = False,
    coarsest: int = 1,
) -> Plan:
    """Plan G²RPO's tree: per start an anchor, at each branch step G branches, completed per granularity.

    `window` > 1 keeps the branches stochastic for further steps (Flow-GRPO-Fast); `antithetic` mirrors every
    second branch's noise. `coarsest` > 1 approximates the completions of smaller granularities: at that
    stride, by the second-order solver, from the same noises.
    """
    check_steps(num_steps, branch_steps)
    tree = PlanBuilder(num_steps)
    group = 0
    for _ in range(starts):
        anchor = [tree.root()]
        for index in range(1, num_steps + 1 if anchor_image else max(branch_steps) + 1):
            anchor.append(tree.follow(anchor[-1], [index]))
        for k in sorted(set(branch_steps)):
            steps = range(k, min(k + window, num_steps))
            for member in range(group_size):
                state = anchor[k]
                for offset, j in enumerate(steps):
                    noise = -tree._draws if antithetic and window == 1 and member % 2 else tree.draw()
                    state = tree.add(
                        State(j + 1, state, kernel, eta_at(eta, j), noise, group + offset, member)
                    )
                for level, stride in enumerate(granularities):
                    solver, end = ("dpm_2m", "exact") if stride < coarsest else ("ode", terminal)
                    rest = completion_indices(num_steps, steps[-1], max(stride, coarsest), end)[1:]
                    tree.score(tree.finish(state, rest, solver), level)
            group += len(steps)
    return tree.build()


def independent(
    num_steps: int,
    stochastic_steps: Sequence[int],
    group_size: int,
    *,
    kernel: str = "flow_sde",
    eta: float | Sequence[float] = 0.7,
    trained_steps: Sequence[int] | None = None,
    shared_start: bool = False,
    tail: str = "ode",
    coarsest: int = 1,
) -> Plan:
    """Plan G trajectories that are stochastic on the given steps (Flow-GRPO, DanceGRPO, MixGRPO).

    Common prefixes are still run once. `trained_steps` (default: all the stochastic ones) get an advantage;
    `tail` is the solver of the steps after the last stochastic one. `coarsest` > 1 approximates those steps
    but the first: at that stride, by the second-order solver.
    """
    check_steps(num_steps, stochastic_steps)
    trained = sorted(stochastic_steps if trained_steps is None else trained_steps)
    tree = PlanBuilder(num_steps)
    roots = [tree.root()] * group_size if shared_start else [tree.root() for _ in range(group_size)]
    for member, state in enumerate(roots):
        for j in range(num_steps if coarsest == 1 else max(stochastic_steps) + 1):
            if j in stochastic_steps:
                place = (trained.index(j), member) if j in trained else (-1, -1)
                state = tree.add(State(j + 1, state, kernel, eta_at(eta, j), tree.draw(), *place))
            else:
                state = tree.follow(state, [j + 1], tail if j > max(stochastic_steps) else "ode")
        if coarsest > 1:
            rest = completion_indices(num_steps, max(stochastic_steps), coarsest)[1:]
            state = tree.finish(state, rest, "dpm_2m")
        tree.score(state)
    return tree.build()


def deterministic(num_steps: int) -> Plan:
    """Plan one ODE trajectory: what evaluation runs."""
    tree = PlanBuilder(num_steps)
    tree.score(tree.follow(tree.root(), range(1, num_steps + 1)))
    return tree.build()


def count_forwards(
    num_steps: int,
    branch_steps: Sequence[int],
    group_size: int,
    granularities: Sequence[int],
    anchor_image: bool = False,
    terminal: Terminal = "exact",
) -> int:
    """Count the model evaluations of one G²RPO group, everything shared."""
    tree = {"terminal": terminal, "anchor_image": anchor_image}
    return singular(num_steps, branch_steps, group_size, granularities, **tree).forwards


def check_steps(num_steps: int, steps: Sequence[int]) -> None:
    """Raise ValueError unless `steps` is a non-empty choice from 0…num_steps−1."""
    if not len(steps) or min(steps) < 0 or max(steps) >= num_steps:
        choice = f"choose at least one from 0…{num_steps - 1} for {num_steps} steps"
        raise ValueError(f"branch steps are {list(steps)}; {choice}")
