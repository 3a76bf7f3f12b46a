"""Whole runs of the bundled model under a judge that misbehaves: they end, or stop resumable and say why.

No picture is mis-scored.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import judge_host
import pytest
import torch
from judge_host import (
    JudgeHost,
    after,
    close_mid_body,
    completion,
    hang,
    pictures_of,
    slow,
    sometimes,
    status,
)
from some_cases import some
from test_run import config

from comfy_g2rpo.rewards import RewardError
from comfy_g2rpo.run.folder import RunFolder, read_state
from comfy_g2rpo.run.scorer import Scorer
from g2rpo_trainer import run as training
from g2rpo_trainer.reports.progress import Silent

patient = judge_host.patient


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Note every picture's brightness beside the score that landed in its place."""
    pairs: list[tuple[float, float]] = []
    finish = Scorer.__exit__

    def leave(scorer: Scorer, *error: Any) -> None:
        finish(scorer, *error)
        pairs.extend(
            (scorer.pictures[p, i].mean().item(), scorer.scores[0, p, i].item())
            for p, i in sorted(scorer.pictures)
        )

    make = Scorer.__init__

    def keep_all(scorer: Scorer, decode: Any, rewards: Any, prompts: Any, *more: Any, **named: Any) -> None:
        make(scorer, decode, rewards, prompts, *more, **(named | {"keep": range(len(prompts))}))

    monkeypatch.setattr(Scorer, "__init__", keep_all)
    monkeypatch.setattr(Scorer, "__exit__", leave)
    return pairs


def made(tmp_path: Path, host: JudgeHost, train: dict[str, Any] | None = None, **reward: Any) -> Any:
    """Configure two small steps under a judge."""
    judge = {
        "name": "bright",
        "url": host.url,
        "protocol": "yes_no",
        "model": "toy",
        "timeout": 5.0,
        "retries": 3,
    } | reward
    return config(
        tmp_path, rewards=[judge], train={"steps": 2, "prompts_per_step": 1, "eval_noises": 1} | (train or {})
    )


BAD = {
    "slow": slow,
    "failing": sometimes(0.3, status(500)),
    "hang_up": sometimes(0.3, close_mid_body),
    "nonsense": sometimes(0.2, lambda *_: completion({"Maybe": 1.0})),
}


@pytest.mark.parametrize("behave", some(BAD, 2))
def test_a_run_ends_under_a_bad_judge_and_no_picture_is_mis_scored(
    behave: str, tmp_path: Path, seen: list[tuple[float, float]], caplog: pytest.LogCaptureFixture
) -> None:
    with JudgeHost(after(1, BAD[behave])) as host:
        run = made(tmp_path, host, retries=8, train={"max_dropped": 0.5})
        summary = training.train(run, tmp_path / "run", progress=Silent())
    assert summary["steps"] == 2 and len(seen) > 30
    assert all(math.isnan(score) or abs(score - bright) < 1e-4 for bright, score in seen)
    dropped = sum(math.isnan(score) for _, score in seen)
    assert (dropped > 0) == (behave == "nonsense")
    assert [record.name for record in caplog.records].count("g2rpo_trainer.judges") == (behave == "nonsense")
    rows = [row for row in RunFolder.open(tmp_path / "run").metrics() if "nfe" in row]
    assert all(row["dropped_share"] <= 0.5 for row in rows)


def test_a_judge_that_dies_stops_the_run_which_goes_on_when_it_is_back(tmp_path: Path) -> None:
    with JudgeHost() as host:
        train = {"checkpoint_every": 1, "eval_every": 0}
        run = made(tmp_path, host, train=train, retries=0, timeout=2.0)
        learn = training.learn

        def die_after_a_step(
            setup: Any, learner: Any, folder: Any, progress: Any, check: Any, stops: Any
        ) -> None:
            step = progress.step
            progress.step = lambda row: step(row) or ("nfe" in row and setattr(host, "behave", hang))
            learn(setup, learner, folder, progress, check, stops)

        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(
                RewardError, match=r"judged none of the 9 pictures of step 2; .* and resume the run"
            ),
        ):
            patch.setattr(training, "learn", die_after_a_step)
            training.train(run, tmp_path / "run", progress=Silent())
        assert RunFolder.open(tmp_path / "run").latest().name == "000001"
        host.behave = None
        assert training.train(run, tmp_path / "run", resume=True, progress=Silent())["steps"] == 2
        # What a run without any trouble gives, bit for bit.
        training.train(run, tmp_path / "whole", progress=Silent())
    states = [read_state(RunFolder.open(tmp_path / name).latest())[0] for name in ("run", "whole")]
    assert states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


def test_ctrl_c_while_a_judge_hangs_stops_at_once_and_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with JudgeHost(after(1, hang)) as host:
        run = made(tmp_path, host, timeout=600.0)

        def press() -> None:
            while host.asked < 2:
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)

        presser = threading.Thread(target=press)
        presser.start()
        begin = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            training.train(run, tmp_path / "run", progress=Silent())
        presser.join()
        assert time.perf_counter() - begin < 60
    assert not [
        thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("rewards")
    ]


def test_a_judge_that_is_not_there_starts_no_run(tmp_path: Path) -> None:
    with JudgeHost() as host:
        run = made(tmp_path, host, retries=0)
    with pytest.raises(RewardError, match="connection failed"):
        training.train(run, tmp_path / "run", progress=Silent())
    assert not (tmp_path / "run").exists()


def test_win_rates_alone_train_and_measure_nothing_they_cannot(tmp_path: Path) -> None:
    with JudgeHost() as host:
        run = made(tmp_path, host, protocol="pairwise", name="better")
        summary = training.train(run, tmp_path / "run", progress=Silent())
        shown = {len(pictures_of(body)) for body in host.bodies}
    rows = RunFolder.open(tmp_path / "run").metrics()
    assert (
        summary["steps"] == 2
        and shown == {2}
        and not any(key.startswith("heldout/better") for row in rows for key in row)
    )
    assert [row["reward/better/mean"] for row in rows if "nfe" in row] == pytest.approx([0.5, 0.5], abs=1e-6)


def test_a_held_out_reward_must_measure_single_pictures(tmp_path: Path) -> None:
    with JudgeHost() as host:
        pair = {"name": "better", "url": host.url, "protocol": "pairwise", "model": "toy"}
        run = config(tmp_path, heldout_rewards=[pair])
        with pytest.raises(
            RewardError, match="heldout_rewards names 'better', which only compares the pictures of one group"
        ):
            training.train(run, tmp_path / "run", progress=Silent())
