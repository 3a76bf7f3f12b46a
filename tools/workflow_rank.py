"""The graph that ranks a folder of images, saves them with their scores, and draws more like the best."""

from __future__ import annotations

from workflow_graph import Graph
from workflow_parts import TINY, Family, draw, encode, load, preview, reward, write_prompt

LEARNED = (("pickscore", 1.0), ("aesthetic", 0.5))
RULES = (("colourfulness", 1.0), ("sharpness", 0.5))
DENOISE = 0.6
FETCH = (
    "Judges: g2rpo rewards fetch pickscore --to models/g2rpo_rewards, and the same for aesthetic; or "
    "choose built-in rules."
)
TEXT = (
    "Put images, or a folder of them, into ComfyUI's *input* directory, press **R**, choose the "
    "folder. Then press **Run**.\n\n"
    "**Look at** the ranked sheet, at the table in *Score Images*, and at output/ranked: the best "
    "images with their scores inside the "
    "PNG files, and a CSV of all scores.\n\n"
    "Prompts come from a .txt beside an image, or from the graph in its PNG; judges that read "
    "prompts need them.\n\n"
    "*Reference Reward* likes the colours that you write there. The last column draws four more "
    "like the best one: mute it "
    "(Ctrl+M) if you only want the ranking."
)


def rank(graph: Graph, family: Family) -> None:
    """Rank a folder of images."""
    rules = family is TINY
    files = "The judges are rules: nothing to download." if rules else family.files + " " + FETCH
    graph.column("Images")
    graph.note(f"**Rank a folder of images — {family.label}**\n\n{files}\n\n{TEXT}")
    settings = {"folder": "(input)", "deep": True, "most": 64}
    folder = graph.add("G2RPO_LoadImageFolder", settings, size=(400, 240))
    graph.column("Judges")
    judges = RULES if rules else LEARNED
    sockets = [reward(graph, name) for name, _ in judges]
    palette = {"kind": "palette", "colours": "#ff8800, #002244"}
    sockets.append(graph.add("G2RPO_ReferenceReward", palette, size=(300, 200))["reward"])
    weights = (*(weight for _, weight in judges), 0.25)
    values = {f"reward_{i}": socket for i, socket in enumerate(sockets, 1)}
    values |= {f"weight_{i}": each for i, each in enumerate(weights, 1)}
    judge = graph.add("G2RPO_MixRewards", values | {"mix": "zscore"}, size=(300, 640))["reward"]
    graph.column("Scores")
    images = {"images": folder["images"], "names": folder["names"]}
    wires = images | {"prompt": folder["prompts"], "reward": judge}
    scored = graph.add("G2RPO_ScoreImages", wires, size=(400, 440))
    wires = images | {"scores": scored["scores"], "details": scored["details"]}
    settings = {"prefix": f"ranked/{family.name}", "most": 20}
    graph.add("G2RPO_SaveScoredImages", wires | settings, size=(400, 420))
    wires = {"images": folder["images"], "scores": scored["scores"], "k": 1}
    best = graph.add("G2RPO_SelectBest", wires, "The best one")
    graph.column("Ranking")
    preview(graph, scored["ranked"], "Ranked, best first", (480, 520))
    preview(graph, best["image_list"], "The best one as it is", (480, 360))
    graph.column(f"Model · {family.label}")
    model = load(graph, family)
    conditioning = encode(graph, family, model.clip, write_prompt(graph, family))
    graph.column("More like the best")
    size = {"upscale_method": "lanczos", "width": family.size, "height": family.size, "crop": "center"}
    fitted = graph.add("ImageScale", {"image": best["images"]} | size)["IMAGE"]
    latent = graph.add("VAEEncode", {"pixels": fitted, "vae": model.vae})["LATENT"]
    four = graph.add("RepeatLatentBatch", {"samples": latent, "amount": 4})["LATENT"]
    images = draw(graph, family, model, model.model, conditioning, 1, four, DENOISE)
    graph.column("Results")
    preview(graph, images, "Four like it", (480, 480))
