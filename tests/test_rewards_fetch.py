"""`g2rpo rewards fetch, check, add, list`, against a local server that stands in for the hub and for
GitHub.
"""

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from reward_folders import (
    EMBED,
    HEADS,
    IMAGE,
    PATCH,
    PROMPTS,
    TEXT_WIDTH,
    VOCABULARY,
    WIDTH,
    clip_config,
    imagereward_config,
    imagereward_weights,
    open_clip_weights,
    owlv2_config,
    pictures,
    write_clip_tokenizer,
)
from reward_hub import REVISION, Hub, pickled, published
from safetensors.torch import save
from typer.testing import CliRunner

from comfy_g2rpo.files.one_writer import one_writer
from comfy_g2rpo.rewards.fetching import download, prepare
from comfy_g2rpo.rewards.fetching.download import Sources
from comfy_g2rpo.rewards.fetching.fetch import fetch
from comfy_g2rpo.rewards.fetching.prepare import EXAMPLES, Example
from comfy_g2rpo.rewards.models.catalogue import KNOWN, Known
from comfy_g2rpo.rewards.models.installed import command_line, installed, load_installed
from g2rpo_trainer.commands.rewards import rewards_app
from g2rpo_trainer.rewards.recheck import read_picture

pytest.importorskip("transformers", reason="model-backed rewards need transformers: pip install '.[rewards]'")

Tiny = Callable[[str], Known]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Start the server; do not wait before a lost connection is tried again."""
    monkeypatch.setattr(download, "PAUSE", 0.0)
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("G2RPO_GITHUB", hub.address)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def tiny(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Put a tiny model in a known reward's place."""
    monkeypatch.setitem(prepare.CONFIGS, "hpsv2", clip_config())
    monkeypatch.setitem(prepare.CONFIGS, "imagereward", imagereward_config())
    monkeypatch.setitem(prepare.CONFIGS, "pickscore", clip_config())
    monkeypatch.setitem(prepare.CONFIGS, "owlv2", owlv2_config())
    for name in list(EXAMPLES):
        monkeypatch.setitem(EXAMPLES, name, ())

    def put(name: str) -> Known:
        known = replace(KNOWN[name], files=tuple(published(hub, name)), gigabytes=0.001)
        monkeypatch.setitem(KNOWN, name, known)
        return known

    return put


def run(*words: str) -> tuple[int, str]:
    """Run `g2rpo rewards …`; return its exit code and what it said, errors included."""
    result = CliRunner().invoke(rewards_app, list(words))
    return result.exit_code, f"{result.output}{result.exception or ''}"


def get(name: str, root: Path, *words: str) -> tuple[int, str]:
    """Run `g2rpo rewards fetch`."""
    return run("fetch", name, "--to", str(root), *words)


def check(name: str, root: Path) -> tuple[int, str]:
    """Run `g2rpo rewards check`."""
    return run("check", name, "--to", str(root), "--device", "cpu")


def install(known: Known, root: Path) -> None:
    """Fetch a reward without a word."""
    fetch([known.name], root, Sources.chosen(), say=lambda text: None)


@pytest.mark.parametrize("name", list(KNOWN))
def test_a_fetched_reward_is_installed_whole_and_judges(
    hub: Hub, tiny: Tiny, tmp_path: Path, name: str
) -> None:
    tiny(name)
    code, said = get(name, tmp_path)
    assert code == 0, said
    assert os.listdir(tmp_path) == installed(tmp_path) == [name]
    prompts = ["a photo of a red cube"] * 5 if name == "detection" else PROMPTS
    assert load_installed(tmp_path, name).score(pictures(), prompts).isfinite().all()
    kinds = {path.suffix for path in (tmp_path / name).rglob("*")}
    assert kinds <= {".json", ".safetensors", ".txt"}
    assert hub.tokens == []
    code, said = check(name, tmp_path)
    assert code == 0 and "files: as installed" in said and said.endswith("well\n"), said


def test_converted_weights_are_the_published_ones(tiny: Tiny, tmp_path: Path) -> None:
    install(tiny("imagereward"), tmp_path)
    module, weights = load_installed(tmp_path, "imagereward").module, imagereward_weights()
    torch.testing.assert_close(module.head[3].weight, weights["mlp.layers.6.weight"], atol=0, rtol=0)
    torch.testing.assert_close(
        module.vision_model.post_layernorm.bias, weights["blip.visual_encoder.norm.bias"], atol=0, rtol=0
    )


def test_the_manifest_says_what_came_from_where(tiny: Tiny, tmp_path: Path) -> None:
    install(tiny("pickscore"), tmp_path)
    manifest = json.loads((tmp_path / "pickscore" / "reward.json").read_text())
    assert (manifest["kind"], manifest["source"], manifest["revision"]) == ("pickscore", "clip", REVISION)
    assert set(manifest["files"]) == {"model.safetensors", "config.json", "vocab.json", "merges.txt"}
    assert f"clip@{REVISION}/model.safetensors" in manifest["published"] and manifest["unpinned"] == []


@pytest.mark.parametrize("name", ["clipscore", "aesthetic"])
def test_another_content_than_the_pinned_one_is_refused(
    hub: Hub, tiny: Tiny, tmp_path: Path, name: str
) -> None:
    pin = tiny(name).files[-1]
    path = next(path for path in hub.files if path.endswith(pin.path))
    hub.spoil[path] = lambda content: bytes([content[0] ^ 1]) + content[1:]
    code, said = get(name, tmp_path)
    got = hashlib.sha256(hub.spoil[path](hub.files[path])).hexdigest()
    assert code == 1 and f"is not the pinned file: its SHA-256 is {got}" in said
    assert installed(tmp_path) == []
    hub.spoil.clear()
    assert get(name, tmp_path)[0] == 0


def test_what_was_downloaded_before_an_interruption_is_kept(hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    tiny("clipscore")
    lost = next(path for path in hub.files if path.endswith("merges.txt"))
    content = hub.files.pop(lost)
    code, said = get("clipscore", tmp_path)
    assert code == 1 and "merges.txt: HTTP Error 404" in said and "try again, it goes on" in said
    hub.files[lost] = content
    hub.asked.clear()
    assert get("clipscore", tmp_path)[0] == 0
    assert hub.asked == [(lost, None)]


def test_a_file_that_breaks_off_is_no_file(hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    tiny("aesthetic_linear")
    path = next(path for path in hub.files if path.endswith("a+b.pth"))
    hub.spoil[path] = lambda content: content[:100]
    code, said = get("aesthetic_linear", tmp_path)
    assert code == 1 and "the connection ended after 100 of" in said and "try again, it goes on" in said
    assert installed(tmp_path) == []


@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_lost_connection_goes_on_where_it_stopped_or_starts_again(
    hub: Hub, tiny: Tiny, tmp_path: Path, share: float, goes_on: bool
) -> None:
    tiny("clipscore")
    path = next(path for path in hub.files if path.endswith("model.safetensors"))
    cut, hub.goes_on = int(share * len(hub.files[path])), goes_on
    hub.spoil[path] = lambda content: content[:cut]
    code, said = get("clipscore", tmp_path)
    assert code == 1 and f"the connection ended after {cut} of {len(hub.files[path])} bytes" in said
    assert os.listdir(tmp_path) == [".fetching"]
    hub.spoil.clear()
    hub.asked.clear()
    code, said = get("clipscore", tmp_path)
    assert code == 0 and "going on with clip/model.safetensors" in said
    assert hub.asked[0] == (path, f"bytes={cut}-" if goes_on else None)
    assert os.listdir(tmp_path) == ["clipscore"]


def test_a_connection_that_is_lost_once_is_taken_up_by_itself(hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    tiny("clipscore")
    path = next(path for path in hub.files if path.endswith("model.safetensors"))
    hub.spoil[path] = lambda content: hub.spoil.pop(path) and content[:1000]
    assert get("clipscore", tmp_path)[0] == 0
    assert [wanted for asked, wanted in hub.asked if asked == path] == [None, "bytes=1000-"]


def test_a_part_that_is_whole_already_is_judged_by_its_hash(hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    pin = tiny("clipscore").files[0]
    whole = hub.files[f"/clip/resolve/{REVISION}/{pin.path}"]
    for content, expected in ((b"x" * len(whole), 1), (whole, 0)):
        part = tmp_path / ".fetching" / "clip" / REVISION / f"{pin.path}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        assert get("clipscore", tmp_path)[0] == expected


def test_several_rewards_bring_what_they_share_once(
    hub: Hub, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = tiny("clipscore")
    files = dict(hub.files)
    known = tiny("aesthetic")
    hub.files |= files  # the same CLIP for both
    monkeypatch.setitem(KNOWN, "aesthetic", replace(known, files=(*clip.files[:2], known.files[-1])))
    code, said = run("fetch", "clipscore", "aesthetic", "--to", str(tmp_path))
    assert code == 0, said
    assert sorted(os.listdir(tmp_path)) == ["aesthetic", "clipscore"]
    assert len([path for path, _ in hub.asked if path.endswith("model.safetensors")]) == 1


@pytest.mark.parametrize("second", ["clipscor", "pickscore"])
def test_several_are_all_refused_for_one_that_cannot_be_had(
    hub: Hub, tiny: Tiny, tmp_path: Path, second: str
) -> None:
    tiny("clipscore")
    (tmp_path / "pickscore").mkdir()
    code, said = run("fetch", "clipscore", second, "--to", str(tmp_path))
    assert code == 1 and ("did you mean 'clipscore'?" in said or "exists already" in said)
    assert hub.asked == [] and os.listdir(tmp_path) == ["pickscore"]


def test_two_do_not_fetch_into_one_folder_at_once(tiny: Tiny, tmp_path: Path) -> None:
    tiny("clipscore")
    with one_writer(tmp_path / ".fetching"):
        code, said = get("clipscore", tmp_path)
    assert code == 1 and "is being written by process" in said
    assert get("clipscore", tmp_path)[0] == 0


def test_what_a_killed_conversion_left_is_removed(tiny: Tiny, tmp_path: Path) -> None:
    tiny("clipscore")
    (tmp_path / ".fetching" / "ready-x" / "clipscore").mkdir(parents=True)
    (tmp_path / ".fetching" / "ready-x" / "clipscore" / "model.safetensors").write_bytes(b"half")
    assert get("clipscore", tmp_path)[0] == 0
    assert os.listdir(tmp_path) == ["clipscore"]


@pytest.mark.parametrize("mirror", ["ftp://x", "file:///etc", "localhost:80"])
def test_a_mirror_is_a_web_address(hub: Hub, tmp_path: Path, mirror: str) -> None:
    code, said = get("clipscore", tmp_path, "--mirror", mirror)
    assert code == 1 and "is no web address; begin it with https://" in said and hub.asked == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([r"C:\p\python.exe", r"C:\c\fetch_rewards.py", "x"], r"C:\p\python.exe C:\c\fetch_rewards.py x"),
        ([r"C:\p\python.exe", r"C:\c d\f.py", "x"], r'C:\p\python.exe "C:\c d\f.py" x'),
        (
            [r"C:\Program Files (x86)\python.exe", r"C:\f.py", "x"],
            r'"C:\Program Files (x86)\python.exe" C:\f.py x (in PowerShell with & before it)',
        ),
    ],
)
def test_a_command_is_written_for_windows(words: list[str], line: str) -> None:
    assert command_line(words, windows=True) == line


def test_without_a_hash_nothing_is_downloaded_unless_told_to(
    hub: Hub, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = tiny("hpsv2.1")
    unpinned = replace(known.files[0], sha256=None)
    monkeypatch.setitem(KNOWN, "hpsv2.1", replace(known, files=(unpinned, *known.files[1:])))
    code, said = get("hpsv2.1", tmp_path)
    assert code == 1 and hub.asked == []
    assert "no hash is known for HPS_v2.1_compressed.pt of hps@0123456789ab" in said
    code, said = get("hpsv2.1", tmp_path, "--accept-unpinned")
    assert code == 0 and f"not pinned: hps/HPS_v2.1_compressed.pt has SHA-256 {known.files[0].sha256}" in said
    manifest = json.loads((tmp_path / "hpsv2.1" / "reward.json").read_text())
    assert manifest["unpinned"] == ["HPS_v2.1_compressed.pt"]


class Poison:
    """Run a program when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("way", ["torch", "plain"])
def test_a_poisoned_published_pickle_runs_nothing(
    hub: Hub, tiny: Tiny, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, poison = tiny("imagereward"), {**imagereward_weights(), "x": Poison(tmp_path / "mark")}
    content = pickled(poison) if way == "torch" else pickle.dumps(poison)
    pin = hub.publish("imagereward", "ImageReward.pt", content)
    monkeypatch.setitem(KNOWN, "imagereward", replace(known, files=(pin, *known.files[1:])))
    code, said = get("imagereward", tmp_path / "rewards")
    assert code == 1 and "ImageReward.pt holds more than tensors, or is damaged" in said
    assert not (tmp_path / "mark").exists() and installed(tmp_path / "rewards") == []


FOREIGN = [{}, {"state_dict": [1]}, {"state_dict": {}}, [1], {"state_dict": {"x": torch.zeros(2)}}]


@pytest.mark.parametrize("content", FOREIGN, ids=str)
def test_a_published_pickle_of_another_model_is_refused(
    hub: Hub, tiny: Tiny, tmp_path: Path, content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = tiny("hpsv2.1")
    pin = hub.publish("hps", "HPS_v2.1_compressed.pt", pickled(content))
    monkeypatch.setitem(KNOWN, "hpsv2.1", replace(known, files=(pin, *known.files[1:])))
    code, said = get("hpsv2.1", tmp_path)
    assert code == 1 and ("holds no table of tensors" in said or "of another architecture" in said)
    assert installed(tmp_path) == []


def test_old_pytorch_converts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.pt").write_bytes(pickled({"x": torch.zeros(1)}))
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    with pytest.raises(ValueError, match=r"needs PyTorch 2\.6 or newer"):
        prepare.read_pickle(tmp_path / "x.pt")


def test_nothing_is_overwritten(hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    tiny("clipscore")
    (tmp_path / "clipscore").mkdir()
    (tmp_path / "clipscore" / "mine").write_text("x")
    code, said = get("clipscore", tmp_path)
    assert code == 1 and "exists already" in said and hub.asked == []
    assert (tmp_path / "clipscore" / "mine").read_text() == "x"


def test_a_full_disk_is_said_before_the_download(
    hub: Hub, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KNOWN, "clipscore", replace(tiny("clipscore"), gigabytes=1e9))
    code, said = get("clipscore", tmp_path)
    assert code == 1 and "make room or give --to" in said and hub.asked == []


def test_check_tells_a_changed_file(tiny: Tiny, tmp_path: Path) -> None:
    install(tiny("clipscore"), tmp_path)
    with open(tmp_path / "clipscore" / "merges.txt", "a") as file:
        file.write("\n")
    code, said = check("clipscore", tmp_path)
    assert code == 1 and "files: changed since they were installed: merges.txt" in said


def test_check_compares_with_the_authors_scores(
    hub: Hub, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, drawn = tiny("imagereward"), io.BytesIO()
    Image.effect_noise((40, 30), 90).convert("RGB").save(drawn, "webp", lossless=True)
    picture = hub.publish("imagereward", "assets/1.webp", drawn.getvalue(), "github")
    example = Example(picture, "a red cube", 0.0, 0.02, "they have")
    for offset, verdict, expected in ((0.0, "well", 0), (0.1, "NOT the same", 1)):
        root = tmp_path / str(expected)
        monkeypatch.setitem(EXAMPLES, "imagereward", (replace(example, score=0.0),))
        install(known, root)
        reward = load_installed(root, "imagereward")
        score = reward.score(read_picture(root / "imagereward/examples/1.webp"), ["a red cube"]).item()
        monkeypatch.setitem(EXAMPLES, "imagereward", (replace(example, score=score + offset),))
        code, said = check("imagereward", root)
        assert code == expected
        assert f"published example 1.webp: {score:.4f}, they have {score + offset:.4f}: {verdict}" in said


def test_check_says_how_to_get_what_is_not_there(tmp_path: Path) -> None:
    code, said = run("check", "pickscore", "--to", str(tmp_path))
    assert code == 1 and "get it with: g2rpo rewards fetch pickscore" in said


@pytest.mark.parametrize(
    ("name", "meant"), [("hpsv3", "hpsv2.1"), ("PickScor", "pickscore"), ("asthetic", "aesthetic")]
)
def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path, name: str, meant: str) -> None:
    code, said = get(name, tmp_path)
    assert code == 1 and f"{name!r} is unknown (did you mean {meant!r}?); known: pickscore, hpsv2.1" in said


def test_list_names_every_reward_and_what_is_installed(tiny: Tiny, tmp_path: Path) -> None:
    install(tiny("clipscore"), tmp_path)
    (tmp_path / "clipscore").rename(tmp_path / "clipscore_mine")
    install(tiny("pickscore"), tmp_path)
    code, said = run("list", "--to", str(tmp_path))
    assert code == 0
    assert "* pickscore " in said and "  hpsv2.1 " in said and "* clipscore_mine " in said
    assert all(known.licence in said and known.note in said for known in KNOWN.values())


def open_clip_folder(path: Path, weights_name: str, **preprocess: str) -> Path:
    """Write a CLIP in open_clip's layout."""
    path.mkdir()
    vision = {
        "image_size": IMAGE,
        "layers": 2,
        "width": WIDTH,
        "head_width": WIDTH // HEADS,
        "patch_size": PATCH,
    }
    text = {"context_length": 77, "vocab_size": VOCABULARY, "width": TEXT_WIDTH, "heads": 2, "layers": 2}
    model = {"embed_dim": EMBED, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    config = {"model_cfg": model, "preprocess_cfg": preprocess}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    weights = open_clip_weights()
    (path / weights_name).write_bytes(pickled(weights) if weights_name.endswith(".bin") else save(weights))
    write_clip_tokenizer(path)
    return path


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_a_clip_of_open_clips_layout_becomes_a_clipscore(tmp_path: Path, weights: str) -> None:
    source = open_clip_folder(tmp_path / "DFN5B", weights, interpolation="bicubic", resize_mode="squash")
    rewards = tmp_path / "rewards"
    code, said = run("add", "clipscore_dfn5b", str(source), "--to", str(rewards), "--licence", "Apple's")
    assert code == 0, said
    reward = load_installed(rewards, "clipscore_dfn5b")
    assert reward.licence == "Apple's"
    assert (reward.pictures.fit, reward.pictures.size) == ("squash", IMAGE)
    assert reward.module.vision_model.config.hidden_act == "quick_gelu"
    assert reward.score(pictures(), PROMPTS).isfinite().all()
    assert check("clipscore_dfn5b", rewards)[0] == 0


def test_a_clip_of_transformers_layout_becomes_a_clipscore(tiny: Tiny, tmp_path: Path) -> None:
    rewards = tmp_path / "rewards"
    install(tiny("clipscore"), rewards)
    code, said = run("add", "mine", str(rewards / "clipscore"), "--to", str(rewards))
    assert code == 0, said
    assert installed(rewards) == ["clipscore", "mine"]
    assert load_installed(rewards, "mine").licence == "that of its weights"


@pytest.mark.parametrize("lost", ["open_clip_config.json", "open_clip_model.safetensors", "vocab.json"])
def test_a_folder_that_lacks_a_file_is_refused_by_its_name(tmp_path: Path, lost: str) -> None:
    source = open_clip_folder(tmp_path / "clip", "open_clip_model.safetensors")
    (source / lost).unlink()
    code, said = run("add", "mine", str(source), "--to", str(tmp_path / "rewards"))
    assert code == 1 and lost in said
    assert installed(tmp_path / "rewards") == [] and os.listdir(tmp_path / "rewards") == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", "."])
def test_a_name_is_never_a_path(tmp_path: Path, name: str) -> None:
    code, said = run("add", name, str(tmp_path), "--to", str(tmp_path / "rewards"))
    assert code == 1 and "no free name" in said


def test_every_pin_is_whole() -> None:
    pins = [file for known in KNOWN.values() for file in known.files]
    pins += [example.picture for examples in EXAMPLES.values() for example in examples]
    assert len(pins) > 20
    for pin in pins:
        assert len(pin.revision) == 40 and int(pin.revision, 16) and pin.place in ("hub", "github")
        assert (pin.sha256 is None and pin.place == "hub") or (len(pin.sha256) == 64 and int(pin.sha256, 16))
        assert pin.size is None or pin.size > 0
