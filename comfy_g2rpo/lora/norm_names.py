"""The layers that no pair of matrices changes but other adapters do: norms by native and diffusers name, and
which layers have a bias. As in `key_names`, `{}` is a block's number.
"""

from __future__ import annotations

import re

from .key_names import DOUBLE, NEXT_DIT, SINGLE, Family, Link, links, template

FLUX_NORMS = links(
    {
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
    },
    native=DOUBLE["native"],
    diffusers=DOUBLE["diffusers"],
) + links(
    {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"},
    native=SINGLE["native"],
    diffusers=SINGLE["diffusers"],
)
NEXT_DIT_NORMS = links({"cap_embedder.0": "cap_embedder.0"}) + tuple(
    link
    for prefix in NEXT_DIT
    for link in links(
        {"attention.q_norm": "attention.norm_q", "attention.k_norm": "attention.norm_k"}
        | {name: name for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")},
        native=prefix,
        diffusers=prefix,
    )
)
NORMS: dict[str, tuple[Link, ...]] = {
    "sd3": links(
        {
            "x_block.attn.ln_q": "attn.norm_q",
            "x_block.attn.ln_k": "attn.norm_k",
            "x_block.attn2.ln_q": "attn2.norm_q",
            "x_block.attn2.ln_k": "attn2.norm_k",
            "context_block.attn.ln_q": "attn.norm_added_q",
            "context_block.attn.ln_k": "attn.norm_added_k",
        },
        native="joint_blocks.{}.",
        diffusers="transformer_blocks.{}.",
    ),
    "flux": FLUX_NORMS,
    "flux2": FLUX_NORMS,
    "qwen_image": links(
        {
            name: name
            for name in (
                "txt_norm",
                *(f"transformer_blocks.{{}}.attn.norm_{part}" for part in ("q", "k", "added_q", "added_k")),
            )
        }
    ),
    "wan": links(
        {
            "norm3": "norm2",
            "self_attn.norm_q": "attn1.norm_q",
            "self_attn.norm_k": "attn1.norm_k",
            "cross_attn.norm_q": "attn2.norm_q",
            "cross_attn.norm_k": "attn2.norm_k",
            "cross_attn.norm_k_img": "attn2.norm_added_k",
        },
        native="blocks.{}.",
        diffusers="blocks.{}.",
    )
    + links(
        {
            "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
            "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
        }
    ),
    "z_image": NEXT_DIT_NORMS,
    "lumina2": NEXT_DIT_NORMS,
}
BIASED = re.compile(r"norm3$|img_emb\.proj\.")  # among the norms
UNBIASED = {"flux2": re.compile(""), **dict.fromkeys(("z_image", "lumina2"), re.compile("attention|feed_fo"))}
"""Layers without a bias."""
PARAMETERS = {"wan": ("blocks.{}.modulation", "head.modulation")}
"""Native parameters that belong to no layer with a weight."""
INDEX = {
    family: {name: link for link in made for name in (link.native, *link.diffusers)}
    for family, made in NORMS.items()
}


def norm(family: Family, module: str) -> Link | None:
    """Find the link of a norm of either naming, with its block's number filled in."""
    pattern, number = template(module)
    index = INDEX.get(family.name, {})
    return index[module] if module in index else index[pattern].at(number) if pattern in index else None


def has_bias(family: Family, module: str) -> bool:
    """Return whether the native layer of a module has a bias."""
    if link := norm(family, module):
        return bool(BIASED.search(link.native))
    link = family.find(module)
    without = UNBIASED.get(family.name)
    return link is not None and not (without and without.search(link.native))
