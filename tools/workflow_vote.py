"""The graph in which a person is the judge: every run of it is one vote and one update."""

from __future__ import annotations

from workflow_graph import Graph
from workflow_parts import Family, draw, empty, encode, guide, load, preview, schedule, write_prompt

BRANCH_STEPS, GROUP_SIZE = "1,3", 6  # twelve pictures: what a person still compares
FASTER = 3  # times the learning rate, for a person makes few updates


def vote(graph: Graph, family: Family) -> None:
    """Vote on a group and train on the votes."""
    run = f"{family.name}-vote"
    graph.column(f"Model · {family.label}")
    graph.note(
        f"**Vote and train — {family.label}**\n\n{family.files}\n\n"
        "Press **Run**: twelve pictures are drawn and appear in *Vote*; nothing below it runs yet, and "
        "nothing waits in memory.\n\n"
        "Click the best picture first, then the next best, as far as you like. *Vote and go on* makes "
        "one update from your votes and "
        "draws the next group. Ten or twenty votes are a good beginning.\n\n"
        "**Look at** the fixed noise drawn with the updated LoRA, and at the heat map. Keys in *Vote*: "
        "digits choose, arrows move, "
        "Enter chooses, Backspace takes back.\n\n"
        f"The run {run} in output/g2rpo keeps the LoRA and all votes; another *run* name begins anew. "
        "Write another prompt between two votes as you like.\n\nFor a file: right-click *Save LoRA*, "
        "Mode, Always."
    )
    model = load(graph, family)
    settings = {
        "rank": family.rank,
        "alpha": float(family.rank),
        "learning_rate": FASTER * family.learning_rate,
        "run": run,
    }
    policy = graph.add("G2RPO_LoRAPolicy", {"model": model.model} | settings)
    graph.column("Prompt and noise")
    prompt = write_prompt(graph, family)
    conditioning = encode(graph, family, model.clip, prompt)
    noise = graph.add("RandomNoise", {"noise_seed": policy["step"]}, "Noise: another at every step")["NOISE"]
    sigmas, latent = schedule(graph, family, model.model), empty(graph, family)
    graph.column("Rollout")
    guider = guide(graph, family, policy["model"], conditioning)
    wires = {"guider": guider, "noise": noise, "sigmas": sigmas, "latent_image": latent}
    settings = {
        "branch_steps": BRANCH_STEPS,
        "group_size": GROUP_SIZE,
        "granularities": "1",
        "slots": family.slots,
    }
    tree = graph.add("G2RPO_Rollout", wires | settings, size=(320, 340))
    pictures = graph.add("VAEDecode", {"samples": tree["completions"], "vae": model.vae})["IMAGE"]
    graph.column("You are the judge")
    wires = {"rollout": tree["rollout"], "pictures": pictures, "prompt": prompt, "run": run}
    voted = graph.add("G2RPO_VoteRollout", wires, size=(560, 760))
    graph.column("Update")
    advantages = graph.add(
        "G2RPO_Advantages", {"rollout": tree["rollout"], "scores": voted["scores"]}, size=(400, 290)
    )
    wires = {"policy": policy["policy"], "advantages": advantages["advantages"]}
    updated = graph.add("G2RPO_UpdateLoRA", wires | {"micro_batch": family.micro_batch}, size=(400, 240))
    wires = {"lora": updated["lora"], "model": updated["model"], "name": f"{family.name}-vote"}
    graph.add("G2RPO_SaveLoRA", wires, mode=2, size=(400, 200))
    graph.column("The same noise after the update")
    images = draw(graph, family, model, updated["model"], conditioning, 1, latent)
    preview(graph, images, "Fixed noise, updated LoRA", (300, 300))
    graph.column("Results")
    preview(graph, advantages["heatmap"], "Heat map: step × granularity", (480, 340))
    preview(graph, advantages["ranked"], "Ranked, best first", (480, 560))
