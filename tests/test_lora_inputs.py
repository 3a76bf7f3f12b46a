"""LoRA files as people have them: 8-bit floats, adapters of any name, embeddings beside the pairs, long
headers, and files that are none.
"""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from program import call, leave
from safetensors.torch import load_file, save_file
from some_cases import some
from torch import Tensor

from comfy_g2rpo.files.safe import FileError, read_header, read_tensors
from comfy_g2rpo.lora import LoraError, read
from comfy_g2rpo.lora.forms import understand

MODULES = {"attn.to_q": 16, "img_mod.1": 96}
EIGHT_BITS = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]


def pairs(form: str) -> dict[str, Tensor]:
    """Make a small LoRA of a Qwen-Image model, its keys as `form` writes them."""
    noise = torch.Generator().manual_seed(0)
    return {
        form.format(f"transformer_blocks.{i}.{module}", part): torch.randn(*shape, generator=noise)
        for i in range(2)
        for module, rows in MODULES.items()
        for part, shape in (("A", (4, 16)), ("B", (rows, 4)))
    }


PLAIN = pairs("transformer.{}.lora_{}.weight")


def exported(file: Path) -> dict[str, Tensor]:
    """Export a file to the native form and read that."""
    out = file.with_name("out.safetensors")
    assert call("export", file, "--form", "native", "--out", out) == 0
    return load_file(out)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the plain file is exported to."""
    file = tmp_path_factory.mktemp("truth") / "a.safetensors"
    save_file(PLAIN, file)
    return exported(file)


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_pairs_in_8_bit_floats_are_pairs(tmp_path: Path, kind: str) -> None:
    dtype = getattr(torch, kind)
    save_file({key: tensor.to(dtype) for key, tensor in PLAIN.items()}, tmp_path / "a.safetensors")
    for module, matrices in read(tmp_path / "a.safetensors").pairs.items():
        for part, matrix in zip("AB", matrices, strict=True):
            assert matrix.equal(PLAIN[f"transformer.{module}.lora_{part}.weight"].to(dtype).bfloat16())
    save_file({key: tensor.to(dtype) for key, tensor in PLAIN.items()}, tmp_path / "b.safetensors")
    assert all(tensor.isfinite().all() for tensor in exported(tmp_path / "b.safetensors").values())
    assert call("check-lora", tmp_path / "b.safetensors") in (0, 1)


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_nan_in_8_bit_floats_is_refused(tmp_path: Path, kind: str) -> None:
    bad = {key: (tensor * torch.nan).to(getattr(torch, kind)) for key, tensor in PLAIN.items()}
    with pytest.raises(LoraError, match="NaN"):
        understand(bad, {}, "a.safetensors")


@pytest.mark.parametrize(
    "name", ["default", "style", "default_0.default", "my_lora", "my lora", "weight.1", "ü"]
)
def test_an_adapter_may_have_any_name(tmp_path: Path, truth: dict[str, Tensor], name: str) -> None:
    save_file(pairs("{}.lora_{}." + name + ".weight"), tmp_path / "a.safetensors")
    found = exported(tmp_path / "a.safetensors")
    assert found.keys() == truth.keys() and all(found[key].equal(truth[key]) for key in truth)


def test_two_adapters_in_one_file_are_refused() -> None:
    with pytest.raises(LoraError, match=r"twice, in two forms or of two adapters; keep one of them"):
        understand(pairs("{}.lora_{}.one.weight") | pairs("{}.lora_{}.two.weight"), {}, "a.safetensors")


@pytest.mark.parametrize("key", ["bundle_emb.my token.clip_l", "bundle_emb.x.t5", "emb_params"])
def test_embeddings_are_left_out_with_a_note(
    tmp_path: Path, truth: dict[str, Tensor], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(PLAIN | {key: torch.ones(2, 8)}, tmp_path / "a.safetensors")
    assert exported(tmp_path / "a.safetensors").keys() == truth.keys()
    assert "note: 1 keys of embeddings are left out" in capsys.readouterr().err
    _, said, _ = leave(capsys, "check-lora", tmp_path / "a.safetensors")
    assert said.startswith("4 pairs, 1 keys of embeddings\n") and "no known name" not in said


@pytest.mark.parametrize("tags", some([400_000, 100_000, 1_500_000], 1))
def test_a_long_header_is_read(tmp_path: Path, tags: int) -> None:
    words = json.dumps({f"tag number {i}": i for i in range(tags)})
    save_file(PLAIN, tmp_path / "a.safetensors", {"ss_tag_frequency": words})
    tensors, metadata = read_tensors(tmp_path / "a.safetensors")
    assert tensors.keys() == PLAIN.keys() and metadata["ss_tag_frequency"] == words


def test_metadata_that_are_null_are_none(tmp_path: Path) -> None:
    header = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": None}
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    assert read_tensors(tmp_path / "a.safetensors") == ({"x": torch.zeros(1)}, {})


@pytest.mark.parametrize("length", [0x3C, 0x7B, 0x280, 0x8B1F])
def test_a_header_is_not_taken_for_another_kind_by_its_length(tmp_path: Path, length: int) -> None:
    text = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, separators=(",", ":"))
    assert len(text) <= length
    content = struct.pack("<Q", length) + text.ljust(length).encode() + bytes(4)
    (tmp_path / "a.safetensors").write_bytes(content)
    assert read_tensors(tmp_path / "a.safetensors") == ({"x": torch.zeros(1)}, {})


KINDS = {
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(300), "a GGUF file"),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64,
        "a Git LFS pointer",
    ),
    "a page": (b"<!DOCTYPE html><html></html>", "a web page"),
    "a page after a mark": (b"\xef\xbb\xbf\n  <html><body>Sign in</body></html>", "a web page"),
    "a refusal": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page or XML file"),
    "a zipped pickle": (b"PK\x03\x04" + bytes(300), "a pickle"),
    "a pickle": (b"\x80\x02}q\x00." + bytes(300), "a pickle"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(300), "a picture"),
    "JSON": (b'{"error": "Not Found", "code": 404}', "a JSON file"),
    "nothing": (b"", "header claims 0 bytes"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_safetensors_file_is_named(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, words = KINDS[name]
    (tmp_path / "a.safetensors").write_bytes(content)
    code, _, said = leave(capsys, "check-lora", tmp_path / "a.safetensors")
    assert code == 2 and words in said and len(said.splitlines()) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    for place in (Path("/dev/zero"), tmp_path, tmp_path / "a.safetensors"):
        with pytest.raises(FileError, match="is a folder, pipe or device; choose a file"):
            read_header(place)


def test_a_sparse_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    save_file(PLAIN, tmp_path / "a.safetensors")
    os.truncate(tmp_path / "a.safetensors", 2**40)
    with pytest.raises(FileError, match=r"a\.safetensors is damaged"):
        read_tensors(tmp_path / "a.safetensors")
