"""A run's speed section on real models: what completions are computed in, what compiles, and a run that
switches itself back.
"""

import json

import pytest
import torch
from accelerate import Accelerator
from flux_folder import pipeline
from test_run import StopAt, assert_equal, config, outcome

from comfy_g2rpo.files.safe import write_json
from comfy_g2rpo.run import checkpoint
from comfy_g2rpo.run import setup as run_setup
from comfy_g2rpo.run.folder import RunFolder
from comfy_g2rpo.speed.cheap_completions import Speed
from g2rpo_trainer import run as training
from g2rpo_trainer.config.reading import ConfigError, load
from g2rpo_trainer.families.flux import Cond, Flux
from g2rpo_trainer.model import cheap_forward as speeding
from g2rpo_trainer.model.cheap_forward import (
    CompiledBlocks,
    Completions,
    FP8Products,
    completions,
    fp8_linear,
)
from g2rpo_trainer.model.stored_linear import store
from g2rpo_trainer.reports.progress import Silent

pytestmark = pytest.mark.xdist_group("speed")  # one process makes what they share

ROWS = 3


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def flux():
    """A shrunk FLUX.1 with an adapter that does something."""
    policy = Flux(pipeline("dev"), max_sequence_length=24)
    policy.add_lora(4, 8, seed=0)
    for i, (_, up) in enumerate(policy.pairs().values()):
        up.data.copy_(0.02 * noise(*up.shape, seed=i))
    return policy


@pytest.fixture(scope="module")
def asked():
    """Latents at three noise levels, with texts; 256 tokens each, so that products in 8 bit are worth it."""
    return (
        noise(ROWS, 16, 32, 32),
        torch.tensor([0.9, 0.5, 0.1]),
        [Cond(noise(24, 32, seed=i), noise(16, seed=i)) for i in range(ROWS)],
    )


@pytest.fixture(scope="module")
def exact(flux, asked):
    with flux.inference():
        return flux.velocity(*asked)


def error(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("bf16", 1e-3, 2e-2), ("fp16", 1e-4, 3e-3), ("fp8", 1e-2, 8e-2)]
)
def test_completions_in_lower_precision_are_near_and_leave_the_rest_exact(
    flux, asked, exact, precision, least, most
):
    with flux.inference():
        found = completions(flux, Speed(precision=precision))(*asked)
        assert found.dtype == torch.float32 and least < error(found, exact) < most
        assert torch.equal(flux.velocity(*asked), exact)


def test_weights_that_are_kept_in_8_bit_are_multiplied_in_it_too(asked):
    policy = Flux(pipeline("dev"), max_sequence_length=24)
    policy.add_lora(4, 8, seed=0)
    store(policy.transformer, "fp8", 0, torch.device("cpu"))
    with policy.inference():
        exact, cheap = policy.velocity(*asked), completions(policy, Speed(precision="fp8"))(*asked)
    assert 1e-2 < error(cheap, exact) < 8e-2


def test_rows_in_8_bit_do_not_depend_on_one_another(flux, asked):
    x, sigma, cond = asked
    cheap = completions(flux, Speed(precision="fp8"))
    with flux.inference():
        assert torch.allclose(cheap(x, sigma, cond)[:2], cheap(x[:2], sigma[:2], cond[:2]), atol=2e-3)


def test_a_product_in_8_bit_errs_by_the_types_three_bits():
    x, weight, bias = noise(2, 300, 64), noise(48, 64, seed=1), noise(48, seed=2)
    x[0, 0] *= 1000  # scales by row: one large row costs the others nothing
    true = torch.nn.functional.linear(x, weight, bias)
    found = fp8_linear(x, weight, bias)
    assert found.shape == true.shape and found.dtype == x.dtype
    assert 0.005 < error(found[1], true[1]) < 0.05 and error(found[0, 1:], true[0, 1:]) < 0.05
    assert fp8_linear(torch.zeros_like(x), weight, bias).equal(bias.expand(2, 300, 48).contiguous())


def test_the_adapter_and_small_products_stay_out_of_8_bit():
    linear = torch.nn.Linear(64, 48)
    few, many = noise(10, 64), noise(300, 64)
    with FP8Products(), torch.no_grad():
        learns, small = linear(many), linear.requires_grad_(False)(few)
        frozen = linear(many)
    assert torch.equal(learns, torch.nn.functional.linear(many, linear.weight, linear.bias))
    assert torch.equal(small, torch.nn.functional.linear(few, linear.weight, linear.bias))
    assert torch.equal(frozen, fp8_linear(many, linear.weight, linear.bias)) and not torch.equal(
        frozen, learns
    )


@pytest.fixture
def graphs(monkeypatch):
    """Let blocks compile to what PyTorch runs anyway, and collect the graphs: machine code would want a
    C++ compiler, and seconds.
    """
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(speeding, "BACKEND", backend)
    return seen


@pytest.mark.long
def test_blocks_are_compiled_for_completions_alone(flux, asked, exact, graphs):
    compiled = Completions(flux, Speed(compile=True))
    blocks = [type(block).__name__ for _, _, block, _ in compiled.blocks.places]
    assert blocks == ["FluxTransformerBlock"] * 2 + ["FluxSingleTransformerBlock"] * 2
    with flux.inference():
        assert error(compiled(*asked), exact) < 1e-5 and graphs
        count = len(graphs)
        assert torch.equal(flux.velocity(*asked), exact)
        compiled(*asked)
    assert len(graphs) == count and compiled.notes == []
    assert not any(isinstance(module, torch._dynamo.OptimizedModule) for module in flux.transformer.modules())


def test_compiled_blocks_multiply_in_8_bit_too(graphs):
    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64).requires_grad_(False) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = torch.nn.functional.gelu(layer(x))
            return x

    stack, x = Stack(), noise(300, 64)
    with torch.no_grad():
        exact = stack(x)
        with FP8Products():
            plain = stack(x)
            with CompiledBlocks(stack).in_place():
                both = stack(x)
    assert graphs and error(both, plain) < 1e-3 and error(both, exact) > 1e-2


def test_blocks_that_do_not_compile_run_as_they_are_and_the_run_says_why(flux, asked, exact, monkeypatch):
    def broken(graph, inputs):
        raise OSError("no compiler on this machine")

    torch._dynamo.reset()
    monkeypatch.setattr(speeding, "BACKEND", broken)
    compiled = Completions(flux, Speed(compile=True))
    with flux.inference():
        assert torch.equal(compiled(*asked), exact) and torch.equal(compiled(*asked), exact)
    assert len(compiled.notes) == 1
    assert (
        compiled.notes[0].startswith("speed.compile is off: the blocks do not compile here (")
        and "no compiler" in compiled.notes[0]
    )


def test_memory_that_runs_out_is_not_taken_for_a_block_that_does_not_compile(flux, asked, monkeypatch):
    def full(x, sigma, cond):
        raise torch.OutOfMemoryError("full")

    compiled = Completions(flux, Speed(compile=True))
    monkeypatch.setattr(flux, "velocity", full)
    with pytest.raises(torch.OutOfMemoryError):
        compiled(*asked)
    assert compiled.blocks and compiled.notes == []


def test_a_transformer_that_names_no_blocks_has_those_of_its_lists():
    policy = training.load_policy(load("demo"), "cpu")
    kinds = [type(block).__name__ for _, _, block, _ in CompiledBlocks(policy.transformer).places]
    assert kinds and set(kinds) == {"JointTransformerBlock"}


def test_what_changes_nothing_is_refused_and_so_is_what_is_out_of_bounds(flux, monkeypatch, tmp_path):
    assert completions(flux, Speed()) is None and completions(flux, Speed(cache=0.1, tail_stride=2)) is None
    monkeypatch.setattr(flux, "dtype", torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"speed.precision is bf16, which the model has anyway .*; remove it, or choose fp8"
    ):
        completions(flux, Speed(precision="bf16"))
    with pytest.raises(ConfigError, match=r"speed.cache is 2.*; it must lie between 0 and 1"):
        config(tmp_path, speed={"cache": 2})


def test_a_card_that_cannot_multiply_in_8_bit_is_told_what_to_choose(flux, monkeypatch):
    monkeypatch.setattr(
        speeding, "FP8", torch.float64
    )  # stands for what this hardware's scaled product does not take
    with pytest.raises(
        ValueError, match=r"speed.precision is fp8, which this cpu cannot multiply \(.+\); choose bf16"
    ):
        completions(flux, Speed(precision="fp8"))


class Noted(Silent):
    """Keep the remarks."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


RUNS = {
    # Rank correlations of exactly 1 are not to be had by such strides: the first measurement ends it.
    "off": {"tail_stride": 3, "cache": 0.3, "guard_every": 1, "guard_rank": 1.0},
    "on": {"precision": "bf16", "cache": 0.1, "guard_every": 1, "guard_rank": 0.0},
}


@pytest.fixture(scope="module", params=RUNS)
def cheap(request, tmp_path_factory):
    """Run without interruption; return how, where, and what was said."""
    path, progress = tmp_path_factory.mktemp(request.param), Noted()
    training.train(fast_config(path, request.param), path / "run", progress=progress)
    return request.param, path / "run", progress.notes


def fast_config(path, kind):
    method = {"num_steps": 8, "group_size": 5, "pick": "random", "pick_size": 1}
    return config(
        path,
        method=method,
        rewards=[{"name": "sharpness"}],
        train={"steps": 2, "eval_noises": 1},
        speed=RUNS[kind],
    )


def test_a_run_measures_its_completions_and_says_when_they_go_back_to_exact(cheap):
    kind, path, notes = cheap
    rows = [row for row in RunFolder.open(path).metrics() if "nfe" in row]
    measured = [(row["step"], row["guard/on"]) for row in rows if "guard/rank" in row]
    said = [note for note in notes if "switched off" in note]
    if kind == "off":
        assert measured == [(1, 0.0)] and rows[0]["guard/rank"] < 1
        assert len(said) == 1 and said[0].startswith(
            "step 1: cheap completions rank rewards as exact ones do to 0."
        )
    else:
        assert measured == [(1, 1.0), (2, 1.0)] and said == []
    assert all(-1 <= row["guard/rank"] <= 1 and row["guard/nfe"] > 0 for row in rows if "guard/rank" in row)


def test_an_interrupted_run_resumes_bit_for_bit_cheap_or_not(cheap, tmp_path):
    kind, path, _ = cheap
    with pytest.raises(KeyboardInterrupt):
        training.train(fast_config(tmp_path, kind), tmp_path / "run", progress=StopAt(1))
    training.train(fast_config(tmp_path, kind), tmp_path / "run", resume=True, progress=Silent())
    assert_equal(outcome(path), outcome(tmp_path / "run"))


def test_a_checkpoint_of_an_earlier_version_resumes_with_cheap_completions(cheap, tmp_path):
    kind, _, _ = cheap
    setup = training.prepare(fast_config(tmp_path, kind), Accelerator(cpu=True))
    learner, folder = run_setup.make_learner(setup), RunFolder.create(tmp_path / "run", {})
    learner.step, learner.cheap = 1, False
    checkpoint.save(setup, learner, folder)
    checkpoint.restore(setup, other := run_setup.make_learner(setup), folder)
    assert not other.cheap
    state = folder.latest() / "state.json"
    write_json(
        state,
        {
            name: value
            for name, value in json.loads(state.read_text()).items()
            if name not in ("cheap", "sha256")
        },
    )
    checkpoint.restore(setup, other, folder)
    assert other.cheap
