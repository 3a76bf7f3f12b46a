"""`g2rpo worker` without anything to train: its options, what it says, how it ends.

What it trains is tested with a real ComfyUI (test_nodes_handover.py).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from graph_forms import model_file
from program import leave

from comfy_g2rpo.files.one_writer import one_writer
from comfy_g2rpo.files.spool import Spool
from g2rpo_trainer.jobs.graph_job import Owner
from g2rpo_trainer.jobs.worker_loop import Here, Worker, use_comfyui
from g2rpo_trainer.run import stoppable
from g2rpo_trainer.workflows.model_files import ModelFolders

JOB = {
    "recipe": {
        "model": {"family": "flux", "width": 64, "height": 64},
        "rewards": [{"name": "jpeg"}],
        "prompts": {"train": ["a circle"], "heldout": []},
    },
    "settings": [],
    "models": {"folder": "checkpoints", "model": "gone.safetensors", "text_encoders": [], "vae": ""},
    "source": "graph",
}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the folders of a ComfyUI; what a worker sets in the environment is taken back."""
    for folder in ("models/checkpoints", "models/g2rpo_rewards", "output"):
        (tmp_path / "comfy" / folder).mkdir(parents=True)
    for name in ("G2RPO_REWARDS", "COMFYUI_PATH"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    return tmp_path / "comfy"


def spool_of(base: Path) -> Spool:
    """Return the spool of a ComfyUI."""
    return Spool(base / "output/g2rpo/spool")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--comfyui", "gone"], "--comfyui gone has no folder models; give the folder that ComfyUI works in"),
        (["--output", "gone"], "gone is no folder; give ComfyUI's --output-directory"),
        (["--models", "gone"], "--models gone is neither a folder nor a file; check the path"),
        (["--preset", "3gb"], "--preset '3gb' is unknown; the smallest is 8gb"),
        (["--set", "steps"], "--set 'steps' has no value; write it as section.key=value"),
    ],
)
def test_what_its_owner_has_mistyped_is_said_before_any_job_fails(
    words: list[str], says: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spool_of(base).submit("one", JOB)
    code, _, error = leave(capsys, "worker", "--once", "--comfyui", base, *words)
    assert code == 2 and error.startswith("error: ") and says in error
    assert spool_of(base).state("one") == "waiting"


def test_without_a_job_it_ends_at_once(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = leave(capsys, "worker", "--comfyui", base, "--once")
    assert code == 0 and said.startswith(f"worker: trains what is handed over in {spool_of(base).path};")
    assert len(said.splitlines()) == 1 and not list((base / "output").iterdir())


def test_a_job_that_cannot_be_run_has_failed_with_its_line_and_a_damaged_one_is_left_alone(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = spool_of(base)
    spool.submit("one", JOB)
    (spool.path / "bad.job.json").write_text("{")
    code, said, _ = leave(capsys, "worker", "--comfyui", base, "--once")
    line = (
        "models.model asks for 'gone.safetensors', which is not among the checkpoints here; fetch it, or give"
    )
    assert code == 0 and f"one: failed, {line}" in said
    assert said.count("bad.job.json cannot be read as a job") == 1
    assert spool.ended("one")["error"].startswith(line)
    # It has ended, and is not begun again.
    assert "begins" not in leave(capsys, "worker", "--comfyui", base, "--once")[1]


def test_what_another_worker_trains_is_left_to_it(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spool = spool_of(base)
    spool.submit("one", JOB)
    with one_writer(spool.path / "one.taken"):
        code, said, _ = leave(capsys, "worker", "--comfyui", base, "--once")
    assert code == 0 and "begins" not in said and spool.state("one") == "waiting"


def test_a_job_that_cannot_be_run_yet_shows_in_the_exit_code(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = spool_of(base)
    spool.submit("one", JOB)
    spool.send("one", "http://127.0.0.1:9")
    code, said, _ = leave(capsys, "worker", "--comfyui", base, "--once")
    assert code == 75 and "one was sent to http://127.0.0.1:9" in said
    assert said.endswith("worker: could not run one yet; mend what is said above, and start it again\n")


def test_ctrl_c_ends_it_while_it_waits(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    former, begin = signal.getsignal(signal.SIGINT), time.monotonic()

    def press() -> None:
        while signal.getsignal(signal.SIGINT) is former and time.monotonic() < begin + 50:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    code, _, error = leave(capsys, "worker", "--comfyui", base)
    assert code == 0 and error == "worker: stopped\n" and time.monotonic() - begin < 60
    assert signal.getsignal(signal.SIGINT) is former


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system hangs nothing up")
def test_a_hang_up_that_nohup_has_had_ignored_stays_so(base: Path) -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        worker = Worker(base, base, Here(Owner(ModelFolders.of([base]))))
        with worker.stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
        with stoppable() as check:
            os.kill(os.getpid(), signal.SIGHUP)
            check("rollout")
        assert not worker.ending.is_set() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_the_owners_preset_and_settings_go_into_every_job(base: Path) -> None:
    model_file(base / "models/checkpoints/gone.safetensors", "flux")
    folders = ModelFolders.of([base / "models"])
    settings = Owner(folders, ["model.dtype=fp32"], "16gb").prepare(JOB, base / "one")["settings"]
    assert settings[-1] == "model.dtype=fp32" and any(each.startswith("memory.") for each in settings[:-1])
    assert Owner(folders).prepare(JOB, base / "one")["settings"] == []


def test_reward_models_and_tokenizers_are_those_of_its_comfyui(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMFYUI_PATH", "mine")
    use_comfyui(base)
    assert os.environ["G2RPO_REWARDS"] == str(base / "models/g2rpo_rewards")
    assert os.environ["COMFYUI_PATH"] == "mine"
