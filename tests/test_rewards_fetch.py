"""`g2rpo rewards fetch, check, add, list`, against a local server that stands in for the hub and for
GitHub.
"""

import hashlib
import io
import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from PIL import Image
from reward_folders import (
    BERT_WORDS,
    EMBED,
    HEAD,
    HEADS,
    IMAGE,
    PATCH,
    PROMPTS,
    TEXT_WIDTH,
    VISION,
    VOCABULARY,
    WIDTH,
    clip_config,
    clip_model,
    clip_tokenizer,
    head_weights,
    imagereward_config,
    imagereward_weights,
    named_vision,
    open_clip_weights,
    owlv2_config,
    owlv2_model,
    pictures,
    siglip_vision,
    write_clip_tokenizer,
)
from safetensors.torch import save
from typer.testing import CliRunner

from comfy_g2rpo.rewards.models.catalogue import KNOWN, Known, Published
from comfy_g2rpo.rewards.models.installed import installed, load_installed
from g2rpo_trainer.commands.rewards import rewards_app
from g2rpo_trainer.rewards import prepare
from g2rpo_trainer.rewards.fetch import Sources, fetch
from g2rpo_trainer.rewards.prepare import EXAMPLES, Example
from g2rpo_trainer.rewards.recheck import read_picture

pytest.importorskip("transformers", reason="model-backed rewards need transformers: pip install '.[rewards]'")

Tiny = Callable[[str], Known]
REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serve files as the hub and GitHub do; `spoil` changes what is sent of a path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.spoil: dict[str, Callable[[bytes], bytes]] = {}
        self.tokens: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                path = unquote(self.path)
                hub.asked.append((self.command, path))
                hub.tokens += [self.headers[name] for name in ("Authorization",) if name in self.headers]
                content = hub.files.get(path)
                if content is None:
                    self.send_error(404)
                    return
                sent = hub.spoil.get(path, bytes)(content)
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", REVISION)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(sent)

            def log_message(self, form: str, *values: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def publish(self, repo: str, path: str, content: bytes, place: str = "hub") -> Published:
        """Serve a file; return its pin."""
        place_of = f"/{repo}/resolve/{REVISION}/{path}" if place == "hub" else f"/{repo}/{REVISION}/{path}"
        self.files[place_of] = content
        return Published(repo, REVISION, path, hashlib.sha256(content).hexdigest(), len(content), place)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Start the server; let huggingface_hub use a network, which is this one."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("G2RPO_GITHUB", hub.address)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def pickled(content: Any) -> bytes:
    """Save as the published `.pt` files are."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def tokenizer_files(hub: Hub) -> list[Published]:
    """Publish CLIP's word list."""
    words, merges = clip_tokenizer()
    return [
        hub.publish("clip", "vocab.json", words.encode()),
        hub.publish("clip", "merges.txt", merges.encode()),
    ]


def clip_files(hub: Hub, model: torch.nn.Module, act: str = "gelu") -> list[Published]:
    """Publish a CLIP in transformers' layout."""
    weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    return [
        hub.publish("clip", "model.safetensors", save(weights, {"format": "pt"})),
        hub.publish("clip", "config.json", json.dumps(clip_config(act)).encode()),
    ]


def published(hub: Hub, name: str) -> list[Published]:
    """Publish a tiny model in the layout of a known reward."""
    if name == "pickscore":
        return [clip_files(hub, clip_model(seed=1))[0], *tokenizer_files(hub)]
    if name == "clipscore":
        form = json.dumps({"size": IMAGE, "crop_size": IMAGE}).encode()
        pictures = hub.publish("clip", "preprocessor_config.json", form)
        return [*clip_files(hub, clip_model()), pictures, *tokenizer_files(hub)]
    if name == "detection":
        weights = owlv2_model().state_dict() | {"box_bias": torch.zeros(4)}
        return [hub.publish("owlv2", "model.safetensors", save(weights)), *tokenizer_files(hub)]
    if name == "hpsv2.1":
        content = pickled({"epoch": 3, "state_dict": open_clip_weights()})
        return [hub.publish("hps", "HPS_v2.1_compressed.pt", content), *tokenizer_files(hub)]
    if name == "imagereward":
        words = hub.publish("bert", "vocab.txt", ("\n".join(BERT_WORDS) + "\n").encode())
        return [hub.publish("imagereward", "ImageReward.pt", pickled(imagereward_weights())), words]
    if name == "aesthetic_v2.5":
        weights = named_vision(siglip_vision())
        weights |= {"text_model.x": torch.zeros(2), "logit_bias": torch.zeros(1)}
        config = json.dumps({"vision_config": VISION, "text_config": {}}).encode()
        head = pickled(head_weights(WIDTH, "scoring_head.{}", HEAD))
        return [
            hub.publish("siglip", "model.safetensors", save(weights)),
            hub.publish("siglip", "config.json", config),
            hub.publish("head", "models/aesthetic_predictor_v2_5.pth", head, "github"),
        ]
    head = head_weights(EMBED, "layers.{}", HEAD) if name == "aesthetic" else head_weights(EMBED, "", (1,))
    clip = clip_files(hub, clip_model("quick_gelu"), "quick_gelu")
    return [*clip, hub.publish("head", "a+b.pth", pickled(head), "github")]


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
    fetch(known, root, Sources.from_environment(), say=lambda text: None)


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
    assert code == 1 and "cannot download clip/merges.txt" in said and "try again, it goes on" in said
    hub.files[lost] = content
    hub.asked.clear()
    assert get("clipscore", tmp_path)[0] == 0
    assert {path for _, path in hub.asked} == {lost}


def test_a_file_that_breaks_off_is_no_file(hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    tiny("aesthetic_linear")
    path = next(path for path in hub.files if path.endswith("a+b.pth"))
    hub.spoil[path] = lambda content: content[:100]
    code, said = get("aesthetic_linear", tmp_path)
    assert code == 1 and ("cannot download" in said or "is not the pinned file" in said)
    assert installed(tmp_path) == []


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


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    code, said = get("hpsv3", tmp_path)
    assert code == 1 and "'hpsv3' is unknown; known: pickscore, hpsv2.1" in said


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
