"""`g2rpo calibrate`: etas that a toy's optimum tells, a table of what noise costs, and refusals by name."""

import dataclasses
import itertools
import math
import signal

import pytest
import torch
from accelerate import Accelerator
from program import call, leave

from comfy_g2rpo.exploration import calibration
from comfy_g2rpo.exploration.calibration import adjusted, balance_of, calibrate
from comfy_g2rpo.exploration.measuring import (
    exploring,
    measured_gains,
    noisy_steps,
    probing_plan,
    rolled_scores,
    sde_minus_ode,
)
from comfy_g2rpo.methods.recipe_options import KERNELS
from comfy_g2rpo.plan import ROOT, independent, singular
from comfy_g2rpo.recipes import recipe
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.trees.dense_chains import probed
from g2rpo_trainer.config.reading import apply_overrides, load
from g2rpo_trainer.run import prepare

pytestmark = pytest.mark.xdist_group("calibrate")

FEW = ("method.num_steps=4", "method.group_size=3", "method.steps=all_but_last", "train.seed=5")
SMALL = [word for setting in FEW for word in ("--set", setting)]


def toy(optimum):
    """Measure gains that are balanced up to each step's own strength, and mostly bad above it."""

    def measure(etas, number):
        good = {k: 500 if etas[k] <= best else 200 for k, best in optimum.items()}
        return {k: torch.tensor([1.0] * count + [-1.0] * (1000 - count)) for k, count in good.items()}

    return measure


@pytest.mark.parametrize("begin", [0.0, 0.7, 1.6])
@pytest.mark.parametrize("step", [0.05, 0.02, 0.13])
def test_on_a_toy_it_converges_to_within_one_step_of_the_optimum(begin, step):
    optimum = {0: 0.31, 1: 0.902, 2: 1.25, 4: 0.08}
    rounds = [*calibrate((begin,) * 5, toy(optimum), 100, step, 0.1)]
    assert len(rounds) == 100
    for each in rounds[-10:]:
        assert all(abs(each.following[k] - best) <= step + 1e-9 for k, best in optimum.items())
        assert each.following[3] == begin  # nothing was measured there
    assert all(one.following == other.etas for one, other in itertools.pairwise(rounds))


@pytest.mark.parametrize(
    ("eta", "balance", "then"),
    [
        (0.7, 0.0, 0.75),
        (0.7, 0.099, 0.75),
        (0.7, -0.099, 0.75),
        (0.7, 0.1, 0.65),
        (0.7, -0.5, 0.65),
        (0.7, 0.5, 0.65),
        (0.03, -1.0, 0.0),
        (9.99, 0.0, 10.0),
        (0.7, math.nan, 0.7),
        (0.30000000000000004, -1.0, 0.25),
    ],
)
def test_a_strength_rises_where_images_are_as_often_better_as_worse(eta, balance, then):
    """|#{ΔR > 0} − #{ΔR < 0}| < ε₁: ψ + ε₂, else ψ − ε₂ (arXiv 2601.20218)."""
    assert adjusted(eta, balance, 0.05, 0.1) == then


def test_a_kernel_whose_noise_is_full_is_not_raised_beyond():
    assert adjusted(0.98, 0.0, 0.05, 0.1, most=1.0) == 1.0


@pytest.mark.parametrize(
    ("gains", "balance"),
    [([1.0, 2.0, -5.0, 0.0], 0.25), ([0.0, 0.0], 0.0), ([-1.0, math.nan, -2.0], -1.0), ([1e-30, -1e30], 0.0)],
)
def test_the_balance_counts_signs_alone(gains, balance):
    assert balance_of(torch.tensor(gains)) == balance


def test_the_balance_of_nothing_is_unknown():
    assert math.isnan(balance_of(torch.tensor([math.nan]))) and math.isnan(balance_of(torch.zeros(0)))


@pytest.mark.parametrize(
    ("kernel", "last"), [("flow_sde", True), ("dance_sde", True), ("cps", False), ("ddim", False)]
)
def test_steps_that_take_no_noise_are_left_alone(kernel, last):
    made = recipe("dense_grpo", num_steps=6, steps="all", kernel=kernel)
    assert noisy_steps(made, shifted_sigmas(6)) == list(range(6 if last else 5))


def test_chains_are_measured_as_chains_and_branches_as_branches():
    etas = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    for name, forwards in (("dense_grpo", 3 * 6 * 7 // 2), ("g2rpo", 6 + 3 * (5 + 4 + 3))):
        plan = probing_plan(recipe(name, num_steps=6, group_size=3), range(3 if name == "g2rpo" else 5), etas)
        assert plan.forwards == forwards
        for i in plan.transitions:
            assert plan.states[i].eta == etas[plan.states[plan.states[i].parent].index]


@pytest.mark.parametrize(
    "plan",
    [singular(5, [0, 2], 3, starts=2), independent(5, [1, 3], 4), independent(5, [0], 4, shared_start=True)],
    ids=["branches", "chains", "one start"],
)
def test_the_sde_is_compared_with_the_ode_of_its_own_start(plan):
    plan = probed(plan, [i for i, state in enumerate(plan.states) if state.parent == ROOT])
    scores = torch.randint(-99, 99, (2, 3, len(plan.images)), generator=torch.Generator().manual_seed(1)) / 8
    found, column = sde_minus_ode(plan, scores), {image: i for i, image in enumerate(plan.images)}
    drawn = [leaf.state for leaf in plan.leaves if leaf.of == ROOT]
    for n, state in enumerate(drawn):
        root = state
        while plan.states[root].parent != ROOT:
            root = plan.states[root].parent
        ode = root
        while plan.children[ode]:  # the only walk without noise
            ode = next(i for i in plan.children[ode] if not plan.states[i].noise)
        assert torch.equal(found[:, :, n], scores[:, :, column[state]] - scores[:, :, column[ode]])


@pytest.fixture(scope="module")
def setup():
    """Prepare a run of the tiny model: four steps, three images, two prompts."""
    settings = [*FEW, "train.prompts_per_step=2", "train.steps=2"]
    return prepare(load("demo", settings), Accelerator(cpu=True))


def test_without_strength_the_sde_is_the_ode_and_teaches_nothing(setup):
    for kernel in KERNELS:
        (found,) = exploring(setup, kernel, 0.0, lambda phase: None)
        assert abs(found.gap) < 0.02 and found.spread < 0.02
    (noisy,) = exploring(setup, "ddim", 1.0, lambda phase: None)
    assert noisy.spread > 0.02 and noisy.width > 0


def test_gains_are_the_rewards_own_and_turn_with_their_weight(setup):
    steps, etas = noisy_steps(setup.recipe, setup.sigmas), (0.7,) * 4
    gains = measured_gains(setup, steps, etas, 0, lambda phase: None)
    plan = probing_plan(setup.recipe, steps, etas)
    scores = rolled_scores(setup, plan, 0, lambda phase: None)
    assert sorted(gains) == [0, 1, 2] and all(len(found) == 2 * 3 for found in gains.values())
    for k, found in gains.items():
        expected = torch.stack([plan.gains(scores[:, p])[:, k] for p in range(2)], 1).flatten()
        assert torch.equal(found, expected)
    turned = dataclasses.replace(setup, weights=(-2.0,))
    again = measured_gains(turned, steps, etas, 0, lambda phase: None)
    assert all(torch.equal(again[k], -gains[k]) for k in gains)
    other = measured_gains(setup, steps, etas, 1, lambda phase: None)
    assert any(not torch.equal(other[k], gains[k]) for k in gains)


def test_the_command_prints_a_row_for_the_recipe_and_repeats_itself(tmp_path, capsys):
    printed = []
    for name in ("one.png", "two.png"):
        words = ["calibrate", "demo", "--prompts", 2, "--rounds", 2, "--out", tmp_path / name, *SMALL]
        code, said, progress = leave(capsys, *words)
        assert code == 0 and progress.count("round ") == 2 and "forwards" in progress
        printed.append(said.splitlines())
    assert printed[0][0] == printed[1][0] and printed[0][1] == str(tmp_path / "one.png")
    etas = apply_overrides({}, [printed[0][0]])["method"]["etas"]
    assert all(abs(eta - 0.7) <= 0.1 + 1e-9 for eta in etas) and etas[3] == 0.7 and etas[:3] != [0.7] * 3
    assert load("demo", [*FEW, printed[0][0]]).method.etas == tuple(etas)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_has_a_row_for_every_kernel_and_strength(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "calibrate",
        "demo",
        "--report",
        "--prompts",
        2,
        "--quiet",
        *SMALL,
        "--set",
        "method.group_size=2",
    ]
    code, said, errors = leave(capsys, *words)
    assert code == 0 and not errors and not list(tmp_path.iterdir())
    rows = [line.split()[:2] for line in said.splitlines() if line.split()[0] in KERNELS]
    tried = ["0.3", "0.5", "0.7", "1", "1.2"]
    assert rows == [[kernel, eta] for kernel in KERNELS for eta in tried[: 4 if kernel == "cps" else 5]]
    assert "agreement" in said.splitlines()[0] and said.count("\n") == 2 + len(rows) + 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--step", "0"], "--step is 0; it must be above 0"),
        (["--step", "nan"], "--step is nan"),
        (["--step", "-1"], "--step is -1"),
        (["--step", "inf"], "--step is inf"),
        (["--step", "10.5"], "at most 10"),
        (["--step", "much"], "--step"),
        (["--balance", "0"], "--balance is 0; it must be above 0 and at most 1"),
        (["--balance", "nan"], "--balance is nan"),
        (["--balance", "1.01"], "--balance is 1.01"),
        (["--prompts", "0"], "--prompts"),
        (["--prompts", "10001"], "--prompts"),
        (["--rounds", "0"], "--rounds"),
        (["--rounds", "2.5"], "--rounds"),
        (["--out", "there.png"], "there.png exists; choose another --out, or give --replace"),
        (["--out", "plot.jpg"], "--out is plot.jpg; the plot is a picture"),
        (["--out", "folder.png"], "--out is folder.png, a folder"),
        (["--set", "rewards.0.name=votes", "--set", "heldout_rewards=[jpeg]"], "rewards has votes"),
        (["--set", "rewards.0.name=pickscore"], "pickscore"),
        (
            ["--set", "method.name=diffusion_nft", "--set", "method.granularities=[1]"],
            "method.objective is nft, which explores no step",
        ),
        (
            ["--report", "--set", "method.name=awm", "--set", "method.granularities=[1]"],
            "method.objective is awm, which explores no step",
        ),
        (["--set", "method.etas=[1,2]"], "method.etas has 2 values for"),
        (["--set", "method.kernel=cps", "--set", "method.num_steps=1"], "no step of 1 takes noise"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(words, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("G2RPO_REWARDS", str(tmp_path / "none"))
    (tmp_path / "there.png").write_bytes(b"mine")
    (tmp_path / "folder.png").mkdir()
    code, _, errors = leave(capsys, "calibrate", "demo", "--quiet", *words)
    assert code == 2 and says in " ".join(errors.split())
    assert (tmp_path / "there.png").read_bytes() == b"mine"
    assert {path.name for path in tmp_path.iterdir()} == {"there.png", "folder.png"}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stop_leaves_nothing_behind(name, tmp_path, capsys, monkeypatch):
    def interrupted(gains):
        signal.raise_signal(getattr(signal, name))
        return balance_of(gains)

    monkeypatch.setattr(calibration, "balance_of", interrupted)
    words = ["calibrate", "demo", "--prompts", 1, "--rounds", 50, "--out", tmp_path / "plot.png", *SMALL]
    code, said, errors = leave(
        capsys, *words, "--set", "method.steps=first_half", "--set", "method.num_steps=2"
    )
    assert code == 130 and "interrupted; nothing was written" in errors and not said
    assert not list(tmp_path.iterdir())


def test_help_names_every_option(capsys):
    assert call("calibrate", "--help") == 0
    said = capsys.readouterr().out
    for option in ("--prompts", "--rounds", "--step", "--balance", "--report", "--out", "--set", "--quiet"):
        assert option in said
