"""A step in parts: cut, put together, written as bytes, and explored ahead of the learner; without Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import assert_equal, config, outcome, prepare

from comfy_g2rpo.recipes import recipe
from comfy_g2rpo.run.checkpoint import restore
from comfy_g2rpo.run.folder import RunFolder
from comfy_g2rpo.run.iteration import Explored, explore, explore_part
from comfy_g2rpo.run.loop import learn
from comfy_g2rpo.run.setup import make_learner
from comfy_g2rpo.sharing.ahead import Ahead, Order, adapter_bytes, check_ahead, take_adapter, work_off
from comfy_g2rpo.sharing.explored import merged, packed, parted, unpacked
from g2rpo_trainer.config.reading import dump
from g2rpo_trainer.reports.progress import Silent

CLIP = {"name": "g2rpo", "num_steps": 4, "group_size": 3, "learning_rate": 1e-3, "objective": "clip"}
PIECES = {"prompts_per_step": 3, "prompts_at_once": 2, "eval_every": 0, "watch": "off"}


class Here:
    """Workers in this process, which do their orders late and in the wrong order."""

    def __init__(self, made: Any) -> None:
        self.setup = prepare(made)
        self.learner = make_learner(self.setup)
        self.adapters: dict[int, bytes] = {}
        self.orders: list[Order] = []

    def publish(self, version: int, adapter: bytes) -> None:
        self.adapters[version] = adapter

    def submit(self, order: Order) -> None:
        self.orders.append(order)

    def collect(self, step: int, wait: Callable[[], None]) -> list[bytes]:
        wait()
        mine = [order for order in self.orders if order.step == step]
        done = {o.part: self.explore(o) for o in reversed(mine)}
        return [done[part] for part in range(len(mine))]

    def explore(self, order: Order) -> bytes:
        return work_off(self.setup, self.learner, order, self.adapters[order.version], lambda phase: None)

    def told(self) -> dict[str, float]:
        return {}


def learned(made: Any, place: Path, staleness: int | None = None, stop: int = 0) -> list[Order]:
    """Make a run, or go on with one; return the orders of its workers. It breaks off in step `stop`."""
    resumes, workers = place.exists(), None
    setup = prepare(made)
    if staleness is not None:
        workers = Here(made)
        setup = dataclasses.replace(setup, explorer=Ahead(workers, staleness))
    learner = make_learner(setup)
    folder = RunFolder(place) if resumes else RunFolder.create(place, dump(made))
    if resumes:
        restore(setup, learner, folder)

    def check(phase: str) -> None:
        if stop and phase == "update" and learner.step == stop - 1:
            raise KeyboardInterrupt

    try:
        learn(setup, learner, folder, Silent(), check, (KeyboardInterrupt,))
    except KeyboardInterrupt:
        assert stop
    return workers.orders if workers else []


def without_workers(found: Any) -> Any:
    """Leave out what a run of one process has no column for, and the adapters that were kept."""
    rows = [{k: v for k, v in row.items() if not k.startswith("workers/")} for row in found[2]]
    return found[0], {k: v for k, v in found[1].items() if not k.startswith("version/")}, rows


@pytest.mark.parametrize("count", range(6))
@pytest.mark.parametrize("at_once", range(7))
def test_slots_are_cut_in_their_order(count: int, at_once: int) -> None:
    parts = parted(range(count), at_once)
    assert [slot for part in parts for slot in part] == [*range(count)]
    assert all(0 < len(part) <= (at_once or count) for part in parts)
    assert len(parts) == (-(-count // at_once) if at_once else min(count, 1))


def same(one: Explored, two: Explored) -> None:
    """Compare two steps bit by bit."""
    assert torch.equal(one.rollout.x, two.rollout.x)
    assert torch.equal(one.scores.nan_to_num(7), two.scores.nan_to_num(7))
    assert (one.rollout.seeds, one.rollout.nfe, one.plan) == (two.rollout.seeds, two.rollout.nfe, two.plan)
    assert torch.equal(one.rollout.coefficients.table, two.rollout.coefficients.table)
    assert one.features.keys() == two.features.keys()
    for name in one.features:
        for a, b in zip(one.features[name], two.features[name], strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    assert (one.latents is None) == (two.latents is None)
    assert one.latents is None or torch.equal(one.latents, two.latents)
    for name in ("finished", "images"):
        a, b = (getattr(each.rollout, name, ()) for each in (one, two))
        assert len(a) == len(b) and all(
            torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True)
        )


@pytest.mark.parametrize(
    "method",
    [{}, {"name": "diffusion_nft"}, {"expand": 2.0, "prune_at": (0.5,)}, {"diversity_weight": 0.5}],
    ids=["tree", "images", "pruned", "features"],
)
def test_a_part_comes_back_from_bytes_as_it_was(tmp_path: Path, method: dict[str, Any]) -> None:
    made = config(tmp_path, method={"num_steps": 4, **method}, train=PIECES)
    setup = prepare(made)
    learner = make_learner(setup)
    whole = explore(setup, learner, lambda phase: None)
    places = whole.chosen.places
    parts = [explore_part(setup, learner, places, slots, lambda phase: None) for slots in ((0, 1), (2,))]
    again = []
    for part in parts:
        content = packed(part)
        assert isinstance(content, bytes)
        again.append(unpacked(content, part.plan, setup.sigmas, part.conds, "cpu"))
        same(part, again[-1])
    same(merged(again, whole.chosen), whole)
    assert len(whole.conds) == len(whole.rollout.x) == 3


def test_adapters_travel_as_bytes_and_must_fit() -> None:
    given = [torch.randn(3, 2), torch.randn(4)]
    target = [torch.nn.Parameter(torch.zeros_like(each)) for each in given]
    take_adapter(target, adapter_bytes(given))
    assert all(torch.equal(a, b) for a, b in zip(given, target, strict=True))
    for wrong in (given[:1], [*given, torch.ones(1)], given[::-1]):
        with pytest.raises(ValueError, match="same version of g2rpo"):
            take_adapter(target, adapter_bytes(wrong))


@pytest.mark.parametrize(
    ("changes", "staleness", "says"),
    [
        ({}, 1, "staleness 0"),
        ({"objective": "clip", "prompt_choice": "signal"}, 1, "in_turn"),
        ({"objective": "pairs"}, 0, "leave --ray out"),
    ],
)
def test_what_cannot_be_explored_ahead_is_refused(changes: dict[str, Any], staleness: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_ahead(recipe("g2rpo", **changes), staleness)
    check_ahead(recipe("g2rpo"), 0)
    check_ahead(recipe("g2rpo", objective="clip"), 3)


@pytest.mark.parametrize(
    "method", [{}, {"prompt_choice": "curriculum", "candidates": 2}], ids=["in turn", "chosen"]
)
def test_without_staleness_workers_change_nothing(tmp_path: Path, method: dict[str, Any]) -> None:
    made = config(tmp_path, method=method, train={**PIECES, "steps": 2})
    learned(made, tmp_path / "alone")
    orders = learned(made, tmp_path / "shared", 0)
    assert [(o.step, o.part, o.version, o.slots) for o in orders] == [
        (0, 0, 0, (0, 1)),
        (0, 1, 0, (2,)),
        (1, 0, 1, (0, 1)),
        (1, 1, 1, (2,)),
    ]
    alone, shared = outcome(tmp_path / "alone"), outcome(tmp_path / "shared")
    assert_equal(alone, without_workers(shared))


def test_stale_steps_are_drawn_by_an_older_adapter_and_corrected(tmp_path: Path) -> None:
    made = config(tmp_path, method=CLIP, train={**PIECES, "steps": 4, "prompts_at_once": 0})
    orders = learned(made, tmp_path / "run", 2)
    assert {o.step: o.version for o in orders} == {0: 0, 1: 0, 2: 0, 3: 1}
    rows = [row for row in RunFolder(tmp_path / "run").metrics() if "nfe" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["workers/staleness"] for row in rows] == [0, 1, 2, 2]
    # By the newest adapter every ratio is 1; by an older one it is not.
    assert rows[0]["ratio/max_deviation"] == 0
    assert all(0 < row["ratio/max_deviation"] < 0.1 for row in rows[1:])


@pytest.mark.parametrize("name", ["diffusion_nft", "clip"])
def test_a_stale_run_that_stops_goes_on_as_if_it_had_not(tmp_path: Path, name: str) -> None:
    method = CLIP | {"replay": 1} if name == "clip" else {"name": name, "num_steps": 4, "group_size": 3}
    made = config(tmp_path, method=method, train={**PIECES, "steps": 3, "prompts_per_step": 2})
    learned(made, tmp_path / "whole", 1)
    learned(made, tmp_path / "broken", 1, stop=2)
    assert RunFolder(tmp_path / "broken").latest().name == "000001"
    learned(made, tmp_path / "broken", 1)
    assert_equal(outcome(tmp_path / "whole"), outcome(tmp_path / "broken"))


def test_a_guard_over_a_whole_step_is_refused_in_parts(tmp_path: Path) -> None:
    made = config(tmp_path, train=PIECES, speed={"tail_stride": 2})
    with pytest.raises(ValueError, match=r"prompts_at_once is 2.*leave the section speed out"):
        prepare(made)
