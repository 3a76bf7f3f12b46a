"""What `g2rpo plan` says of time, and that nothing large starts without a GPU."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from program import leave

from g2rpo_trainer.config import file_checks
from g2rpo_trainer.config.bundled import bundled_recipes
from g2rpo_trainer.config.reading import ConfigError, load
from g2rpo_trainer.cost import price as pricing
from g2rpo_trainer.cost import remembered
from g2rpo_trainer.cost.count_model import count_model
from g2rpo_trainer.cost.estimate import Cost, count
from g2rpo_trainer.cost.hours_by_card import CARDS, UTILISATION, work_of
from g2rpo_trainer.cost.remembered import counts_key, counts_of, shipped
from g2rpo_trainer.cost.timing import END, measure, without_people
from g2rpo_trainer.model import cpu_refusal
from g2rpo_trainer.model.cpu_refusal import LARGE, refuse_cpu, why_no_gpu

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TINY = ["train.eval_every=0", "train.eval_prompts=4", "train.eval_noises=1", "train.slots=16"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what is counted and measured in a folder of the test."""
    monkeypatch.setenv("G2RPO_PLANS", str(tmp_path / "plans"))
    return tmp_path / "plans"


def forbidden(*given: object) -> None:
    """Stand in for what should not be called."""
    raise AssertionError("counted again")


def test_a_forward_of_flux_takes_what_is_known_of_it() -> None:
    """37.3 TFLOP at 720×720 with 512 tokens of text, and 1 % more for an adapter of rank 64."""
    counted = counts_of(load("flux_dev"))
    assert counted.forward == pytest.approx(37.3e12, rel=0.02)
    assert counted.parameters == pytest.approx(11.9e9, rel=0.01)
    # The frozen weights need no gradient: a backward pass costs about what a forward does.
    assert 2 < counted.update / counted.forward < 2.5


def test_a_run_of_flux_dev_takes_about_sixty_hours_of_an_h100() -> None:
    config = load("flux_dev")
    work = work_of(config, count(config), counts_of(config))
    assert work.hours(CARDS["H100"].bf16) == pytest.approx(60, rel=0.05)
    assert all(
        work.operations[name] > 0 for name in ("rollouts", "decoding", "updates", "evaluations", "texts")
    )
    by_hand = sum(work.operations.values()) / (CARDS["A100"].bf16 * 1e12 * UTILISATION) + work.rules
    assert work.hours(CARDS["A100"].bf16) == pytest.approx(by_hand / 3600)


@pytest.mark.parametrize("name", bundled_recipes())
def test_the_counts_of_every_bundled_recipe_come_with_the_program(name: str) -> None:
    assert counts_key(load(name)) in shipped(), "run tools/make_counts.py"


@pytest.mark.parametrize("name", ["demo", pytest.param("sd35_medium", marks=pytest.mark.long)])
def test_counts_that_come_with_the_program_are_up_to_date(name: str) -> None:
    config = load(name)
    told, found = shipped()[counts_key(config)], dataclasses.asdict(count_model(config))
    assert set(found) == set(told)
    for field, value in found.items():
        assert value == (told[field] if isinstance(value, dict) else pytest.approx(told[field], rel=0.02)), (
            field
        )


def test_what_is_counted_once_is_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("demo", ["lora.rank=3"])
    first = counts_of(config)
    assert len(list(cache.glob("*.json"))) == 1
    monkeypatch.setattr("g2rpo_trainer.cost.count_model.count_model", forbidden)
    assert counts_of(config) == first
    next(cache.glob("*.json")).write_text("{")  # a damaged file is not believed
    with pytest.raises(AssertionError, match="counted again"):
        counts_of(config)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        (["train.steps=7", "rewards.0.name=jpeg", "method.eta=0.1", "train.seed=4"], True),
        (["train.slots=9"], False),
        (["lora.rank=9"], False),
        (["model.width=32"], False),
        (["memory.quantization=fp8"], False),
    ],
)
def test_counts_are_kept_apart_by_what_they_depend_on(changes: list[str], same: bool) -> None:
    assert (counts_key(load("demo", changes)) == counts_key(load("demo"))) is same


def test_hours_are_said_for_cards_and_the_faster_recipe_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = leave(capsys, "plan", "flux_dev")
    assert code == 0
    assert [name for name in CARDS if f"  {name}, " not in text] == []
    assert "nothing was measured" in text
    assert "flux_dev_fast takes ≈" in text
    assert "which this machine does not have; fetch it with: hf download" in text


def test_rewards_that_are_not_fetched_yet_are_in_the_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("G2RPO_REWARDS", str(tmp_path))
    config = load("flux_dev")
    work = work_of(config, count(config), counts_of(config))
    # PickScore and CLIPScore, about 1.0 and 0.4 billion numbers.
    assert work.operations["rewards"] > 2 * 257 * 0.9e9 * count(config).images
    assert work.unknown == ()


def test_a_run_takes_what_its_parts_take() -> None:
    config = load("demo", [*TINY, "train.steps=10"])
    counts = count(config)
    cost = Cost("cpu", start=5, step=2, look=3, end=END, peak=0, left_out="", at=0)
    assert cost.run(counts) == 5 + 20 + 2 * 3 + END
    assert cost.run(counts, minutes=0.1) == 5 + 6 + 2 * 3 + END


@pytest.mark.long
def test_a_measured_step_is_what_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock counts latents that the model sees and pictures that are decoded: the machine may be busy."""
    from accelerate import Accelerator

    from comfy_g2rpo.run.iteration import iterate
    from comfy_g2rpo.run.setup import make_learner
    from g2rpo_trainer.families.sd3 import SD3
    from g2rpo_trainer.run import prepare

    work, velocity, decode = [0], SD3.velocity, SD3.decode

    def counted(self: SD3, x: torch.Tensor, *rest: object) -> torch.Tensor:
        work[0] += 10 * len(x)
        return velocity(self, x, *rest)

    def decoded(self: SD3, latents: torch.Tensor) -> torch.Tensor:
        work[0] += len(latents)
        return decode(self, latents)

    monkeypatch.setattr(SD3, "velocity", counted)
    monkeypatch.setattr(SD3, "decode", decoded)
    config = load("demo", [*TINY, "train.slots=128"])
    cost = measure(config, count(config), lambda: float(work[0]))
    setup = prepare(config, Accelerator(cpu=True))
    begin = work[0]
    iterate(setup, make_learner(setup), lambda phase: None)
    assert cost.step == pytest.approx(work[0] - begin)
    assert cost.look > 0 < cost.start


@pytest.mark.long
def test_a_measurement_is_kept_for_a_day_and_renewed_when_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("plan", "demo", *(word for each in TINY for word in ("--set", each)))
    assert re_measured(capsys, asked)
    monkeypatch.setattr("g2rpo_trainer.cost.timing.measure", forbidden)
    assert re_measured(capsys, asked)
    with pytest.raises(AssertionError, match="counted again"):
        leave(capsys, *asked, "--measure")
    monkeypatch.setattr("g2rpo_trainer.cost.measured.KEPT_SECONDS", 0)
    with pytest.raises(AssertionError, match="counted again"):
        leave(capsys, *asked)


def re_measured(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> bool:
    """Return whether a plan says a measured time."""
    code, text, _ = leave(capsys, *words)
    return code == 0 and "measured on" in text and "time in all" in text


def test_judges_and_people_are_not_asked_for_the_sake_of_a_price() -> None:
    config = load(
        "demo",
        ["rewards=[votes, jpeg]", "heldout_rewards=[{name: far, url: 'http://localhost:1/x'}, strict]"],
    )
    asked, left_out = without_people(config)
    assert left_out == "far, votes"
    assert [each.name for each in (*asked.rewards, *asked.heldout_rewards)] == ["jpeg", "strict"]


@pytest.mark.parametrize("command", ["train", "plan", "sample"])
def test_files_are_looked_at_before_anything_is_counted(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with one part cut short; nothing is counted, loaded or made."""
    monkeypatch.setattr("g2rpo_trainer.cost.count_model.count_model", forbidden)
    monkeypatch.setattr("g2rpo_trainer.run.prepare", forbidden)
    model = tmp_path / "model"
    (model / "transformer").mkdir(parents=True)
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (model / "model_index.json").write_text(json.dumps(index))
    (model / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    more = {"train": ["--out", tmp_path / "run"], "sample": ["--prompt", "x", "--out", tmp_path / "a.png"]}
    code, text, error = leave(capsys, command, "demo", "--set", f"model.path={model}", *more.get(command, []))
    if command == "plan":
        assert (code, "has 10 of 16 bytes" in text) == (0, True)
    else:
        assert (code, "transformer/diffusion_pytorch_model.safetensors has 10 of 16 bytes" in error) == (
            2,
            True,
        )
    assert not (tmp_path / "run").exists()


def test_a_build_without_cuda_is_told_from_a_hidden_and_a_missing_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_refusal.sys, "platform", "linux")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA; install one that has it" in why_no_gpu()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is '' and hides every GPU; unset it" in why_no_gpu()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "no CUDA device is visible; see whether nvidia-smi lists one" in why_no_gpu()
    monkeypatch.setattr(cpu_refusal.sys, "platform", "darwin")
    assert "no Apple GPU" in why_no_gpu()


def test_a_large_model_does_not_start_on_a_cpu_without_force() -> None:
    large = load("flux_dev").model
    with pytest.raises(ConfigError, match=r"^no GPU: .* 11\.9 billion parameters .*; or go on with --force$"):
        refuse_cpu(large, CPU)
    assert refuse_cpu(large, CPU, force=True).startswith("no GPU: ")
    assert refuse_cpu(large, GPU) == ""
    assert refuse_cpu(load("demo").model, CPU) == ""


@pytest.mark.parametrize(
    "words", [["train", "flux_dev"], ["train", "qwen_edit"], ["sample", "z_image", "--prompt", "x"]]
)
def test_no_gpu_is_the_first_thing_that_is_said(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("g2rpo_trainer.cost.presets.device", lambda: CPU)
    code, _, error = leave(capsys, *words, "--out", tmp_path / "out.png")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("error: no GPU: ")
    assert not (tmp_path / "out.png").exists()


def test_parameters_are_counted_by_headers() -> None:
    assert file_checks.parameters_of(load("demo").model) == counts_of(load("demo")).parameters < LARGE


def test_a_plan_says_beforehand_what_will_waste_a_run(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a cat\ntwo red circles\n")
    (tmp_path / "held.txt").write_text("a blue circle\n")
    files = [f"prompts.train={tmp_path / 'train.txt'}", f"prompts.heldout={tmp_path / 'held.txt'}"]
    found = pricing.foreseen(load("demo", [*files, "train.prompts_per_step=3"]))
    assert [text.partition(":")[0].partition(",")[0] for text in found] == [
        "prompts_per_step is 3",
        "none of agreement can judge 1 of the 2 prompts to train on",
        "3 held-out images (1 prompts × 3 noises) show no gain below 1.6 spreads of a score",
    ]


def test_nothing_is_kept_where_the_cache_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file")
    remembered.keep("key", {"a": 1})
    assert remembered.recall("key") is None
