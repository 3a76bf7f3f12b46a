"""A run folder that somebody else wrote, or that a disk has damaged, is refused in one line that names the
file.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from comfy_g2rpo.files.safe import RunError, read_json, write_json, write_tensors
from comfy_g2rpo.run.folder import RunFolder, damage, fitting, is_run, read_progress, write_state
from comfy_g2rpo.run.optimizers import load_optimizer_tensors, optimizer_tensors

DEEP = "[" * 100_000
CONFIG = {"config": {"train": {"steps": 3}, "model": {"width": 64}}}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", CONFIG)


def optimizer() -> torch.optim.AdamW:
    """Return one that has made a step on two parameters."""
    parameters = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))]
    made = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    return made


@pytest.mark.parametrize(
    "content", ["{", "[]", "7", "null", DEEP, '{"config": []}', '{"config": null}', "{}"]
)
def test_a_configuration_of_another_kind_is_refused(run: RunFolder, content: str) -> None:
    run.config_file.write_text(content)
    with pytest.raises(RunError, match=r"config\.json"):
        RunFolder.reopen(run.path, CONFIG)


REWARD = {"name": "agreement", "weight": 1.0, "timeout": 60}


@pytest.mark.parametrize("free", [{"timeout": 5}, {"retries": 3}, {"device": "cpu", "batch": 1}])
def test_how_a_reward_is_asked_may_change(run: RunFolder, free: dict[str, Any]) -> None:
    write_json(run.config_file, {"config": {"rewards": [REWARD]}})
    RunFolder.reopen(run.path, {"config": {"rewards": [REWARD | free]}})


@pytest.mark.parametrize(
    ("rewards", "field"),
    [
        ([REWARD | {"weight": 2.0}], "weight"),
        ([REWARD | {"name": "jpeg"}], "name"),
        ([], "name"),
        ([REWARD, REWARD], "name"),
    ],
)
def test_another_reward_is_refused_by_its_field(run: RunFolder, rewards: list[Any], field: str) -> None:
    write_json(run.config_file, {"config": {"rewards": [REWARD]}})
    place = max(len(rewards) - 1, 0)
    with pytest.raises(RunError, match=rf"was made with rewards\.{place}\.{field} = "):
        RunFolder.reopen(run.path, {"config": {"rewards": rewards}})


def test_a_difference_is_shown_in_short(run: RunFolder) -> None:
    write_json(run.config_file, {"config": {"model": {"width": "x" * 10**5}}})
    with pytest.raises(RunError, match=r"model\.width") as refused:
        RunFolder.reopen(run.path, CONFIG)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "line", ["[]", "7", "null", DEEP, '{"step": "1"}', '{"step": null}', '{"step": 1e400}']
)
def test_a_row_that_is_none_is_named_by_its_line(run: RunFolder, line: str) -> None:
    run.append({"step": 1})
    with run.metrics_file.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunError, match="line 3"):
        run.metrics()


def test_a_deep_first_line_is_no_run(run: RunFolder) -> None:
    run.metrics_file.write_text(DEEP)
    assert not is_run(run.path)


def test_a_lone_surrogate_in_a_row_does_not_stop_a_run(run: RunFolder) -> None:
    run.append({"step": 1})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 2, "\\ud800": 1}\n')
    run.truncate_metrics(2)
    assert [row["step"] for row in run.metrics()] == [1, 2]


@pytest.mark.parametrize("name", ["12abc", "1²", "9" * 200, ".DS_Store", "000001.bak"])
def test_other_names_among_the_checkpoints_are_left_alone(run: RunFolder, name: str) -> None:
    (run.checkpoints / name).mkdir(parents=True)
    for file in ("lora.safetensors", "state.safetensors", "state.json"):
        (run.checkpoints / name / file).write_text("x")
    (run.checkpoints / ".file").write_text("x")
    assert RunFolder.open(run.path).latest() is None
    assert (run.checkpoints / name / "state.json").exists()


@pytest.mark.parametrize("step", ["1", -1, True, 1.5, None, float("nan"), 2, 1e300])
def test_progress_of_another_step_is_refused(tmp_path: Path, step: Any) -> None:
    place = tmp_path / "000001"
    write_state(place, {}, {"step": step})
    with pytest.raises(RunError, match="step 1"):
        read_progress(place, ())


@pytest.mark.parametrize("count", ["1", -1, None, True])
def test_progress_with_a_strange_count_is_refused(tmp_path: Path, count: Any) -> None:
    place = tmp_path / "000001"
    write_state(place, {}, {"step": 1, "forwards": count})
    with pytest.raises(RunError, match=r"state\.json"):
        read_progress(place, ("forwards",))


@pytest.mark.parametrize("change", [{"step": 2}, {"forwards": 8}, {"forwards": None}, {"cheap": False}])
def test_changed_progress_is_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    write_tensors(tmp_path / "lora.safetensors", {"x": torch.ones(1)})
    write_state(tmp_path, {"x": torch.ones(2)}, {"step": 1, "forwards": 7})
    assert damage(tmp_path) == ""
    write_json(tmp_path / "state.json", read_json(tmp_path / "state.json") | change)
    assert damage(tmp_path) == "state.json"


@pytest.mark.parametrize("index", ["{}", '""', "7", "null", "[7]", '[{"file": "000.png"}]'])
def test_an_index_that_lists_no_pictures_is_named(run: RunFolder, index: str) -> None:
    folder = run.path / "images/000001"
    folder.mkdir(parents=True)
    (folder / "index.json").write_text(index)
    with pytest.raises(RunError, match=r"index\.json is damaged: it lists no pictures"):
        run.samples(1)


@pytest.mark.parametrize(
    "bad", [None, torch.zeros(3), torch.zeros(2, 2, dtype=torch.long), torch.full((2, 2), torch.nan)]
)
def test_parameters_that_do_not_fit_are_refused(bad: torch.Tensor | None) -> None:
    tensors = {} if bad is None else {"parameter/0": bad}
    with pytest.raises(RunError, match="does not fit"):
        fitting(tensors, "parameter", [torch.zeros(2, 2)], Path("run"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer/x/exp_avg", torch.zeros(2, 3)),
        ("optimizer/0/exp_avg/y", torch.zeros(2, 3)),
        ("optimizer/-1/exp_avg", torch.zeros(2, 3)),
        ("optimizer/2/exp_avg", torch.zeros(2, 3)),
        ("optimizer/0/foreign", torch.zeros(2, 3)),
        ("optimizer/0/exp_avg", torch.tensor(0.0)),
        ("optimizer/0/exp_avg", torch.full((2, 3), torch.nan)),
        ("optimizer/0/exp_avg", torch.zeros(2, 3, dtype=torch.long)),
        ("optimizer/0/exp_avg_sq", torch.full((2, 3), -1.0)),
        ("optimizer/0/step", torch.tensor(-1.0)),
        ("optimizer/0/step", torch.tensor([1.0])),
    ],
)
def test_an_optimizer_state_that_no_adamw_has_left_is_refused(key: str, value: torch.Tensor) -> None:
    made = optimizer()
    with pytest.raises(RunError, match="optimizer state"):
        load_optimizer_tensors(made, {**optimizer_tensors(made), key: value})


@pytest.mark.parametrize("missing", ["step", "exp_avg", "exp_avg_sq"])
def test_half_an_optimizer_state_is_refused(missing: str) -> None:
    made = optimizer()
    kept = {key: value for key, value in optimizer_tensors(made).items() if key != f"optimizer/0/{missing}"}
    with pytest.raises(RunError, match="incomplete"):
        load_optimizer_tensors(made, kept)
