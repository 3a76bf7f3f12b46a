"""What the workflows are made of: the model families with the settings that suit them, and the pieces that
several graphs have.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from workflow_graph import Fold, Graph, Node, Socket

ROOT = Path(__file__).resolve().parent.parent
STEP = 360  # from one column of a folded graph to the next
HUB = "https://huggingface.co/Comfy-Org"


def lines_of(file: str, first: int, count: int) -> str:
    """Take some prompts of a file."""
    prompts = (
        line
        for line in (ROOT / "prompts" / file).read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    )
    return "\n".join(islice(prompts, first, first + count))


GET_REWARDS = (
    "First get both rewards, 6 GB: *python fetch_rewards.py pickscore hpsv2.1* in the pack's folder."
)


@dataclass(frozen=True)
class Family:
    """A model and the settings that suit it: real ones a card of 24 GB, the tiny one any processor."""

    name: str
    label: str
    files: str  # what the note says about model files
    size: int
    num_steps: int
    cfg: float
    branch_steps: str
    group_size: int
    slots: int
    micro_batch: int
    rank: int
    learning_rate: float
    steps: int
    prompts_per_step: int
    eval_every: int
    changes: str
    prompt: str
    train: str
    heldout: str
    rewards: tuple[tuple[str, float], tuple[str, float]]  # the judge of pictures that are only looked at
    target: str  # what is trained
    watch: str  # what only measures
    searched: str  # what a search looks for, and below it what only measures that
    unsearched: str
    search_images: int  # whose forwards a search may spend
    judge_at: str
    strength: float
    get_rewards: str = ""  # what the note says about reward models

    @property
    def forwards(self) -> int:
        """Return what one image takes: a forward per step, with guidance two."""
        return self.num_steps * (2 if self.cfg > 1 else 1)


TINY = Family(
    name="tiny",
    label="tiny demo",
    files="The model comes with the pack: no download, no GPU.",
    size=64,
    num_steps=8,
    cfg=1.0,
    branch_steps="0-3",
    group_size=8,
    slots=64,
    micro_batch=4,
    rank=16,
    learning_rate=1e-3,
    # Enough to see the held-out reward rise: half a minute to two on a processor.
    steps=120,
    prompts_per_step=2,
    eval_every=20,
    changes="num_steps = 8\ngroup_size = 8\ngranularities = 2",
    prompt="a red circle above a blue square",
    train=lines_of("shapes_train.txt", 0, 24),
    heldout=lines_of("shapes_heldout.txt", 0, 12),
    rewards=(("agreement", 1.0), ("strict", 0.5)),
    target="agreement",
    watch="strict",
    searched="agreement",
    unsearched="strict",
    search_images=8,
    judge_at="3,4,5",
    strength=20.0,
)
SD35 = Family(
    name="sd35",
    label="SD3.5",
    files="Settings for a card of 24 GB.",
    size=512,
    num_steps=12,
    cfg=4.5,
    branch_steps="0,2,4",
    group_size=8,
    slots=8,
    micro_batch=1,
    rank=32,
    learning_rate=1e-4,
    steps=200,
    prompts_per_step=2,
    eval_every=10,
    changes="num_steps = 12\ngroup_size = 8\ngranularities = 2",
    prompt="a lighthouse on a cliff at sunset",
    train=lines_of("pictures.txt", 0, 32),
    heldout=lines_of("pictures.txt", 32, 8),
    rewards=(("colourfulness", 1.0), ("sharpness", 0.5)),
    target="colourfulness",
    watch="sharpness",
    searched="pickscore",
    unsearched="hpsv2.1",
    search_images=6,
    judge_at="4,6,8",
    strength=1.5,
    get_rewards=GET_REWARDS,
)
FLUX = Family(
    name="flux",
    label="FLUX.1",
    files="Settings for a card of 24 GB.",
    size=512,
    num_steps=12,
    cfg=1.0,
    branch_steps="0,2,4",
    group_size=6,
    slots=4,
    micro_batch=1,
    rank=16,
    learning_rate=1e-4,
    steps=200,
    prompts_per_step=2,
    eval_every=20,
    changes="num_steps = 12\ngroup_size = 6\ngranularities = 2\npick = random\npick_size = 3",
    prompt="a lighthouse on a cliff at sunset",
    train=lines_of("pictures.txt", 0, 32),
    heldout=lines_of("pictures.txt", 32, 8),
    rewards=(("colourfulness", 1.0), ("sharpness", 0.5)),
    target="colourfulness",
    watch="sharpness",
    searched="pickscore",
    unsearched="hpsv2.1",
    search_images=6,
    judge_at="4,6,8",
    strength=1.5,
    get_rewards=GET_REWARDS,
)
Z_IMAGE = Family(
    name="z_image",
    label="Z-Image",
    files="Settings for a card of 24 GB; needs a ComfyUI that knows Z-Image.",
    size=512,
    num_steps=16,
    cfg=4.0,
    branch_steps="0,2,4",
    group_size=6,
    slots=4,
    micro_batch=1,
    rank=32,
    learning_rate=1e-4,
    steps=200,
    prompts_per_step=2,
    eval_every=20,
    changes="num_steps = 16\ngroup_size = 6\ngranularities = 2\npick = random\npick_size = 3",
    prompt="a lighthouse on a cliff at sunset",
    train=lines_of("pictures.txt", 0, 32),
    heldout=lines_of("pictures.txt", 32, 8),
    rewards=(("colourfulness", 1.0), ("sharpness", 0.5)),
    target="colourfulness",
    watch="sharpness",
    searched="pickscore",
    unsearched="hpsv2.1",
    search_images=6,
    judge_at="6,8,10",
    strength=1.5,
    get_rewards=GET_REWARDS,
)
FAMILIES = (TINY, SD35, FLUX, Z_IMAGE)

FILES = {
    "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors": "stable-diffusion-3.5-fp8/resolve/main",
    "flux1-dev-fp8.safetensors": "flux1-dev/resolve/main",
    "z_image_bf16.safetensors": "z_image/resolve/main/split_files/diffusion_models",
    "qwen_3_4b.safetensors": "z_image_turbo/resolve/main/split_files/text_encoders",
    "ae.safetensors": "z_image_turbo/resolve/main/split_files/vae",
}
"""The files of ComfyUI's own templates, and where the page offers to fetch them from."""


NAMED = {
    "sd35": (("model", "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors", "checkpoints"),),
    "flux": (("model", "flux1-dev-fp8.safetensors", "checkpoints"),),
    "z_image": (
        ("model", "z_image_bf16.safetensors", "diffusion_models"),
        ("text_encoder_1", "qwen_3_4b.safetensors", "text_encoders"),
        ("vae", "ae.safetensors", "vae"),
    ),
}
"""Widgets of Submit Training, the files that they name, and the folders of those."""


@dataclass(frozen=True)
class Model:
    """What the loaders give, and their widgets that name files: node, widget, label."""

    model: Socket
    clip: Socket
    vae: Socket
    files: tuple[tuple[Node, str, str], ...]


def load(graph: Graph, family: Family) -> Model:
    """Add the family's usual loaders."""

    def loader(kind: str, widget: str, name: str, folder: str, **more: str) -> Node:
        models = {name: (f"{HUB}/{FILES[name]}/{name}", folder)}
        return graph.add(kind, {widget: name, **more}, models=models)

    if family is TINY:
        tiny = graph.add("G2RPO_TinyDemoLoader")
        return Model(tiny["MODEL"], tiny["CLIP"], tiny["VAE"], ())
    if family is Z_IMAGE:
        unet = loader("UNETLoader", "unet_name", "z_image_bf16.safetensors", "diffusion_models")
        clip = loader("CLIPLoader", "clip_name", "qwen_3_4b.safetensors", "text_encoders", type="lumina2")
        vae = loader("VAELoader", "vae_name", "ae.safetensors", "vae")
        files = ((unet, "unet_name", "model"), (clip, "clip_name", "text encoder"), (vae, "vae_name", "VAE"))
        return Model(unet["MODEL"], clip["CLIP"], vae["VAE"], files)
    name = "sd3.5_medium_incl_clips_t5xxlfp8scaled" if family is SD35 else "flux1-dev-fp8"
    loaded = loader("CheckpointLoaderSimple", "ckpt_name", f"{name}.safetensors", "checkpoints")
    return Model(loaded["MODEL"], loaded["CLIP"], loaded["VAE"], ((loaded, "ckpt_name", "checkpoint"),))


def load_one(graph: Graph, family: Family) -> Node:
    """Add one node that gives MODEL, CLIP and VAE."""
    if family is not Z_IMAGE:
        load(graph, family)
        return graph.columns[-1].nodes[-1]
    inner = graph.fold("Z-Image")
    inner.column(0, 300)
    found = load(inner, family)
    promote_files(inner, found)
    for name, socket in (("MODEL", found.model), ("CLIP", found.clip), ("VAE", found.vae)):
        inner.give(name, socket)
    return graph.folded(inner, {})


def promote_files(inner: Fold, model: Model) -> None:
    """Show the loaders' files on the folded node."""
    for node, widget, label in model.files:
        inner.promote(node, widget, label)


def write_prompt(inner: Fold, family: Family) -> Socket:
    """Add the field in which the prompt is written once, and show it on the folded node."""
    written = inner.add("PrimitiveStringMultiline", {"value": family.prompt})
    inner.promote(written, "value", "prompt")
    return written["STRING"]


def next_column(graph: Graph) -> None:
    """Begin the next column of a folded graph."""
    graph.column(graph.columns[-1].x + STEP if graph.columns else 0, 300)


def encode(graph: Graph, family: Family, clip: Socket, prompt: Socket) -> Socket:
    """Encode the prompt."""
    positive = graph.add("CLIPTextEncode", {"clip": clip, "text": prompt})["CONDITIONING"]
    if family is FLUX:
        next_column(graph)
        positive = graph.add("FluxGuidance", {"conditioning": positive, "guidance": 3.5})["CONDITIONING"]
    return positive


def against(graph: Graph, family: Family, clip: Socket, positive: Socket) -> Socket:
    """Add what core's sampler wants as negative: read with classifier-free guidance only."""
    if family.cfg > 1:
        return graph.add("CLIPTextEncode", {"clip": clip, "text": ""}, "Negative prompt")["CONDITIONING"]
    next_column(graph)
    return graph.add("ConditioningZeroOut", {"conditioning": positive})["CONDITIONING"]


def guide(graph: Graph, family: Family, model: Socket, positive: Socket, negative: Socket | None) -> Socket:
    """Add a guider: with classifier-free guidance where the family uses it."""
    if negative is not None:
        values = {"model": model, "positive": positive, "negative": negative, "cfg": family.cfg}
        return graph.add("CFGGuider", values)["GUIDER"]
    return graph.add("BasicGuider", {"model": model, "conditioning": positive})["GUIDER"]


def empty(graph: Graph, family: Family, count: int = 1) -> Node:
    """Add an empty latent."""
    size = {"width": family.size, "height": family.size, "batch_size": count}
    return graph.add("EmptySD3LatentImage", size)


def schedule(graph: Graph, family: Family, model: Socket) -> Socket:
    """Add the noise levels."""
    settings = {"scheduler": "simple", "steps": family.num_steps, "denoise": 1.0}
    return graph.add("BasicScheduler", {"model": model} | settings)["SIGMAS"]


def sample(graph: Graph, family: Family, wires: dict[str, Socket], seed: int) -> Node:
    """Add core's usual sampler; `wires` are model, positive, negative and latent_image."""
    settings = {"seed": seed, "steps": family.num_steps, "cfg": family.cfg, "denoise": 1.0}
    settings |= {"sampler_name": "euler", "scheduler": "simple"}
    return graph.add("KSampler", wires | settings)


def reward(graph: Graph, name: str, title: str = "") -> Socket:
    """Add a reward."""
    return graph.add("G2RPO_LoadReward", {"reward": name}, title)["reward"]


def training(family: Family, steps: int) -> dict[str, object]:
    """Return Train LoRA's widgets; the same settings but for `steps` go on with the same run."""
    return {
        "recipe": "g2rpo",
        "steps": steps,
        "prompts": family.train,
        "heldout_prompts": family.heldout,
        "negative": "",
        "guidance": family.cfg,
        "width": family.size,
        "height": family.size,
        "learning_rate": family.learning_rate,
        "rank": family.rank,
        "alpha": float(family.rank),
        "prompts_per_step": family.prompts_per_step,
        "slots": family.slots,
        "eval_every": family.eval_every,
        "run": f"{family.name}-train",
        "changes": family.changes,
    }


def submit(graph: Graph, family: Family, wires: dict[str, Socket]) -> Node:
    """Add Submit Training, whose model is that of the family's loaders, by name."""
    settings = training(family, family.steps) | {"run": f"{family.name}-worker"}
    models: dict[str, tuple[str, str]] = {}
    if family is FLUX:
        # There it is an input of the model, as FluxGuidance sets it.
        settings["guidance"] = 3.5
    for widget, name, folder in NAMED.get(family.name, ()):
        settings[widget] = f"{name} (checkpoint)" if folder == "checkpoints" else name
        models[name] = (f"{HUB}/{FILES[name]}/{name}", folder)
    return graph.add("G2RPO_SubmitTraining", wires | settings, models=models)


def named_files(family: Family) -> list[tuple[str, str]]:
    """List the widgets of Submit Training that name the family's files, with their labels."""
    labels = {"model": "model", "text_encoder_1": "text encoder", "vae": "VAE"}
    return [(widget, labels[widget]) for widget, *_ in NAMED.get(family.name, ())]


def branching(family: Family, strides: str) -> dict[str, object]:
    """Return Rollout's widgets."""
    settings = {"branch_steps": family.branch_steps, "group_size": family.group_size}
    return settings | {"granularities": strides, "slots": family.slots}
