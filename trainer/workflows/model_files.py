"""Model files by the names that workflows have, below given folders and nowhere else."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comfy_g2rpo.lora.key_names import family_of_model

from ..config.comfyui_models import FOLDERS, is_file_name, within
from ..lora.weight_files import PREFIXES, look_at
from .graph_file import WorkflowError, shown

T5 = ".SelfAttention."
ENCODERS = ("text_encoders.", "text_encoder.", "lora_te", "clip_l.", "clip_g.", "t5xxl.")


@dataclass(frozen=True)
class Facts:
    """What a transformer's file says of it."""

    family: str
    guided: bool
    """Whether it takes its guidance as an input."""
    parameters: int
    exact: bool
    """Whether its weights are in 32 bit."""


@dataclass(frozen=True)
class ModelFolders:
    """ComfyUI's folders of models, and that of the pictures that graphs load."""

    roots: Sequence[Path] = ()
    pictures: Path | None = None

    def find(self, kind: str, name: str, asked: str) -> str:
        """Return the file of a name; `asked` is the node that asks for it."""
        if not self.roots:
            raise WorkflowError(f"{asked} loads {shown(name)}; give ComfyUI's models folder with --models")
        places = [(root / folder, name) for root in self.roots for folder in FOLDERS[kind]]
        return self._below(places, self.roots, asked, f"in {' or '.join(FOLDERS[kind])} of --models")

    def picture(self, name: str, asked: str) -> str:
        """Return the file of a picture that a graph loads."""
        if self.pictures is None:
            raise WorkflowError(f"{asked} loads {shown(name)}; give ComfyUI's input folder with --input")
        plain = name.removesuffix(" [input]")
        return self._below([(self.pictures, plain)], [self.pictures], asked, "in --input")

    def _below(
        self, places: Sequence[tuple[Path, str]], roots: Sequence[Path], asked: str, where: str
    ) -> str:
        """Return the first of some files that is there and lies within the roots."""
        bounds = [os.path.realpath(root) for root in roots]
        for folder, name in places:
            if not is_file_name(name):
                raise WorkflowError(
                    f"{asked} asks for {shown(name)}, which is no name of a file; choose anew"
                )
            found = os.path.realpath(folder.joinpath(*name.replace("\\", "/").split("/")))
            if not os.path.isfile(found):
                continue
            if not any(within(bound, found) for bound in bounds):
                raise WorkflowError(
                    f"{asked} asks for {shown(name)}, which lies outside the folders that were given; name "
                    "its own folder, too"
                )
            return found
        raise WorkflowError(f"{asked} asks for {shown(name)}, which is not {where}; fetch it, or choose anew")

    def facts(self, path: str, asked: str) -> Facts:
        """Tell a transformer, its own file's or a checkpoint's, by the header."""
        model = look_at(Path(path))
        modules = model.modules()
        found = family_of_model(modules)
        if found is None:
            raise WorkflowError(
                f"{asked} loads {shown(Path(path).name)}, which holds no model that can be trained here; "
                "docs/models.md lists those that can"
            )
        prefix = next((each for each in PREFIXES if any(key.startswith(each) for key in model.tensors)), "")
        kinds: Counter[str] = Counter()
        for key, stored in model.tensors.items():
            if key.startswith(prefix):
                kinds[stored.dtype] += math.prod(stored.shape)
        guided = any("guidance" in module for module in modules)
        return Facts(found[0].name, guided, kinds.total(), kinds.most_common(1)[0][0] == "F32")

    def reads_long_text(self, paths: Sequence[str]) -> bool:
        """Return whether some files have a T5 among their text encoders."""
        return any(T5 in key for path in paths for key in look_at(Path(path)).tensors)

    def changes_text(self, path: str) -> bool:
        """Return whether a LoRA changes text encoders, too, by its header."""
        return any(key.startswith(ENCODERS) for key in look_at(Path(path)).tensors)
