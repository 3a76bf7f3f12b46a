"""The run folder: nothing is lost, torn or overwritten."""

import json
import math
import os
import random
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfy_g2rpo.files.safe import (
    HEADER_BYTES,
    FileError,
    RunError,
    folder_on_disk,
    read_json,
    read_tensors,
    write_bytes,
    write_json,
    write_tensors,
)
from comfy_g2rpo.files.save_pictures import save_png
from comfy_g2rpo.run.folder import RunFolder, Sample, check_place, is_run, read_state, write_state
from comfy_g2rpo.run.optimizers import load_optimizer_tensors, optimizer_tensors


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", {"a": 1})


def fill(folder: Path) -> None:
    """Write the files of a checkpoint."""
    write_tensors(folder / "lora.safetensors", {"x": torch.ones(1)})
    write_state(folder, {"x": torch.ones(2)}, {"step": 1})


def test_a_new_run_has_its_configuration_and_the_schema_line(run: RunFolder) -> None:
    assert run.config() == {"a": 1}
    assert json.loads(run.metrics_file.read_text()) == {"schema": "g2rpo-metrics/1"}


def test_an_existing_run_is_not_overwritten(run: RunFolder) -> None:
    run.append({"step": 1})
    with pytest.raises(RunError, match=r"already holds a run; .*g2rpo resume.*--replace.*--out"):
        RunFolder.create(run.path, {})
    assert run.metrics() == [{"step": 1}]


def test_replace_starts_over(run: RunFolder) -> None:
    run.append({"step": 1})
    assert RunFolder.create(run.path, {"b": 2}, replace=True).metrics() == []


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "metrics.jsonl"])
def test_replace_never_removes_what_is_not_a_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(RunError, match="not a run"):
        RunFolder.create(tmp_path, {}, replace=True)
    assert (tmp_path / name).exists()


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, {}).path == tmp_path


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_does_not_become_a_run(tmp_path: Path, replace: bool) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(RunError, match="is not a run of this program"):
        check_place(tmp_path / "notes", replace)


@pytest.mark.parametrize("line", ["[]", "7", "null", "{}", '{"schema": "other/1"}', '{"schema": null}', ""])
def test_a_run_is_known_by_its_schema_line(run: RunFolder, line: str) -> None:
    assert is_run(run.path)
    run.metrics_file.write_text(line + "\n")
    assert not is_run(run.path)


def test_metrics_without_a_configuration_are_no_run(run: RunFolder) -> None:
    run.config_file.unlink()
    assert not is_run(run.path)


def test_opening_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        RunFolder.open(tmp_path)


def test_metrics_come_back_and_nan_becomes_null(run: RunFolder) -> None:
    run.append({"step": 1, "kl/velocity": math.nan, "lr": math.inf, "grad_norm": 0.5})
    assert run.metrics() == [{"step": 1, "kl/velocity": None, "lr": None, "grad_norm": 0.5}]


ROWS = [
    {"step": 1, "a": math.nan, "b": -math.inf, "c": 1 / 3, "d": 10**20},
    {"step": 2, "text": "ü 猫", "list": [1, (2.5, math.nan)], "table": {3: True}},
    {},
]


def test_what_is_remembered_of_the_metrics_is_what_their_file_holds(run: RunFolder) -> None:
    assert run.metrics() == []
    for row in ROWS:
        run.append(row)
        assert json.dumps(run.metrics()) == json.dumps(RunFolder(run.path).metrics())
    run.metrics().clear()
    assert len(run.metrics()) == len(ROWS)


def test_metrics_that_somebody_else_changed_are_read_again(run: RunFolder) -> None:
    run.append({"step": 1})
    assert run.metrics() == [{"step": 1}]
    RunFolder(run.path).append({"step": 2})
    assert run.metrics() == [{"step": 1}, {"step": 2}]
    RunFolder(run.path).append({"step": 3})
    run.append({"step": 4})
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4]
    run.truncate_metrics(2)
    assert [row["step"] for row in run.metrics()] == [1, 2]


@given(st.integers(0, 40))
def test_a_torn_last_line_is_dropped_on_opening(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    run = RunFolder.create(tmp_path_factory.mktemp("torn") / "run", {})
    run.append({"step": 1})
    whole = run.metrics_file.read_bytes()
    run.metrics_file.write_bytes(whole + b'{"step": 2, "reward/agreement/mean": 0.5}'[:cut])
    opened = RunFolder.open(run.path)
    opened.append({"step": 2})
    assert opened.metrics() == [{"step": 1}, {"step": 2}]


def test_a_damaged_line_in_the_middle_is_named(run: RunFolder) -> None:
    with open(run.metrics_file, "a") as file:
        file.write("x\n")
    with pytest.raises(RunError, match="line 2"):
        run.metrics()


def test_resuming_drops_the_rows_after_the_checkpoint(run: RunFolder) -> None:
    for step in range(5):
        run.append({"step": step, "value": 1 / 3})
    before = run.metrics_file.read_bytes().splitlines()[:4]
    run.truncate_metrics(2)
    assert run.metrics_file.read_bytes().splitlines() == before


def test_a_checkpoint_appears_whole_or_not_at_all(run: RunFolder) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise KeyboardInterrupt

    run.save_checkpoint(1, fill)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(2, fail)
    assert [path.name for path in run.checkpoints.iterdir()] == ["000001"]
    assert run.latest() == run.checkpoints / "000001"


def test_an_incomplete_checkpoint_is_not_the_latest(run: RunFolder) -> None:
    run.save_checkpoint(1, fill)
    run.save_checkpoint(2, lambda folder: write_json(folder / "state.json", {}))
    assert run.latest() == run.checkpoints / "000001"


def test_only_the_newest_checkpoints_stay(run: RunFolder) -> None:
    for step in (9, 10, 100, 1_000_000):
        run.save_checkpoint(step, fill)
        run.prune(keep_last=2)
    assert [path.name for path in run.saved()] == ["000100", "1000000"]


@pytest.mark.parametrize(
    ("steps", "summary", "chosen"),
    [
        ([], {}, None),
        ([], {"steps": 3, "lora_step": 3}, None),
        ([1, 2, 3], {}, 3),
        ([1, 2, 3], {"steps": 3, "lora_step": 1}, 1),
        ([1, 2, 3], {"steps": 2, "lora_step": 1}, 3),  # went on since
        ([2, 3], {"steps": 3, "lora_step": 1}, 3),  # removed since
    ],
)
def test_the_outcome_is_what_the_summary_of_the_newest_step_says(
    run: RunFolder, steps: list[int], summary: dict[str, int], chosen: int | None
) -> None:
    for step in steps:
        run.save_checkpoint(step, fill)
    run.save_summary(summary)
    assert run.outcome() == (run.checkpoints / f"{chosen:06d}" if chosen else None)


def test_a_step_can_be_saved_again(run: RunFolder) -> None:
    run.save_checkpoint(1, fill)
    run.save_checkpoint(1, lambda folder: (fill(folder), write_json(folder / "state.json", {"again": True})))
    assert read_state(run.latest())[1] == {"again": True}


def test_opening_clears_what_an_interruption_left(run: RunFolder) -> None:
    (run.checkpoints / ".filling-x").mkdir(parents=True)
    RunFolder.open(run.path)
    assert not any(run.checkpoints.iterdir())


@pytest.mark.parametrize("foreach", [False, True])
def test_an_optimizer_continues_bit_for_bit(tmp_path: Path, foreach: bool) -> None:
    def start() -> tuple[list[torch.nn.Parameter], torch.optim.AdamW]:
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
        return weights, torch.optim.AdamW(weights, lr=1e-2, foreach=foreach)

    def learn(weights: list[torch.nn.Parameter], optimizer: torch.optim.AdamW, steps: range) -> None:
        for step in steps:
            for weight in weights:
                weight.grad = torch.sin(weight.detach() * (step + 1))
            optimizer.step()

    whole, optimizer = start()
    learn(whole, optimizer, range(6))
    first, optimizer = start()
    learn(first, optimizer, range(3))
    write_state(
        tmp_path, {f"p{i}": weight for i, weight in enumerate(first)} | optimizer_tensors(optimizer), {}
    )
    tensors, _ = read_state(tmp_path)
    second, optimizer = start()
    for i, weight in enumerate(second):
        weight.data = tensors[f"p{i}"]
    load_optimizer_tensors(optimizer, tensors)
    learn(second, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_an_optimizer_state_of_another_adapter_is_refused() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight])
    with pytest.raises(RunError, match="does not fit this adapter"):
        load_optimizer_tensors(optimizer, {"optimizer/0/exp_avg": torch.zeros(4)})


def test_pictures_come_back_with_prompt_seed_and_scores(run: RunFolder) -> None:
    run.save_samples(
        3, [Sample("a red circle", 7, {"agreement": 0.5, "strict": math.nan}, torch.full((4, 6, 3), 0.5))]
    )
    (sample,) = run.samples(3)
    assert (sample.prompt, sample.seed, sample.scores) == (
        "a red circle",
        7,
        {"agreement": 0.5, "strict": None},
    )
    assert sample.path.is_file()
    assert run.sampled_steps() == [3]


def test_a_summary_is_empty_until_the_run_ends(run: RunFolder) -> None:
    assert run.summary() == {}
    run.save_summary({"seconds": 1.5})
    assert run.summary() == {"seconds": 1.5}


def test_written_files_are_readable_by_everybody_and_leave_no_rest(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert stat.S_IMODE(os.stat(tmp_path / "a.safetensors").st_mode) == 0o644


def test_tensors_that_share_memory_are_written_each_by_itself(tmp_path: Path) -> None:
    both = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "a.safetensors", {"row": both[0], "all": both, "turned": both.T})
    tensors, _ = read_tensors(tmp_path / "a.safetensors")
    assert torch.equal(tensors["turned"], both.T)


@pytest.mark.parametrize("write", [write_bytes, write_json, save_png, write_tensors])
def test_a_place_that_cannot_be_written_is_named_with_a_remedy(tmp_path: Path, write: object) -> None:
    content = {
        write_bytes: b"",
        write_json: {},
        save_png: torch.zeros(1, 1, 3),
        write_tensors: {"x": torch.zeros(1)},
    }[write]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*file/a: .*; make room or choose another folder"):
        write(tmp_path / "file" / "a", content)


def test_a_system_that_opens_no_folders_writes_files_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(13, "Permission denied")  # as Windows answers

    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        windows.setattr(os, "open", refused)
        folder_on_disk(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line(run: RunFolder) -> None:
    run.metrics_file.unlink()
    run.metrics_file.symlink_to("/dev/full")
    with pytest.raises(RunError, match="no space left on device; make room"):
        run.append({"step": 1})


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff"])
def test_damaged_json_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(RunError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES + 1, 2**63])
def test_an_oversized_header_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(FileError, match=f"header claims {length} bytes"):
        read_tensors(tmp_path / "a.safetensors")


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    header = json.dumps(dict.fromkeys(map(str, range(20_001)), 0)).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FileError, match="at most 20000 tensors"):
        read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("header", ["[]", "70", "null", '"x"', "[[1, 2]]"])
def test_a_header_that_is_no_table_is_refused(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + b" " * 64)
    with pytest.raises(FileError, match="header must be a table"):
        read_tensors(tmp_path / "a.safetensors")


@given(st.integers(0, 2**32))
def test_a_damaged_file_is_one_line_whatever_the_damage(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    path = tmp_path_factory.mktemp("damage") / "a.safetensors"
    write_tensors(path, {"x": torch.ones(3), "y": torch.ones(2, 2)})
    content, chance = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(chance.randrange(1, 4)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    path.write_bytes(content[: chance.randrange(len(content) + 1)])
    try:
        read_tensors(path)
    except FileError as error:
        assert "\n" not in str(error)
