"""The nine subjects that the workflows show, each for any family."""

from __future__ import annotations

from collections.abc import Callable

from workflow_folds import (
    draw_group,
    draw_images,
    judges,
    learn,
    model_and_lora,
    model_and_prompt,
    one_image,
    prompt_and_guidance,
    searched_and_measured,
    searches,
    submit_folded,
    train_folded,
    train_short,
)
from workflow_graph import MUTED, Graph, Node
from workflow_layout import GAP, HEIGHT, MAP, NOTE, TALL_NOTE, WIDTH
from workflow_parts import TINY, Family, branching, load_one, reward


def say(*lines: str) -> str:
    """Write a note, a paragraph per line."""
    return "\n\n".join(lines)


def pick(graph: Graph, family: Family) -> None:
    """Pick the best of some images; nothing is trained."""
    graph.column(0, 290, 0, HEIGHT)
    images = graph.folded(draw_images(graph, family), {}, grow=1)
    judge = graph.folded(judges(graph, family), {}, "judge")
    folder = {"folder": "(input)", "deep": True, "most": 64}
    graph.add("G2RPO_LoadImageFolder", folder, "Your own images", mode=MUTED, collapsed=True)
    graph.column(326, 280, 190)
    wires = {"images": images["images"], "reward": judge["reward"], "prompt": images["prompt"]}
    scored = graph.add("G2RPO_ScoreImages", wires)
    graph.column(642, 290, 0, HEIGHT)
    best = graph.add("G2RPO_SelectBest", {"images": images["images"], "scores": scored["scores"], "k": 2})
    graph.add("PreviewImage", {"images": scored["ranked"]}, "Ranked, best first", grow=1)
    graph.column(968, WIDTH - 968, 0, MAP)
    wires = {"images": best["image_list"], "scores": best["kept_scores"]}
    graph.add("G2RPO_SaveScoredImages", wires | {"prefix": f"best/{family.name}"}, grow=1)
    graph.column(326, 280, HEIGHT - TALL_NOTE - 40, HEIGHT)
    graph.note(
        say(
            f"**Pick the best of my images.** {family.files}",
            "Press **Run**: eight images are drawn and judged, and the best two are saved.",
            "**Look at** the ranked sheet: the best image comes first.",
            "*Judge* mixes two rewards; other ones are in its lists.",
            "*Your own images*, lower left: switch it on (Ctrl+M) and connect it instead of *Draw images*.",
        ),
        grow=1,
    )


def why(graph: Graph, family: Family) -> None:
    """Show one rollout and why its branches are pushed up or down."""
    graph.column(0, 226)
    begun = graph.folded(model_and_prompt(graph, family), {}, "sample")
    worth = explained(graph, family, begun, 0)
    graph.column(1057, WIDTH - 1057, 0, MAP)
    graph.add("PreviewImage", {"images": worth["heatmap"]}, "Heat map: step × granularity", grow=1)
    graph.add("PreviewImage", {"images": worth["ranked"]}, "Ranked, best first", grow=1)
    graph.column(533, 484, HEIGHT - NOTE, HEIGHT)
    graph.note(
        say(
            f"**Why is one better?** {family.files}",
            "Press **Run**: *Rollout* draws variants of one image, and a reward judges each.",
            "**Look at** the heat map: blue steps liked the winner, orange ones voted against it.",
            "*Advantages* says what training would push up or down, and why.",
            "Try another prompt, or another reward.",
        ),
        grow=1,
    )


def explained(graph: Graph, family: Family, begun: Node, bus: int) -> Node:
    """Add a rollout, its scores and what they are worth, below `bus` pixels of passing wires."""
    graph.column(274, 225, bus + 145)
    judge = reward(graph, family.target)
    wires = {name: begun[name] for name in ("guider", "noise", "sigmas")} | {"latent_image": begun["latent"]}
    tree = graph.add("G2RPO_Rollout", wires | branching(family, "1,2"))
    graph.column(533, 225, bus)
    wires = {"rollout": tree["rollout"], "vae": begun["vae"], "reward": judge, "prompt": begun["prompt"]}
    scored = graph.add("G2RPO_ScoreRollout", wires)
    graph.column(792, 225, bus + 300 + bus // 2)
    return graph.add("G2RPO_Advantages", {"rollout": tree["rollout"], "scores": scored["scores"]})


def train(graph: Graph, family: Family) -> None:
    """Train a LoRA in one block."""
    graph.column(0, 300)
    model = load_one(graph, family)
    judge = reward(graph, family.target, "Reward: what is trained")
    watch = reward(graph, family.watch, "Held-out reward: only measures")
    graph.column(348, 390, 0, HEIGHT - TALL_NOTE - GAP)
    wires = {"model": model["MODEL"], "clip": model["CLIP"], "vae": model["VAE"]}
    inner = train_folded(graph, family, "Train a LoRA (open it for all settings)")
    trained = graph.folded(inner, wires | {"reward": judge, "heldout_reward": watch}, "train", grow=1)
    graph.column(772, WIDTH - 772, 0, MAP)
    graph.add("G2RPO_RunMonitor", {"run_name": trained["run"]}, "Curve", grow=1)
    graph.column(348, 390, HEIGHT - TALL_NOTE, HEIGHT)
    graph.note(
        say(
            f"**Train a LoRA on a reward.** {family.files}",
            f"Press **Run**: {family.steps} steps. The price comes first; **Stop** keeps what is done.",
            "**Look at** the curve. Solid: trained prompts; dashed: prompts it never sees.",
            "Where only the solid line rises, the model games its judge.",
            "The LoRA lies in models/loras/g2rpo. More *steps* go on with the run.",
        ),
        grow=1,
    )


def vote(graph: Graph, family: Family) -> None:
    """Vote on a group and train on the votes."""
    graph.column(0, 290)
    begun = graph.folded(draw_group(graph, family), {}, "sample")
    bus = 44 + 20 * (len(begun.outputs) - 2)
    graph.column(326, 430, bus, HEIGHT)
    wires = {"rollout": begun["rollout"], "pictures": begun["pictures"], "prompt": begun["prompt"]}
    voted = graph.add("G2RPO_VoteRollout", wires | {"run": begun["run"]}, grow=1)
    graph.column(792, 240)
    inner = learn(graph, family)
    wires = {name: begun[name] for name, *_ in inner.inputs if name in begun.outputs}
    learnt = graph.folded(inner, wires | {"scores": voted["scores"]}, "train")
    graph.column(1068, WIDTH - 1068, 0, 560)
    graph.add("PreviewImage", {"images": learnt["images"]}, "The same noise, updated LoRA", grow=1)
    wires = {"lora": learnt["lora"], "name": f"{family.name}-vote"}
    graph.add("G2RPO_SaveLoRA", wires, "Save LoRA", mode=MUTED)
    graph.column(0, 290, 500, HEIGHT)
    graph.note(
        say(
            f"**Train on my votes.** {family.files}",
            "Press **Run**: twelve images appear in *Vote*. Nothing below it runs yet.",
            "Click the best one, then the next best; *Vote and go on* makes an update and draws new ones.",
            "**Look at** the picture on the right: the same noise, drawn with your LoRA. Vote ten times.",
            "The run keeps LoRA and votes: come back tomorrow.",
        ),
        grow=1,
    )


def again(graph: Graph, family: Family) -> None:
    """Train a LoRA of its own on all votes that a run has kept."""
    graph.column(0, 225)
    model = load_one(graph, family)
    graph.column(246, 225, 330)
    settings = {"rank": family.rank, "alpha": float(family.rank), "run": f"{family.name}-again"}
    settings |= {"learning_rate": family.learning_rate}
    learner = graph.add("G2RPO_LoRAPolicy", {"model": model["MODEL"]} | settings)
    graph.column(492, 290, 120, 700)
    wires = {"policy": learner["policy"], "clip": model["CLIP"], "run": f"{family.name}-vote"}
    settings = {"epochs": 8, "guidance": family.cfg, "micro_batch": family.micro_batch}
    learnt = graph.add("G2RPO_UpdateFromVotes", wires | settings, grow=1)
    graph.column(818, 236, 0)
    wires = {"model": learnt["model"], "clip": model["CLIP"], "vae": model["VAE"]}
    image = graph.folded(one_image(graph, family), wires, "look")
    wires = {"lora": learnt["lora"], "name": f"{family.name}-again"}
    graph.add("G2RPO_SaveLoRA", wires, "Save LoRA", mode=MUTED)
    graph.column(1090, WIDTH - 1090, 0, 420)
    graph.add("PreviewImage", {"images": image["images"]}, "LoRA of all votes", grow=1)
    graph.column(0, 456, HEIGHT - NOTE - 60, HEIGHT)
    graph.note(
        say(
            f"**Train again on kept votes.** {family.files}",
            "Vote first, in the template *Train on my votes*: its run keeps what you clicked.",
            "Press **Run**: a LoRA of its own learns from all those votes, eight times over.",
            "**Look at** the image on the right, and at other prompts: too many *epochs* memorise.",
            "*run* may name another run with votes, such as a friend's.",
        ),
        grow=1,
    )


def loop(graph: Graph, family: Family) -> None:
    """Make the graph the loop: every run of it is an update."""
    run = f"{family.name}-loop"
    graph.column(0, 226)
    begun = graph.folded(model_and_lora(graph, family, run), {}, "sample")
    worth = explained(graph, family, begun, 50)
    graph.column(1057, WIDTH - 1057, 0, MAP)
    wires = {"policy": begun["policy"], "advantages": worth["advantages"]}
    graph.add("G2RPO_UpdateLoRA", wires | {"micro_batch": family.micro_batch})
    graph.add("PreviewImage", {"images": worth["ranked"]}, "Ranked, best first", grow=1)
    graph.column(0, 226, HEIGHT - TALL_NOTE - 60, HEIGHT)
    graph.note(
        say(
            f"**The loop as a graph.** {family.files}",
            "Press **Run**: one update. Set the batch count beside Run to 20 for twenty.",
            f"**Look at** the ranked sheet. The run {run} keeps the LoRA, after a restart too.",
            "Change reward, prompt or branch steps between two updates as you like.",
            "*Run Monitor* shows the curve of a run.",
        ),
        grow=1,
    )


def compare(graph: Graph, family: Family) -> None:
    """Train a LoRA, or take that of the finished run, and compare."""
    graph.column(0, 255)
    model = load_one(graph, family)
    judge = reward(graph, family.target)
    graph.column(291, 250, 300)
    wires = {"model": model["MODEL"], "clip": model["CLIP"], "vae": model["VAE"], "reward": judge}
    inner = train_short(graph, family)
    trained = graph.folded(inner, wires, "train")
    graph.column(577, 330, 0, HEIGHT)
    pair = {"base": model["MODEL"], "tuned": trained["model"], "clip": model["CLIP"], "vae": model["VAE"]}
    settings = {"prompts": family.heldout, "negative": "", "guidance": family.cfg}
    settings |= {"num_steps": family.num_steps, "width": family.size, "height": family.size}
    settings |= {"slots": family.slots, "noises": 2 if family is TINY else 1}
    compared = graph.add("G2RPO_CompareLoRA", pair | {"reward": judge} | settings, grow=1)
    graph.column(943, WIDTH - 943, 0, MAP)
    graph.add("PreviewImage", {"images": compared["sheet"]}, "Before and after", grow=1)
    graph.column(0, 541, HEIGHT - NOTE, HEIGHT)
    graph.note(
        say(
            f"**Before and after.** {family.files}",
            f"Press **Run**: it finishes the run {family.name}-train, then draws without and with its LoRA.",
            "**Look at** *Compare LoRA*: every score's change, and whether it is more than chance.",
            "The LoRA lies in models/loras/g2rpo; any LoRA loader finds it after a press of **R**.",
            "A LoRA you have: put *Load LoRA* in the place of *Train*.",
        ),
        grow=1,
    )


def search(graph: Graph, family: Family) -> None:
    """Compare three searches at one budget with an ordinary image."""
    price = "two per step with guidance" if family.cfg > 1 else "one per step"
    price += "; guidance above 1 doubles that" if family is TINY else ""
    graph.column(0, 290, 0, 270)
    graph.note(
        say(
            f"**Better images without training.** {family.files} {family.get_rewards}".rstrip(),
            f"Press **Run**: three searches, each at the price of {family.search_images} images, look for "
            "one that the *searched* reward likes.",
            "**Look at** the table. Where the reward that is *only measured* falls, the search games its "
            "reward.",
            "**Change first** prompt and *budget*. Try more *guidance* before you search: that may do.",
            f"Budgets count forwards of the model: an image takes {family.forwards}, {price}.",
        ),
        grow=1,
    )
    graph.column(0, 290, 294)
    begun = graph.folded(prompt_and_guidance(graph, family), {}, "sample")
    rewards = graph.folded(searched_and_measured(graph, family), {}, "judge")
    graph.column(356, 234, 60, 600)
    inner = searches(graph, family)
    wires = {name: begun[name] for name in begun.outputs} | rewards.outputs
    # Older pages show the picture of the running search on it.
    found = graph.folded(inner, wires, "sample", grow=1)
    graph.column(630, WIDTH - 630, 0, 300)
    title = "Ordinary, best of n, coarse first, particles"
    shown = found.outputs.get("shown", found["images"])
    graph.add("PreviewImage", {"images": shown}, title, grow=1)
    graph.column(630, 464, 420, HEIGHT)
    wires = {name: found[name] for name in ("images", "names", "prompt", "reward")}
    graph.add("G2RPO_ScoreImages", wires, grow=1)


def beside(graph: Graph, family: Family) -> None:
    """Hand a training over to a worker, and look at what becomes of it."""
    graph.column(0, 300)
    judge = reward(graph, family.target, "Reward: what is trained")
    watch = reward(graph, family.watch, "Held-out reward: only measures")
    graph.column(348, 390, 0, HEIGHT - TALL_NOTE - GAP)
    inner = submit_folded(graph, family, "Submit a training (open it for all settings)")
    handed = graph.folded(inner, {"reward": judge, "heldout_reward": watch}, "train", grow=1)
    graph.column(762, 290, 0, MAP)
    result = graph.add("G2RPO_TrainingResult", {"run": handed["run"]}, "Training Result", grow=1)
    graph.column(1122, WIDTH - 1122, 0, MAP)
    graph.add("PreviewImage", {"images": result["samples"]}, "Newest samples", grow=1)
    wires = {"lora": result["lora"], "name": f"{family.name}-worker"}
    graph.add("G2RPO_SaveLoRA", wires, "Save LoRA", mode=MUTED)
    graph.column(348, 390, HEIGHT - TALL_NOTE, HEIGHT)
    graph.note(
        say(
            f"**Train beside ComfyUI.** {family.files}",
            "First, on a command line: *g2rpo worker --comfyui FOLDER*, with ComfyUI's own folder.",
            "Press **Run**: the training is handed over, and ComfyUI is free. Run again to look.",
            "**Look at** the curve, which moves by itself. *stop* ends the training.",
            "The LoRA lies in models/loras/g2rpo at the end.",
        ),
        grow=1,
    )


GRAPHS: dict[str, Callable[[Graph, Family], None]] = {
    "Pick the best of my images": pick,
    "Why is one better": why,
    "Train a LoRA on a reward": train,
    "Train on my votes": vote,
    "Train again on kept votes": again,
    "The loop as a graph": loop,
    "Before and after": compare,
    "Better images without training": search,
    "Train beside ComfyUI": beside,
}
