"""Make workflows/*.json: `python tools/make_workflows.py` asks the first ComfyUI that it finds for its nodes
and writes the graphs.

With `--pictures` it also makes the .jpg files: the tiny graphs are run and one result is kept, of the others
the page is photographed (needs Chromium and playwright). Every graph exists for three models: the tiny one
that comes with the pack, SD3.5 medium and FLUX.1-dev.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from workflow_graph import BYPASSED, Graph
from workflow_parts import (
    FAMILIES,
    ROOT,
    TINY,
    Family,
    advantages,
    begin,
    conditions,
    draw,
    empty,
    encode,
    guide,
    judged,
    mixed,
    policy,
    preview,
    reward,
    rollout,
    schedule,
    train,
    update,
    write_prompt,
)
from workflow_rank import rank
from workflow_vote import vote

WORKFLOWS = ROOT / "workflows"


def score(graph: Graph, family: Family) -> None:
    """Score pictures and keep the best; nothing is trained."""
    text = (
        "Press **Run**: a batch of pictures is drawn, *Score Images* judges each of them and *Select "
        "Best* keeps two.\n\n"
        "**Look at** the ranked sheet and at the table in *Score Images*: every reward's own score, "
        "best first.\n\n"
        "**Your own pictures:** add *Load Image* (several: *Batch Images*) and connect it to *images* "
        "of both *Score Images* and "
        "*Select Best* instead of *VAE Decode*. Rewards that read the prompt want one that fits."
    )
    model = begin(graph, family, "Score pictures and keep the best", text)
    graph.column("Pictures")
    prompt = write_prompt(graph, family)
    conditioning = encode(graph, family, model.clip, prompt)
    images = draw(graph, family, model, model.model, conditioning, 7, empty(graph, family, 8))
    graph.column("Judge")
    judge = mixed(graph, family.rewards)
    graph.column("Scores")
    wires = {"images": images, "reward": judge, "prompt": prompt}
    scored = graph.add("G2RPO_ScoreImages", wires, size=(400, 420))
    best = graph.add("G2RPO_SelectBest", {"images": images, "scores": scored["scores"], "k": 2})
    graph.column("Results")
    preview(graph, scored["ranked"], "Ranked, best first", (480, 420))
    saved = {"images": best["images"], "filename_prefix": f"g2rpo_best_{family.name}"}
    graph.add("SaveImage", saved, "The best two", size=(480, 360))


def look(graph: Graph, family: Family) -> None:
    """Look at one rollout."""
    text = (
        "Press **Run**. *Rollout* draws the deterministic picture, the anchor. At each branch step a "
        "group of branches leaves it "
        "by one stochastic step and is completed without noise, once per granularity.\n\n"
        "**Look at** the heat map (blue: this granularity likes the step's winner too, orange: it was "
        "outvoted, hatched: all the same) "
        "and at the ranked sheet: score and advantage of every branch, framed by whether training "
        "would push it up or down.\n\n"
        "*Singular SDE Sampler* draws one of these very branches in an ordinary graph. In the lower "
        "half *Score Images* and "
        "*Scores From Values* are the judge: any graph can be, and so can you: disconnect *values* and "
        "type your own votes."
    )
    model = begin(graph, family, "Look at one rollout", text)
    graph.column("Prompt and noise")
    prompt = write_prompt(graph, family)
    conditioning = conditions(graph, family, model.clip, prompt)
    noise = graph.add("RandomNoise", {"noise_seed": 5})["NOISE"]
    sigmas, latent = schedule(graph, family, model.model), empty(graph, family)
    graph.column("Rollout")
    guider = guide(graph, family, model.model, conditioning)
    tree = rollout(graph, family, guider, noise, sigmas, latent, "1,2")
    settings = {"branch_step": int(family.branch_steps[0]), "branch": 3}
    sampler = graph.add("G2RPO_SingularSDESampler", settings, "Branch 3 by itself")["SAMPLER"]
    wires = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": latent}
    single = graph.add("SamplerCustomAdvanced", wires)["output"]
    graph.column("Anchor and a branch")
    for latents, title in ((tree["anchor"], "Anchor"), (single, "Branch 3")):
        images = graph.add("VAEDecode", {"samples": latents, "vae": model.vae})["IMAGE"]
        preview(graph, images, title, (300, 300))
    graph.column("Judge")
    judge = reward(graph, family.rewards[0][0])
    scored = judged(graph, tree, model, judge, prompt, lines=10)
    other = reward(graph, family.rewards[1][0], "Another judge")
    pictures = scored["pictures"]
    wires = {"images": pictures, "reward": other, "prompt": prompt}
    values = graph.add("G2RPO_ScoreImages", wires, "Any graph can judge", lines=10)["scores"]
    graph.column("Why branches are pushed")
    shown = advantages(graph, tree, scored["scores"])
    wires = {"rollout": tree["rollout"], "values": values, "pictures": pictures, "votes": ""}
    values = graph.add("G2RPO_ScoresFromValues", wires, lines=3)["scores"]
    others = advantages(graph, tree, values, "Advantages (the other judge)", per_branch=True)
    graph.column("Results")
    preview(graph, shown["heatmap"], "Heat map: step × granularity", (480, 340))
    preview(graph, shown["ranked"], "Ranked, best first", (480, 480))
    preview(graph, others["heatmap"], "Heat map of the other judge, a row per branch", (480, 380))


def train_lora(graph: Graph, family: Family) -> None:
    """Train a LoRA in one block."""
    text = (
        f"Press **Run**: {family.steps} steps, {family.price}. The log says the price before anything "
        "runs.\n\n"
        "**Look at** the curve in *Train LoRA* while it runs. Solid: the reward on training prompts; "
        "dashed: on prompts it is never "
        "trained on. Where only the solid line rises, or the rewards that only measure fall, the model "
        "games its judge.\n\n"
        "**Stop** whenever you like: what is finished is kept. **Run** again goes on; more *steps* "
        "continue a finished run.\n\n"
        f"The LoRA lies in models/loras/g2rpo, the run in output/g2rpo/{family.name}-train."
        + (
            ""
            if family is TINY
            else "\n\nOut of memory? Lower *slots*. The rewards are examples: put in what you want more of."
        )
    )
    model = begin(graph, family, "Train a LoRA in one block", text)
    graph.column("Judges")
    judge = reward(graph, family.target, "Reward: what is trained")
    watch = mixed(graph, tuple((name, 1.0) for name in family.watch), "Held-out rewards: only measure")
    graph.column("Train")
    trained = train(graph, family, model, family.steps, judge, watch)
    graph.column("Results")
    preview(graph, trained["curve"], "Curve", (480, 400))
    loss = {"loss": trained["loss"], "filename_prefix": "loss_graph"}
    graph.add("LossGraphNode", loss, "Minus the reward", size=(480, 420))


def loop(graph: Graph, family: Family) -> None:
    """Make the graph the loop."""
    run = f"{family.name}-loop"
    text = (
        "Every press of **Run** is one update: rollout, scores, advantages, one step of the optimizer. "
        "Set the batch count beside the Run button to 20 for 20 updates.\n\n"
        f"*LoRA Policy* keeps the LoRA in the run {run} and goes on from there, after a restart too; "
        "with a blank *run* "
        "every press starts anew. Its *step* output feeds the noise seed: another start noise at every "
        "update.\n\n"
        "**Look at** the heat map, the ranked sheet, the fixed noise drawn with the updated LoRA, and "
        "the curve in *Run Monitor*. "
        "Change judge, prompt or branch steps between two presses as you like.\n\n"
        "For a file: right-click *Save LoRA*, Mode, Always."
    )
    model = begin(graph, family, "The graph is the loop", text)
    learner = policy(graph, family, model, family.learning_rate, run)
    graph.column("Prompt and noise")
    prompt = write_prompt(graph, family)
    conditioning = encode(graph, family, model.clip, prompt)
    noise = graph.add("RandomNoise", {"noise_seed": learner["step"]}, "Noise: another at every step")["NOISE"]
    sigmas, latent = schedule(graph, family, model.model), empty(graph, family)
    graph.column("Rollout and scores")
    guider = guide(graph, family, learner["model"], conditioning)
    tree = rollout(graph, family, guider, noise, sigmas, latent, "2")
    judge = reward(graph, family.target)
    scored = judged(graph, tree, model, judge, prompt, lines=8)
    graph.column("Update")
    worth = advantages(graph, tree, scored["scores"])
    updated = update(graph, family, learner, worth, run)
    graph.column("The same noise after the update")
    images = draw(graph, family, model, updated["model"], conditioning, 1, latent)
    preview(graph, images, "Fixed noise, updated LoRA", (300, 300))
    graph.column("The run so far")
    graph.add("G2RPO_RunMonitor", {"run": "newest"}, size=(400, 560))
    graph.column("Results")
    preview(graph, worth["heatmap"], "Heat map: step × granularity", (480, 340))
    preview(graph, worth["ranked"], "Ranked, best first", (480, 560))


def resume(graph: Graph, family: Family) -> None:
    """Go on with a run and compare."""
    steps, name = family.steps * 3 // 2, f"{family.name}-lora"
    text = (
        f"The same run as in g2rpo_train_lora_{family.name}, with {steps} steps instead of "
        f"{family.steps}: press **Run** and it goes on "
        "where that one ended: LoRA, optimizer, random draws and curve. Run that one first. Only "
        "*steps* and *eval_every* may differ.\n\n"
        "**Look at** *Compare LoRA*: the same prompts and noises without and with the LoRA, every "
        "score's change, "
        "and whether it is more than chance. *Run Monitor* shows the curve of any run of the list.\n\n"
        f"*Save LoRA* writes g2rpo/{name}. Then press **R**, choose it in *LoraLoaderModelOnly* and "
        "switch that on with Ctrl+B: "
        "the file works in every graph."
    )
    model = begin(graph, family, "Resume and compare", text)
    graph.column("Judges")
    judge = reward(graph, family.target, "Reward: what is trained")
    watch = mixed(graph, tuple((each, 1.0) for each in family.watch), "Held-out rewards: only measure")
    monitor = graph.add("G2RPO_RunMonitor", {"run": "newest"}, size=(400, 620))
    graph.column("Go on training")
    trained = train(graph, family, model, steps, judge, watch)
    graph.column("Use and keep the LoRA")
    wires = {"model": model.model, "lora": trained["lora"], "strength_model": 1.0}
    tuned = graph.add("LoraModelLoader", wires, "LoRA by wire, in the same run", size=(400, 110))
    wires = {"lora": trained["lora"], "model": model.model, "run": trained["run"]}
    graph.add("G2RPO_SaveLoRA", wires | {"name": name, "key_names": "native"}, size=(400, 200))
    wires = {
        "base": model.model,
        "tuned": tuned["model"],
        "clip": model.clip,
        "vae": model.vae,
        "reward": judge,
    }
    settings = {
        "prompts": family.heldout,
        "negative": "",
        "guidance": family.cfg,
        "num_steps": family.num_steps,
    }
    settings |= {
        "width": family.size,
        "height": family.size,
        "slots": family.slots,
        "noises": 2 if family is TINY else 1,
    }
    compared = graph.add("G2RPO_CompareLoRA", wires | settings, size=(400, 700))
    graph.column("The file in any graph")
    loader = {"model": model.model, "lora_name": f"g2rpo/{name}.safetensors", "strength_model": 1.0}
    filed = graph.add("LoraLoaderModelOnly", loader, mode=BYPASSED)["MODEL"]
    conditioning = encode(graph, family, model.clip, write_prompt(graph, family))
    images = draw(graph, family, model, filed, conditioning, 1, empty(graph, family))
    graph.column("Results")
    preview(graph, compared["sheet"], "Before and after", (480, 640))
    preview(graph, monitor["curve"], "Run Monitor's curve", (480, 360))
    preview(graph, images, "One picture", (480, 320))


GRAPHS: dict[str, Callable[[Graph, Family], None]] = {
    "score_images": score,
    "rank_folder": rank,
    "look_at_rollout": look,
    "train_lora": train_lora,
    "graph_loop": loop,
    "vote_and_train": vote,
    "resume_compare": resume,
}


def make_all(schemas: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every workflow's name and its JSON."""
    for title, describe in GRAPHS.items():
        for family in FAMILIES:
            graph = Graph(f"g2rpo_{title}_{family.name}", schemas)
            describe(graph, family)
            yield graph.name, graph.write()


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", action="store_true", help="make the .jpg files too")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    import comfy_host

    found = comfy_host.comfyui_roots()
    if not found:
        parser.error(comfy_host.MISSING)
    with (
        tempfile.TemporaryDirectory() as folder,
        comfy_host.server(found[0], comfy_host.make_base(Path(folder))) as server,
    ):
        schemas = server.get("/object_info")
    for name, text in make_all(schemas):
        (WORKFLOWS / f"{name}.json").write_text(text, "utf-8")
    if args.pictures:
        import workflow_pictures

        workflow_pictures.make(found[-1], WORKFLOWS)


if __name__ == "__main__":
    main()
