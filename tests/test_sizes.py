"""Several sizes in a run: one per step by seed and step alone, drawn, learned from, resumed and paid for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from program import leave
from test_run import StopAt, assert_equal, config, outcome, prepare

from comfy_g2rpo.run.iteration import iterate
from comfy_g2rpo.run.pace import Pace
from comfy_g2rpo.run.setup import Setup, Size, make_learner
from g2rpo_trainer.config.reading import ConfigError
from g2rpo_trainer.cost.count_model import footprint
from g2rpo_trainer.reports.progress import Silent
from g2rpo_trainer.run import train

SIZES = ["64x64", "96x48", "32x64"]


def order(count: int, seed: int, steps: int) -> list[int]:
    """Return which of so many sizes each step takes."""
    sizes = tuple(Size((i,), torch.zeros(0)) for i in range(count))
    fields = SimpleNamespace(sizes=sizes, pace=Pace(seed=seed))
    return [Setup.size(fields, step).shape[0] for step in range(steps)]


@given(st.integers(1, 6), st.integers(0, 50), st.integers(1, 5))
def test_every_round_takes_every_size_once(count: int, seed: int, rounds: int) -> None:
    found = order(count, seed, rounds * count)
    for first in range(0, len(found), count):
        assert sorted(found[first : first + count]) == list(range(count))
    assert found == order(count, seed, rounds * count)


def test_the_order_changes_with_seed_and_round() -> None:
    assert len({tuple(order(4, seed, 4)) for seed in range(8)}) > 1
    long = order(4, 0, 32)
    assert len({tuple(long[first : first + 4]) for first in range(0, 32, 4)}) > 1


def test_steps_draw_their_sizes_and_evaluations_the_models_own(tmp_path: Path) -> None:
    setup = prepare(config(tmp_path, model={"sizes": SIZES}))
    learner, drawn = make_learner(setup), []
    decode = setup.policy.decode
    setup.policy.decode = lambda latents: drawn.append(decode(latents)) or drawn[-1]
    sizes = []
    for _ in SIZES:
        iterate(setup, learner, lambda phase: None)
        (size,) = {(picture.shape[2], picture.shape[1]) for picture in drawn}
        sizes.append(f"{size[0]}x{size[1]}")
        drawn.clear()
    assert sorted(sizes) == sorted(SIZES) and setup.shape[1:] == (8, 8)


def test_a_run_of_several_sizes_resumes_bit_for_bit(tmp_path: Path) -> None:
    made = config(tmp_path, model={"sizes": SIZES})
    train(made, tmp_path / "whole", progress=Silent())
    with pytest.raises(KeyboardInterrupt):
        train(made, tmp_path / "parts", progress=StopAt(2))
    train(made, tmp_path / "parts", resume=True, progress=Silent())
    assert_equal(outcome(tmp_path / "whole"), outcome(tmp_path / "parts"))


def test_a_list_of_the_models_own_size_changes_nothing(tmp_path: Path) -> None:
    for name, sizes in (("without", []), ("with", ["64x64"])):
        train(config(tmp_path, model={"sizes": sizes}), tmp_path / name, progress=Silent())
    assert_equal(outcome(tmp_path / "without"), outcome(tmp_path / "with"))


@pytest.mark.parametrize("size", ["640", "8x64", "64x5000", "64X64", "axb", "64x64x64", "-64x64", "²4x64"])
def test_what_is_no_size_is_refused(tmp_path: Path, size: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.sizes has .*; write a size as 640x448"):
        config(tmp_path, model={"sizes": ["64x64", size]})


@pytest.mark.parametrize(
    ("size", "says"), [("64x50", "both must be multiples of 16"), ("64x272", "sides of up to 256 pixels")]
)
@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_size_that_the_model_cannot_draw_is_refused_before_the_run(
    command: str, size: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = () if command == "plan" else ("--out", tmp_path / "run")
    code, printed, error = leave(capsys, command, "demo", "--set", f"model.sizes=[64x64, {size}]", *out)
    assert f"model.sizes has {size}: " in printed + error and says in printed + error
    assert code == (0 if command == "plan" else 2) and not (tmp_path / "run").exists()


@pytest.mark.long
def test_memory_is_that_of_the_largest_size(tmp_path: Path) -> None:
    sizes = {"sizes": ["64x64", "128x96", "96x64"]}
    several, small = (footprint(config(tmp_path, model=model)) for model in (sizes, {}))
    large = footprint(config(tmp_path, model={"width": 128, "height": 96}))
    assert several.peaks == large.peaks and several.need > small.need
