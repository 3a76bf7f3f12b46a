"""Run inside ComfyUI by test_nodes_scoring.py: the scoring blocks in graphs of core nodes, and what they
do with hostile inputs.
"""

import dataclasses
import math
import random
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy_side
import torch
from comfy_graphs import block, core, drawing, lists, outputs, refusals, reward, run, thing

given, tensors = comfy_side.given(), comfy_side.given_tensors()
types, rewards = comfy_side.pack_module("nodes.types"), comfy_side.pack_module("comfy_g2rpo.rewards")


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Keep what JSON can say."""
    return {name: value for name, value in values.items() if isinstance(value, (str, int, float, list))}


answers: dict[str, Any] = {}
pictures: dict[str, torch.Tensor] = {}

# A rollout of the bundled model, judged in the graph and, picture by picture, by core's decoder and Score
# Images.
judged_graph = {
    **drawing(given["prompt"], steps=6),
    "rollout": block("Rollout", branch_steps="0,2", group_size=5, granularities="1,2", slots=4),
    "r1": reward("agreement"),
    "r2": reward("colourfulness"),
    "mix": block("MixRewards", reward_1=["r1", 0], reward_2=["r2", 0], weight_2=-0.01),
    "score": block("ScoreRollout", reward=["mix", 0], prompt=given["prompt"]),
    "advantages": block("Advantages", scores=["score", 0], clamp=2.0),
    "branches": block("Advantages", scores=["score", 0], clamp=2.0, per_branch=True),
    "decode": core("VAEDecode", samples=["rollout", 1], vae=["load", 2]),
    "images": block("ScoreImages", images=["decode", 0], reward=["mix", 0], prompt=given["prompt"]),
    "best": block("SelectBest", images=["decode", 0], scores=["images", 0], k=3),
    "voted": block(
        "ScoresFromValues", rollout=["rollout", 0], votes="", values=["images", 0], pictures=["decode", 0]
    ),
    "voted_advantages": block("Advantages", scores=["voted", 0]),
    "same": block("Advantages", scores=["score", 0], clamp=2.0, diversity=0.0),
    "diverse": block("Advantages", scores=["score", 0], clamp=2.0, diversity=0.3),
}
judged = run(
    judged_graph,
    **outputs(rollout="rollout", load="model - vae", score="scores pictures score_table", mix="- about"),
    **outputs(advantages="advantages heatmap ranked summary", branches="- per_branch", decode="decoded"),
    **outputs(images="- image_order image_ranked image_table", best="best kept", voted="voted"),
    **outputs(voted_advantages="voted_advantages", same="same - - same_summary"),
    **outputs(diverse="diverse - - diverse_summary"),
)
rollout, scores, advantages = judged.values["rollout"], judged.values["scores"], judged.values["advantages"]
answers["judged"] = {
    **plain({name: judged.values[name] for name in ("score_table", "summary", "image_table", "about")}),
    **plain({name: judged.values[name] for name in ("same_summary", "diverse_summary")}),
    "ui": {node: output.get("text") for node, output in judged.ui.items()},
    "names": scores.names,
    "weights": scores.weights,
    "prompt": scores.prompt,
    "images": len(rollout.rollout.plan.images),
    "learnable": not (advantages.table.is_inference() or advantages.rewards.is_inference()),
}
pictures |= {
    name: judged.values[name]
    for name in ("heatmap", "ranked", "per_branch", "image_ranked", "best", "pictures", "decoded")
}
pictures |= {
    "scores": scores.values,
    "table": advantages.table,
    "rewards": advantages.rewards,
    "same": judged.values["same"].table,
    "diverse": judged.values["diverse"].table,
    "voted_table": judged.values["voted_advantages"].table,
    "voted_scores": judged.values["voted"].values,
    "voted_pictures": judged.values["voted"].pictures,
}

# Score Images and Select Best as anybody may use them.
above = {"use_threshold": True, "threshold": given["threshold"]}
free_graph = {
    "images": thing("free", tensors["images"]),
    "reward": reward("colourfulness"),
    "score": block("ScoreImages", images=["images", 0], reward=["reward", 0]),
    "best": block("SelectBest", images=["images", 0], scores=["score", 0], k=2),
    "above": block("SelectBest", images=["images", 0], scores=["score", 0], k=100, **above),
    "drawn": block("SelectBest", images=["images", 0], scores=["score", 0], k=2, how="draw", temperature=1e6),
    "surely": block(
        "SelectBest", images=["images", 0], scores=["score", 0], k=2, how="draw", temperature=1e-4
    ),
    "sizes": thing("sizes", [tensors[name] for name in ("wide", "tall", "grey", "alpha")]),
    "mixed_sizes": block("ScoreImages", images=["sizes", 0], reward=["reward", 0]),
    "one_of_sizes": block("SelectBest", images=["sizes", 0], scores=["mixed_sizes", 0]),
    "agreement": reward("agreement"),
    "scenes": thing("scenes", tensors["scenes"]),
    "lines": block("ScoreImages", images=["scenes", 0], reward=["agreement", 0], prompt=given["lines"]),
    "all": block("ScoreImages", images=["scenes", 0], reward=["agreement", 0], prompt=given["scene"]),
    "none": block("ScoreImages", images=["scenes", 0], reward=["agreement", 0], prompt="a <b>lighthouse</b>"),
}
kept = {name: tensor.clone() for name, tensor in tensors.items()}
judges = ("score", "mixed_sizes", "lines", "all", "none")
free = lists(
    free_graph,
    **{f"{node} {slot}": (node, slot) for node in judges for slot in (0, 1, 3)},
    **outputs(best="free_best kept", above="free_above above_kept", one_of_sizes="one_of_sizes"),
    **outputs(drawn="free_drawn drawn_kept", surely="free_surely surely_kept"),
)
answers["free"] = {
    **{node: {slot: free[f"{node} {slot}"] for slot in "01"} for node in judges},
    **{name: free[name] for name in ("kept", "above_kept", "drawn_kept", "surely_kept")},
    "tables": {node: free[f"{node} 3"][0] for node in judges},
    "unchanged": all(
        torch.equal(tensors[name].nan_to_num(7.0), kept[name].nan_to_num(7.0)) for name in tensors
    ),
}
pictures |= {name: free[name][0] for name in ("free_best", "free_above", "free_drawn", "one_of_sizes")}

# Many images with other people's names, and no prompt at all.
hostile_names = [f"*{i}* | _{i}_ `x` # <b>桜{i}</b>.png" for i in range(64)]
many_graph = {
    "images": thing("many", torch.rand(64, 8, 8, 3, generator=torch.Generator().manual_seed(1))),
    "names": thing("many names", hostile_names),
    "reward": reward("colourfulness"),
    "agreement": reward("agreement"),
    "mix": block("MixRewards", reward_1=["reward", 0], reward_2=["agreement", 0]),
}
sent = {"images": ["images", 0]}
many_graph |= {
    "many": core("G2RPO_ScoreImages", **sent, reward=["reward", 0], names=["names", 0]),
    "unread": core("G2RPO_ScoreImages", **sent, reward=["agreement", 0]),
    "both": core("G2RPO_ScoreImages", **sent, reward=["mix", 0]),
    "blank": block("ScoreImages", **sent, reward=["reward", 0], prompt=" \n"),
}
many = run(many_graph, **{name: (name, 3) for name in ("many", "unread", "both", "blank")})
answers["many"] = {name: [many.values[name], many.ui[name]["text"][0]] for name in many.values}

# The model against itself with doubled weights.
compared_graph = {
    "load": block("TinyDemoLoader"),
    "tuned": core("ModelMergeAdd", model1=["load", 0], model2=["load", 0]),
    "reward": reward("colourfulness"),
    "compare": core(
        "G2RPO_CompareLoRA",
        base=["load", 0],
        tuned=["tuned", 0],
        clip=["load", 1],
        vae=["load", 2],
        reward=["reward", 0],
        prompts=given["compared"],
        **{"negative": "", "guidance": 1.0, "width": 64, "height": 64},
        **{"num_steps": 2, "noises": 4, "slots": 8, "seed": 3},
    ),
}
ran = run(compared_graph, **outputs(compare="sheet gains before after"))
answers["gains"] = ran.values["gains"]
kept_pictures = comfy_side.pack_module("nodes.results").kept_pictures
answers["kept"] = [kept_pictures(*each) for each in given["kept"]]
pictures |= {name: ran.values[name] for name in ("sheet", "before", "after")}

# Interruption: the judge presses the button, and must not be asked again.


def fake_vae(shape: list[int]) -> Any:
    """Return a VAE that decodes to a shape."""
    return SimpleNamespace(latent_channels=16, decode=lambda x: torch.zeros(len(x), *shape))


class Presser(rewards.Reward):
    """A reward that interrupts."""

    name, licence, compares_across_prompts = "presser", "none", True
    calls = 0

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        self.calls += 1
        comfy.model_management.interrupt_current_processing(True)
        return torch.zeros(len(images))


for name, graph in {
    "images": {
        "images": thing("sizes", [tensors["wide"], tensors["tall"]]),
        "score": block("ScoreImages", images=["images", 0], reward=["presser", 0]),
    },
    "rollout": {
        "rollout": thing("rollout", rollout),
        # Core's own VAE hears the button as well; this one leaves it to the block.
        "vae": thing("vae", fake_vae([8, 8, 3])),
        "score": block("ScoreRollout", vae=["vae", 0], reward=["presser", 0], prompt=""),
    },
}.items():
    presser = Presser()
    graph["presser"] = thing("presser", types.RewardSet((presser,), (1.0,)))
    stopped = comfy_side.run_prompt(graph, {"out": ("score", 1)})
    answers[f"interrupted {name}"] = {"error": stopped.error, "calls": presser.calls}
comfy.model_management.interrupt_current_processing(False)


def odd(**changes: Any) -> Any:
    """Change the rollout."""
    return dataclasses.replace(rollout, rollout=dataclasses.replace(rollout.rollout, **changes))


# Broken latents, given to the real decoder.
latents = rollout.rollout.latents.clone()
latents[0, 1, 0, 0, 0], latents[0, 2, 0, 0, 0] = torch.nan, torch.inf
sent = {"rollout": odd(latents=latents), "vae": judged.values["vae"], "prompt": given["prompt"]}
score = block("ScoreRollout", **{name: [name, 0] for name in sent}, reward=["agreement", 0])
graph = {name: thing(name, value) for name, value in sent.items()}
graph |= {"agreement": reward("agreement"), "score": score}
ran = run(graph, scores=("score", 0), pictures=("score", 1))
pictures |= {"broken_scores": ran.values["scores"].values, "broken_pictures": ran.values["pictures"]}

# Votes that are all the same: nothing to learn, whatever the rounding says.
count = len(rollout.rollout.plan.images)
tie_graph = {
    "rollout": thing("rollout", rollout),
    "votes": block("ScoresFromValues", rollout=["rollout", 0], votes="0.9 " * count),
    "tie": block("Advantages", scores=["votes", 0], std_floor=0.0),
}
tie = run(tie_graph, **outputs(tie="- heatmap - summary"))
answers["tie"], pictures["tie"] = tie.values["summary"], tie.values["heatmap"]

# Equal votes and the pictures of a user: only their unlikeness tells the branches apart.
for name, shown in tensors.items():
    if name.startswith("alike "):
        few = block("Rollout", branch_steps="1", group_size=len(shown), granularities="1")
        graph = {**drawing(given["prompt"], steps=2), "rollout": few, "shown": thing(name, shown)}
        wires = {"rollout": ["rollout", 0], "pictures": ["shown", 0], "votes": "1 " * len(shown)}
        graph |= {"votes": block("ScoresFromValues", **wires)}
        graph |= {"diverse": block("Advantages", scores=["votes", 0], diversity=given["diversity"])}
        pictures[name] = run(graph, made=("diverse", 0)).values["made"].table

# A reward whose noise is larger than any spread: all that it says of a group is that.
noisy = rewards.Rule("noisy", lambda images, prompts: images.mean((1, 2, 3)), True)
object.__setattr__(noisy, "noise", lambda: 10.0)
noisy_set = types.RewardSet((noisy,), (1.0,))
score = block("ScoreRollout", **{name: [name, 0] for name in sent}, reward=["noisy", 0])
graph = {name: thing(name, value) for name, value in {**sent, "noisy": noisy_set}.items()}
graph |= {"score": score, "noise": block("Advantages", rollout=["rollout", 0], scores=["score", 0])}
ran = run(graph, **outputs(noise="noise_advantages - - noise_summary", score="noise_scores"))
answers["noise"] = ran.values["noise_summary"]
pictures["noise_table"], pictures["noise_scores"] = (
    ran.values["noise_advantages"].table,
    ran.values["noise_scores"].values,
)

# Hostile inputs: what each block says.
good, one_reward = torch.rand(2, 8, 8, 3), types.RewardSet((rewards.load("colourfulness"),), (1.0,))
pixel, votes = torch.zeros(1, 1, 1, 3), ",".join(map(str, range(count)))
to_advantages = {"rollout": rollout, "scores": scores, "clamp": 5.0, "std_floor": 1e-8, "per_branch": False}
usual = {
    "ScoreImages": {"images": good, "reward": one_reward, "prompt": ""},
    "ScoreRollout": {"rollout": rollout, "vae": judged.values["vae"], "reward": one_reward, "prompt": ""},
    "SelectBest": {"images": good, "scores": [0.5, 0.25], "k": 1, "use_threshold": False, "threshold": 0.0},
    "ScoresFromValues": {"rollout": rollout, "votes": votes},
    "Advantages": to_advantages,
    "MixRewards": {"reward_1": one_reward, "reward_2": one_reward, "weight_1": 1.0, "weight_2": 1.0},
}


def other_scores(values: torch.Tensor) -> Any:
    """Change the scores."""
    return dataclasses.replace(scores, values=values)


hostile: dict[str, dict[str, dict[str, Any]]] = {
    "ScoreImages": {
        "images of no batch": {"images": torch.zeros(0, 8, 8, 3)},
        "images without pixels": {"images": torch.zeros(1, 0, 8, 3)},
        "images of five channels": {"images": torch.zeros(1, 8, 8, 5)},
        "images of three axes": {"images": torch.zeros(8, 8, 3)},
        "images of whole numbers": {"images": torch.zeros(1, 8, 8, 3, dtype=torch.uint8)},
        "images of text": {"images": "picture.png"},
        "images from -1": {"images": good * 2 - 1},
        "images to 255": {"images": good * 255},
        "images without end": {"images": pixel.expand(1025, 1, 1, 3)},
        "images of a huge size": {"images": pixel.expand(1, 2**16, 2**16, 3)},
        "prompt too long": {"prompt": "x" * 100_000},
        "prompt with NUL": {"prompt": "a\0b"},
        "prompt with half a character": {"prompt": "a\ud800b"},
        "prompt line too long": {"prompt": "a\n" + "x" * 2001},
        "prompt list of another length": {"prompt": ["a", "b", "c"]},
        "prompt of a number": {"prompt": 3},
    },
    "SelectBest": {
        "k of none": {"k": 0},
        "k of too many": {"k": 10**9},
        "scores of another length": {"scores": [0.5]},
        "scores of nan": {"scores": [math.nan, math.nan]},
        "scores of infinity": {"scores": [math.inf, 0.0]},
        "scores of text": {"scores": ["high", "low"]},
        "threshold above all": {"use_threshold": True, "threshold": 0.75},
        "threshold of nan": {"use_threshold": True, "threshold": math.nan},
        "how of another word": {"how": ["worst"]},
        "temperature of nan": {"how": ["draw"], "temperature": [math.nan]},
        "temperature of 0": {"how": ["draw"], "temperature": [0.0]},
        "seed of less than none": {"how": ["draw"], "seed": [-1]},
    },
    "ScoreRollout": {
        "rollout without latents": {"rollout": odd(latents=None)},
        "rollout of two prompts": {"rollout": odd(latents=rollout.rollout.latents.expand(2, -1, -1, -1, -1))},
        "rollout of video": {"rollout": odd(latents=torch.zeros(1, count, 16, 5, 8, 8))},
        "vae of another model": {"vae": SimpleNamespace(latent_channels=4)},
        "vae of video": {"vae": fake_vae([5, 8, 8, 3])},
        "vae of one channel": {"vae": fake_vae([8, 8, 1])},
        "rollout prompt too long": {"prompt": "x" * 2001},
    },
    "ScoresFromValues": {
        "votes missing": {"votes": ""},
        "votes too few": {"votes": "1, 2"},
        "votes of words": {"votes": "good, <b>bad</b>"},
        "votes of infinity": {"votes": votes.replace("0", "inf", 1)},
        "votes beyond float": {"votes": votes.replace("0", "1e39", 1)},
        "votes without end": {"votes": "1," * 100_000},
        "votes and values": {"values": [1.0] * count},
        "values of infinity": {"votes": " ", "values": [math.inf] * count},
        "pictures of another count": {"pictures": good},
    },
    "Advantages": {
        "scores of another rollout": {"scores": other_scores(scores.values[:, :-1])},
        "scores that judge nothing": {"scores": other_scores(scores.values * math.nan)},
        "infinite scores": {"scores": other_scores(scores.values / 0.0)},
        "rollout without branches": {
            "rollout": odd(plan=comfy_side.pack_module("comfy_g2rpo.plan").deterministic(4)),
            "scores": other_scores(torch.zeros(2, 1)),
        },
        "clamp of nan": {"clamp": math.nan},
        "clamp below zero": {"clamp": -1.0},
        "std_floor without end": {"std_floor": math.inf},
        "diversity of nan": {"diversity": math.nan},
        "diversity below zero": {"diversity": -0.1},
        "diversity above ten": {"diversity": 10.5},
        "diversity of text": {"diversity": "much"},
        "diversity without pictures": {
            "diversity": 0.1,
            "scores": dataclasses.replace(scores, pictures=None),
        },
        "diversity of too few pictures": {
            "diversity": 0.1,
            "scores": dataclasses.replace(scores, pictures=scores.pictures[:-1]),
        },
    },
    "MixRewards": {
        "weights of zero": {"weight_1": 0.0, "weight_2": 0.0},
        "weights that cancel": {"weight_1": 1.0, "weight_2": -1.0},
        "weight of nan": {"weight_1": math.nan},
        "weight without end": {"weight_2": 1e30},
    },
    "LoadReward": {"reward of a path": {"reward": "../../secret"}},
}
answers["hostile"] = refusals(usual, hostile)

# And the widgets themselves. Core refuses numbers out of bounds, but 0.3.64 lets any text pass as a choice:
# the block must refuse it.
graph = {
    "images": thing("images", good),
    "scores": thing("scores", [0.5, 0.5]),
    "r": thing("r", rollout),
    "s": thing("s", scores),
}
answers["refused"] = {
    name: not comfy_side.run_prompt({**graph, "block": wrong}, {"out": ("block", 0)}).ok
    for name, wrong in {
        "reward": reward("../../secret"),
        "k": block("SelectBest", k=0, images=["images", 0], scores=["scores", 0]),
        "clamp": block("Advantages", rollout=["r", 0], scores=["s", 0], clamp=-1.0, std_floor=0.0),
    }.items()
}

# Random inputs: a result or a ValueError of our own, never another exception.
rng, strange, outcomes = random.Random(0), [], {"ok": 0, "refused": 0}
ALPHABET = "a1 ,;\n\t\0\ud800é日.-+eE_naif<>&\"'\\/"
SIDES = range(9)


def random_images() -> Any:
    """Make something like an IMAGE."""
    shape = [rng.choice(SIDES) for _ in range(rng.choice([3, 4, 4, 4, 4, 5]))]
    shape[-1] = rng.choice([1, 3, 3, 3, 4, 2])
    made = torch.rand(shape) * rng.choice([1, 1, 1, 1, 2, 255]) - rng.choice([0, 0, 0, 0, 0.1, 1])
    if made.numel() and rng.random() < 0.3:
        made.view(-1)[0] = rng.choice([math.nan, math.inf, -math.inf])
    return made


def random_text() -> str:
    """Make any text."""
    return "".join(rng.choice(ALPHABET) for _ in range(rng.choice([0, 1, 2, 5, 40, 2500])))


def random_number() -> Any:
    """Make something like a number."""
    return rng.choice(
        [0, 1, 1, 1, 2, 3, 0.5, 0.25, -1, math.nan, math.inf, 1e300, -1e10, True, None, "1", 2**70]
    )


BLOCKS = {
    name: comfy_side.node_class(f"G2RPO_{name}")
    for name in ("ScoreImages", "SelectBest", "ScoresFromValues", "MixRewards", "Advantages")
}
for _ in range(given["random"]):
    name = rng.choice(list(BLOCKS))
    calls = {
        "ScoreImages": lambda: (
            [random_images() for _ in range(rng.choice([1, 1, 2, 0]))],
            [one_reward],
            [random_text()],
        ),
        "SelectBest": lambda: (
            [good],
            [random_number() for _ in range(rng.choice([2, 2, 1]))],
            [random_number()],
            [rng.random() < 0.5],
            [random_number()],
        ),
        "ScoresFromValues": lambda: (
            [rollout],
            [rng.choice([random_text(), votes])],
            rng.choice([None, [random_number() for _ in range(count)]]),
        ),
        "MixRewards": lambda: (one_reward, one_reward, random_number(), random_number()),
        "Advantages": lambda: (rollout, scores, random_number(), random_number(), rng.random() < 0.5),
    }
    try:
        with torch.inference_mode():
            BLOCKS[name].execute(*calls[name]())
        outcomes["ok"] += 1
    except ValueError as error:
        outcomes["refused"] += 1
        if "\n" in str(error) or len(str(error)) > 400:
            strange.append(f"{name}: {error}")
    except Exception as error:
        strange.append(f"{name}: {type(error).__name__}: {error}")
answers["random"] = {**outcomes, "strange": strange}

comfy_side.answer(answers, pictures)
