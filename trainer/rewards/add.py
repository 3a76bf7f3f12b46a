"""Make a CLIPScore from a CLIP that the user has, in transformers' or open_clip's layout."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from comfy_g2rpo.files.safe import digest_of, write_json
from comfy_g2rpo.rewards.fetching import rewrite_weights
from comfy_g2rpo.rewards.fetching.fetch import MANIFEST
from comfy_g2rpo.rewards.fetching.prepare import TOKENIZER, read_pickle
from comfy_g2rpo.rewards.models.installed import installed, load_installed
from comfy_g2rpo.rewards.models.safe_folder import NAME
from comfy_g2rpo.rewards.protocol import RewardError

OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
KERNELS = {"bilinear": 2, "bicubic": 3, "lanczos": 1}


def add(root: Path, name: str, source: Path, licence: str | None = None) -> Path:
    """Install a CLIPScore from a folder; the folder is only read."""
    place = root / name
    if not NAME.fullmatch(name) or place.exists():
        raise RewardError(
            f"reward {name[:80]!a} is no free name in {root}; use letters, digits, dots, dashes and "
            "underscores"
        )
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".adding-") as ready:
        folder = Path(ready) / name
        folder.mkdir()
        if (source / "model.safetensors").is_file():
            _copy(source, folder, ("model.safetensors", "config.json", "preprocessor_config.json"))
        elif (source / "open_clip_config.json").is_file():
            _from_open_clip(source, folder)
        else:
            raise RewardError(
                f"{source} holds no model.safetensors and no open_clip_config.json; give a CLIP of "
                "either layout"
            )
        _copy(_tokenizer(root, source), folder, TOKENIZER)
        files = {path.name: digest_of(path) for path in sorted(folder.iterdir())}
        about = {"kind": "clipscore", "source": source.name, "revision": None, "licence": licence}
        write_json(folder / MANIFEST, {**about, "files": files})
        load_installed(Path(ready), name)
        os.chmod(folder, 0o755)
        os.replace(folder, place)
    return place


def _copy(source: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Copy files, and name the first one that is not there."""
    for name in names:
        if not (source / name).is_file():
            raise RewardError(f"{source} lacks {name}; take it from where the model was published")
        shutil.copyfile(source / name, folder / name)


def _tokenizer(root: Path, source: Path) -> Path:
    """Find CLIP's word list beside the model or in another installed reward: all CLIPs share it."""
    places = [source, *(root / name for name in installed(root))]
    found = next((place for place in places if all((place / name).is_file() for name in TOKENIZER)), None)
    if found is None:
        raise RewardError(
            f"{source} lacks vocab.json and merges.txt; put CLIP's there, or first: g2rpo rewards "
            "fetch clipscore"
        )
    return found


def _from_open_clip(source: Path, folder: Path) -> None:
    """Convert open_clip's layout."""
    content = json.loads((source / "open_clip_config.json").read_text(encoding="utf-8"))
    model, pictures = content.get("model_cfg", {}), content.get("preprocess_cfg", {})
    weights = next((source / name for name in OPEN_CLIP_WEIGHTS if (source / name).is_file()), None)
    if weights is None:
        raise RewardError(f"{source} lacks {' and '.join(OPEN_CLIP_WEIGHTS)}; download one of them")
    tensors = load_file(weights) if weights.suffix == ".safetensors" else read_pickle(weights)
    config = _config(model)
    write_json(folder / "config.json", config)
    write_json(
        folder / "preprocessor_config.json", _preprocessor(pictures, config["vision_config"]["image_size"])
    )
    save_file(
        rewrite_weights.ready(rewrite_weights.open_clip(tensors)),
        folder / "model.safetensors",
        {"format": "pt"},
    )


def _config(model: dict[str, Any]) -> dict[str, Any]:
    """Say open_clip's model_cfg in transformers' words."""
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    try:
        return {
            "projection_dim": model["embed_dim"],
            "vision_config": {
                "hidden_size": vision["width"],
                "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
                "num_hidden_layers": vision["layers"],
                "num_attention_heads": vision["width"] // vision.get("head_width", 64),
                "image_size": vision["image_size"],
                "patch_size": vision["patch_size"],
                "hidden_act": act,
            },
            "text_config": {
                "hidden_size": text["width"],
                "intermediate_size": 4 * text["width"],
                "num_hidden_layers": text["layers"],
                "num_attention_heads": text["heads"],
                "vocab_size": text["vocab_size"],
                "max_position_embeddings": text["context_length"],
                "hidden_act": act,
            },
        }
    except (KeyError, TypeError) as error:
        raise RewardError(
            f"open_clip_config.json lacks {error}; only CLIP with two plain transformers can be added"
        ) from error


def _preprocessor(pictures: dict[str, Any], size: int) -> dict[str, Any]:
    """Say open_clip's preprocess_cfg in transformers' words."""
    mode, kernel = pictures.get("resize_mode", "shortest"), pictures.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or kernel not in KERNELS:
        raise RewardError(
            f"open_clip_config.json resizes by {mode!a}, {kernel!a}; known are shortest and squash, "
            f"{', '.join(KERNELS)}"
        )
    edge = {"height": size, "width": size} if mode == "squash" else {"shortest_edge": size}
    said = {"size": edge, "do_center_crop": mode == "shortest", "resample": KERNELS[kernel]}
    return said | {f"image_{name}": pictures[name] for name in ("mean", "std") if name in pictures}
