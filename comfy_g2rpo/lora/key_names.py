"""What the weights of a model are called: its native names (ComfyUI, published single files) and diffusers'
names, as data.

A link joins one native module to the diffusers modules that hold its rows, in order. Most are one to one. A
native qkv holds three modules of diffusers, FLUX's linear1 four. Where `swaps`, the two halves of the rows
(shift, scale) change places. `{}` is a block's number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

NAMINGS = ("native", "diffusers")
BOTH, NEW, NONE = "both", "0.33", ""
Size = tuple[int, ...]  # rows and columns


@dataclass(frozen=True)
class Link:
    """One native module and the diffusers modules that hold its rows; `shares` says in which proportion."""

    native: str
    diffusers: tuple[str, ...]
    shares: tuple[int, ...]
    swaps: bool = False

    def at(self, number: str) -> Link:
        """Name the link of one block."""
        return Link(
            self.native.format(number),
            tuple(name.format(number) for name in self.diffusers),
            self.shares,
            self.swaps,
        )


@dataclass(frozen=True)
class Family:
    """The names of one architecture, and what ComfyUI's own key map makes of diffusers' ones."""

    name: str
    title: str
    links: tuple[Link, ...]
    signature: tuple[str, str]
    """A module that only this family has, by native and by diffusers name."""
    core: str
    """Which ComfyUI maps `transformer.` + diffusers names: both (0.3.64 and 0.33), 0.33 alone, or none."""
    core_names: str = ""
    """The family whose names it maps for this one, where that is another."""
    core_lacks: frozenset[str] = frozenset()
    """Diffusers modules that it does not map all the same."""
    pipeline_takes_alpha: bool = False
    """Whether diffusers' `load_lora_weights` takes `.alpha` beside its own names."""
    guidance_is_input: bool = False
    """Whether the model takes guidance as a number, and moves away from no negative prompt."""
    ratios: tuple[tuple[str, float], ...] = ()
    """Rows over columns of native modules whose names another family has, too."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Width and number of blocks of the published models."""

    @cached_property
    def index(self) -> dict[str, Link]:
        """Find links by the name, with `{}`, of any module on either side."""
        return {name: link for link in self.links for name in (link.native, *link.diffusers)}

    def find(self, module: str) -> Link | None:
        """Find the link of a module of either naming, with its block's number filled in."""
        if module in self.index:
            return self.index[module]
        pattern, number = template(module)
        return self.index[pattern].at(number) if pattern in self.index else None

    def fits(self, modules: Mapping[str, Size | None]) -> bool:
        """Return whether all modules (rows, columns; None: any) can be this family's."""
        ratios = dict(self.ratios)
        for module, size in modules.items():
            ratio = ratios.get(template(module)[0])
            if self.find(module) is None or (ratio and size and size[0] != round(ratio * size[1])):
                return False
        return True

    def in_core(self, module: str) -> str:
        """Return which ComfyUI maps `transformer.<module>`."""
        known = FAMILIES[self.core_names or self.name]
        link = known.find(module)
        lacking = (
            link is None or module not in link.diffusers or {module, template(module)[0]} & known.core_lacks
        )
        return NONE if lacking else known.core


def template(module: str) -> tuple[str, str]:
    """Replace a module's first number by `{}`; return the number, too."""
    found = re.search(r"(?:^|(?<=\.))\d+(?=\.)", module)
    return (module[: found.start()] + "{}" + module[found.end() :], found[0]) if found else (module, "")


def links(
    names: Mapping[str, str],
    *,
    native: str = "",
    diffusers: str = "",
    shares: Mapping[str, tuple[int, ...]] | None = None,
    swaps: Iterable[str] = (),
) -> tuple[Link, ...]:
    """Make links from native name → diffusers names (separated by spaces), under a prefix on each side."""
    made = []
    for one, others in names.items():
        parts = tuple(diffusers + part for part in others.split())
        made.append(Link(native + one, parts, (shares or {}).get(one, (1,) * len(parts)), one in swaps))
    return tuple(made)


SD3 = Family(
    "sd3",
    "Stable Diffusion 3 and 3.5",
    links(
        {
            "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
        },
        native="joint_blocks.{}.",
        diffusers="transformer_blocks.{}.",
        swaps=[
            "context_block.adaLN_modulation.1"
        ],  # of the last block, whose text has but a shift and a scale
    )
    + links(
        {
            "x_embedder.proj": "pos_embed.proj",
            "context_embedder": "context_embedder",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
            "final_layer.linear": "proj_out",
        },
        swaps=["final_layer.adaLN_modulation.1"],
    ),
    signature=("joint_blocks.0.x_block.attn.proj", "pos_embed.proj"),
    core=BOTH,
    sizes=((1536, 24), (2432, 38)),
)

FLUX_DOUBLE = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "txt_attn.proj": "attn.to_add_out",
}
DOUBLE = {"native": "double_blocks.{}.", "diffusers": "transformer_blocks.{}."}
SINGLE = {"native": "single_blocks.{}.", "diffusers": "single_transformer_blocks.{}."}

FLUX = Family(
    "flux",
    "FLUX.1",
    links(
        FLUX_DOUBLE
        | {
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "img_mod.lin": "norm1.linear",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            "txt_mod.lin": "norm1_context.linear",
        },
        native=DOUBLE["native"],
        diffusers=DOUBLE["diffusers"],
    )
    + links(
        {
            "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
            "linear2": "proj_out",
            "modulation.lin": "norm.linear",
        },
        native=SINGLE["native"],
        diffusers=SINGLE["diffusers"],
        shares={"linear1": (1, 1, 1, 4)},
    )
    + links(
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
            "final_layer.linear": "proj_out",
        },
        swaps=["final_layer.adaLN_modulation.1"],
    ),
    signature=("vector_in.in_layer", "single_transformer_blocks.0.proj_mlp"),
    core=BOTH,
    pipeline_takes_alpha=True,
    guidance_is_input=True,
    ratios=(
        ("single_blocks.{}.linear1", 7),
        ("double_blocks.{}.img_mlp.0", 4),
        ("double_blocks.{}.txt_mlp.0", 4),
    ),
    sizes=((3072, 19),),
)

FLUX2_GLOBAL = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
FLUX2_UNMAPPED = {
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
}

FLUX2 = Family(
    "flux2",
    "FLUX.2",
    links(
        FLUX_DOUBLE
        | {
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
        native=DOUBLE["native"],
        diffusers=DOUBLE["diffusers"],
    )
    + links(
        {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
        native=SINGLE["native"],
        diffusers=SINGLE["diffusers"],
    )
    + links(FLUX2_GLOBAL | FLUX2_UNMAPPED, swaps=["final_layer.adaLN_modulation.1"]),
    signature=("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
    guidance_is_input=True,
    core=NEW,
    core_lacks=frozenset(FLUX2_UNMAPPED.values()),
    ratios=(
        ("single_blocks.{}.linear1", 9),
        ("double_blocks.{}.img_mlp.0", 6),
        ("double_blocks.{}.txt_mlp.0", 6),
    ),
    sizes=((3072, 5), (4096, 8), (6144, 8)),
)

QWEN_BLOCK = (
    "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj attn.add_v_proj "
    "attn.to_add_out img_mlp.net.0.proj img_mlp.net.2 txt_mlp.net.0.proj txt_mlp.net.2 img_mod.1 txt_mod.1"
)
QWEN_GLOBAL = (
    "img_in txt_in proj_out norm_out.linear time_text_embed.timestep_embedder.linear_1 "
    "time_text_embed.timestep_embedder.linear_2"
)

QWEN_IMAGE = Family(
    "qwen_image",
    "Qwen-Image",  # ComfyUI took over diffusers' names
    links(
        {f"transformer_blocks.{{}}.{name}": f"transformer_blocks.{{}}.{name}" for name in QWEN_BLOCK.split()}
    )
    + links({name: name for name in QWEN_GLOBAL.split()}),
    signature=("transformer_blocks.0.img_mod.1", "transformer_blocks.0.img_mod.1"),
    core=BOTH,
    sizes=((3072, 60),),
)

WAN = Family(
    "wan",
    "Wan 2.1 and 2.2",
    links(
        {
            f"self_attn.{one}": f"attn1.{other}"
            for one, other in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)
        }
        | {
            f"cross_attn.{one}": f"attn2.{other}"
            for one, other in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)
        }
        | {
            "cross_attn.k_img": "attn2.add_k_proj",
            "cross_attn.v_img": "attn2.add_v_proj",
            "ffn.0": "ffn.net.0.proj",
            "ffn.2": "ffn.net.2",
        },
        native="blocks.{}.",
        diffusers="blocks.{}.",
    )
    + links(
        {
            "patch_embedding": "patch_embedding",
            "text_embedding.0": "condition_embedder.text_embedder.linear_1",
            "text_embedding.2": "condition_embedder.text_embedder.linear_2",
            "time_embedding.0": "condition_embedder.time_embedder.linear_1",
            "time_embedding.2": "condition_embedder.time_embedder.linear_2",
            "time_projection.1": "condition_embedder.time_proj",
            "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
            "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
            "head.head": "proj_out",
        }
    ),
    signature=("blocks.0.self_attn.q", "blocks.0.attn1.to_q"),
    core=NONE,
    sizes=((1536, 30), (5120, 40), (3072, 30)),
)

NEXT_DIT = ("layers.{}.", "noise_refiner.{}.", "context_refiner.{}.")


def next_dit(names: Mapping[str, str], shares: tuple[int, ...]) -> tuple[Link, ...]:
    """Make the links of the three kinds of blocks of a NextDiT."""
    return tuple(
        link
        for prefix in NEXT_DIT
        for link in links(names, native=prefix, diffusers=prefix, shares={"attention.qkv": shares})
    )


Z_IMAGE = Family(
    "z_image",
    "Z-Image",
    next_dit(
        {
            "attention.qkv": "attention.to_q attention.to_k attention.to_v",
            "attention.out": "attention.to_out.0",
            "feed_forward.w1": "feed_forward.w1",
            "feed_forward.w2": "feed_forward.w2",
            "feed_forward.w3": "feed_forward.w3",
            "adaLN_modulation.0": "adaLN_modulation.0",
        },
        (1, 1, 1),
    )
    + links(
        {
            "x_embedder": "all_x_embedder.2-1",
            "cap_embedder.1": "cap_embedder.1",
            "t_embedder.mlp.0": "t_embedder.mlp.0",
            "t_embedder.mlp.2": "t_embedder.mlp.2",
            "final_layer.linear": "all_final_layer.2-1.linear",
            "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        }
    ),
    signature=("layers.0.adaLN_modulation.0", "all_x_embedder.2-1"),
    core=NEW,
    ratios=tuple((f"{prefix}attention.qkv", 3.0) for prefix in NEXT_DIT),
    sizes=((3840, 30),),
)

LUMINA2 = Family(
    "lumina2",
    "Lumina Image 2.0",
    next_dit(
        {
            "attention.qkv": "attn.to_q attn.to_k attn.to_v",
            "attention.out": "attn.to_out.0",
            "feed_forward.w1": "feed_forward.linear_1",
            "feed_forward.w2": "feed_forward.linear_2",
            "feed_forward.w3": "feed_forward.linear_3",
            "adaLN_modulation.1": "norm1.linear",
        },
        (3, 1, 1),  # three heads of q share one of k and v
    )
    + links(
        {
            "x_embedder": "x_embedder",
            "cap_embedder.1": "time_caption_embed.caption_embedder.1",
            "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
            "final_layer.linear": "norm_out.linear_2",
            "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        }
    ),
    signature=("layers.0.adaLN_modulation.1", "time_caption_embed.caption_embedder.1"),
    core=NONE,
    core_names="z_image",
    ratios=tuple((f"{prefix}attention.qkv", 5 / 3) for prefix in NEXT_DIT),
    sizes=((2304, 26),),
)

FAMILIES = {family.name: family for family in (SD3, FLUX, FLUX2, QWEN_IMAGE, WAN, Z_IMAGE, LUMINA2)}


def candidates(modules: Mapping[str, Size | None]) -> list[Family]:
    """List the families that have all modules (rows, columns); sizes decide where names do not."""
    fitting = [family for family in FAMILIES.values() if family.fits(modules)]
    if len(fitting) < 2 or not modules:
        return fitting
    sized = [family for family in fitting if published_size(family, modules)[1]]
    return sized if len(sized) == 1 else fitting


def published_size(family: Family, modules: Mapping[str, Size | None]) -> Size:
    """Return width and number of blocks of the published model that has modules of these sizes, or 0, 0."""
    numbers = [
        int(number)
        for number in (template(module)[1] for module in modules if not module.startswith("single_"))
        if number
    ]
    widths = {side for shape in modules.values() if shape for side in shape}
    blocks = max(numbers, default=-1) + 1
    return next(
        ((width, count) for width, count in family.sizes if width in widths and count == blocks), (0, 0)
    )


def family_of_model(modules: Iterable[str]) -> tuple[Family, str] | None:
    """Say by its signature which family a whole model is, and by which names."""
    names = set(modules)
    for family in FAMILIES.values():
        # Diffusers' first: Z-Image's native one has the same name there.
        for naming, module in reversed(list(zip(NAMINGS, family.signature, strict=True))):
            if module in names:
                return family, naming
    return None
