"""Reward models of the published architectures, too small to cost anything, in folders as `g2rpo rewards
fetch` leaves them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from comfy_g2rpo.rewards.fetching import rewrite_weights

IMAGE, PATCH, WIDTH, LAYERS, HEADS, EMBED = 28, 7, 32, 2, 4, 24
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
TEXT_WIDTH = 16
HEAD = (12, 8, 1)
PROMPTS = ["a red cube", "a red cube on the table, and " + "blue " * 60, "", "Ünïcode & <b>", "a red cube"]


def pictures(count: int = 5, height: int = 40, width: int = 50, seed: int = 0) -> Tensor:
    """Draw pictures of smooth noise in 8-bit levels."""
    noise = torch.rand(count, 3, 6, 7, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.interpolate(noise, (height, width), mode="bilinear")
    return (smooth.permute(0, 2, 3, 1) * 255).round() / 255


def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """Return CLIP's byte alphabet, two merges and the two marks of start and end, as numbers and as
    merges.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(rest))]
    merges = ["r e", "re d</w>"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>"]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}, merges


VOCABULARY = len(clip_vocabulary()[0])
CLIP_TEXT = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 77,
}
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cube", "on", "the", "table", ","]
BERT_WORDS += ["##s", "b", "##l", "##u", "##e"]


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value of a useful size, norms and biases too, so that no tensor may be
    forgotten unseen.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        usual = 4.6 if name == "logit_scale" else float("norm" in name and name.endswith("weight"))
        parameter.data = noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else usual + 0.3 * noise
    return module.eval()


def clip_model(act: str = "gelu", seed: int = 0) -> nn.Module:
    """Make transformers' own CLIP with random weights."""
    from transformers import CLIPConfig, CLIPModel

    config = clip_config(act)
    marks = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}
    config["text_config"] |= marks
    return shaken(CLIPModel(CLIPConfig(**config)), seed)


def write_folder(
    root: Path, name: str, kind: str, config: dict[str, Any], tensors: dict[str, Tensor]
) -> Path:
    """Write a reward's folder."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "reward.json").write_text(json.dumps({"kind": kind, "source": "test", "revision": "0"}))
    (folder / "config.json").write_text(json.dumps(config))
    weights = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def clip_tokenizer() -> tuple[str, str]:
    """Return the content of CLIP's two tokenizer files."""
    words, merges = clip_vocabulary()
    return json.dumps(words), "\n".join(["#version: 0.2", *merges, ""])


def write_clip_tokenizer(folder: Path) -> None:
    """Write CLIP's two tokenizer files."""
    words, merges = clip_tokenizer()
    (folder / "vocab.json").write_text(words)
    (folder / "merges.txt").write_text(merges, encoding="utf-8")


def clip_config(act: str = "gelu") -> dict[str, Any]:
    """Return what a tiny CLIP's config.json says."""
    return {
        "projection_dim": EMBED,
        "vision_config": {**VISION, "hidden_act": act},
        "text_config": {**CLIP_TEXT, "hidden_act": act},
    }


def clip_folder(
    root: Path, name: str, kind: str, model: nn.Module, preprocessor: dict[str, Any] | None = None
) -> Path:
    """Write a CLIP reward."""
    config = clip_config(model.config.vision_config.hidden_act)
    folder = write_folder(root, name, kind, config, model.state_dict())
    write_clip_tokenizer(folder)
    pictures = preprocessor or {"size": {"shortest_edge": IMAGE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return folder


def owlv2_config() -> dict[str, Any]:
    """Return what a tiny OWLv2's config.json says."""
    return {
        "projection_dim": TEXT_WIDTH,
        "vision_config": {**VISION, "hidden_act": "quick_gelu"},
        "text_config": {**CLIP_TEXT, "max_position_embeddings": 16, "hidden_act": "quick_gelu"},
    }


def owlv2_model(seed: int = 0) -> nn.Module:
    """Make transformers' own OWLv2 with random weights."""
    from transformers import Owlv2Config, Owlv2ForObjectDetection

    return shaken(Owlv2ForObjectDetection(Owlv2Config(**owlv2_config())), seed)


def owlv2_folder(root: Path, name: str, model: nn.Module) -> Path:
    """Write a detection reward."""
    folder = write_folder(root, name, "owlv2", owlv2_config(), model.state_dict())
    write_clip_tokenizer(folder)
    return folder


def open_clip_weights(seed: int = 0) -> dict[str, Tensor]:
    """Make random weights in open_clip's layout (HPS v2.1, DFN5B)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3)

    def blocks(prefix: str, width: int) -> dict[str, Tensor]:
        shapes = {
            "ln_1": (width,),
            "attn.in_proj": (3 * width, width),
            "attn.out_proj": (width, width),
            "ln_2": (width,),
            "mlp.c_fc": (4 * width, width),
            "mlp.c_proj": (width, 4 * width),
        }
        made = {}
        for i in range(LAYERS):
            for key, shape in shapes.items():
                joint = "_" if key == "attn.in_proj" else "."
                made[f"{prefix}.resblocks.{i}.{key}{joint}weight"] = draw(*shape)
                made[f"{prefix}.resblocks.{i}.{key}{joint}bias"] = draw(shape[0])
        return made

    def norm(prefix: str, width: int) -> dict[str, Tensor]:
        return {f"{prefix}.{part}": draw(width) + (part == "weight") for part in ("weight", "bias")}

    patches = (IMAGE // PATCH) ** 2
    return {
        "visual.class_embedding": draw(WIDTH),
        "visual.positional_embedding": draw(patches + 1, WIDTH),
        "visual.proj": draw(WIDTH, EMBED),
        "visual.conv1.weight": draw(WIDTH, 3, PATCH, PATCH),
        **norm("visual.ln_pre", WIDTH),
        **norm("visual.ln_post", WIDTH),
        **blocks("visual.transformer", WIDTH),
        "token_embedding.weight": draw(VOCABULARY, TEXT_WIDTH),
        "positional_embedding": draw(77, TEXT_WIDTH),
        **blocks("transformer", TEXT_WIDTH),
        **norm("ln_final", TEXT_WIDTH),
        "text_projection": draw(TEXT_WIDTH, EMBED),
        "logit_scale": torch.tensor(4.6),
    }


def hps_folder(root: Path, name: str, weights: dict[str, Tensor]) -> Path:
    """Write HPS from weights in open_clip's layout, as fetching does."""
    ready = rewrite_weights.ready(rewrite_weights.open_clip(weights))
    folder = write_folder(root, name, "hpsv2", clip_config(), ready)
    write_clip_tokenizer(folder)
    return folder


BLIP_TEXT = {
    "hidden_size": TEXT_WIDTH,
    "encoder_hidden_size": WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-12,
}


def imagereward_config() -> dict[str, Any]:
    """Return what a tiny ImageReward's config.json says."""
    return {
        "vision_config": {**VISION, "layer_norm_eps": 1e-6, "hidden_act": "gelu"},
        "text_config": BLIP_TEXT,
    }


class Drawn(dict[str, Tensor]):
    """Random weights, drawn layer by layer."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, name: str, *shape: int) -> None:
        """Draw a tensor."""
        self[name] = torch.randn(shape, generator=self.generator)

    def linear(self, name: str, out: int, of: int) -> None:
        """Draw a matrix and its bias."""
        self[f"{name}.weight"] = torch.randn(out, of, generator=self.generator) * of**-0.5
        self[f"{name}.bias"] = 0.3 * torch.randn(out, generator=self.generator)

    def norms(self, width: int, *names: str) -> None:
        """Draw norms."""
        for name in names:
            self[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=self.generator)
            self[f"{name}.bias"] = 0.3 * torch.randn(width, generator=self.generator)


def imagereward_weights(seed: int = 0) -> dict[str, Tensor]:
    """Make random weights in ImageReward.pt's layout: timm's ViT, BLIP's BERT and the head."""
    vit, bert, wide, made = "blip.visual_encoder", "blip.text_encoder", TEXT_WIDTH, Drawn(seed)
    patches, embeddings = f"{vit}.patch_embed.proj", f"{bert}.embeddings"
    made.linear(patches, WIDTH, 3 * PATCH**2)
    made[f"{patches}.weight"] = made[f"{patches}.weight"].view(WIDTH, 3, PATCH, PATCH)
    made.norms(WIDTH, f"{vit}.norm")
    made.norms(wide, f"{embeddings}.LayerNorm")
    made.draw(f"{vit}.cls_token", 1, 1, WIDTH)
    made.draw(f"{vit}.pos_embed", 1, (IMAGE // PATCH) ** 2 + 1, WIDTH)
    made.draw(f"{embeddings}.word_embeddings.weight", BLIP_TEXT["vocab_size"], wide)
    made.draw(f"{embeddings}.position_embeddings.weight", BLIP_TEXT["max_position_embeddings"], wide)
    made[f"{embeddings}.position_ids"] = torch.arange(BLIP_TEXT["max_position_embeddings"])[None]
    for i in range(LAYERS):
        block, layer = f"{vit}.blocks.{i}", f"{bert}.encoder.layer.{i}"
        made.norms(WIDTH, f"{block}.norm1", f"{block}.norm2")
        for name, out, of in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            made.linear(f"{block}.{name}", out * WIDTH, of * WIDTH)
        for attention, source in ((f"{layer}.attention", wide), (f"{layer}.crossattention", WIDTH)):
            for name, of in (("query", wide), ("key", source), ("value", source)):
                made.linear(f"{attention}.self.{name}", wide, of)
            made.linear(f"{attention}.output.dense", wide, wide)
            made.norms(wide, f"{attention}.output.LayerNorm")
        made.linear(f"{layer}.intermediate.dense", 4 * wide, wide)
        made.linear(f"{layer}.output.dense", wide, 4 * wide)
        made.norms(wide, f"{layer}.output.LayerNorm")
    sides = (wide, 1024, 128, 64, 16, 1)
    for place, of, out in zip((0, 2, 4, 6, 7), sides, sides[1:], strict=False):
        made.linear(f"mlp.layers.{place}", out, of)
    made.linear("blip.vision_proj", 8, WIDTH)
    made.linear("blip.text_proj", 8, wide)
    return dict(made)


def imagereward_folder(root: Path, name: str, weights: dict[str, Tensor]) -> Path:
    """Write ImageReward from weights in their published layout, as fetching does."""
    ready = rewrite_weights.ready(rewrite_weights.imagereward(weights))
    folder = write_folder(root, name, "imagereward", imagereward_config(), ready)
    (folder / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")
    return folder


def head_weights(width: int, layout: str, widths: tuple[int, ...] = HEAD, seed: int = 3) -> dict[str, Tensor]:
    """Make a head's weights as published: `layout` names its layers by their place, for instance
    "layers.{}" or "" for a single layer.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for place, (of, out) in enumerate(zip((width, *widths), widths, strict=False)):
        prefix = f"{layout.format(2 * place)}." if layout else ""
        found[f"{prefix}weight"] = torch.randn(out, of, generator=generator) * of**-0.5
        found[f"{prefix}bias"] = torch.randn(out, generator=generator)
    return found


def aesthetic_folder(
    root: Path, name: str, model: nn.Module, head: dict[str, Tensor], widths: tuple[int, ...]
) -> Path:
    """Write a LAION predictor from CLIP and a head, as fetching does."""
    tower = rewrite_weights.tower(model.state_dict(), ("vision_model.", "visual_projection."))
    vision = {**VISION, "hidden_act": "quick_gelu"}
    config = {"projection_dim": EMBED, "vision_config": vision, "head": list(widths)}
    ready = rewrite_weights.ready(tower | rewrite_weights.head(head))
    return write_folder(root, name, "aesthetic", config, ready)


def siglip_vision(seed: int = 0) -> nn.Module:
    """Make transformers' own SigLIP picture tower with random weights."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return shaken(SiglipVisionModel(SiglipVisionConfig(**VISION)), seed)


def named_vision(model: nn.Module) -> dict[str, Tensor]:
    """Name the weights of a picture tower as those of a whole SigLIP."""
    return {f"vision_model.{key.removeprefix('vision_model.')}": t for key, t in model.state_dict().items()}


def aesthetic_v25_folder(
    root: Path, name: str, model: nn.Module, head: dict[str, Tensor], widths: tuple[int, ...]
) -> Path:
    """Write Aesthetic Predictor v2.5 from SigLIP, named as in the published SiglipModel, and a head, as
    fetching does.
    """
    config = {"vision_config": VISION, "head": list(widths)}
    ready = rewrite_weights.ready(named_vision(model) | rewrite_weights.head(head))
    return write_folder(root, name, "aesthetic_v2.5", config, ready)
