"""Run inside ComfyUI by test_nodes_voting.py: the block Vote in a graph that trains, with votes as the
page would write them.
"""

import json
import random
from pathlib import Path
from typing import Any

import comfy_side
import folder_paths
import numpy as np
from comfy_graphs import block, core, drawing, reward
from PIL import Image
from safetensors import safe_open

PROMPT = "two red circles"
VOTE, UPDATE = "vote", "update"
given = comfy_side.given()


def graph(
    votes: str, run: str = "", kept_in: str | None = None, prompt: str = PROMPT, tail: bool = True
) -> dict[str, Any]:
    """Return a graph that trains on votes.

    `run` is LoRA Policy's, `kept_in` the one that keeps the votes if it is another.
    """
    keeping = run if kept_in is None else kept_in
    made = {
        **drawing(PROMPT, steps=4, seed=["policy", 2], model=["policy", 1]),
        "policy": block("LoRAPolicy", model=["load", 0], run=run),
        "rollout": block("Rollout", branch_steps="0,1", group_size=4),
        "decode": core("VAEDecode", samples=["rollout", 1], vae=["load", 2]),
        VOTE: block(
            "VoteRollout",
            rollout=["rollout", 0],
            pictures=["decode", 0],
            prompt=prompt,
            votes=votes,
            run=keeping,
        ),
    }
    if tail:
        made["advantages"] = block("Advantages", scores=[VOTE, 0])
        wires = {"policy": ["policy", 0], "advantages": ["advantages", 0]}
        made[UPDATE] = block("UpdateLoRA", **wires, micro_batch=4)
    return made


def run(votes: str, fresh: bool = False, **changes: Any) -> dict[str, Any]:
    """Run the graph; say what came of it."""
    whole = graph(votes, **changes)
    ran = comfy_side.run_prompt(whole, {"scores": (VOTE, 0)}, fresh=fresh)
    shown = (ran.ui.get(VOTE) or {}).get("g2rpo_ballot") or [None]
    scores = ran.values.get("scores")
    return {
        "error": ran.error,
        "node": ran.error_node,
        "problems": str(ran.problems or ""),
        "ballot": shown[0],
        "updated": UPDATE in ran.ui,
        "scores": None if scores is None else scores.values[0].tolist(),
        "names": None if scores is None else list(scores.names),
    }


def redness(picture: dict[str, str]) -> float:
    """Look at a picture that the page would show."""
    pixels = np.asarray(
        Image.open(Path(folder_paths.get_temp_directory()) / picture["subfolder"] / picture["filename"]),
        float,
    )
    return float(pixels[..., 0].mean() - pixels[..., 1:].mean())


def ranked(ballot: dict[str, Any]) -> dict[str, Any]:
    """Vote for the redder pictures."""
    pictures = ballot["pictures"]
    order = sorted(pictures, key=redness, reverse=True)
    return {
        "pictures": [picture["key"] for picture in pictures],
        "ranking": [picture["key"] for picture in order],
    }


def kept(name: str) -> list[str]:
    """Read a run's lines of votes."""
    place = Path(folder_paths.get_output_directory()) / "g2rpo" / name / "votes.jsonl"
    return place.read_text("utf-8").splitlines() if place.exists() else []


def forks(name: str) -> list[dict[str, Any]]:
    """Say what a run's ballots keep of their forks."""
    found = []
    for place in sorted((Path(folder_paths.get_output_directory()) / "g2rpo" / name).glob("ballots/*")):
        with safe_open(place / "forks.safetensors", "pt") as file:
            shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            found.append({"shapes": shapes, "notes": file.metadata()})
    return found


def story() -> dict[str, Any]:
    """Vote and train twice, as a user does: look, vote, run, look at the next group."""
    looks, votes = [], ""
    for _ in range(2):
        looks.append(run(votes, run="voted"))
        votes = json.dumps(ranked(looks[-1]["ballot"]))
        looks.append(run(votes, run="voted"))
    looks.append(run(votes, run="voted"))
    return {"looks": looks, "votes": json.loads(votes), "lines": kept("voted"), "forks": forks("voted")}


def again(votes_of: str, run: str = "", **settings: Any) -> dict[str, Any]:
    """Learn from kept votes, in a run of its own or in none."""
    made = {
        **drawing(PROMPT, steps=4, model=["policy", 1]),
        "policy": block("LoRAPolicy", model=["load", 0], run=run, learning_rate=1e-3),
        UPDATE: block(
            "UpdateFromVotes",
            policy=["policy", 0],
            clip=["load", 1],
            run=votes_of,
            **{"epochs": 5, "micro_batch": 2, **settings},
        ),
    }
    ran = comfy_side.run_prompt(made, {"policy": (UPDATE, 0), "lora": (UPDATE, 1)})
    place = Path(folder_paths.get_output_directory()) / "g2rpo" / run / "metrics.jsonl"
    policy = ran.values.get("policy")
    return {
        "error": ran.error,
        "node": ran.error_node,
        "step": policy and policy.step,
        "moved": policy and any(bool(up.abs().max() > 0) for _, up in policy.adapter.pairs.values()),
        "lora": bool(ran.values.get("lora")),
        "said": " ".join((ran.ui.get(UPDATE) or {}).get("text", ())),
        "rows": [json.loads(line) for line in place.read_text().splitlines()[1:]] if place.exists() else [],
        "problems": str(ran.problems or ""),
    }


def used_again() -> dict[str, Any]:
    """Learn from what `story` has kept, twice in a row, and from what cannot be learned from."""
    found = {"first": again("voted", "learnt"), "second": again("voted", "learnt", pair_loss="dpo")}
    found["kept nowhere"] = again("voted", epochs=1, pair_loss="pg_dpo")
    found["guided"] = again("voted", epochs=1, guidance=2.0, negative="grey")
    whole = block("TrainLoRA", **{name: ["load", i] for i, name in enumerate(("model", "clip", "vae"))})
    whole["inputs"] |= {
        "reward": ["judge", 0],
        "prompts": PROMPT,
        "changes": "objective = pairs",
        "run": "no",
    }
    judged = {"load": block("TinyDemoLoader"), "judge": reward("agreement"), "train": whole}
    found["rolled out"] = comfy_side.run_prompt(judged).error
    found["blank"] = again(" ")
    found["unknown"] = again("nobody")
    found["outside"] = again("../voted")
    found["no votes"] = again("learnt")
    runs = Path(folder_paths.get_output_directory()) / "g2rpo"
    (place,) = list((runs / "voted/ballots").glob("*/forks.safetensors"))[:1]
    content = place.read_bytes()
    place.write_bytes(content[:-3])
    found["damaged"] = again("voted")
    place.write_bytes(content.replace(b", none", b", some"))
    found["another model"] = again("voted")
    place.write_bytes(content)
    for each in (runs / "voted/ballots").glob("*/forks.safetensors"):
        each.unlink()
    found["no forks"] = again("voted")
    return found


def without_run() -> dict[str, Any]:
    """Vote where nothing is kept, then take the votes back.

    And vote where a run keeps them, then forget them in the page.
    """
    first = run("")
    votes = json.dumps(ranked(first["ballot"]))
    keys = [picture["key"] for picture in first["ballot"]["pictures"]]
    some = json.dumps(
        {"pictures": keys, "pairs": [[keys[0], keys[1]], [keys[0], keys[1]], [keys[2], keys[1]]]}
    )
    other = json.dumps({"pictures": [key[::-1] for key in keys], "ranking": [key[::-1] for key in keys]})
    answers = {
        "first": first,
        "voted": run(votes),
        "again": run(""),
        "pairs": run(some),
        "other": run(other),
        "votes": json.loads(votes),
    }
    answers["kept"] = run(votes, kept_in="voted", tail=False)
    answers["replayed"] = run("", kept_in="voted", tail=False, fresh=True)
    answers["another prompt"] = run("", kept_in="voted", tail=False, prompt="two blue squares")
    return answers


def hostile(keys: list[str]) -> dict[str, dict[str, Any]]:
    """Try what a stranger's workflow may hold."""
    good = {"pictures": keys, "ranking": keys}
    tried = {
        name: text if isinstance(text, str) else json.dumps(text) for name, text in given["texts"].items()
    }
    tried |= {name: json.dumps({**good, **change}) for name, change in given["changes"].items()}
    tried["a picture twice"] = json.dumps({**good, "ranking": [keys[0], keys[0]]})
    tried["a picture of no group"] = json.dumps({**good, "winners": ["0123456789abcdef"]})
    tried["a picture against itself"] = json.dumps({**good, "pairs": [[keys[0], keys[0]]]})
    tried["three in a pair"] = json.dumps({**good, "pairs": [keys[:3]]})
    tried["a name twice"] = (
        f'{{"pictures": {json.dumps(keys)}, "ranking": [], "ranking": {json.dumps(keys)}}}'
    )
    found = {name: run(text, tail=False) for name, text in tried.items()}
    found |= {f"run {name}": run("", kept_in=name, tail=False) for name in given["runs"]}
    return found


def noise(keys: list[str], count: int) -> list[str]:
    """Change single characters of good votes at random.

    List the answers that are neither votes nor a named error.
    """
    chance, strange = random.Random(0), []
    good = json.dumps(
        {"pictures": keys, "ranking": keys[:3], "winners": keys[:3], "pairs": [[keys[0], keys[1]]]}
    )
    parse = comfy_side.pack_module("comfy_g2rpo.votes.strengths").parse
    for _ in range(count):
        text = list(good)
        for _ in range(chance.randint(1, 4)):
            text[chance.randrange(len(text))] = chance.choice('0a"[]{},:\\ \0\ud800é')
        try:
            parse("".join(text))
        except ValueError as error:
            if not str(error).startswith("votes: ") or ";" not in str(error) or "\n" in str(error):
                strange.append(repr(error))
    return strange


answers = {"story": story(), "without": without_run()}
keys = [picture["key"] for picture in answers["without"]["first"]["ballot"]["pictures"]]
wrong = graph("", tail=False)
wrong[VOTE]["inputs"]["pictures"] = ["one", 0]
wrong["one"] = core("VAEDecode", samples=["rollout", 2], vae=["load", 2])
ran = comfy_side.run_prompt(wrong)
answers |= {
    "again": used_again(),
    "hostile": hostile(keys),
    "noise": noise(keys, 500),
    "another count": ran.error,
}
comfy_side.answer(answers)
