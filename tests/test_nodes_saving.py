"""Inside the real ComfyUI: a folder of images is loaded, scored by rules and installed models, and saved
with its scores.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_host import COMFYUIS, Answer, make_base, run_script
from PIL import Image, PngImagePlugin
from reward_folders import clip_folder, clip_model

from comfy_g2rpo.files.captions import CHUNK, caption_of
from comfy_g2rpo.files.picture_files import ORIENTATION, read
from comfy_g2rpo.plan import singular
from comfy_g2rpo.rewards import load, score_all
from comfy_g2rpo.rewards.mixing import mixed_advantages, ranking_scores

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("scripts in comfyui")]

CHILD = Path(__file__).with_name("comfy_child_saving.py")
EVIL = "<img src=x onerror=alert(1)>.png"
PREFIXES = [
    *(
        "../x",
        "..",
        "a/../../x",
        "/tmp/x",
        "a//b",
        "C:\\x",
        "a\\..\\x",
        "~x",
        "",
        " ",
        "x" * 65,
        "a/b/c/d/e",
        "nul",
        "a/CON.png",
        "x.",
    ),
    *("a\0b", "\ud800", "%year%", ".hidden", "out/x"),
]

# The widget that each hostile input must be blamed on.
HOSTILE = {
    **{f"prefix {text[:20]!a}": "prefix" for text in PREFIXES},
    "scores of nan only": "scores",
    "scores of another length": "scores",
    "names of another length": "names",
    "names of numbers": "names",
    "details of others": "details",
    "details without axes": "details",
    "images to 255": "images",
    "images without end": "images",
    "most below none": "most",
    "names for others": "names",
    "folder of a path": "folder",
    "folder that is a link": "folder",
    "folder without images": "folder",
    "folder of broken files": "folder",
    "skip of all": "folder 'cats' holds 7 images",
    "most of none": "most",
    "max_side of none": "max_side",
    "reward of a path": "reward",
    "reward that is not installed": "reward",
    "reward that is damaged": "",
    "precision of a word": "precision",
    "batch of none": "batch",
    "mix of a word": "mix",
    "mix of another mix": "mix is zscore, and reward_1 is itself a mix by minimum",
    "gates of words": "gates, line 1",
    "gates of strangers": "gates names pickscore",
    "gates of infinity": "gates, line 1",
    "gates twice": "gates, line 2",
    "gates without end": "gates has 2001",
    "kind of a word": "kind",
    "reference missing": "reference",
    "reference of two": "reference",
    "reference of nan": "reference",
    "colours missing": "colours",
    "colours of words": "palette",
    "prompts of another length": "prompts",
}


def noise(strength: int, size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Make noise whose colourfulness grows with its strength."""
    return Image.fromarray(
        (np.random.default_rng(seed).random((size[1], size[0], 3)) * strength).astype(np.uint8)
    )


def fill(base: Path) -> None:
    """Put pictures of all kinds into the input directory, and a tiny reward model into the models."""
    cats, secret = base / "input/cats", base / "secret"
    for folder in (cats, cats / "deep", base / "input/empty", base / "input/broken", secret, base / "output"):
        folder.mkdir(parents=True, exist_ok=True)
    noise(50, (20, 10)).save(cats / "a1.png")
    noise(250, (20, 10)).save(cats / "a2.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    noise(150, (30, 12)).save(cats / "a10.jpg", exif=exif)
    Image.new("RGBA", (9, 9), (200, 30, 30, 0)).save(cats / "alpha.png")
    (cats / "alpha.txt").write_text("a red square", "utf-8")
    info = PngImagePlugin.PngInfo()
    info.add_text(CHUNK, json.dumps({"prompt": "=1+1"}))
    noise(90, (200, 100)).save(cats / EVIL, pnginfo=info)
    (cats / "cut.png").write_bytes((cats / "a1.png").read_bytes()[:120])
    (cats / "text.jpg").write_bytes(b"<script>")
    (base / "input/broken/x.png").write_bytes(b"")
    noise(9, (8, 8)).save(cats / "deep/b.png")
    noise(9, (8, 8)).save(secret / "mine.png")
    (cats / "link.png").symlink_to(secret / "mine.png")
    (base / "input/leads_out").symlink_to(secret, target_is_directory=True)
    (base / "output/out").symlink_to(secret, target_is_directory=True)
    clip_folder(base / "models/g2rpo_rewards", "clipscore", "clipscore", clip_model())
    clip_folder(base / "models/g2rpo_rewards", "damaged", "clipscore", clip_model())
    (base / "models/g2rpo_rewards/damaged/model.safetensors").write_bytes(b"\x80\x04not tensors")


IMAGES = (
    torch.rand(5, 40, 44, 3, generator=torch.Generator().manual_seed(1))
    * torch.linspace(0.2, 1, 5)[:, None, None, None]
    * 255
).round() / 255


@pytest.fixture(scope="module", params=COMFYUIS)
def core(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    base = make_base(tmp_path_factory.mktemp("saving"))
    fill(base)
    answer = run_script(request.param, CHILD, base, {"prefixes": PREFIXES}, {"images": IMAGES})
    answer.data["base"] = str(base)
    return answer


# A folder


def test_a_folder_is_loaded_by_name_and_what_is_broken_is_named(core: Answer) -> None:
    found, cats = core.data["folder"], Path(core.data["base"]) / "input/cats"
    assert found["names"] == [EVIL, "a1.png", "a2.png", "a10.jpg", "alpha.png"]
    assert found["sizes"] == [[1, 100, 200, 3], [1, 10, 20, 3], [1, 10, 20, 3], [1, 30, 12, 3], [1, 9, 9, 3]]
    for i, name in enumerate(found["names"]):
        assert torch.equal(core.tensors[f"image {i}"][0], read(cats / name))
    assert found["report"] == ["5 of 7 images loaded; cannot be read: cut.png, text.jpg"]
    assert "link.png" not in found["names"]


def test_the_table_names_the_files_and_no_page_takes_a_name_for_markup(core: Answer) -> None:
    (table,) = core.data["folder"]["ranking"]
    assert all(f". {name}: " in table for name in ("a1.png", "a10.jpg", "alpha.png"))
    assert "-img src-x onerror-alert(1)-.png: " in table
    assert not set("<>&\"'") & set(table)


def test_prompts_come_with_the_images(core: Answer) -> None:
    assert core.data["folder"]["prompts"] == ["=1+1", "", "", "", "a red square"]


def test_parts_of_a_folder_smaller_and_deeper(core: Answer) -> None:
    assert core.data["shrunk"] == [[1, 10, 20, 3], [1, 10, 20, 3]]
    assert core.data["deep"][-1] == "deep/b.png"
    # A link to elsewhere is not offered; core may have folders of its own there.
    assert set(core.data["choices"]) - {"3d"} == {"(input)", "broken", "cats", "cats/deep", "empty"}


# Saving


def test_scores_are_written_into_the_files_beside_cores_notes(core: Answer) -> None:
    chunks = core.data["chunks"]
    assert len(chunks) == 3
    for rank, chunk in enumerate(chunks, 1):
        note = json.loads(chunk[CHUNK])
        assert (note["rank"], note["of"], note["mix"], note["weights"]) == (rank, 5, "zscore", [1.0, 0.5])
        assert set(note["scores"]) == {"colourfulness", "jpeg"}
        assert json.loads(chunk["prompt"])["save"]["class_type"] == "G2RPO_SaveScoredImages"
    assert [json.loads(chunk[CHUNK])["score"] for chunk in chunks] == sorted(
        core.data["folder"]["scores"], reverse=True
    )[:3]
    best = Path(core.data["base"]) / "output" / core.data["folder"]["files"][0]
    assert caption_of(best)[1] in ("note", "")
    assert core.data["core notes"] == {"prompt": '{"1": "\\u00e9"}', "workflow": '{"nodes": []}'}


def test_files_are_numbered_best_first_and_hold_the_images(core: Answer) -> None:
    found, output = core.data["folder"], Path(core.data["base"]) / "output"
    order = sorted(range(5), key=lambda i: -found["scores"][i])[:3]
    assert found["files"] == [f"cats/best_{i:05d}_.png" for i in (1, 2, 3)]
    for file, i in zip(found["files"], order, strict=True):
        assert torch.equal(read(output / file), core.tensors[f"image {i}"][0])
    assert core.data["ui"][0] == {"filename": "best_00009_.png", "subfolder": "cats", "type": "output"}


def test_the_table_says_what_the_files_say(core: Answer) -> None:
    rows, found = core.data["csv"], core.data["folder"]
    assert found["table"] == ["cats/best_00004_scores.csv"]
    assert [f"cats/{row['file']}" for row in rows] == found["files"]
    assert [float(row["score"]) for row in rows] == pytest.approx(
        [json.loads(chunk[CHUNK])["score"] for chunk in core.data["chunks"]], rel=1e-5
    )
    assert all(
        row["name"] in found["names"] or row["name"].removeprefix("'") in found["names"] for row in rows
    )
    assert {"colourfulness", "jpeg"} <= rows[0].keys()


def test_nothing_is_overwritten(core: Answer) -> None:
    assert core.data["again"]["files"] == [f"cats/best_{i:05d}_.png" for i in (5, 6, 7)]
    assert core.data["again"]["untouched"]
    assert core.data["outside"] == []
    assert [path.name for path in (Path(core.data["base"]) / "secret").iterdir()] == ["mine.png"]


def test_without_metadata_the_files_say_nothing(core: Answer) -> None:
    assert core.data["bare"] == {}


def test_broken_images_and_formulas_are_written_safely(core: Answer) -> None:
    assert core.data["odd"]["files"] == ["odd_00001_.png", "odd_00002_.png"]
    assert (
        core.data["odd"]["csv"]
        == "rank,file,name,prompt,score,x\n1,odd_00001_.png,,'=1,1,0\n2,odd_00002_.png,,<b>,,0\n"
    )


# Reward models


def test_an_installed_model_scores_as_it_does_by_itself(core: Answer) -> None:
    model = core.data["model"]
    assert model["scores"] == pytest.approx(model["expected"], abs=1e-4)
    assert model["after unloading"] == pytest.approx(model["expected"], abs=1e-4)
    assert len(set(model["expected"])) == 5


def test_comfyui_manages_its_memory(core: Answer) -> None:
    model = core.data["model"]
    assert model["managed"] and model["shared"]
    assert not model["threads"]
    assert not model["trainable"]
    assert model["bf16"] == "torch.bfloat16"
    assert model["embeds"][0] == 5


def test_the_list_is_what_is_installed_and_says_how_to_get_the_rest(core: Answer) -> None:
    model = core.data["model"]
    assert {"agreement", "jpeg", "clipscore", "damaged"} <= set(model["listed"])
    assert "clipscore (not installed: 1.7 GB, MIT)" not in model["listed"]
    assert "hpsv2.1 (not installed: 2.0 GB, Apache-2.0)" in model["listed"]
    assert re.search(r"fetch_rewards\.py'? NAME\nNAME: .*pickscore", model["about"])
    assert "Licence: MIT" in model["about"]
    assert not re.search("https?:", model["about"])
    assert model["seen again"] and model["loaded again"]


# Mixes, likeness, selection


def test_a_mix_ranks_as_it_says(core: Answer) -> None:
    table = score_all([load("colourfulness"), load("jpeg")], IMAGES, [""] * 5)
    for name, scores in core.data["mixes"].items():
        mix, _, gate = name.partition(" ")
        assert scores == pytest.approx(
            ranking_scores(table, [1.0, 2.0], mix, [50.0, None] if gate else ()).tolist(), rel=1e-3
        ), name
    plain, gated = core.data["mixes"]["sum"], core.data["mixes"]["sum colourfulness = 50"]
    below = [i for i in range(5) if table[0, i] < 50]
    assert 0 < len(below) < 5
    assert max(gated[i] for i in below) < min(gated[i] for i in range(5) if i not in below)
    assert [plain[i] for i in range(5) if i not in below] == [gated[i] for i in range(5) if i not in below]


def test_a_picture_is_most_like_itself(core: Answer) -> None:
    scores = core.data["like"]["scores"]
    assert scores[2] == 1.0 == max(scores)
    assert min(scores) < 1
    assert all(0 <= score <= 1 for score in core.data["like"]["palette"])
    assert re.match(r"phash-[0-9a-f]{8}: ", core.data["like"]["about"][0])


def test_the_best_of_every_prompt_may_differ_in_size(core: Answer) -> None:
    best = core.data["best"]
    assert (best["kept"], best["scores"], best["sizes"]) == (
        [1, 3],
        [0.9, 0.7],
        [[1, 12, 44, 3], [1, 20, 44, 3]],
    )
    assert not best["batch"]
    assert len(best["said"]) == 1
    assert "images to keep differ in size" in best["said"][0] and "use image_list" in best["said"][0]


def test_the_mix_and_its_gates_reach_advantages_and_training(core: Answer) -> None:
    scores = singular(4, [0, 1], 6, (1,)).values(core.tensors["rollout scores"])
    weights, gates = (1.0, 0.5), (None, -2.6)
    assert torch.equal(
        core.tensors[("rollout advantages")], mixed_advantages([scores], weights, "rank_product", gates)[0]
    )
    assert not torch.allclose(core.tensors["rollout advantages"], mixed_advantages([scores], weights)[0])
    assert core.data["trained"]["method"]["mix"] == "rank_product"
    assert core.data["trained"]["rewards"] == [
        {"name": "clipscore", "weight": 1.0},
        {"name": "jpeg", "weight": 0.5, "gate": -2.6},
    ]
    assert core.data["moved"] > 0


# What is wrong


@pytest.mark.parametrize(("name", "blamed"), HOSTILE.items(), ids=list(HOSTILE))
def test_a_wrong_input_is_named_with_its_remedy(core: Answer, name: str, blamed: str) -> None:
    kind, _, words = core.data["hostile"][name].strip().partition(": ")
    assert kind.rpartition(".")[2] in ("ValueError", "RewardError", "FileError"), core.data["hostile"][name]
    assert words.startswith(blamed)
    assert ";" in words or "connect" in words
    assert "\n" not in words
    assert len(words) < 400


def test_every_hostile_input_was_tried(core: Answer) -> None:
    assert set(core.data["hostile"]) == set(HOSTILE)
