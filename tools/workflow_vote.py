"""The graph in which a person is the judge: every run of it is one vote and one update."""

from __future__ import annotations

from workflow_graph import Graph
from workflow_parts import (
    Family,
    advantages,
    begin,
    draw,
    empty,
    encode,
    guide,
    policy,
    preview,
    schedule,
    update,
    write_prompt,
)

BRANCH_STEPS, GROUP_SIZE = "1,3", 6  # twelve pictures: what a person still compares
FASTER = 3  # times the learning rate, for a person makes few updates


def vote(graph: Graph, family: Family) -> None:
    """Vote on a group and train on the votes."""
    run = f"{family.name}-vote"
    text = (
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
    model = begin(graph, family, "Vote and train", text)
    learner = policy(graph, family, model, FASTER * family.learning_rate, run)
    graph.column("Prompt and noise")
    prompt = write_prompt(graph, family)
    conditioning = encode(graph, family, model.clip, prompt)
    noise = graph.add("RandomNoise", {"noise_seed": learner["step"]}, "Noise: another at every step")["NOISE"]
    sigmas, latent = schedule(graph, family, model.model), empty(graph, family)
    graph.column("Rollout")
    guider = guide(graph, family, learner["model"], conditioning)
    wires = {"guider": guider, "noise": noise, "sigmas": sigmas, "latent_image": latent}
    settings = {"branch_steps": BRANCH_STEPS, "group_size": GROUP_SIZE, "granularities": "1"}
    settings |= {"slots": family.slots}
    tree = graph.add("G2RPO_Rollout", wires | settings, size=(320, 340))
    pictures = graph.add("VAEDecode", {"samples": tree["completions"], "vae": model.vae})["IMAGE"]
    graph.column("You are the judge")
    wires = {"rollout": tree["rollout"], "pictures": pictures, "prompt": prompt, "run": run}
    voted = graph.add("G2RPO_VoteRollout", wires, size=(560, 760))
    graph.column("Update")
    worth = advantages(graph, tree, voted["scores"])
    updated = update(graph, family, learner, worth, run)
    graph.column("The same noise after the update")
    images = draw(graph, family, model, updated["model"], conditioning, 1, latent)
    preview(graph, images, "Fixed noise, updated LoRA", (300, 300))
    graph.column("Results")
    preview(graph, worth["heatmap"], "Heat map: step × granularity", (480, 340))
    preview(graph, worth["ranked"], "Ranked, best first", (480, 560))
