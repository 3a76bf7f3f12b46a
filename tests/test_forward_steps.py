"""Single steps of a job on its way to a service and back, with a service that answers as it is told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_graph_job import job_of

from comfy_g2rpo.files.spool import JobError, Spool
from g2rpo_trainer.jobs.forward_job import TRIES, Forward, Passage
from g2rpo_trainer.jobs.mirrored_run import MAX_BYTES, MirroredRun, whole
from g2rpo_trainer.service.remote_client import NONSENSE, RemoteError

HERE = "http://127.0.0.1:9"


def passage_of(tmp_path: Path, view: Mapping[str, Any], patience: float = 600.0, **more: Any) -> Passage:
    """Return a job's passage to a service that tells one view of it."""
    spool = Spool(tmp_path / "spool")
    spool.submit("hand", job_of())
    answers = {"submit_graph": lambda *given: {}, "job": lambda job_id: dict(view), **more}
    remote: Any = SimpleNamespace(url=HERE, **answers)
    mirror = MirroredRun.of(remote, "hand", tmp_path / "hand")
    return Passage(Forward(remote, patience=patience), spool, "hand", spool.job("hand"), mirror)


def refuses(status: int) -> Any:
    """Return what refuses whatever is asked."""

    def refuse(*given: Any, **more: Any) -> Any:
        raise RemoteError(f"refused with {status}", status)

    return refuse


def test_a_wish_to_stop_is_kept_for_as_long_as_the_patience(tmp_path: Path) -> None:
    passage = passage_of(tmp_path, {}, patience=600.0)
    assert not passage.given_up() and passage.unheard is None
    passage.spool.cancel("hand")
    assert not passage.given_up() and passage.unheard is not None
    passage.unheard -= 601
    assert passage.given_up()


@pytest.mark.parametrize("status", ["odd", None, 3])
def test_a_state_that_is_none_is_told(tmp_path: Path, status: Any) -> None:
    with pytest.raises(RemoteError, match=f"{HERE} tells no state of it; is that a g2rpo serve"):
        passage_of(tmp_path, {"status": status}).look()


@pytest.mark.parametrize(("status", "heard"), [(409, True), (500, False), (0, False)])
def test_who_has_ended_meanwhile_need_not_be_stopped(tmp_path: Path, status: int, heard: bool) -> None:
    passage = passage_of(tmp_path, {"status": "done"}, cancel=refuses(status))
    if heard:
        assert passage.stopped() == {"status": "done"}
        return
    with pytest.raises(RemoteError, match=f"refused with {status}"):
        passage.stopped()


def test_what_cannot_be_had_of_an_ended_job_is_asked_for_some_times(tmp_path: Path) -> None:
    view = {"status": "done", "ended": "2026-12-01"}
    passage = passage_of(tmp_path, view)
    for _ in range(TRIES - 1):
        with pytest.raises(RemoteError, match="calls hand done, and has no LoRA"):
            passage.ended(view)
    status, said = passage.ended(view)
    assert status == "failed" and said["error"].startswith("done at the service, but ")
    # A connection that is lost may come back: that is not counted.
    patient = passage_of(tmp_path, view)
    patient.mirror.service.fetch_lora = refuses(0)
    for _ in range(2 * TRIES):
        with pytest.raises(RemoteError, match="refused with 0"):
            patient.ended({**view, "lora": {}, "status": "failed"})


def test_no_rows_are_asked_for_before_there_is_a_run(tmp_path: Path) -> None:
    passage = passage_of(tmp_path, {"status": "waiting"}, rows=refuses(NONSENSE))
    assert not passage.mirror.take_rows() and passage.mirror.follow({}, newest=False)


@pytest.mark.parametrize(("status", "kept"), [(404, True), (NONSENSE, True), (0, False), (503, False)])
def test_pictures_that_are_not_there_are_left_out_and_a_lost_connection_is_not_that(
    tmp_path: Path, status: int, kept: bool
) -> None:
    mirror = passage_of(tmp_path, {}, samples=refuses(status)).mirror
    if kept:
        mirror.take_samples(3)
        assert mirror.given_up == {3}
        return
    with pytest.raises(RemoteError, match=f"refused with {status}"):
        mirror.take_samples(3)
    assert not mirror.given_up


@pytest.mark.parametrize("about", [{"step": 3}, {"sha256": "0" * 64}, {"step": True, "sha256": "0" * 64}])
def test_a_lora_that_comes_without_step_or_digest_is_none(tmp_path: Path, about: dict[str, Any]) -> None:
    mirror = passage_of(tmp_path, {}, fetch_lora=lambda *given, **more: about).mirror
    with pytest.raises(RemoteError, match="the LoRA of hand comes without step or digest"):
        mirror.take_lora()


def test_more_than_any_run_makes_is_given_up(tmp_path: Path) -> None:
    mirror = passage_of(tmp_path, {}).mirror
    mirror.spend(MAX_BYTES)
    with pytest.raises(JobError, match=f"{HERE} sends more for it than a run makes"):
        mirror.spend(1)


def test_a_whole_number_is_no_truth_and_within_its_bounds() -> None:
    assert [whole(value, 5) for value in (0, 5, 6, -1, True, 2.0, "3", None)] == [True, True, *[False] * 6]
