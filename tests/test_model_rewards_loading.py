"""A reward's folder is read without trust: nothing is unpickled, nothing outside of it is read, and what
does not fit is named.
"""

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_folders import (
    EMBED,
    HEAD,
    aesthetic_folder,
    clip_folder,
    clip_model,
    head_weights,
    imagereward_folder,
    imagereward_weights,
)
from safetensors.torch import load_file, save_file

from comfy_g2rpo.rewards.models.installed import installed, load_installed

pytest.importorskip("transformers", reason="model-backed rewards need transformers: pip install '.[rewards]'")


class Poison:
    """Run a program when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Install a CLIPScore."""
    return clip_folder(tmp_path / "rewards", "clipscore_mine", "clipscore", clip_model())


def refused(folder: Path, said: str) -> None:
    """See that loading fails, in one line that says it."""
    with pytest.raises(ValueError, match=said) as caught:
        load_installed(folder.parent, folder.name)
    assert "\n" not in str(caught.value)


def change(path: Path, **values: Any) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_folder_of_any_name_is_a_reward_of_the_kind_it_says(folder: Path) -> None:
    assert installed(folder.parent) == ["clipscore_mine"]
    assert load_installed(folder.parent, "clipscore_mine").name == "clipscore_mine"


def test_a_root_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert installed(tmp_path / "none") == []


def test_a_missing_reward_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not installed in .*; get it with: g2rpo rewards fetch pickscore$"):
        load_installed(tmp_path, "pickscore")


def test_a_misspelt_reward_names_the_nearest(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"did you mean 'clipscore_mine'\? installed: clipscore_mine, known: pickscore, "
    ):
        load_installed(folder.parent, "clipscore_mime")


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a/b", "../rewards/clipscore_mine", "/etc", "clipscore_mine/", "x\x00", "-" * 80]
)
def test_a_name_is_never_a_path(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not installed"):
        load_installed(folder.parent, name)


def test_a_poisoned_pickle_is_not_read(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("model.pt", "pytorch_model.bin", "model.pkl"):
        (folder / name).write_bytes(pickle.dumps(Poison(tmp_path / "mark")))
    refused(folder, r"cannot read .*model\.safetensors: no such file")
    assert not (tmp_path / "mark").exists()


def test_a_pickle_named_safetensors_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Poison(tmp_path / "mark")))
    refused(folder, "is not a safetensors file")
    torch.save({"weights": Poison(tmp_path / "mark")}, folder / "model.safetensors")
    refused(folder, "is not a safetensors file")
    assert not (tmp_path / "mark").exists()


def with_header(header: Any, rest: bytes = b"") -> bytes:
    """Write a safetensors file with a header of one's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 2**40) + b"{}",
        with_header(b"[1, 2"),
        with_header([1]),
        with_header({str(i): {} for i in range(20_001)}),
        with_header({"logit_scale": 1}),
        with_header({"logit_scale": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}),
    ],
    ids=[
        "empty",
        "endless header",
        "no JSON",
        "no table",
        "too many tensors",
        "no entry",
        "one tensor without its data",
    ],
)
def test_a_forged_safetensors_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, r"model\.safetensors")


def test_offsets_beyond_the_file_are_refused(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    refused(folder, "is damaged")


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change a folder's tensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_tensors_are_named(folder: Path) -> None:
    rewrite(
        folder,
        lambda tensors: [
            tensors.pop(key) for key in list(tensors) if key.startswith("text_model.encoder.layers.1.")
        ],
    )
    refused(
        folder,
        (
            r"of another architecture than its config\.json: text_model\.encoder\.layers\.1\.\S+, .* and "
            r"13 more missing"
        ),
    )


def test_surplus_tensors_are_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"adapter.weight": torch.zeros(1)}))
    refused(folder, "of another architecture.*adapter.weight too many")


def test_another_shape_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"visual_projection.weight": torch.zeros(3, 32)}))
    refused(folder, r"visual_projection\.weight is \[3, 32\], not \[24, 32\]")


def test_positions_that_older_files_store_are_passed_over(folder: Path) -> None:
    rewrite(
        folder, lambda tensors: tensors.update({"text_model.embeddings.position_ids": torch.arange(77)[None]})
    )
    assert (
        load_installed(folder.parent, folder.name)
        .score(torch.zeros(1, 8, 8, 3), ["a red cube"])
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    rewrite(folder, lambda tensors: tensors["text_projection.weight"][0].fill_(value))
    refused(folder, "text_projection.weight holds NaN, infinite or non-float values")


def test_whole_numbers_are_no_weights(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"logit_scale": torch.tensor(4)}))
    refused(folder, "logit_scale holds NaN, infinite or non-float values")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "reward.json", "vocab.json", "preprocessor_config.json"]
)
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=r"is a link that leads out of its folder|is not installed"):
        load_installed(folder.parent, folder.name)


def test_a_folder_linked_from_elsewhere_is_no_reward(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "clipscore").symlink_to(folder)
    assert installed(other) == []


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refused(folder, r"config\.json is refused: it must be a file")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '"x"', "[" * 100_000, " " * 2**20 + "{}"],
    ids=["empty", "list", "torn", "text", "deep", "large"],
)
def test_a_damaged_config_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    refused(folder, r"config\.json")


@pytest.mark.parametrize(
    "vision",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": -1},
        {"hidden_size": 1.5},
        {"hidden_size": True},
        {"hidden_size": 33},
        {"hidden_act": "exec"},
        {"patch_size": 64},
        {"layer_norm_eps": 2.0},
        [1],
    ],
    ids=str,
)
def test_a_config_out_of_bounds_is_refused_before_anything_is_built(folder: Path, vision: Any) -> None:
    usual = json.loads((folder / "config.json").read_text())["vision_config"]
    change(folder / "config.json", vision_config={**usual, **vision} if isinstance(vision, dict) else vision)
    refused(folder, r"config\.json")


def test_a_config_cannot_name_code(folder: Path) -> None:
    change(
        folder / "config.json",
        auto_map={"AutoModel": "evil.Model"},
        torch_dtype="float64",
        _attn_implementation="x",
    )
    change(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Processor"})
    assert load_installed(folder.parent, folder.name).module.visual_projection.weight.dtype == torch.float32


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    (folder / "vocab.json").write_text("[]")
    refused(folder, "tokenizer")


def test_a_tokenizer_that_counts_beyond_the_model_is_refused(folder: Path) -> None:
    words = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**words, "zzz": 10**6}))
    refused(folder, "the tokenizer has words up to 1000000")


@pytest.mark.parametrize("head", [None, [], [8, "x", 1], [10**9, 1], list(range(1, 12)), {"0": 1}], ids=str)
def test_a_head_out_of_bounds_is_refused(tmp_path: Path, head: Any) -> None:
    folder = aesthetic_folder(
        tmp_path, "aesthetic", clip_model("quick_gelu"), head_weights(EMBED, "layers.{}"), HEAD
    )
    change(folder / "config.json", head=head)
    refused(folder, r"config\.json: head is")


def test_one_kinds_weights_are_no_other_kinds(tmp_path: Path) -> None:
    folder = imagereward_folder(tmp_path, "imagereward", imagereward_weights())
    (folder / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    change(folder / "reward.json", kind="pickscore")
    refused(folder, "of another architecture.*missing; .*too many")


@pytest.mark.parametrize("kind", ["clip", None, 3, "../x"], ids=str)
def test_a_folder_of_an_unknown_kind_is_no_reward(folder: Path, kind: Any) -> None:
    change(folder / "reward.json", kind=kind)
    assert installed(folder.parent) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [({"batch": 0}, "batch is 0"), ({"dtype": torch.int8}, "dtype is torch.int8")],
    ids=str,
)
def test_options_out_of_bounds_are_refused(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_installed(folder.parent, folder.name, **options)


def test_without_transformers_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(folder, "needs transformers: pip install transformers")


def test_listing_rewards_does_not_load_transformers(folder: Path) -> None:
    root = str(folder.parent)
    words = (
        "from comfy_g2rpo.rewards.models.installed import installed; import sys; "
        f"print(installed({root!r}), 'transformers' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", words], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert said.strip() == "['clipscore_mine'] False"
