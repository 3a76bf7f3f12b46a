"""Text encoders from files or a checkpoint, each recognised by its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from . import sizes
from .single_file import Held, build, hold
from .weight_names import bare, text_encoder

FACTS = Path(__file__).resolve().parent.parent / "facts"
INSIDE = "text_encoders."
WIDE_CLIP = 1280


class TextFiles:
    """The files of a model's text encoders by the components of its pipeline."""

    def __init__(
        self, title: str, facts: Mapping[str, Any], files: Sequence[str], checkpoint: Path | None
    ) -> None:
        self.title, self.facts = title, facts
        self.held = self._assign(
            [hold("model.text_encoders", "a text encoder", Path(file)) for file in files]
        )
        if checkpoint:
            # Files of their own go before what a checkpoint has.
            self.held = self._assign(within(hold("model.path", "a text encoder", checkpoint))) | self.held

    def _assign(self, found: Sequence[Held]) -> dict[str, Held]:
        """Return which component every file is for; one that the model does not have is refused."""
        found = [named(held) for held in found]
        kinds = [kind_of(held) for held in found]
        clips = [
            held.size("embeddings.token_embedding.weight")[1]
            for held, kind in zip(found, kinds, strict=True)
            if kind == "clip"
        ]
        assigned: dict[str, Held] = {}
        for held, kind in zip(found, kinds, strict=True):
            if kind == "clip":
                width = held.size("embeddings.token_embedding.weight")[1]
                kind = "clip_g" if width >= WIDE_CLIP or width > min(clips) else "clip_l"
            component = next(
                (name for name, wanted in self.facts["text_encoders"].items() if wanted == kind), None
            )
            title = facts_of_text(kind)["title"]
            if component is None:
                wanted = " and ".join(
                    facts_of_text(each)["title"] for each in self.facts["text_encoders"].values()
                )
                raise ValueError(
                    f"{held.field} {held.path} is {title}, but {self.title} reads its prompts by "
                    f"{wanted}; remove it"
                )
            if component in assigned:
                raise ValueError(
                    f"{held.field} {held.path} is {title}, and so is {assigned[component].path}; remove one"
                )
            assigned[component] = replace(held, title=title)
        return assigned

    def check(self, components: Sequence[str], optional: Sequence[str]) -> None:
        """Refuse a model that lacks a text encoder."""
        for name in components:
            if name not in self.held and name not in optional:
                fact = facts_of_text(self.facts["text_encoders"][name])
                where = f"{fact['title']} ({fact['file']} in ComfyUI's models/text_encoders)"
                raise ValueError(
                    f"model.text_encoders lacks {where} of {self.title}; fetch it with: hf download "
                    f"{fact['hub']}"
                )

    def check_words(self, pipeline: Any) -> None:
        """Refuse a tokenizer that knows more words than its text encoder."""
        for component, held in self.held.items():
            known = sizes.TEXT[self.facts["text_encoders"][component]](held)["vocab_size"]
            name = component.replace("text_encoder", "tokenizer")
            words = getattr(pipeline, name)
            if words is not None and len(words) > known:
                raise ValueError(
                    f"model.tokenizers: its {name} has {len(words)} words, but {held.title} of {held.path} "
                    f"knows {known}; give the tokenizers of this model"
                )

    def check_width(self, transformer: Mapping[str, Any]) -> None:
        """Refuse a text encoder of another size than the transformer reads."""
        component, field, layers = self.facts.get("reads", ("", "", 1))
        held = self.held.get(component)
        if held is None:
            return
        found = sizes.TEXT[self.facts["text_encoders"][component]](held)
        width = layers * (found.get("d_model") or found["hidden_size"])
        if transformer.get(field, width) != width:
            raise ValueError(
                f"{held.field} {held.path}: {held.title} of this size gives {width} features, but this "
                f"{self.title} reads {transformer[field]}; give the text encoder that belongs to it"
            )

    def build(self, name: str, held: Held, dtype: torch.dtype) -> nn.Module:
        """Load the text encoder of a component."""
        kind = self.facts["text_encoders"][name]
        fact, found = facts_of_text(kind), sizes.TEXT[kind](held)
        config: dict[str, Any] = {**fact["config"], **found}
        if "vision_config" in config:
            config["vision_config"] = {**fact["config"]["vision_config"], **found.get("vision_config", {})}
        model = getattr(
            transformers, self.facts.get("text_classes", {}).get(name, fact["config"]["architectures"][0])
        )

        def make() -> nn.Module:
            made = model(model.config_class.from_dict(config))
            if hasattr(made, "lm_head") and not held.has("lm_head.weight"):
                # Nobody asks an encoder for the next word.
                made.lm_head = nn.Identity()
            return made

        # Stable Diffusion 3 takes CLIP-L's pooled output as it is, which transformers gives behind a
        # projection.
        plain = kind == "clip_l" and name in self.facts.get("text_classes", {})
        given = {"text_projection.weight": torch.eye(found["hidden_size"], dtype=dtype)} if plain else {}
        return build(held, make, "its shapes describe", dtype, given)


def within(held: Held) -> list[Held]:
    """List the text encoders of a checkpoint: `text_encoders.<name>.transformer.<weight>`."""
    groups: dict[str, dict[str, Any]] = {}
    for key, stored in held.tensors.items():
        name, sign, weight = key.removeprefix(INSIDE).partition(".transformer.")
        if key.startswith(INSIDE) and sign:
            groups.setdefault(name, {})[weight] = stored
    return [replace(held, tensors=tensors) for tensors in groups.values()]


def named(held: Held) -> Held:
    """Take what wraps the model off the names of its weights."""
    return replace(
        held, tensors={bare(key): stored for key, stored in held.tensors.items()}, layout=text_encoder
    )


def kind_of(held: Held) -> str:
    """Recognise a text encoder by its weights."""
    if held.has("embeddings.token_embedding.weight") and held.has("encoder.layers.0.mlp.fc1.weight"):
        return "clip"
    if held.has("encoder.block.0.layer.1.DenseReluDense.wi_0.weight"):
        every = held.has("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight")
        return "umt5xxl" if every else "t5xxl"
    if held.has("layers.0.pre_feedforward_layernorm.weight") and not held.has(
        "layers.0.self_attn.q_norm.weight"
    ):
        return "gemma2"
    if held.has("layers.0.self_attn.q_norm.weight") and held.has("embed_tokens.weight"):
        return "qwen3"
    if held.has("layers.0.self_attn.q_proj.bias") and held.has("visual.patch_embed.proj.weight"):
        return "qwen2_5_vl"
    known = "CLIP, T5, UMT5, Qwen2.5-VL, Qwen3 or Gemma 2"
    raise ValueError(
        f"{held.field} {held.path} holds no text encoder that is known; give {known} as safetensors"
    )


@lru_cache
def facts_of_text(kind: str) -> dict[str, Any]:
    """Read the shipped facts about a text encoder."""
    return json.loads((FACTS / f"text_{kind}.json").read_text("utf-8"))
