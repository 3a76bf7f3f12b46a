"""Optimizers of a run: what each keeps in a checkpoint, bit-equal continuation, and what is refused."""

import math
import sys

import pytest
import torch
from torch import nn

from comfy_g2rpo.files.safe import RunError
from comfy_g2rpo.recipes import recipe
from comfy_g2rpo.run.folder import read_state, write_state
from comfy_g2rpo.run.optimizers import adamw, load_optimizer_tensors, optimizer_tensors, rate_schedule
from g2rpo_trainer.model.named_optimizers import make_optimizer

RATES = {"adamw": 1e-2, "adamw_8bit": 1e-2, "prodigy": 1.0}


def parameters() -> list[nn.Parameter]:
    """Make an adapter: a large and a small A, and a B of zeros."""
    generator = torch.Generator().manual_seed(0)
    return [
        *(nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 96), (4, 6))),
        nn.Parameter(torch.zeros(96, 64)),
    ]


def steps(optimizer: torch.optim.Optimizer, count: int, seed: int) -> None:
    """Take steps with gradients of a seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def made(name: str, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    return make_optimizer(weights, recipe("g2rpo", optimizer=name, learning_rate=RATES[name]))


@pytest.mark.parametrize("name", RATES)
def test_a_continued_optimizer_takes_the_same_steps_bit_for_bit(tmp_path, name):
    weights = parameters()
    optimizer = made(name, weights)
    steps(optimizer, 3, 1)
    write_state(
        tmp_path,
        {f"p{i}": weight.detach() for i, weight in enumerate(weights)} | optimizer_tensors(optimizer),
        {},
    )
    steps(optimizer, 3, 2)

    tensors, _ = read_state(tmp_path)
    resumed = [nn.Parameter(tensors[f"p{i}"].clone()) for i in range(len(weights))]
    again = made(name, resumed)
    load_optimizer_tensors(again, tensors)
    steps(again, 3, 2)
    assert all(torch.equal(one, other) for one, other in zip(weights, resumed, strict=True))
    state, theirs = optimizer_tensors(optimizer), optimizer_tensors(again)
    assert state.keys() == theirs.keys() and all(torch.equal(state[key], theirs[key]) for key in state)


@pytest.mark.parametrize("name", RATES)
def test_state_that_the_optimizer_would_not_have_left_is_refused(name):
    optimizer = made(name, parameters())
    steps(optimizer, 1, 1)
    state = optimizer_tensors(optimizer)
    largest = max(
        (key for key in state if key.startswith("optimizer/0/")), key=lambda key: state[key].numel()
    )
    for broken in (
        {largest: torch.zeros(2)},
        {"optimizer/9/step": state["optimizer/0/step"]},
        {"optimizer/0/foreign": torch.zeros(())},
        {"optimizer/0/step": torch.tensor(-1)},
        {"optimizer/group/foreign": torch.zeros(())},
    ):
        with pytest.raises(RunError, match="resume with the run's own configuration"):
            load_optimizer_tensors(made(name, parameters()), {**state, **broken})
    with pytest.raises(RunError, match="is incomplete"):
        load_optimizer_tensors(
            made(name, parameters()), {key: value for key, value in state.items() if key != largest}
        )


def test_the_state_of_another_optimizer_is_refused():
    optimizer = made("adamw", parameters())
    steps(optimizer, 1, 1)
    with pytest.raises(RunError, match="does not fit"):
        load_optimizer_tensors(made("prodigy", parameters()), optimizer_tensors(optimizer))


def test_8_bit_moments_take_a_quarter_of_the_memory():
    sizes = {}
    for name in ("adamw", "adamw_8bit"):
        optimizer = made(name, [nn.Parameter(torch.randn(512, 512))])
        steps(optimizer, 1, 1)
        sizes[name] = sum(tensor.nbytes for tensor in optimizer_tensors(optimizer).values())
    assert sizes["adamw_8bit"] < 0.27 * sizes["adamw"]


def test_prodigys_learning_rate_is_a_factor():
    with pytest.raises(ValueError, match=r"learning_rate is 0\.0001; prodigy .* set it to 1"):
        recipe("g2rpo", optimizer="prodigy")


def test_a_host_without_the_libraries_names_what_it_has():
    with pytest.raises(ValueError, match="headless trainer alone has; set it to adamw"):
        adamw(parameters(), recipe("g2rpo", optimizer="adamw_8bit"))


@pytest.mark.parametrize(("name", "library"), [("adamw_8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch, name, library):
    for module in [module for module in sys.modules if module.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=f"pip install {library}"):
        made(name, parameters())


SCHEDULES = {
    "constant": {"lr_schedule": "constant"},
    "linear": {"lr_schedule": "linear"},
    "cosine": {"lr_schedule": "cosine"},
    "warm-up": {"warmup_steps": 3},
    "warm-up and cosine": {"warmup_steps": 3, "lr_schedule": "cosine"},
}


def shares(steps: int, **fields: object) -> list[float]:
    """Return the learning rate of every step of a run, as a share of the recipe's."""
    rate = RATES["adamw"]
    made_recipe = recipe("g2rpo", learning_rate=rate, **fields)
    optimizer = make_optimizer(parameters(), made_recipe)
    schedule, found = rate_schedule(optimizer, made_recipe, steps), []
    for seed in range(steps):
        found.append(optimizer.param_groups[0]["lr"] / rate)
        steps_taken(optimizer, schedule, 1, seed)
    return found


def steps_taken(optimizer: torch.optim.Optimizer, schedule: object, count: int, seed: int) -> None:
    for i in range(count):
        steps(optimizer, 1, seed + i)
        schedule.step()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]),
        ("warm-up", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]),
        ("warm-up and cosine", [1 / 3, 2 / 3, 1, *((1 + math.cos(math.pi * k / 5)) / 2 for k in range(5))]),
    ],
)
def test_the_learning_rate_rises_and_falls_and_is_never_nothing(name, expected):
    assert shares(8, **SCHEDULES[name]) == pytest.approx(expected)
    assert min(expected) > 0


@pytest.mark.parametrize("done", [1, 3, 5])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RATES)
def test_a_continued_schedule_takes_the_same_steps_bit_for_bit(name, schedule, done):
    fields = {**SCHEDULES[schedule], "optimizer": name, "learning_rate": RATES[name]}
    made_recipe, weights = recipe("g2rpo", **fields), parameters()
    optimizer = make_optimizer(weights, made_recipe)
    rates = rate_schedule(optimizer, made_recipe, 8)
    steps_taken(optimizer, rates, done, 0)
    resumed = [nn.Parameter(weight.detach().clone()) for weight in weights]
    again = make_optimizer(resumed, made_recipe)
    load_optimizer_tensors(again, {key: t.clone() for key, t in optimizer_tensors(optimizer).items()})
    steps_taken(optimizer, rates, 8 - done, 50)
    steps_taken(again, rate_schedule(again, made_recipe, 8, done), 8 - done, 50)
    assert all(torch.equal(one, other) for one, other in zip(weights, resumed, strict=True))


@pytest.mark.parametrize(("warm", "steps"), [(8, 8), (9, 8), (1, 1)])
def test_a_warm_up_that_outlasts_the_run_is_refused(warm, steps):
    with pytest.raises(ValueError, match=f"warmup_steps is {warm}, but the run has {steps} steps"):
        shares(steps, warmup_steps=warm)


def test_prodigy_finds_its_rate_through_a_warm_up():
    fields = {"optimizer": "prodigy", "learning_rate": 1.0, "warmup_steps": 3}
    assert make_optimizer(parameters(), recipe("g2rpo", **fields)).param_groups[0]["safeguard_warmup"]
