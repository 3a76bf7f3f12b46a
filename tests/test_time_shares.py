"""Where the time of a run went, as `g2rpo report` says it."""

from __future__ import annotations

from typing import Any

import pytest

from g2rpo_trainer.reports.report import draw_time
from g2rpo_trainer.reports.time_shares import of_workers, shares_of, time_table

ALONE = [
    {
        "step": step,
        "nfe": 8,
        "time/rollout": 3.0,
        "time/decode": 0.5,
        "time/reward": 0.25,
        "time/update": 0.25,
    }
    for step in (1, 2)
]
TOGETHER = [row | {"time/waiting": 1.0, "time/waiting_max": 2.0} for row in ALONE]


def test_a_run_of_one_process_has_four_phases() -> None:
    assert shares_of(ALONE) == {"rollout": 6.0, "decode": 1.0, "reward": 0.5, "update": 0.5}
    head, *lines = time_table(ALONE)
    assert head.split()[:4] == ["time", "of", "2", "steps"]
    assert [line.split()[-2:] for line in lines] == [
        ["3", "75%"],
        ["0.5", "12%"],
        ["0.25", "6%"],
        ["0.25", "6%"],
    ]


def test_several_processes_wait_too() -> None:
    *_, waiting, note = time_table(TOGETHER)
    assert waiting.split()[-2:] == ["1", "20%"] and "one waited 2 s a step" in note


def test_of_workers_the_learners_idle_share_is_said() -> None:
    told = {"time/waiting": 0.75, "workers/ready": 2.0, "workers/staleness": 1.0, "workers/lost": 1.0}
    bytes_ = {"workers/sent_bytes": 4e6, "workers/got_bytes": 2e6}
    rows = [*ALONE, *(row | told | bytes_ for row in ALONE)]
    assert of_workers(ALONE) == {}
    assert of_workers(rows) == {
        "steps": 2,
        "idle": 0.75,
        "lost": 2.0,
        "staleness": 1.0,
        "sent_bytes": 4e6,
        "got_bytes": 2e6,
    }
    *_, idle, lost = time_table(rows)
    assert "waited 75% of its time" in idle and "2 parts lost" in lost and "sent 4 MB" in lost


@pytest.mark.parametrize("rows", [[], [{"step": 0, "heldout/a/mean": 1.0}], [{"step": 1, "nfe": 4}]])
def test_a_run_without_times_has_no_table(rows: list[dict[str, Any]]) -> None:
    assert [*time_table(rows)] == [] and shares_of(rows) == {}


@pytest.mark.parametrize(("rows", "layers"), [(ALONE, 4), (TOGETHER, 5)])
def test_waiting_is_drawn_where_it_was_measured(rows: list[dict[str, Any]], layers: int) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw_time(axes, rows)
    assert len(axes.collections) == layers
