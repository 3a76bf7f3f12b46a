"""Prompts that start from a picture: read beside the prompt file, refused by line, told apart by text and
picture.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from drawn_pictures import picture, starting

from comfy_g2rpo.files.picture_files import read as load_picture
from comfy_g2rpo.prompts import Prompt, PromptError, columns_of, image_of, load, read, titled
from comfy_g2rpo.rewards import RewardError
from g2rpo_trainer.config.bundled import bundled_folder
from g2rpo_trainer.config.sections import RewardSection
from g2rpo_trainer.reports.ranking import read_prompts
from g2rpo_trainer.rewards.references import compared


def write(place: Path, *rows: dict[str, object], name: str = "prompts.jsonl") -> Path:
    """Write a prompt file."""
    (place / name).write_text("\n".join(map(json.dumps, rows)))
    return place / name


def test_an_image_is_a_path_beside_the_prompt_file(tmp_path):
    picture(tmp_path / "set/cat.png", 64, 48)
    (first, second), notes = read(
        write(tmp_path, {"prompt": "a hat", "image": "set/cat.png", "style": "oil"}, {"prompt": "a dog"})
    )
    assert (
        first == "a hat"
        and image_of(first) == str(tmp_path / "set/cat.png")
        and columns_of(first)["style"] == "oil"
    )
    assert image_of(second) is None and not notes
    assert (titled(first), titled(second)) == ("a hat (cat.png)", "a dog")


def test_the_same_words_may_come_with_several_pictures_but_not_twice_with_one(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png", 64, 48)
    rows = [{"prompt": "a hat", "image": f"{name}.png"} for name in "aba"]
    found, notes = read(write(tmp_path, *rows, {"prompt": "a hat"}))
    assert [image_of(prompt) and Path(image_of(prompt)).name for prompt in found] == ["a.png", "b.png", None]
    assert "1 repeated prompts were dropped" in notes[0]
    with pytest.raises(PromptError, match="lines 1 and 2 have the same prompt but different columns"):
        read(write(tmp_path, rows[0], rows[0] | {"style": "oil"}))


def test_held_out_prompts_are_told_apart_by_their_pictures(tmp_path):
    for number in range(4):
        picture(tmp_path / f"{number}.png", 64, 48)
    rows = [{"prompt": "a hat", "image": f"{number}.png"} for number in range(4)]
    split = load(write(tmp_path, *rows), share=0.25)
    assert (len(split.train), len(split.heldout)) == (3, 1)
    one, other = write(tmp_path, *rows[:2], name="one.jsonl"), write(tmp_path, *rows[2:], name="other.jsonl")
    assert len(load(one, other).heldout) == 2
    with pytest.raises(PromptError, match="1 held-out prompts are trained on too, such as 'a hat'"):
        load(one, write(tmp_path, *rows[1:], name="both.jsonl"))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (3, "is '3'; write the path of a picture on this machine"),
        ("", "is ''; write the path of a picture"),
        (["a.png"], "write the path of a picture"),
        (
            "https://example.com/a.png",
            "is 'https://example.com/a.png'; write the path of a picture on this machine",
        ),
        ("a\0.png", "write the path of a picture"),
        (
            "missing.png",
            "missing.png is no file; give the path of a picture, looked up beside the prompt file",
        ),
        (".", "is no file"),
        ("pipe", "is no file"),
        ("prompts.jsonl", "is not a picture that can be read; save it as PNG or JPEG"),
        ("huge.png", r"has 9000 × 9000 pixels; at most 67 megapixels are read, make it smaller"),
        ("small.png", r"has 40 × 16 pixels; each side needs 32 pixels, and one at most 8 times the other"),
        ("thin.png", r"has 32 × 288 pixels; each side needs 32 pixels"),
    ],
)
def test_what_is_no_picture_to_start_from_is_refused_by_its_line(tmp_path, image, words):
    picture(tmp_path / "small.png", 40, 16)
    picture(tmp_path / "thin.png", 32, 288)
    os.mkfifo(tmp_path / "pipe")
    # A header of 9000 × 9000 pixels, with nothing behind: a bomb need not be a large file.
    start = bytearray(picture(tmp_path / "huge.png", 32, 32).read_bytes())
    start[16:24] = (9000).to_bytes(4, "big") * 2
    start[29:33] = zlib.crc32(start[12:29]).to_bytes(4, "big")
    (tmp_path / "huge.png").write_bytes(start)
    file = write(tmp_path, {"prompt": "a dog"}, {"prompt": "a hat", "image": image})
    with pytest.raises(PromptError, match=rf"prompts\.jsonl, line 2, column image.*{words}"):
        read(file)


def test_the_bundled_edits_start_from_bundled_pictures():
    found, notes = read(bundled_folder("prompts") / "edits.jsonl")
    assert len(found) >= 12 and all(image_of(prompt) for prompt in found) and not notes


def test_pictures_to_score_may_say_which_picture_they_were_made_from(tmp_path):
    picture(tmp_path / "start.png", 64, 48)
    found = read_prompts(write(tmp_path, {"file": "edit.png", "prompt": "a hat", "image": "start.png"}))
    assert image_of(found["edit.png"]) == str(tmp_path / "start.png")
    with pytest.raises(PromptError, match=r"line 1, column image: .*missing\.png is no file"):
        read_prompts(write(tmp_path, {"file": "edit.png", "prompt": "a hat", "image": "missing.png"}))


def test_an_edit_is_compared_with_the_picture_that_it_starts_from_unless_something_else_is_named(tmp_path):
    start, other = (picture(tmp_path / f"{size}.png", size, 48) for size in (64, 80))
    pictures = torch.stack([load_picture(start), load_picture(start)])
    prompts = [starting("a hat", start), starting("a hat", other)]
    scores = compared(RewardSection(name="phash")).score(pictures, prompts)
    assert scores[0] == 1 and scores[1] < 1
    assert (compared(RewardSection(name="phash", reference=str(start))).score(pictures, prompts) == 1).all()
    named = [Prompt("a hat", {"image": str(other), "reference": str(start)})]
    assert compared(RewardSection(name="phash")).score(pictures[:1], named) == 1
    with pytest.raises(RewardError, match="has nothing to compare with"):
        compared(RewardSection(name="phash")).check_prompts(["a hat"])
