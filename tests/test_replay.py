"""Old forks: what is kept of them, which are chosen, and that they teach what they taught when new."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from test_update import CONDS, SEEDS, rolled
from torch import Tensor
from toys import SHAPE, ToyPolicy

from comfy_g2rpo import kernels
from comfy_g2rpo.files.safe import RunError, read_tensors, write_tensors
from comfy_g2rpo.objectives.policy_gradient import clipped_loss
from comfy_g2rpo.objectives.record_rows import Records
from comfy_g2rpo.objectives.vargrad import vargrad_loss
from comfy_g2rpo.prompts import Prompt
from comfy_g2rpo.recipes import Recipe, recipe
from comfy_g2rpo.replay.old_forks import Fork, choose, refuse_too_many, remembered
from comfy_g2rpo.replay.replay_file import NAME, read_forks, write_forks
from comfy_g2rpo.replay.replay_rows import Batch, Share, after, forks_of, metrics_of, with_old
from comfy_g2rpo.rollout import seeded_noise
from comfy_g2rpo.update import backward, records, update

ALONE = Share(0, 1, lambda found: found)
TEXTS = ("a red circle", "two blue squares")
OBJECTIVES = ("clip", "vargrad")


def small(objective: str = "clip", **changes: object) -> Recipe:
    """Return a recipe of four branches on four steps."""
    return recipe("g2rpo", num_steps=8, group_size=4, objective=objective, **{"replay": 2, **changes})


def rows_of_rollout(made: Recipe, policy: ToyPolicy, iteration: int = 0) -> Records:
    """Roll out, and take the advantages for the rewards, too."""
    rollout, advantages = rolled(made, policy, iteration)
    values = [table + 3 for table in advantages]
    every = made.objective == "vargrad"
    return records(rollout, advantages, samples=True, values=values, every=every)


def encode(texts: Sequence[str]) -> list[float]:
    """Return the conditioning of the toy's prompts."""
    return [CONDS[TEXTS.index(text)] for text in texts]


def learn(
    made: Recipe, policy: ToyPolicy, forks: list[Fork], step: int, rate: float = 1e-2
) -> tuple[list[Fork], dict[str, float], Batch]:
    """Take one update with what is kept; return what is kept afterwards."""
    rows = rows_of_rollout(made, policy, step)
    batch = with_old(rows, CONDS, forks, made, ALONE, step, encode)
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate)
    stats = update(policy, batch.rows, batch.conds, optimizer, made, watch=batch.see)
    new = forks_of(rows, batch, ALONE, TEXTS, SEEDS, step)
    kept = after(forks, new, batch, made, ALONE, step + 1)
    return kept, stats | metrics_of(batch, forks, kept, step), batch


def fork(
    made: int = 0, best: float = 0.0, pull: float = 1.0, prompt: str = TEXTS[0], shape: tuple = SHAPE
) -> Fork:
    """Make a fork of two branches."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(made))
    members = torch.tensor([[1.0, -1.0], [best, best - 1], [3.0, -3.0]], dtype=torch.float64)
    return Fork(
        x, 2 * x, members, 0.5, -0.1, 0.3, 0.5, -0.1, step=2, made=made, pull=pull, prompt=prompt, seed=7
    )


def test_the_oldest_go_first_by_number_and_by_age() -> None:
    forks = [fork(made) for made in (0, 0, 1, 2)]
    made = small(replay_size=3, replay_age=100)
    assert [f.made for f in remembered(forks, [fork(3)], made, 4)] == [1, 2, 3]
    young = small(replay_size=100, replay_age=2)
    assert [f.made for f in remembered(forks, [fork(3)], young, 4)] == [2, 3]
    assert [f.made for f in remembered(forks, [], young, 4)] == [2]
    # One step of life is enough for the next step.
    assert [f.made for f in remembered([], [fork(3)], small(replay_age=1), 4)] == [3]


@pytest.mark.parametrize("by", ["uniform", "rank", "draw"])
def test_so_many_are_chosen_without_repetition_by_the_seed_alone(by: str) -> None:
    forks = [fork(i, best=i, pull=1 + i) for i in range(12)]
    places = list(range(1, 12))
    found = choose(forks, places, 5, by, seed=3)
    assert len({chosen.place for chosen in found}) == 5 and {c.place for c in found} <= set(places)
    assert found == choose(forks, places, 5, by, seed=3)
    assert len({tuple(c.place for c in choose(forks, places, 5, by, seed)) for seed in range(9)}) > 1
    for count in (11, 12, 40):
        assert choose(forks, places, count, by, 0) == [(place, 1.0) for place in places]
    assert choose(forks, [], 4, by, 0) == []


def shares(by: str, forks: list[Fork], count: int, seeds: int = 2000) -> Tensor:
    """Return how often each fork is chosen, and the mean of its factors."""
    times = torch.zeros(2, len(forks), dtype=torch.float64)
    for seed in range(seeds):
        for place, factor in choose(forks, range(len(forks)), count, by, seed):
            times[:, place] += torch.tensor([1.0, factor])
    return times / seeds


def test_an_even_choice_is_even() -> None:
    found = shares("uniform", [fork(i, best=i) for i in range(8)], 3)
    assert (found[0] - 3 / 8).abs().max() < 4 * math.sqrt(3 / 8 * 5 / 8 / 2000)


def test_by_rank_the_best_come_most() -> None:
    forks = [fork(i, best=best) for i, best in enumerate([0.5, 3.0, -1.0, 2.0])]
    forks.append(dataclasses.replace(fork(9), members=torch.full((3, 2), torch.nan, dtype=torch.float64)))
    found = shares("rank", forks, 1)[0]
    weights = 1 / (0.05 + torch.tensor([2.0, 0.0, 3.0, 1.0, 4.0], dtype=torch.float64))
    assert (found - weights / weights.sum()).abs().max() < 0.03


@pytest.mark.long
def test_a_budgeted_draw_is_even_on_average() -> None:
    """Chosen by their pull, each weighted by the inverse of its acceptance: sums stay an even choice's."""
    found = shares("draw", [fork(i, pull=pull) for i, pull in enumerate([0.5, 1.0, 2.0, 4.0, 0.3])], 2)
    assert found[0].tolist() == pytest.approx([w / 3.8 for w in (0.5, 1, 2, 3.8, 0.3)], abs=0.04)
    assert found[1].tolist() == pytest.approx([2 / 5] * 5, rel=0.2)


@pytest.mark.parametrize("odd", [0.0, math.inf, math.nan, 1e-300, 1e300])
def test_a_draw_survives_odd_pulls(odd: float) -> None:
    forks = [fork(i, pull=pull) for i, pull in enumerate([1.0, odd, 2.0, 1.5])]
    found = [choose(forks, range(4), 2, "draw", seed) for seed in range(20)]
    assert {len(chosen) for chosen in found} == {2}
    assert all(0 < each.factor < math.inf for chosen in found for each in chosen)


def log_p(
    x: Tensor, sigma: Tensor, velocity: Tensor, policy: ToyPolicy, k: int, noise: Tensor, sigmas: Tensor
) -> float:
    """Return log p_new − log p_old of a branch, per element, both densities written out."""
    now = policy.velocity(x[None], sigma.reshape(1), [CONDS[0]])
    step = sigmas[k], sigmas[k + 1], 0.7, sigmas[1]
    then, std = kernels.flow_sde(x[None], velocity[None], *step)
    mean, _ = kernels.flow_sde(x[None], now, *step)
    reached = then + std * noise
    return (kernels.log_prob(reached, mean, std) - kernels.log_prob(reached, then, std)).item()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_old_fork_gives_the_loss_that_its_state_noise_and_velocity_give(objective: str) -> None:
    from comfy_g2rpo.schedule import shifted_sigmas

    made, policy = small(objective), ToyPolicy()
    forks, _, _ = learn(made, policy, [], 0, rate=0.5)
    old = next(f for f in forks if f.prompt == TEXTS[0] and f.step == 2)
    batch = with_old(rows_of_rollout(made, policy, 1), CONDS, [old], made, ALONE, 0, encode)
    row = batch.rows.rows(torch.tensor([batch.new]))
    assert torch.equal(row.x[0], old.x) and torch.equal(row.velocity[0], old.velocity)
    velocity = policy.velocity(row.x, row.sigma, [batch.conds[int(row.prompt)]])
    sigmas = shifted_sigmas(8, made.shift)
    ratios = []
    for draw in old.members[2].tolist():
        noise = seeded_noise(SHAPE, "rollout", old.seed, abs(int(draw))) * math.copysign(1, draw)
        ratios.append(log_p(old.x, row.sigma[0], old.velocity, policy, 2, noise, sigmas))
    logs, (advantage, value, _) = torch.tensor(ratios, dtype=torch.float64), old.members
    weight = row.weight[0].item()
    if objective == "clip":
        found, _ = clipped_loss(velocity, row.velocity, row, 1e-4)
        worse = torch.maximum(-advantage * logs.exp(), -advantage * logs.exp().clamp(1 - 1e-4, 1 + 1e-4))
        expected = weight * worse.sum()
    else:
        found, _ = vargrad_loss(velocity, row.velocity, row, made.vargrad_tau)
        errors = old.x.numel() * logs - value / made.vargrad_tau
        expected = weight * len(logs) * 0.5 * errors.var(unbiased=False)
    assert (logs.abs() > 1e-6).any()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_new_and_old_rows_count_alike(objective: str) -> None:
    """The gradient is the mean over rows: that of the new ones and that of the old ones, by their numbers."""
    made, policy = small(objective), ToyPolicy()
    forks, _, _ = learn(made, policy, [], 0)
    rows = rows_of_rollout(made, policy, 1)
    batch = with_old(rows, CONDS, forks, made, ALONE, 5, encode)
    count, new = len(batch.rows), len(rows)
    assert count == new + len(forks) == batch.new + len(batch.chosen)

    def gradient(part: Records, conds: Sequence[float]) -> Tensor:
        policy.adapter.grad = None
        backward(policy, part, conds, made)
        return policy.adapter.grad.clone()

    together, alone = gradient(batch.rows, batch.conds), gradient(rows, CONDS)
    only = batch.rows.rows(torch.arange(new, count))
    old = gradient(dataclasses.replace(only, weight=only.weight * count / (count - new)), batch.conds)
    assert torch.allclose(together, (new * alone + (count - new) * old) / count, atol=1e-7)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("changes", [{}, {"epochs": 2}, {"update": "per_step"}])
def test_only_new_rows_ask_for_their_past(objective: str, changes: dict) -> None:
    made, policy = small(objective, **changes), ToyPolicy()
    forks, _, _ = learn(made, policy, [], 0)
    rows = rows_of_rollout(made, policy, 1)
    batch = with_old(rows, CONDS, forks, made, ALONE, 5, encode)
    present = policy.velocity(rows.x, rows.sigma, [CONDS[p] for p in rows.prompt.tolist()])
    policy.calls.clear()
    update(
        policy, batch.rows, batch.conds, torch.optim.SGD(policy.parameters(), lr=1e-2), made, watch=batch.see
    )
    several = len(rows) if changes else 0  # what new rows were, before several optimizer steps
    assert sum(policy.calls) == several + made.epochs * len(batch.rows)
    assert sorted(batch.past) == list(range(len(rows)))
    assert all(torch.allclose(batch.past[i], present[i], atol=1e-6) for i in batch.past)
    assert sorted(batch.ratios) == list(range(len(rows), len(batch.rows)))


def test_without_old_forks_nothing_is_changed() -> None:
    made, policy = small(), ToyPolicy()
    rows = rows_of_rollout(made, policy)
    batch = with_old(rows, CONDS, [], made, ALONE, 0, encode)
    for name in ("x", "weight", "noise", "advantage"):
        assert torch.equal(getattr(batch.rows, name), getattr(rows, name))
    assert batch.rows.velocity is None and batch.conds == CONDS and not batch.chosen


def test_replay_0_takes_the_very_steps_of_before() -> None:
    """The optional columns of records, and that somebody watches, change no bit of a gradient."""
    grads = []
    for replay in (0, 2):
        made, policy = small(replay=replay), ToyPolicy()
        rollout, advantages = rolled(made, policy)
        given = {"values": advantages} if replay else {}
        rows = records(rollout, advantages, samples=True, **given)
        batch = with_old(rows, CONDS, [], made, ALONE, 0, encode)
        backward(policy, batch.rows, CONDS, made, watch=batch.see if replay else None)
        grads.append(policy.adapter.grad)
    assert torch.equal(*grads)


def test_only_forks_of_the_shape_and_with_an_optimizer_step_each_of_the_steps_come_back() -> None:
    policy = ToyPolicy()
    forks = [fork(0), fork(1, shape=(2, 3, 4)), dataclasses.replace(fork(2), step=7)]
    for changes, places in (({}, {0, 2}), ({"update": "per_step"}, {0})):
        made = small(**changes)
        batch = with_old(rows_of_rollout(made, policy), CONDS, forks, made, ALONE, 0, encode)
        assert {chosen.place for chosen in batch.chosen} == places


def test_forks_that_teach_nothing_are_not_kept() -> None:
    made, policy = small(), ToyPolicy()
    rows = rows_of_rollout(made, policy)
    dull = dataclasses.replace(rows, advantage=torch.where(rows.owner == 1, 0.0, rows.advantage))
    batch = Batch(dataclasses.replace(dull, number=torch.arange(len(dull))), CONDS, len(dull))
    backward(policy, batch.rows, CONDS, made, watch=batch.see)
    batch.past[3] = torch.full(SHAPE, torch.nan)
    kept = forks_of(dull, batch, ALONE, TEXTS, SEEDS, 4)
    assert len(kept) == len(rows) - 2 and {f.made for f in kept} == {4}


def test_metrics_say_how_many_how_old_and_how_far() -> None:
    made, policy, forks = small(replay_by="draw"), ToyPolicy(), []
    for step in range(3):
        forks, stats, batch = learn(made, policy, forks, step, rate=0.3)
    rows = len(batch.rows) - len(batch.chosen)
    assert stats["replay/rows"] == 2 * rows and stats["replay/size"] == 3 * rows
    assert stats["replay/age"] == 1.5 and 0 < abs(stats["replay/ratio"] - 1) < 0.5
    new = forks[-1]
    assert new.pull == pytest.approx(new.members[0].abs().sum().item())
    assert any(f.pull != pytest.approx(f.members[0].abs().sum().item(), rel=1e-9) for f in forks[:rows])


class Line:
    """Two processes that go one after the other: what either gathers is found by running both until all is
    known.
    """

    def __init__(self) -> None:
        self.told: list[list[Tensor]] = [[], []]

    def share(self, index: int) -> Share:
        """Return a process's place; its n-th gathering needs the other's n-th."""
        calls = iter(range(100))

        def gather(found: Tensor) -> Tensor:
            place = next(calls)
            if len(self.told[index]) == place:
                self.told[index].append(found)
            if len(self.told[1 - index]) <= place:
                raise LookupError
            both = (self.told[0][place], self.told[1][place])
            return torch.cat(both, 1)

        return Share(index, 2, gather)


def half(rows: Records, prompt: int) -> Records:
    """Return the rows of one prompt as those of a process that has no other."""
    part = rows.rows((rows.prompt == prompt).nonzero().flatten())
    return dataclasses.replace(part, prompt=torch.zeros_like(part.prompt), weight=part.weight * 2)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("by", ["uniform", "rank", "draw"])
def test_two_processes_learn_and_keep_what_one_does(objective: str, by: str) -> None:
    made, policy = small(objective, replay_by=by), ToyPolicy()
    forks, _, _ = learn(made, policy, [], 0, rate=0.2)
    rows = rows_of_rollout(made, policy, 1)
    forks += [dataclasses.replace(f, made=1) for f in forks] + [dataclasses.replace(f, made=2) for f in forks]
    whole = with_old(rows, CONDS, forks, made, ALONE, 5, encode)
    backward(policy, whole.rows, whole.conds, made, watch=whole.see)
    one = policy.adapter.grad.clone()
    kept = after(forks, forks_of(rows, whole, ALONE, TEXTS, SEEDS, 3), whole, made, ALONE, 4)

    line, grads, theirs = Line(), [], {}
    batches = []
    for index in (0, 1):
        part = half(rows, index)
        batch = with_old(part, CONDS[index : index + 1], forks, made, line.share(index), 5, encode)
        policy.adapter.grad = None
        backward(policy, batch.rows, batch.conds, made, watch=batch.see)
        grads.append(policy.adapter.grad.clone())
        batches.append((part, batch))
    assert sorted(c.place for _, b in batches for c in b.chosen) == [c.place for c in whole.chosen]
    assert torch.allclose(sum(grads) / 2, one, atol=1e-6)
    while len(theirs) < 2:
        for index, (part, batch) in enumerate(batches):
            share = line.share(index)
            try:
                new = forks_of(part, batch, share, TEXTS, SEEDS, 3)
                theirs[index] = after(forks, new, batch, made, share, 4)
            except LookupError:
                continue
    for found in theirs.values():
        assert [(f.made, f.prompt, f.seed, f.step) for f in found] == [
            (f.made, f.prompt, f.seed, f.step) for f in kept
        ]
        assert all(
            torch.allclose(f.velocity, g.velocity, atol=1e-6) for f, g in zip(found, kept, strict=True)
        )
        assert [f.pull for f in found] == pytest.approx([f.pull for f in kept], rel=1e-5)
    assert all(torch.equal(f.velocity, g.velocity) for f, g in zip(theirs[0], theirs[1], strict=True))


def same(one: Fork, other: Fork) -> bool:
    """Return whether two forks are equal in every bit."""
    for field in dataclasses.fields(Fork):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if not (torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs):
            return False
    return True


def kinds() -> list[Fork]:
    """Return forks of several shapes, sizes of group, prompts and pictures."""
    pictured = Prompt("a red circle", {"image": "/pictures/one.png"})
    wide = fork(1, shape=(2, 3, 5), prompt=pictured, pull=0.1 + 0.2)
    many = torch.tensor([[1.0, 0.3, -1.3], [0.1, math.nan, 5.0], [1.0, -1.0, 2.0]], dtype=torch.float64)
    return [fork(0), wide, dataclasses.replace(fork(2, prompt=TEXTS[1]), members=many, seed=2**62 + 1)]


def test_a_file_brings_every_bit_back(tmp_path: Path) -> None:
    forks = kinds()
    write_forks(tmp_path, forks)
    found = read_forks(tmp_path, [f.prompt for f in forks])
    assert [f.made for f in found] == [0, 1, 2]
    assert all(
        same(
            dataclasses.replace(f, members=f.members.nan_to_num(9.5)),
            dataclasses.replace(g, members=g.members.nan_to_num(9.5)),
        )
        for f, g in zip(found, forks, strict=True)
    )
    assert found[1].prompt.columns == {"image": "/pictures/one.png"}
    # Another picture makes another prompt.
    assert [f.made for f in read_forks(tmp_path, [TEXTS[0]])] == [0]
    assert read_forks(tmp_path, []) == [] and read_forks(tmp_path / "none", TEXTS) == []


def spoilt(tensors: dict[str, Tensor], notes: dict[str, str], how: str) -> None:
    """Spoil what a file says."""
    if how == "a name":
        del tensors["counts"]
    elif how == "a kind":
        tensors["numbers"] = tensors["numbers"].float()
    elif how == "a NaN":
        tensors["velocity"][3] = torch.nan
    elif how == "a length":
        tensors["x"] = tensors["x"][:-1]
    elif how == "a shape":
        tensors["shape"][0, 1] = -2
    elif how == "a place":
        tensors["prompt"][0] = 77
    elif how == "a negative place":
        tensors["prompt"][0] = -1
    else:
        notes["prompts"] = {"texts": "{", "no list": "7", "deep": "[" * 10**5}[how]


@pytest.mark.parametrize(
    "how",
    [
        "a name",
        "a kind",
        "a NaN",
        "a length",
        "a shape",
        "a place",
        "a negative place",
        "texts",
        "no list",
        "deep",
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, how: str) -> None:
    write_forks(tmp_path, kinds())
    tensors, notes = read_tensors(tmp_path / NAME)
    assert json.loads(notes["prompts"])
    spoilt(tensors, notes, how)
    write_tensors(tmp_path / NAME, tensors, notes)
    with pytest.raises(RunError, match=r"replay\.safetensors is damaged: it holds no old forks; remove"):
        read_forks(tmp_path, TEXTS)


@pytest.mark.parametrize(
    ("shapes", "size", "fits"),
    [
        ([(16, 128, 128)], 477, "476"),
        ([(4, 8, 8), (16, 21, 60, 104)], 256, "59"),
        ([(16, 300, 1000, 100)], 1, "replay: 0"),
    ],
)
def test_more_than_a_gigabyte_is_refused_with_what_fits(shapes: list, size: int, fits: str) -> None:
    with pytest.raises(ValueError, match=rf"replay_size is {size}: .* GB .*above 1 GB; set (it to )?{fits}"):
        refuse_too_many(small(replay_size=size), shapes)
    refuse_too_many(small("clip", replay=0, replay_size=size), shapes)
    if fits.isdigit():
        refuse_too_many(small(replay_size=int(fits)), shapes)


@pytest.mark.parametrize("name", ["g2rpo", "g2rpo_single"])
def test_the_exact_gradient_of_new_branches_refuses_old_ones(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"replay is 4, but objective on_policy cannot .*; choose objective: clip"
    ):
        recipe(name, replay=4)
    assert recipe("flow_grpo", replay=1).replay == 1
