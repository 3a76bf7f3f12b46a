"""Pictures on disk: of every mode, turned as they were taken, and the prompts that lie with them."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from drawn_pictures import colourful, growing
from PIL import Image, PngImagePlugin

from comfy_g2rpo.files import picture_files
from comfy_g2rpo.files.captions import caption_of, of_graph
from comfy_g2rpo.files.picture_files import PictureError

GRAPH = {
    name: {"class_type": kind, "inputs": inputs}
    for name, kind, inputs in (
        ("1", "KSampler", {"model": ["4", 0], "positive": ["5", 0], "negative": ["3", 0], "seed": 1}),
        ("2", "CLIPTextEncode", {"clip": ["4", 1], "text": ["6", 0]}),
        ("3", "CLIPTextEncode", {"clip": ["4", 1], "text": "ugly"}),
        ("5", "FluxGuidance", {"conditioning": ["2", 0], "guidance": 3.5}),
        ("6", "PrimitiveStringMultiline", {"value": "a lighthouse"}),
    )
}


def test_every_mode_is_read_as_it_looks(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray((ramp * 255).round().astype(np.uint8)).save(tmp_path / "grey.png")
    for name in ("deep.png", "float.tif", "grey.png"):
        assert np.abs(picture_files.read(tmp_path / name).numpy() - ramp[..., None]).max() <= 1 / 255
    red = {"RGBA": (255, 0, 0, 10), "CMYK": (0, 255, 255, 0), "P": 0, "LA": (255, 9), "1": 1}
    for mode, colour in red.items():
        place = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (3, 2), colour).save(place)
        assert picture_files.read(place).shape == (2, 3, 3)
    assert picture_files.read(tmp_path / "RGBA.png")[0, 0].tolist() == [1, 0, 0]
    assert picture_files.read(tmp_path / "CMYK.tif")[0, 0].tolist() == pytest.approx([1, 0, 0], abs=0.02)


def test_a_picture_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[picture_files.ORIENTATION] = 6
    for name in ("turned.jpg", "turned.png"):
        colourful(200, (20, 10)).save(tmp_path / name, exif=exif)
        assert picture_files.size_of(tmp_path / name) == (10, 20)
        assert picture_files.read(tmp_path / name).shape == (20, 10, 3)


def test_what_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colourful(9).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    says = r"cannot read .*gone\.png: no such file or directory; check the path"
    with pytest.raises(PictureError, match=says):
        picture_files.read(tmp_path / "gone.png")
    says = r"b\.png is not a picture that can be read; save it as PNG or JPEG"
    with pytest.raises(PictureError, match=says):
        picture_files.size_of(tmp_path / "b.png")
    assert picture_files.texts(tmp_path / "b.png") == {}
    monkeypatch.setattr(picture_files, "MAX_PIXELS", 255)
    with pytest.raises(PictureError, match=r"a\.png has 16 × 16 pixels; at most 0 megapixels"):
        picture_files.read(tmp_path / "a.png")


def chunk(kind: bytes, text: bytes) -> bytes:
    """Write a chunk of a PNG."""
    return struct.pack(">I", len(text)) + kind + text + struct.pack(">I", zlib.crc32(kind + text))


LONG = zlib.compress(bytes(3 * 2**20))
NOTES = {
    "a large profile": chunk(b"iCCP", b"icc\0\0" + LONG),
    "a profile of another method": chunk(b"iCCP", b"icc\0\1" + LONG),
    "a large packed text": chunk(b"zTXt", b"workflow\0\0" + LONG),
    "a text packed otherwise": chunk(b"zTXt", b"workflow\0\7" + LONG),
    "a large international text": chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG),
    "a text of another checksum": chunk(b"tEXt", b"workflow\0x")[:-1] + b"?",
    "long texts": chunk(b"tEXt", b"workflow\0" + b"x" * 2**20) * 70,
}


@pytest.mark.parametrize("place", ["before the pixels", "behind them"])
@pytest.mark.parametrize("name", NOTES)
def test_notes_do_not_make_a_picture_unreadable(name: str, place: str, tmp_path: Path) -> None:
    prompt = PngImagePlugin.PngInfo()
    prompt.add_text("prompt", "a lighthouse")
    colourful(9).save(tmp_path / "plain.png", pnginfo=prompt)
    plain = (tmp_path / "plain.png").read_bytes()
    at = plain.index(b"IDAT" if place == "before the pixels" else b"IEND") - 4
    (tmp_path / "noted.png").write_bytes(plain[:at] + NOTES[name] + plain[at:])
    assert picture_files.size_of(tmp_path / "noted.png") == (16, 16)
    assert picture_files.read(tmp_path / "noted.png").equal(picture_files.read(tmp_path / "plain.png"))
    assert picture_files.texts(tmp_path / "noted.png")["prompt"] == "a lighthouse"
    (tmp_path / "noted.png").write_bytes(plain[: at // 2] + NOTES[name])
    with pytest.raises(PictureError, match=r"noted\.png"):
        picture_files.read(tmp_path / "noted.png")


def test_links_out_of_the_folder_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    folder = growing(tmp_path / "pictures")
    (folder.parent / "elsewhere.png").write_bytes((folder / "a1.png").read_bytes())
    (folder / "link.png").symlink_to(folder.parent / "elsewhere.png")
    (folder / ".hidden.png").write_bytes((folder / "a1.png").read_bytes())
    (folder / "deep").mkdir()
    (folder / "deep/b1.png").write_bytes((folder / "a1.png").read_bytes())
    assert [path.name for path in picture_files.listed(folder)] == [f"a{i}.png" for i in range(1, 11)]
    assert picture_files.listed(folder, deep=True)[-1] == folder / "deep/b1.png"


def test_batches_hold_one_size_and_few_pixels() -> None:
    sizes = [(8, 8), (4, 4), (8, 8), (8, 8), (100, 100), (4, 4)]
    assert picture_files.batches(sizes, 2, 200) == [[0, 2], [3], [1, 5], [4]]


def test_a_prompt_is_found_where_it_was_written(tmp_path: Path) -> None:
    def save(name: str, **chunks: str) -> Path:
        info = PngImagePlugin.PngInfo()
        for key, value in chunks.items():
            info.add_itxt(key, value) if key == "g2rpo" else info.add_text(key, value, zip=True)
        colourful(99).save(tmp_path / name, pnginfo=info)
        return tmp_path / name

    assert caption_of(save("graph.png", prompt=json.dumps(GRAPH))) == ("a lighthouse", "comfyui")
    web = save("web.png", parameters="a cat,\nred\nNegative prompt: dog\nSteps: 3")
    assert caption_of(web) == ("a cat,\nred", "parameters")
    noted = save("note.png", g2rpo='{"prompt": "ein Schiff – 船"}', prompt=json.dumps(GRAPH))
    assert caption_of(noted) == ("ein Schiff – 船", "note")
    beside = save("beside.png", prompt=json.dumps(GRAPH))
    beside.with_suffix(".txt").write_text("\ufeff  a ship \n", "utf-8")
    assert caption_of(beside) == ("a ship", "txt")
    assert caption_of(save("none.png", prompt="{not json", parameters="")) == ("", "")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/mine").write_text("not yours")
    save("link.png").with_suffix(".txt").symlink_to(tmp_path / "secrets/mine")
    assert caption_of(tmp_path / "link.png") == ("", "")


UNCLEAR = [
    [],
    {"1": None, "2": {"inputs": 3}},
    {"1": {"inputs": {"model": 1, "positive": ["1", 0]}}},  # a loop
    {"1": {"inputs": {"model": 1, "positive": ["9", 0]}}},
    # Two samplers with different prompts: which one, nobody can say.
    GRAPH | {"7": {"inputs": {"model": ["4", 0], "positive": ["3", 0]}}},
]


@pytest.mark.parametrize("graph", UNCLEAR)
def test_a_graph_that_says_no_one_prompt_says_nothing(graph: object) -> None:
    assert of_graph(graph) == ""
