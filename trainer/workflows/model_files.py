"""Model files by the names that workflows and their jobs have, below given folders and nowhere else, and what
they tell of a training.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from comfy_g2rpo.blocks.block_settings import LARGE_FROM, dtype_of
from comfy_g2rpo.files.safe import FileError
from comfy_g2rpo.lora.key_names import family_of_model

from ..config.comfyui_models import FOLDERS, is_file_name, within
from ..lora.weight_files import PREFIXES, Model, look_at
from .graph_file import WorkflowError, shown

FAMILIES = Path(__file__).with_name("graph_families.json")
FAMILY_FACTS: Mapping[str, Mapping[str, Any]] = json.loads(FAMILIES.read_text("utf-8"))
"""What graphs of a family have: how long texts are, and the files that are usual."""
LONG_PROMPT = 200
"""Characters from which a prompt may be longer than the texts that graphs fill up to."""
T5 = ".SelfAttention."
ENCODERS = ("text_encoders.", "text_encoder.", "lora_te", "clip_l.", "clip_g.", "t5xxl.")


@dataclass(frozen=True)
class Facts:
    """What a transformer's file says of it."""

    family: str
    guided: bool
    """Whether it takes its guidance as an input."""
    parameters: int


@dataclass(frozen=True)
class ModelFolders:
    """ComfyUI's folders of models, and that of the pictures that graphs load."""

    roots: Sequence[Path] = ()
    """Models folders, or files like extra_model_paths.yaml."""
    pictures: Path | None = None

    @classmethod
    def of(cls, roots: Iterable[Path], pictures: Path | None = None) -> ModelFolders:
        """Take folders and files that are there; WorkflowError for another one."""
        made = cls(tuple(roots), pictures)
        for root in made.roots:
            if not root.exists():
                raise WorkflowError(f"--models {root} is neither a folder nor a file; check the path")
            folders_of(root)
        return made

    def of_kind(self, kind: str) -> list[Path]:
        """Return the folders of a kind of files."""
        return [folder for root in self.roots for folder in folders_of(root)[kind]]

    def find(self, kind: str, name: Any, asked: str) -> str:
        """Return the file of a name; `asked` is the node or the field that asks for it."""
        if not self.roots:
            raise WorkflowError(f"{asked} loads {shown(name)}; give ComfyUI's models folder with --models")
        where = f"among the {kind} here; fetch it, or give its folder with --models"
        folders = self.of_kind(kind)
        return self._below(folders, [*self.roots, *folders], name, asked, where)

    def picture(self, name: str, asked: str) -> str:
        """Return the file of a picture that a graph loads."""
        if self.pictures is None:
            raise WorkflowError(f"{asked} loads {shown(name)}; give ComfyUI's input folder with --input")
        plain, where = name.removesuffix(" [input]"), "in --input; fetch it, or choose anew"
        return self._below([self.pictures], [self.pictures], plain, asked, where)

    def _below(
        self, folders: Sequence[Path], roots: Sequence[Path], name: Any, asked: str, where: str
    ) -> str:
        """Return the first file of a name that lies within the roots."""
        asks = f"{asked} asks for {shown(name)}, which"
        if not is_file_name(name):
            raise WorkflowError(f"{asks} is no name of a file; choose anew")
        parts = name.replace("\\", "/").split("/")
        places = [os.path.realpath(folder.joinpath(*parts)) for folder in folders]
        files = [place for place in places if os.path.isfile(place)]
        bounds = [os.path.realpath(root) for root in roots]
        for place in files:
            if any(within(bound, place) for bound in bounds):
                return place
        if files:
            raise WorkflowError(f"{asks} lies outside the folders that were given; name its own folder, too")
        raise WorkflowError(f"{asks} is not {where}")

    def tell(self, section: Mapping[str, Any], asked: str) -> tuple[Facts, dict[str, Any], dict[str, Any]]:
        """Return what a model's files say of it: facts, and fields of a recipe's model and memory."""
        facts = self.facts(section.get("transformer") or section["path"], asked)
        known = FAMILY_FACTS[facts.family]
        texts = section.get("text_encoders") or [section.get("path") or section["transformer"]]
        lacks = known.get("t5_may_lack") and not self.reads_long_text(texts)
        model = {"family": facts.family, "dtype": dtype_of(facts.parameters)}
        model["max_sequence_length"] = 0 if lacks else known["tokens"]
        return facts, model, {"gradient_checkpointing": True} if facts.parameters >= LARGE_FROM else {}

    def facts(self, path: str, asked: str) -> Facts:
        """Tell a transformer, its own file's or a checkpoint's, by the header."""
        model = look(path)
        modules = model.modules()
        found = family_of_model(modules)
        if found is None:
            raise WorkflowError(
                f"{asked} loads {shown(Path(path).name)}, which holds no model that can be trained here; "
                "docs/models.md lists those that can"
            )
        prefix = next((each for each in PREFIXES if any(key.startswith(each) for key in model.tensors)), "")
        shapes = [stored.shape for key, stored in model.tensors.items() if key.startswith(prefix)]
        guided = any("guidance" in module for module in modules)
        return Facts(found[0].name, guided, sum(map(math.prod, shapes)))

    def reads_long_text(self, paths: Sequence[str]) -> bool:
        """Return whether some files have a T5 among their text encoders."""
        return any(T5 in key for path in paths for key in look(path).tensors)

    def changes_text(self, path: str) -> bool:
        """Return whether a LoRA changes text encoders, too, by its header."""
        return any(key.startswith(ENCODERS) for key in look(path).tensors)


def look(path: str) -> Model:
    """Read a file's header; WorkflowError names the file without its place, which is nobody's elsewhere."""
    try:
        return look_at(Path(path))
    except FileError as error:
        raise WorkflowError(str(error).replace(path, Path(path).name)) from error


def tokens_for(facts: Facts, tokens: int, longest: int) -> int:
    """Return the length that texts are filled up to: more than `tokens` where a prompt of `longest`
    characters may need it, and the model reads that much.
    """
    family = FAMILY_FACTS[facts.family]
    # Of the models that may take guidance as an input, those that do not read no longer texts.
    able = facts.guided >= ("guidance" in family)
    return max(tokens, family.get("long_tokens", 0)) if able and tokens and longest > LONG_PROMPT else tokens


def folders_of(root: Path) -> dict[str, list[Path]]:
    """Return the folders of each kind below a models folder, or as an extra_model_paths.yaml lists them."""
    if root.is_file():
        return extra_paths(root)
    return {kind: [root / name for name in names] for kind, names in FOLDERS.items()}


def extra_paths(file: Path) -> dict[str, list[Path]]:
    """Read the folders of each kind from a file like ComfyUI's extra_model_paths.yaml."""
    try:
        tree = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise WorkflowError(f"--models {file} is no extra_model_paths.yaml; check the file") from error
    found: dict[str, list[Path]] = {kind: [] for kind in FOLDERS}
    for section in tree.values() if isinstance(tree, dict) else ():
        given = section if isinstance(section, dict) else {}
        base = file.parent / os.path.expandvars(Path(str(given.get("base_path") or "")).expanduser())
        for kind, names in FOLDERS.items():
            lines = [line for name in names for line in str(given.get(name) or "").splitlines()]
            found[kind] += [base / line.strip() for line in lines if line.strip()]
    return found
