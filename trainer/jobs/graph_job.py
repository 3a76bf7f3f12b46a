"""A job that a graph has handed over, as this machine runs it: names become files under the worker's folders.

Whoever can write into the spool could write any job there. So a job may say how to train, and never where
something lies or what program to run: every field that does is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_g2rpo.blocks.block_settings import TINY_MODEL
from comfy_g2rpo.files.safe import write_bytes

from ..config.bundled import bundled_folder
from ..config.reading import apply_overrides, from_dict
from ..config.reward_checks import missing_models
from ..workflows.model_files import ModelFolders, tokens_for

SHOWN = {"width", "height", "guidance", "negative_prompt", "max_sequence_length"}
REWARD = {"name", "weight", "gate", "batch", "dtype"}
FIELDS: dict[str, set[str] | None] = {
    "model": {"family", "dtype", "schedule", *SHOWN},
    "memory": {"gradient_checkpointing"},
    "lora": {"rank", "alpha", "targets"},
    "method": None,
    "train": None,
    "rewards": REWARD,
    "heldout_rewards": REWARD,
    "prompts": {"train", "heldout"},
}
"""What a job may set, by section; None for all of one that names no place."""
VOTES = "votes"
MAX_PROMPTS = 4096


class RefusedJobError(ValueError):
    """A job that this worker does not run, in one line."""


@dataclass(frozen=True)
class Owner:
    """What whoever trains gives to every job of a graph: folders of models, settings, a card's preset."""

    folders: ModelFolders
    settings: Sequence[str] = ()
    preset: str | None = None

    def prepare(self, job: Mapping[str, Any], stem: Path) -> dict[str, Any]:
        """Return what is run in place of a job."""
        own = prepared(job, self.folders, stem)
        return {**own, "settings": [*self.of_preset(own["recipe"]), *self.settings]}

    def check(self, job: Mapping[str, Any]) -> None:
        """Refuse a job that could not be run; ValueError."""
        recipe, lists = with_files(job, self.folders)
        tree = {**recipe, "prompts": prompts_as_text(lists)}
        config = from_dict(apply_overrides(tree, [*self.of_preset(recipe), *self.settings]))
        if missing := missing_models((*config.rewards, *config.heldout_rewards)):
            raise RefusedJobError(missing)

    def of_preset(self, recipe: Mapping[str, Any]) -> list[str]:
        """Return the settings of the preset for a job's model; none for a family without presets."""
        if self.preset is None:
            return []
        from ..cost.presets import presets, written

        family = presets().get(str(recipe["model"].get("family")), {})
        return written(family.get(self.preset, {}))


def prepared(
    job: Mapping[str, Any], folders: ModelFolders, stem: Path, settings: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what is run in place of a job: with files for names, and its prompts beside `stem`.

    `settings` are the worker's own, which go last. RefusedJobError for a job that says more than it may.
    """
    recipe, lists = with_files(job, folders)
    prompts = {}
    for name, lines in lists.items():
        if lines:
            place = stem.with_name(f"{stem.name}.{name}.jsonl")
            write_bytes(place, "".join(json.dumps({"prompt": line}) + "\n" for line in lines).encode())
            prompts[name] = str(place)
    return {"recipe": {**recipe, "prompts": prompts}, "settings": list(settings)}


def with_files(job: Mapping[str, Any], folders: ModelFolders) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Return a job's recipe with files for names, and its prompts; RefusedJobError where it may not run."""
    recipe = checked_recipe(job)
    models = job.get("models")
    if not isinstance(models, dict):
        raise RefusedJobError("the job names no models; submit it from the block Submit Training")
    lists = {name: checked_prompts(name, texts) for name, texts in recipe["prompts"].items()}
    model, memory = {**recipe["model"], **places(models, folders)}, recipe.get("memory", {})
    if models.get("folder") != TINY_MODEL:
        facts, told, kept = folders.tell(model, "models.model")
        longest = max((len(line) for lines in lists.values() for line in lines), default=0)
        told["max_sequence_length"] = tokens_for(facts, told["max_sequence_length"], longest)
        model, memory = {**told, **model}, {**kept, **memory}
    return {**recipe, "model": model, "memory": memory}, lists


def prompts_as_text(lists: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return prompts as a recipe may hold them itself, one per line."""
    return {name: "".join(f"{line}\n" for line in lines) for name, lines in lists.items() if lines}


def may_set(place: str) -> bool:
    """Return whether a job may set a field, or one of its section, by its place without numbers."""
    section, _, field = place.partition(".")
    allowed = FIELDS.get(section, set())
    return section in FIELDS and (not field or allowed is None or field in allowed)


def checked_recipe(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a job's recipe; RefusedJobError for the first field that no job may set."""
    recipe = job.get("recipe")
    if not isinstance(recipe, dict) or not {"model", "rewards", "prompts"} <= recipe.keys():
        raise RefusedJobError("the job has no recipe with model, rewards and prompts; submit another one")
    if job.get("settings"):
        raise RefusedJobError("the job brings settings, which only a worker's owner may give; remove them")
    for section, content in recipe.items():
        parts = content if section in ("rewards", "heldout_rewards") else [content]
        if section not in FIELDS or not isinstance(parts, list):
            raise RefusedJobError(f"{str(section)[:40]!a} is no section that a job may have; remove it")
        for part in parts:
            if not isinstance(part, dict):
                raise RefusedJobError(f"{section} holds no fields; submit another job")
            for field in part:
                if not may_set(f"{section}.{field}"):
                    named = f"{section}.{str(field)[:40]}"
                    raise RefusedJobError(f"{named} is nothing that a job may set; remove it")
            if part.get("name") == VOTES:
                raise RefusedJobError("rewards has votes, and a worker asks nobody; train in ComfyUI instead")
    return recipe


def checked_prompts(name: str, texts: Any) -> list[str]:
    """Return a job's prompts; RefusedJobError unless they are a list of texts."""
    if not isinstance(texts, list) or len(texts) > MAX_PROMPTS or any(not isinstance(t, str) for t in texts):
        raise RefusedJobError(f"prompts.{name} is no list of at most {MAX_PROMPTS} texts; submit another job")
    return texts


def places(models: Mapping[str, Any], folders: ModelFolders) -> dict[str, Any]:
    """Return the model's fields of a recipe that say where its parts lie."""
    kind, name = models.get("folder"), models.get("model")
    if kind == TINY_MODEL:
        return {"path": str(bundled_folder("models") / "tiny")}
    if kind not in ("checkpoints", "diffusion_models"):
        raise RefusedJobError(
            f"models.folder is {str(kind)[:40]!a}; a model is among checkpoints or diffusion_models"
        )
    field = "path" if kind == "checkpoints" else "transformer"
    found: dict[str, Any] = {field: folders.find(str(kind), name, "models.model")}
    given = models.get("text_encoders", [])
    if not isinstance(given, list) or len(given) > 4:
        raise RefusedJobError("models.text_encoders is no list of up to 4 names; submit another job")
    if given:
        found["text_encoders"] = [folders.find("text_encoders", one, "models.text_encoders") for one in given]
    if models.get("vae"):
        found["vae"] = folders.find("vae", models["vae"], "models.vae")
    return found
