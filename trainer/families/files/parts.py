"""The parts of a model, wherever they lie: a diffusers folder, a file for each part, one checkpoint, or a
mixture.

A folder brings its own configurations. For files they are shipped (`families/facts`), and their sizes read
off the weights. Text encoders are loaded when the first prompt is encoded, so a run whose prompts are all in
the cache never loads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import nn

from comfy_g2rpo.lora import key_names

from ...config.family_names import FAMILIES
from ...model.prompt_cache import PARTS, encoder_files, for_files
from . import diffusers_folder, sizes, weight_names
from .single_file import Held, build, hold, hold_transformer
from .text_files import TextFiles
from .tokenizers import load_tokenizers

if TYPE_CHECKING:
    from ...config.sections import ModelSection

FACTS = Path(__file__).resolve().parent.parent / "facts"
VAE_PREFIXES = ("vae.", "first_stage_model.")


class Parts:
    """Loads the parts of one model of a family, whose policy class says what they are.

    `pipeline` loads all but the text encoders, `attach` lets a policy load those when it needs them.
    """

    def __init__(
        self, policy: Any, section: ModelSection, path: Path | None, device: torch.device | str
    ) -> None:
        self.policy, self.family, self.section, self.device = policy, section.family, section, device
        self.kind, self.optional = policy.pipeline_of(path), tuple(policy.optional)
        self.title = FAMILIES[self.family].title
        self.dtype = torch.bfloat16 if section.dtype == "bf16" else torch.float32
        self.folder = path if path and path.is_dir() else None
        self.checkpoint = path if path and not path.is_dir() else None
        self.transformer = self._hold_transformer()
        self.config = read_config(self.folder, "transformer") or (
            policy.sizes(self.transformer) if self.transformer else {}
        )
        self.facts = read_facts(policy.facts(self.family, self.config, self.folder))
        self.text = TextFiles(self.title, self.facts, section.text_encoders, self.checkpoint)
        self.text.check_width(self.config)

    def pipeline(self, ready: Mapping[str, Any] | None = None) -> Any:
        """Load the pipeline without its text encoders; components that are `ready` are taken as they are."""
        given: dict[str, Any] = dict(ready or {})
        if self.transformer:
            given["transformer"] = self._build_transformer(self.transformer)
        if (held := self._hold_vae()) is not None:
            given["vae"] = self._build_vae(held)
        if self.folder:
            given |= dict.fromkeys(self.text.held)
            later = [name for name in self.encoders() if name not in given]
            made = diffusers_folder.load_pipeline(
                self.kind, self.folder, self.dtype, self.optional, given, later
            )
            self.text.check_words(made)
            return made.to(self.device)
        self.text.check(self.encoders(), self.optional)
        given["scheduler"] = getattr(diffusers, self.facts["scheduler"]["_class_name"]).from_config(
            self.facts["scheduler"]
        )
        given |= load_tokenizers(self.facts, self.section.tokenizers, self.transformer.path, self.text.held)
        absent = [
            name for name in (*self.facts["text_encoders"], *self.facts["tokenizers"]) if name not in given
        ]
        made = self.kind(**given, **dict.fromkeys(absent), **self.facts.get("options", {}))
        self.text.check_words(made)
        return made.to(self.device)

    def attach(self, policy: Any, *settings: object, parts: Sequence[str] = PARTS) -> Any:
        """Give a policy its prompt cache and the loader of its text encoders; return it.

        The cache's key has the `settings` and the files of the `parts` that features depend on.
        """
        policy.cache = for_files(self._encoder_files(parts), *settings)
        policy.load_text_encoders = self.text_encoders
        if policy.cache is None:
            policy.take_text_encoders()
        return policy

    def encoders(self) -> tuple[str, ...]:
        """List the text encoders of the pipeline's class."""
        return tuple(name for name in self.kind.__init__.__annotations__ if name.startswith("text_encoder"))

    def text_encoders(self) -> dict[str, nn.Module]:
        """Load the text encoders."""
        found = {name: self.text.build(name, held, self.dtype) for name, held in self.text.held.items()}
        if self.folder:
            left = [name for name in self.encoders() if name not in found]
            found |= diffusers_folder.load_parts(self.kind, self.folder, self.dtype, left)
        return found

    def _hold_transformer(self) -> Held | None:
        """Look at the file that has the transformer, if any does."""
        field, path = "model.transformer", self.section.transformer
        if path is None:
            field, path = "model.path", self.checkpoint
        if path is None:
            if self.folder is None:
                raise ValueError(
                    "model.path is missing; give it, or model.transformer with model.text_encoders and "
                    "model.vae"
                )
            return None
        if self.family not in key_names.FAMILIES:
            raise ValueError(
                f"{field}: {self.title} is loaded from its folder alone; give that as model.path"
            )
        layout = weight_names.by_rules(self.policy.layout)
        held = hold_transformer(field, Path(path), key_names.FAMILIES[self.family], layout)
        known = key_names.family_of_model(key.rpartition(".")[0] for key in held.tensors)
        if known and known[0].name != self.family:
            remedy = (
                f"set model.family: {known[0].name}" if known[0].name in FAMILIES else "give another file"
            )
            raise ValueError(f"{field} {path} holds {known[0].title}, not {self.title}; {remedy}")
        if known is None:
            raise ValueError(f"{field} {path} holds no transformer of {self.title}; give the file of one")
        return held

    def _build_transformer(self, held: Held) -> nn.Module:
        config, described = self.config, f"{self.folder} describes"
        if "_class_name" not in config:
            config, described = {**self.facts["transformer"], **config}, "its shapes describe"
        return build(
            held, lambda: getattr(diffusers, config["_class_name"]).from_config(config), described, self.dtype
        )

    def _hold_vae(self) -> Held | None:
        """Look at the file that has the VAE; a folder may have it, too."""
        fact = self.facts.get("vae", {})
        if self.section.vae:
            return hold("model.vae", "a VAE", Path(self.section.vae), VAE_PREFIXES)
        if self.checkpoint:
            held = hold("model.path", "a VAE", self.checkpoint, VAE_PREFIXES)
            if any(key.startswith(("decoder.", "encoder.")) for key in held.tensors):
                return held
        if self.folder:
            return None
        where = f"{fact['title']} ({fact['file']} in ComfyUI's models/vae)"
        raise ValueError(f"model.vae is missing: {self.title} decodes with {where}; {download(fact['hub'])}")

    def _build_vae(self, held: Held) -> nn.Module:
        fact = self.facts["vae"]
        wanted = fact["config"]
        remedy = f"give {fact['title']} ({fact['file']}); {download(fact['hub'])}"
        held, found = described_vae(held, remedy, wanted)
        channels, ours = (
            config.get("z_dim") or config["latent_channels"] for config in ({**wanted, **found}, wanted)
        )
        if channels != ours:
            raise ValueError(
                f"{held.field} {held.path} has {channels} latent channels, but {self.title} works with "
                f"{ours}; {remedy}"
            )
        config = read_config(self.folder, "vae") or {**wanted, **found}
        return build(
            held,
            lambda: getattr(diffusers, wanted["_class_name"]).from_config(config),
            "its shapes describe",
            self.dtype,
        )

    def _encoder_files(self, parts: Sequence[str]) -> dict[str, Path]:
        """List the files that text features depend on, by names that do not change when they move."""
        found = {f"{name} {held.path.name}": held.path for name, held in self.text.held.items()}
        for root in (self.folder, Path(self.section.tokenizers) if self.section.tokenizers else None):
            for file in encoder_files(root, parts) if root else ():
                label = file.relative_to(root).as_posix()
                if label.partition("/")[0] not in self.text.held:
                    found[label] = file
        return found


def read_facts(name: str) -> dict[str, Any]:
    """Read the shipped facts of a name; a family without any is loaded from its folder alone."""
    file = FACTS / f"{name}.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def described_vae(held: Held, remedy: str, wanted: Mapping[str, Any]) -> tuple[Held, dict[str, Any]]:
    """Give a VAE's file its layout and read its sizes; another kind than the wanted one is refused."""
    keys = held.tensors
    causal = "decoder.middle.0.residual.0.gamma" in keys or "decoder.mid_block.resnets.0.norm1.gamma" in keys
    plain = "decoder.mid.block_1.norm1.weight" in keys or "decoder.mid_block.resnets.0.norm1.weight" in keys
    if not (causal or plain):
        raise ValueError(f"{held.field} {held.path} holds no VAE that is read; {remedy}")
    if causal != ("z_dim" in wanted):
        what = "a VAE for video" if causal else "a VAE for pictures"
        raise ValueError(f"{held.field} {held.path} is {what}, another kind than this model's; {remedy}")
    if plain:
        stages = len(
            {key.split(".")[2] for key in keys if key.startswith(("encoder.down.", "encoder.down_blocks."))}
        )
        held = replace(held, layout=weight_names.ldm_vae(stages))
        return held, sizes.kl_vae(held)
    residual = (
        "encoder.downsamples.0.downsamples.0.residual.2.weight" in keys
        or "encoder.down_blocks.0.resnets.0.conv1.weight" in keys
    )
    if residual != bool(wanted.get("is_residual")):
        raise ValueError(f"{held.field} {held.path} is the VAE of another Wan; {remedy}")
    first = "encoder.downsamples.0.downsamples.{}" if residual else "encoder.downsamples.{}"
    resnets = next(
        number for number in range(len(keys)) if f"{first.format(number)}.residual.2.weight" not in keys
    )
    held = replace(held, layout=weight_names.wan_vae(resnets, residual))
    return held, sizes.wan_vae(held, residual)


def read_config(root: Path | None, part: str) -> dict[str, Any] | None:
    """Read a part's configuration in a folder, if there is one."""
    file = root / part / "config.json" if root else None
    if file is None or not file.is_file():
        return None
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file}: not a JSON file ({error}); {diffusers_folder.remedy(root, part)}"
        ) from error
    return content if isinstance(content, dict) else None


def download(hub: str) -> str:
    """Name the command that fetches a file, given as `owner/name path`."""
    return f"fetch it with: hf download {hub}"
