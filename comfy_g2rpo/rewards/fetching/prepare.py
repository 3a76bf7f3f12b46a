"""From published files to a reward's folder: what is read, its configuration, examples."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...files.safe import write_json
from ..models.catalogue import Known, Published
from . import rewrite_weights

Files = Mapping[str, Path]
TOKENIZER = ("vocab.json", "merges.txt")

_VIT_H_14: dict[str, Any] = {
    "projection_dim": 1024,
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
    },
}
# LAION's ViT-H-14, OWLv2's B/16, and BLIP's ViT-L with ImageReward's med_config.json, in transformers' words.
CONFIGS: dict[str, dict[str, Any]] = {
    "pickscore": _VIT_H_14,
    "hpsv2": _VIT_H_14,
    "owlv2": {
        "projection_dim": 512,
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 960,
            "patch_size": 16,
            "hidden_act": "quick_gelu",
        },
        "text_config": {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "vocab_size": 49408,
            "max_position_embeddings": 16,
            "hidden_act": "quick_gelu",
        },
    },
    "imagereward": {
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 16,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
        },
        "text_config": {
            "hidden_size": 768,
            "encoder_hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "vocab_size": 30524,
            "max_position_embeddings": 512,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
        },
    },
}


@dataclass(frozen=True)
class Example:
    """An image, a prompt and its published score; `near`: by how much a device may differ."""

    picture: Published
    prompt: str
    score: float
    near: float
    whose: str


_OCEAN = "a painting of an ocean with clouds and birds, day time, low depth field effect"
_IMAGEREWARD = ("THUDM/ImageReward", "c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb")
_PICTURES = tuple(
    Published(*_IMAGEREWARD, f"assets/images/{number}.webp", digest, size, "github")
    for number, digest, size in (
        (1, "a5fcd126763da8b3fe2a9e620fc1ba03d215d20de36c77bf6770a540a9bc972d", 336918),
        (2, "dc13919a49a37987d19c8be3ba0c1ef2941570f820f90fb66ac91a9a9db24082", 256026),
        (3, "ee859bac167e6a04cbcde63454757b6fc7d9b8704429c15725ca8c4accf176e3", 282058),
        (4, "84faf59d59d9ca7ab298c9acb957d727365ae104768ac1a1ec55ab96be68aaf9", 318528),
    )
)


def _examples(whose: str, near: float, *scores: float) -> tuple[Example, ...]:
    """Pair ImageReward's four example pictures with scores."""
    return tuple(
        Example(picture, _OCEAN, score, near, whose) for picture, score in zip(_PICTURES, scores, strict=True)
    )


# ImageReward's README, "Example Use"; and what DiffSynth-Studio's examples/image_quality_metric/README.md
# prints for the same pictures.
EXAMPLES: dict[str, tuple[Example, ...]] = {
    "imagereward": _examples("the authors have", 0.02, 0.58116, 0.27453, -1.41318, -2.02957),
    "pickscore": _examples("DiffSynth-Studio has", 0.1, 20.73713, 20.44360, 20.66075, 19.42607),
    "hpsv2.1": _examples("DiffSynth-Studio has", 0.004, 0.23211, 0.20234, 0.19783, 0.19230),
    "aesthetic": _examples("DiffSynth-Studio has", 0.05, 5.90086, 5.77657, 5.79986, 5.05205),
}


def prepare(known: Known, files: Files, folder: Path) -> None:
    """Fill a reward's folder from its published files."""
    PREPARE[known.kind](files, folder)
    for example in EXAMPLES.get(known.name, ()):
        (folder / "examples").mkdir(exist_ok=True)
        place(files[example.picture.path], folder / "examples" / Path(example.picture.path).name)


def place(source: Path, target: Path) -> None:
    """Put a downloaded file where it belongs: without taking its space twice where the disk can do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _clipscore(files: Files, folder: Path) -> None:
    """Take a CLIP in transformers' layout as it is."""
    for name in ("model.safetensors", "config.json", "preprocessor_config.json", *TOKENIZER):
        place(files[name], folder / name)


def _pickscore(files: Files, folder: Path) -> None:
    """Take PickScore's weights as they are."""
    write_json(folder / "config.json", CONFIGS["pickscore"])
    for name in ("model.safetensors", *TOKENIZER):
        place(files[name], folder / name)


def _owlv2(files: Files, folder: Path) -> None:
    """Take OWLv2's weights without the grid of its boxes, which is no weight."""
    tensors = load_file(files["model.safetensors"])
    _write(folder, CONFIGS["owlv2"], {name: each for name, each in tensors.items() if name != "box_bias"})
    for name in TOKENIZER:
        place(files[name], folder / name)


def _hpsv2(files: Files, folder: Path) -> None:
    """Convert HPS_v2.1_compressed.pt, which is open_clip's layout under "state_dict"."""
    content = read_pickle(files["HPS_v2.1_compressed.pt"])
    _write(
        folder,
        CONFIGS["hpsv2"],
        rewrite_weights.open_clip(_tensors(content.get("state_dict"), "HPS_v2.1_compressed.pt")),
    )
    for name in TOKENIZER:
        place(files[name], folder / name)


def _imagereward(files: Files, folder: Path) -> None:
    """Convert ImageReward.pt."""
    tensors = _tensors(read_pickle(files["ImageReward.pt"]), "ImageReward.pt")
    _write(folder, CONFIGS["imagereward"], rewrite_weights.imagereward(tensors))
    place(files["vocab.txt"], folder / "vocab.txt")


def _aesthetic(files: Files, folder: Path) -> None:
    """Join CLIP's picture tower and a head."""
    _with_head(files, folder, ("vision_model.", "visual_projection."))


def _aesthetic_v25(files: Files, folder: Path) -> None:
    """Join SigLIP's picture tower and a head."""
    _with_head(files, folder, ("vision_model.",))


def _with_head(files: Files, folder: Path, modules: tuple[str, ...]) -> None:
    """Join some modules of a model and the head that is the one pickle of the files."""
    name = next(name for name in files if name.endswith(".pth"))
    head = rewrite_weights.head(_tensors(read_pickle(files[name]), name))
    published = json.loads(files["config.json"].read_text(encoding="utf-8"))
    config = {
        "projection_dim": published.get("projection_dim", 768),
        "vision_config": published["vision_config"],
        "head": [len(tensor) for key, tensor in sorted(head.items()) if key.endswith(".weight")],
    }
    _write(folder, config, rewrite_weights.tower(load_file(files["model.safetensors"]), modules) | head)


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a published pickle's tensors by PyTorch's restricted reader, which builds nothing else."""
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 6):
        # CVE-2025-32434: before 2.6 a crafted file could run code in spite of weights_only.
        raise ValueError(
            f"converting {path.name} needs PyTorch 2.6 or newer, this is {torch.__version__}; update "
            "it, or convert elsewhere"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # The restricted reader refuses with errors of many kinds.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path.name} holds more than tensors, or is damaged: {reason}; fetch it again"
        ) from error
    return content if isinstance(content, dict) else {}


def _tensors(content: Any, name: str) -> dict[str, Tensor]:
    """See that something read from a pickle is a table of tensors."""
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(value, Tensor) for value in content.values())
    ):
        raise ValueError(f"{name} holds no table of tensors where one was published; fetch it again")
    return dict(content)


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write configuration and weights."""
    write_json(folder / "config.json", config)
    save_file(rewrite_weights.ready(tensors), folder / "model.safetensors", {"format": "pt"})


PREPARE: dict[str, Callable[[Files, Path], None]] = {
    "pickscore": _pickscore,
    "clipscore": _clipscore,
    "hpsv2": _hpsv2,
    "imagereward": _imagereward,
    "aesthetic": _aesthetic,
    "aesthetic_v2.5": _aesthetic_v25,
    "owlv2": _owlv2,
}
