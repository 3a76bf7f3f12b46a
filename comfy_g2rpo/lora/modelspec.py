"""What a LoRA file tells programs that list models: the keys of ModelSpec, and those of kohya's trainers.

`modelspec.*` is the standard of github.com/Stability-AI/ModelSpec, 1.0.1; ComfyUI's model library, SwarmUI
and others show it. `ss_*` are what ComfyUI, Lora-Manager and web UIs read of kohya's keys. Left out, because
they would not be true: `ss_tag_frequency` and `modelspec.trigger_phrase`, which are shown as trigger words;
`ss_network_module`, which names kohya's code; `modelspec.prediction_type`, whose values are v and epsilon.

A checkpoint holds what the run's settings determine, so that the same run writes the same bytes. The name of
the file, the date and the hash come with the copy that is handed out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import NamedTuple

from ..files.safe import join_file, split_file
from .key_names import Family, family_of_model, published_size

Shapes = Mapping[str, Sequence[int]]
RECIPE, DATE = "g2rpo.recipe", "modelspec.date"
SPEC = {"modelspec.sai_model_spec": "1.0.1"}
SETTINGS = "g2rpo.run_settings"
OUTDATED = ("sshs_legacy_hash", SETTINGS)  # a copy is no longer the file that they tell of
HINT = "Strength 1. No trigger word is needed."


class Base(NamedTuple):
    """A base model by its ID in ModelSpec, as SwarmUI lists them, and as `ss_base_model_version` has it."""

    architecture: str
    version: str


BASES = {
    "sd3": Base("stable-diffusion-v3-medium", "sd3_medium"),
    "flux": Base("flux-1", "flux1"),
    "flux2": Base("Flux.2-dev", "flux2"),
    "qwen_image": Base("qwen-image", "qwen_image"),
    "wan": Base("wan-2_1-text2video-1_3b", "wan_2.1"),
    "z_image": Base("z-image", "z_image"),
    "lumina2": Base("lumina-2", "lumina2"),
}
SIZED = {
    ("sd3", 2432): Base("stable-diffusion-v3.5-large", "sd3.5_large"),
    ("flux2", 3072): Base("Flux.2-klein-4b", "flux2_klein_4b"),
    ("flux2", 4096): Base("Flux.2-klein-9b", "flux2_klein_9b"),
    ("wan", 5120): Base("wan-2_1-text2video-14b", "wan_2.1"),
    ("wan", 3072): Base("wan-2_2-ti2v-5b", "wan_2.2_5b"),
}
"""Models of a family that are told by their width and number of blocks."""


def base_of_model(shapes: Shapes, otherwise: str) -> Base:
    """Name a whole model by the shapes of its weights, by module; `otherwise` is for an unknown family."""
    found = family_of_model(shapes)
    if found is None:
        return Base(otherwise.lower(), otherwise.lower())
    base = base_of_lora(found[0], shapes)
    if base == BASES["flux"]:
        kind = "dev" if any("guidance" in name for name in shapes) else "schnell"
        base = Base(f"flux-1-{kind}", base.version)
    return base


def base_of_lora(family: Family, shapes: Shapes) -> Base:
    """Name the model that a LoRA's modules belong to, as far as they tell; dev or schnell they do not."""
    if family.name == "sd3" and any(".attn2." in name for name in shapes):
        return Base("stable-diffusion-v3.5-medium", "sd3.5_medium")
    width = published_size(family, {name: tuple(shape) for name, shape in shapes.items()})[0]
    return SIZED.get((family.name, width), BASES.get(family.name, Base(family.name, family.name)))


def named_base(base: Base) -> dict[str, str]:
    """Return the keys of a base model."""
    return {"modelspec.architecture": f"{base.architecture}/lora", "ss_base_model_version": base.version}


def about_run(
    base: Base, recipe: str, rewards: Mapping[str, str], size: tuple[int, int] | None
) -> dict[str, str]:
    """Return the keys that a run's settings determine.

    `rewards` holds what is said of each by its name, such as "0.5 pickscore"; `size` is width and height in
    pixels.
    """
    said = ", ".join(rewards.values())
    notes = {
        **SPEC,
        **named_base(base),
        "modelspec.title": f"{recipe} LoRA for {said}",
        "modelspec.description": f"Trained by G²RPO (recipe {recipe}) to raise these rewards: {said}.",
        "modelspec.tags": ", ".join(("g2rpo", *rewards)),
        "modelspec.usage_hint": HINT,
    }
    return notes | ({"modelspec.resolution": f"{size[0]}x{size[1]}"} if size else {})


def date_of(made: float) -> dict[str, str]:
    """Return the key of the time that a LoRA was made at, in seconds since 1970."""
    return {DATE: datetime.fromtimestamp(int(made), timezone.utc).isoformat()}


def handed_out(content: bytes, name: str, notes: Mapping[str, str] | None = None) -> bytes:
    """Return a LoRA file of ours as it is handed out under a name, with its hash and further notes.

    A title that somebody gave stays.
    """
    header, data = split_file(content)
    known = header.get("__metadata__", {})
    kept = {key: text for key, text in known.items() if key not in OUTDATED} | dict(notes or {})
    title, former = kept.get("modelspec.title"), kept.get("ss_output_name")
    if title in (None, former) or (RECIPE in kept and not former):
        kept["modelspec.title"] = name
    if "g2rpo.step" in kept:
        kept["ss_steps"] = kept["g2rpo.step"]
    if "modelspec.architecture" in kept:
        kept |= SPEC
    digest = hashlib.sha256(data).hexdigest()
    kept |= {"ss_output_name": name, "modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
    return join_file({**header, "__metadata__": kept}, data)
