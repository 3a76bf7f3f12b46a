"""The model-backed rewards that this package knows: what they are, what they allow, how they fail, and where their weights lie."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published file, pinned: `place` is "hub" (a Hugging Face repository) or "github"; sha256 None = nobody could be asked for it."""

    repo: str
    revision: str
    path: str
    sha256: str | None
    bytes: int
    place: str = "hub"


@dataclass(frozen=True)
class Known:
    """Describe a reward model: what a user reads before he fetches it, and what `g2rpo rewards fetch` needs."""

    name: str
    kind: str
    title: str
    licence: str
    compares_across_prompts: bool
    note: str
    scale: str
    gigabytes: float
    files: tuple[Published, ...] = ()

    @property
    def how_to_get(self) -> str:
        """Return the command that installs it."""
        return f"g2rpo rewards fetch {self.name}"


KNOWN: dict[str, Known] = {
    known.name: known
    for known in (
        Known(
            "pickscore",
            "pickscore",
            "PickScore v1",
            "MIT",
            True,
            "Keeps realism longest of the learned ones; pushed hard it ends in one glossy, over-detailed style.",
            "100 × cosine, about 18 to 24 (flow_grpo divides it by 26)",
            3.9,
        ),
        Known(
            "hpsv2.1",
            "hpsv2",
            "HPS v2.1",
            "Apache-2.0",
            True,
            "Over-saturates and over-contrasts; smooth, poster-like surfaces.",
            "cosine, about 0.2 to 0.35",
            3.9,
        ),
        Known(
            "clipscore",
            "clipscore",
            "CLIPScore (OpenAI ViT-L/14)",
            "MIT",
            True,
            "Reads the prompt, not the picture's quality: blurs, and writes the prompt into the picture.",
            "100 × cosine, about 15 to 35",
            1.7,
        ),
        Known(
            "imagereward",
            "imagereward",
            "ImageReward 1.0",
            "Apache-2.0",
            False,
            "Compares pictures of one prompt only; as a single target it soon corrupts them.",
            "standardised, about -2 to 2",
            1.8,
        ),
        Known(
            "aesthetic",
            "aesthetic",
            "LAION aesthetic (improved, MLP head)",
            "Apache-2.0",
            True,
            "Ignores the prompt: everything becomes the same moody portrait.",
            "1 to 10, about 4 to 7",
            1.2,
        ),
        Known(
            "aesthetic_linear",
            "aesthetic",
            "LAION aesthetic (linear head)",
            "MIT",
            True,
            "Ignores the prompt; paintings win over everything.",
            "1 to 10, about 4 to 7",
            1.2,
        ),
        Known(
            "aesthetic_v2.5",
            "aesthetic_v2.5",
            "Aesthetic Predictor v2.5 (SigLIP)",
            "AGPL-3.0 (code and head), Apache-2.0 (SigLIP)",
            True,
            "Ignores the prompt; likes illustration and soft light.",
            "1 to 10, good from 5.5",
            1.7,
        ),
    )
}
