"""What the workflows are made of: the three model families with the settings that suit them, and the
pieces that every graph has.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from workflow_graph import MUTED, Graph, Node, Socket

ROOT = Path(__file__).resolve().parent.parent


def lines_of(file: str, first: int, count: int) -> str:
    """Take some prompts of a file."""
    prompts = (
        line
        for line in (ROOT / "prompts" / file).read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    )
    return "\n".join(islice(prompts, first, first + count))


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
    watch: tuple[str, str]  # what only measures
    price: str  # what the note says about time


TINY = Family(
    name="tiny",
    label="Tiny Demo",
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
    steps=20,
    prompts_per_step=2,
    eval_every=5,
    changes="num_steps = 8\ngroup_size = 8\ngranularities = 2",
    prompt="a red circle above a blue square",
    train=lines_of("shapes_train.txt", 0, 24),
    heldout=lines_of("shapes_heldout.txt", 0, 12),
    rewards=(("agreement", 1.0), ("strict", 0.5)),
    target="agreement",
    watch=("strict", "colourfulness"),
    price="a minute or two on a processor",
)
SD35 = Family(
    name="sd35",
    label="SD3.5 medium",
    files=(
        "Files: checkpoints/sd3.5_medium · text_encoders/clip_l, clip_g, t5xxl_fp8_e4m3fn_scaled. Settings "
        "for a card of 24 GB."
    ),
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
    rewards=(("colourfulness", 1.0), ("sharpness", 0.05)),
    target="colourfulness",
    watch=("sharpness", "jpeg"),
    price="about 1000 forwards of one picture each (guidance counts double; guidance 1 halves it)",
)
FLUX = Family(
    name="flux",
    label="FLUX.1-dev",
    files="Files: diffusion_models/flux1-dev (loaded as fp8) · text_encoders/clip_l, t5xxl_fp8_e4m3fn_scaled "
    "· vae/ae. Settings for a card of 24 GB.",
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
    rewards=(("colourfulness", 1.0), ("sharpness", 0.05)),
    target="colourfulness",
    watch=("sharpness", "jpeg"),
    price="about 190 forwards of one picture each",
)
FAMILIES = (TINY, SD35, FLUX)


@dataclass(frozen=True)
class Model:
    """What the loaders give."""

    model: Socket
    clip: Socket
    vae: Socket


def load(graph: Graph, family: Family) -> Model:
    """Add the family's usual loaders."""
    if family is TINY:
        tiny = graph.add("G2RPO_TinyDemoLoader")
        return Model(tiny["MODEL"], tiny["CLIP"], tiny["VAE"])
    if family is SD35:
        checkpoint = graph.add("CheckpointLoaderSimple", {"ckpt_name": "sd3.5_medium.safetensors"})
        names = ("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors")
        clip = graph.add("TripleCLIPLoader", {f"clip_name{i}": name for i, name in enumerate(names, 1)})
        return Model(checkpoint["MODEL"], clip["CLIP"], checkpoint["VAE"])
    unet = graph.add("UNETLoader", {"unet_name": "flux1-dev.safetensors", "weight_dtype": "fp8_e4m3fn"})
    names = {
        "clip_name1": "clip_l.safetensors",
        "clip_name2": "t5xxl_fp8_e4m3fn_scaled.safetensors",
        "type": "flux",
        "device": "default",
    }
    clip = graph.add("DualCLIPLoader", names)
    return Model(unet["MODEL"], clip["CLIP"], graph.add("VAELoader", {"vae_name": "ae.safetensors"})["VAE"])


def begin(graph: Graph, family: Family, title: str, text: str) -> Model:
    """Begin a graph with its note and the model."""
    graph.column(f"Model · {family.label}")
    graph.note(f"**{title} — {family.label}**\n\n{family.files}\n\n{text}")
    return load(graph, family)


def write_prompt(graph: Graph, family: Family) -> Socket:
    """Add the field in which the prompt is written once."""
    return graph.add("PrimitiveStringMultiline", {"value": family.prompt}, "Prompt", lines=3)["STRING"]


def encode(graph: Graph, family: Family, clip: Socket, prompt: Socket) -> tuple[Socket, Socket]:
    """Encode the prompt; return positive and negative conditioning."""
    positive = graph.add("CLIPTextEncode", {"clip": clip, "text": prompt}, lines=2)["CONDITIONING"]
    if family is FLUX:
        positive = graph.add("FluxGuidance", {"conditioning": positive, "guidance": 3.5})["CONDITIONING"]
    if family.cfg > 1:
        return positive, graph.add("CLIPTextEncode", {"clip": clip, "text": ""}, "Negative prompt", lines=2)[
            "CONDITIONING"
        ]
    return positive, graph.add("ConditioningZeroOut", {"conditioning": positive})["CONDITIONING"]


def guide(
    graph: Graph, family: Family, model: Socket, conditioning: tuple[Socket, Socket], title: str = ""
) -> Socket:
    """Add a guider: with classifier-free guidance where the family uses it."""
    positive, negative = conditioning
    if family.cfg > 1:
        values = {"model": model, "positive": positive, "negative": negative, "cfg": family.cfg}
        return graph.add("CFGGuider", values, title)["GUIDER"]
    return graph.add("BasicGuider", {"model": model, "conditioning": positive}, title)["GUIDER"]


def conditions(graph: Graph, family: Family, clip: Socket, prompt: Socket) -> tuple[Socket, Socket]:
    """Encode the prompt for guide(): without classifier-free guidance nothing negative is needed."""
    if family.cfg > 1:
        return encode(graph, family, clip, prompt)
    positive = graph.add("CLIPTextEncode", {"clip": clip, "text": prompt}, lines=2)["CONDITIONING"]
    if family is FLUX:
        positive = graph.add("FluxGuidance", {"conditioning": positive, "guidance": 3.5})["CONDITIONING"]
    return positive, positive


def empty(graph: Graph, family: Family, count: int = 1) -> Socket:
    """Add an empty latent."""
    return graph.add(
        "EmptySD3LatentImage", {"width": family.size, "height": family.size, "batch_size": count}
    )["LATENT"]


def schedule(graph: Graph, family: Family, model: Socket) -> Socket:
    """Add the noise levels."""
    return graph.add(
        "BasicScheduler", {"model": model, "scheduler": "simple", "steps": family.num_steps, "denoise": 1.0}
    )["SIGMAS"]


def draw(
    graph: Graph,
    family: Family,
    model: Model,
    tuned: Socket,
    conditioning: tuple[Socket, Socket],
    seed: int,
    latent: Socket,
    denoise: float = 1.0,
) -> Socket:
    """Add core's usual sampler and the decoder; return the pictures."""
    wires = {"model": tuned, "positive": conditioning[0], "negative": conditioning[1], "latent_image": latent}
    settings = {"seed": seed, "steps": family.num_steps, "cfg": family.cfg, "denoise": denoise}
    settings |= {"sampler_name": "euler", "scheduler": "simple"}
    latents = graph.add("KSampler", wires | settings)["LATENT"]
    return graph.add("VAEDecode", {"samples": latents, "vae": model.vae})["IMAGE"]


def preview(graph: Graph, images: Socket, title: str, size: tuple[int, int] = (400, 340)) -> None:
    """Add a preview of pictures."""
    graph.add("PreviewImage", {"images": images}, title, size=size)


def reward(graph: Graph, name: str, title: str = "") -> Socket:
    """Add a reward."""
    return graph.add("G2RPO_LoadReward", {"reward": name}, title, size=(300, 240))["reward"]


def mixed(graph: Graph, parts: tuple[tuple[str, float], tuple[str, float]], title: str = "") -> Socket:
    """Add two rewards and their mix."""
    sockets = [reward(graph, name) for name, _ in parts]
    values = {f"reward_{i}": socket for i, socket in enumerate(sockets, 1)} | {
        f"weight_{i}": part[1] for i, part in enumerate(parts, 1)
    }
    return graph.add("G2RPO_MixRewards", values, title, size=(300, 620))["reward"]


def rollout(
    graph: Graph, family: Family, guider: Socket, noise: Socket, sigmas: Socket, latent: Socket, strides: str
) -> Node:
    """Add the rollout."""
    wires = {"guider": guider, "noise": noise, "sigmas": sigmas, "latent_image": latent}
    settings = {
        "branch_steps": family.branch_steps,
        "group_size": family.group_size,
        "granularities": strides,
        "slots": family.slots,
    }
    return graph.add("G2RPO_Rollout", wires | settings, size=(320, 340))


def train(
    graph: Graph, family: Family, model: Model, steps: int, judge: Socket, heldout: Socket | None
) -> Node:
    """Add Train LoRA; the same settings but for `steps` go on with the same run."""
    wires = {"model": model.model, "clip": model.clip, "vae": model.vae, "reward": judge}
    settings = {
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
    wires |= {"heldout_reward": heldout} if heldout else {}
    return graph.add("G2RPO_TrainLoRA", wires | settings, size=(460, 1400))


def policy(graph: Graph, family: Family, model: Model, rate: float, run: str) -> Node:
    """Add the LoRA that a graph trains by itself."""
    settings = {"rank": family.rank, "alpha": float(family.rank), "learning_rate": rate, "run": run}
    return graph.add("G2RPO_LoRAPolicy", {"model": model.model} | settings)


def judged(graph: Graph, tree: Node, model: Model, judge: Socket, prompt: Socket, lines: int) -> Node:
    """Add the scores of a rollout."""
    wires = {"rollout": tree["rollout"], "vae": model.vae, "reward": judge, "prompt": prompt}
    return graph.add("G2RPO_ScoreRollout", wires, lines=lines)


def advantages(graph: Graph, tree: Node, scores: Socket, title: str = "", per_branch: bool = False) -> Node:
    """Add what scores are worth to the learner."""
    values = {"rollout": tree["rollout"], "scores": scores} | ({"per_branch": True} if per_branch else {})
    return graph.add("G2RPO_Advantages", values, title, size=(400, 290))


def update(graph: Graph, family: Family, learner: Node, worth: Node, name: str) -> Node:
    """Add one update of the LoRA, and its file, which is only written on demand."""
    wires = {"policy": learner["policy"], "advantages": worth["advantages"]}
    updated = graph.add("G2RPO_UpdateLoRA", wires | {"micro_batch": family.micro_batch}, size=(400, 240))
    wires = {"lora": updated["lora"], "model": updated["model"], "name": name}
    graph.add("G2RPO_SaveLoRA", wires, mode=MUTED, size=(400, 200))
    return updated
