"""Run inside ComfyUI by test_nodes_scoring.py: the scoring blocks in graphs of core nodes, and what they
do with hostile inputs.
"""

import dataclasses
import math
import random
from types import SimpleNamespace
from typing import Any, ClassVar

import comfy.model_management
import comfy_side
import torch

import nodes

given, tensors = comfy_side.given(), comfy_side.given_tensors()
judging, types = comfy_side.pack_module("nodes.inputs.judging"), comfy_side.pack_module("nodes.types")
rewards = comfy_side.pack_module("comfy_g2rpo.rewards")


class Anything(str):
    """A type that goes with every other."""

    def __ne__(self, other: object) -> bool:
        return False


class Give:
    """Put any object on a wire."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"name": ("STRING", {})}})
    RETURN_TYPES = (Anything("*"),)
    FUNCTION = "give"
    CATEGORY = "tests"
    things: ClassVar[dict[str, Any]] = {}

    def give(self, name: str) -> tuple[Any]:
        return (self.things[name],)


class GiveList(Give):
    """Put a list of objects on a wire."""

    OUTPUT_IS_LIST = (True,)


nodes.NODE_CLASS_MAPPINGS |= {"TestGive": Give, "TestGiveList": GiveList}


def thing(name: str, value: Any, many: bool = False) -> dict[str, Any]:
    """Return a node that gives an object."""
    Give.things[name] = value
    return {"class_type": "TestGiveList" if many else "TestGive", "inputs": {"name": name}}


def block(name: str, /, **inputs: Any) -> dict[str, Any]:
    """Return a node of the pack."""
    return {"class_type": f"G2RPO_{name}", "inputs": inputs}


def core(name: str, /, **inputs: Any) -> dict[str, Any]:
    """Return a node of core."""
    return {"class_type": name, "inputs": inputs}


def reward(name: str) -> dict[str, Any]:
    """Return a reward loader."""
    return block("LoadReward", reward=name)


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Keep what JSON can say."""
    return {name: value for name, value in values.items() if isinstance(value, (str, int, float, list))}


answers: dict[str, Any] = {}
pictures: dict[str, torch.Tensor] = {}

# A rollout of the bundled model, judged in the graph and, picture by picture, by core's decoder and Score
# Images.
rollout_graph = {
    "load": block("TinyDemoLoader"),
    "text": core("CLIPTextEncode", clip=["load", 1], text=given["prompt"]),
    "guider": core("BasicGuider", model=["load", 0], conditioning=["text", 0]),
    "noise": core("RandomNoise", noise_seed=3),
    "sigmas": core("BasicScheduler", model=["load", 0], scheduler="simple", steps=6, denoise=1.0),
    "empty": core("EmptySD3LatentImage", width=64, height=64, batch_size=1),
    "rollout": block(
        "Rollout",
        guider=["guider", 0],
        noise=["noise", 0],
        sigmas=["sigmas", 0],
        latent_image=["empty", 0],
        branch_steps="0,2",
        group_size=5,
        granularities="1,2",
        kernel="flow_sde",
        eta=0.9,
        terminal="exact",
        antithetic=False,
        slots=4,
    ),
}
mix_graph = {"r1": reward("agreement"), "r2": reward("colourfulness")}
mix_graph["mix"] = block("MixRewards", reward_1=["r1", 0], reward_2=["r2", 0], weight_1=1.0, weight_2=-0.01)
judged_graph = {
    **rollout_graph,
    **mix_graph,
    "score": block(
        "ScoreRollout", rollout=["rollout", 0], vae=["load", 2], reward=["mix", 0], prompt=given["prompt"]
    ),
    "advantages": block(
        "Advantages", rollout=["rollout", 0], scores=["score", 0], clamp=2.0, std_floor=1e-8, per_branch=False
    ),
    "branches": block(
        "Advantages", rollout=["rollout", 0], scores=["score", 0], clamp=2.0, std_floor=1e-8, per_branch=True
    ),
    "decode": core("VAEDecode", samples=["rollout", 1], vae=["load", 2]),
    "images": block("ScoreImages", images=["decode", 0], reward=["mix", 0], prompt=given["prompt"]),
    "best": block(
        "SelectBest", images=["decode", 0], scores=["images", 0], k=3, use_threshold=False, threshold=0.0
    ),
    "voted": block(
        "ScoresFromValues", rollout=["rollout", 0], votes="", values=["images", 0], pictures=["decode", 0]
    ),
    "voted_advantages": block(
        "Advantages", rollout=["rollout", 0], scores=["voted", 0], clamp=5.0, std_floor=1e-8, per_branch=False
    ),
}
want = {
    "rollout": ("rollout", 0),
    "model": ("load", 0),
    "vae": ("load", 2),
    "scores": ("score", 0),
    "pictures": ("score", 1),
    "score_table": ("score", 2),
    "advantages": ("advantages", 0),
    "heatmap": ("advantages", 1),
    "ranked": ("advantages", 2),
    "summary": ("advantages", 3),
    "per_branch": ("branches", 1),
    "decoded": ("decode", 0),
    "image_order": ("images", 1),
    "image_ranked": ("images", 2),
    "image_table": ("images", 3),
    "about": ("mix", 1),
    "best": ("best", 0),
    "kept": ("best", 1),
    "voted": ("voted", 0),
    "voted_advantages": ("voted_advantages", 0),
}
judged = comfy_side.run_prompt(judged_graph, want)
assert judged.ok, judged
rollout, scores, advantages = judged.values["rollout"], judged.values["scores"], judged.values["advantages"]
answers["judged"] = {
    **plain({name: judged.values[name] for name in ("score_table", "summary", "image_table", "about")}),
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
    "voted_table": judged.values["voted_advantages"].table,
    "voted_scores": judged.values["voted"].values,
    "voted_pictures": judged.values["voted"].pictures,
}

# Score Images and Select Best as anybody may use them. Give is no list, so that lists are made by GiveList.
free_graph = {
    "images": thing("free", tensors["images"]),
    "reward": reward("colourfulness"),
    "score": block("ScoreImages", images=["images", 0], reward=["reward", 0], prompt=""),
    "best": block(
        "SelectBest", images=["images", 0], scores=["score", 0], k=2, use_threshold=False, threshold=0.0
    ),
    "above": block(
        "SelectBest",
        images=["images", 0],
        scores=["score", 0],
        k=100,
        use_threshold=True,
        threshold=given["threshold"],
    ),
    "sizes": thing("sizes", [tensors["wide"], tensors["tall"], tensors["grey"], tensors["alpha"]], many=True),
    "mixed_sizes": block("ScoreImages", images=["sizes", 0], reward=["reward", 0], prompt=""),
    "one_of_sizes": block(
        "SelectBest", images=["sizes", 0], scores=["mixed_sizes", 0], k=1, use_threshold=False, threshold=0.0
    ),
    "agreement": reward("agreement"),
    "scenes": thing("scenes", tensors["scenes"]),
    "lines": block("ScoreImages", images=["scenes", 0], reward=["agreement", 0], prompt=given["lines"]),
    "all": block("ScoreImages", images=["scenes", 0], reward=["agreement", 0], prompt=given["scene"]),
}
kept = {name: tensor.clone() for name, tensor in tensors.items()}
outputs = {
    f"{node} {slot}": (node, slot) for node in ("score", "mixed_sizes", "lines", "all") for slot in (1, 3)
}


def caught_list(node: str) -> dict[str, Any]:
    """Run the graph once more for a list output, which is caught value by value otherwise."""
    seen: list[float] = []

    class Collect:
        INPUT_TYPES = classmethod(lambda cls: {"required": {"value": (Anything("*"), {})}})
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE, INPUT_IS_LIST = (), "keep", "tests", True, True

        def keep(self, value: list[Any]) -> dict[str, Any]:
            seen.extend(value)
            return {}

    nodes.NODE_CLASS_MAPPINGS["TestCollect"] = Collect
    found = {}
    for slot in (0, 1):
        seen.clear()
        ran = comfy_side.run_prompt({**free_graph, "collect": core("TestCollect", value=[node, slot])})
        assert ran.ok, ran
        found[str(slot)] = list(seen)
    return found


free = comfy_side.run_prompt(
    free_graph, {"best": ("best", 0), "above": ("above", 0), "one_of_sizes": ("one_of_sizes", 0), **outputs}
)
assert free.ok, free
answers["free"] = {
    "score": caught_list("score"),
    "mixed_sizes": caught_list("mixed_sizes"),
    "lines": caught_list("lines"),
    "all": caught_list("all"),
    "kept": caught_list("best")["1"],
    "above_kept": caught_list("above")["1"],
    "tables": {node: free.values[f"{node} 3"] for node in ("score", "mixed_sizes", "lines", "all")},
    "unchanged": all(
        torch.equal(tensors[name].nan_to_num(7.0), kept[name].nan_to_num(7.0)) for name in tensors
    ),
}
pictures |= {
    "free_best": free.values["best"],
    "free_above": free.values["above"],
    "one_of_sizes": free.values["one_of_sizes"],
}

# Interruption: the judge presses the button, and must not be asked again.


def fake_vae(shape: list[int]) -> Any:
    """Return a VAE that decodes to a shape."""
    return SimpleNamespace(latent_channels=16, decode=lambda x: torch.zeros(len(x), *shape))


class Presser:
    """A reward that interrupts."""

    name, licence, compares_across_prompts = "presser", "none", True
    calls = 0

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        self.calls += 1
        comfy.model_management.interrupt_current_processing(True)
        return torch.zeros(len(images))


for name, graph in {
    "images": {
        "images": thing("sizes", [tensors["wide"], tensors["tall"]], many=True),
        "score": block("ScoreImages", images=["images", 0], reward=["presser", 0], prompt=""),
    },
    "rollout": {
        "rollout": thing("rollout", rollout),
        # Core's own VAE hears the button as well; this one leaves it to the block.
        "vae": thing("vae", fake_vae([8, 8, 3])),
        "score": block(
            "ScoreRollout", rollout=["rollout", 0], vae=["vae", 0], reward=["presser", 0], prompt=""
        ),
    },
}.items():
    presser = Presser()
    graph["presser"] = thing("presser", types.RewardSet((presser,), (1.0,)))
    stopped = comfy_side.run_prompt(graph, {"out": ("score", 1)})
    answers[f"interrupted {name}"] = {"error": stopped.error, "calls": presser.calls}
comfy.model_management.interrupt_current_processing(False)

# Broken latents, given to the real decoder.
latents = rollout.rollout.latents.clone()
latents[0, 1, 0, 0, 0], latents[0, 2, 0, 0, 0] = torch.nan, torch.inf
broken = dataclasses.replace(rollout, rollout=dataclasses.replace(rollout.rollout, latents=latents))
score_graph = {"vae": thing("vae", judged.values["vae"]), "agreement": reward("agreement")}
ran = comfy_side.run_prompt(
    {
        **score_graph,
        "rollout": thing("broken", broken),
        "score": block(
            "ScoreRollout",
            rollout=["rollout", 0],
            vae=["vae", 0],
            reward=["agreement", 0],
            prompt=given["prompt"],
        ),
    },
    {"scores": ("score", 0), "pictures": ("score", 1)},
)
assert ran.ok, ran
pictures |= {"broken_scores": ran.values["scores"].values, "broken_pictures": ran.values["pictures"]}


# Votes that are all the same: nothing to learn, whatever the rounding says.
tie_graph = {
    "rollout": thing("rollout", rollout),
    "votes": block(
        "ScoresFromValues", rollout=["rollout", 0], votes="0.9 " * len(rollout.rollout.plan.images)
    ),
    "tie": block(
        "Advantages", rollout=["rollout", 0], scores=["votes", 0], clamp=5.0, std_floor=0.0, per_branch=False
    ),
}
tie = comfy_side.run_prompt(tie_graph, {"heatmap": ("tie", 1), "summary": ("tie", 3)})
assert tie.ok, tie
answers["tie"], pictures["tie"] = tie.values["summary"], tie.values["heatmap"]


# Hostile inputs: what each block says.
def odd(**changes: Any) -> Any:
    """Change the rollout."""
    return dataclasses.replace(rollout, rollout=dataclasses.replace(rollout.rollout, **changes))


good, one_reward = torch.rand(2, 8, 8, 3), types.RewardSet((rewards.load("colourfulness"),), (1.0,))
count = len(rollout.rollout.plan.images)
votes = ",".join(map(str, range(count)))
score_images = {"images": good, "reward": one_reward, "prompt": ""}
score_rollout = {"rollout": rollout, "vae": judged.values["vae"], "reward": one_reward, "prompt": ""}
select = {"images": good, "scores": [0.5, 0.25], "k": 1, "use_threshold": False, "threshold": 0.0}
from_values = {"rollout": rollout, "votes": votes}
to_advantages = {"rollout": rollout, "scores": scores, "clamp": 5.0, "std_floor": 1e-8, "per_branch": False}
mixing = {"reward_1": one_reward, "reward_2": one_reward, "weight_1": 1.0, "weight_2": 1.0}
deterministic = comfy_side.pack_module("comfy_g2rpo.plan").deterministic(4)
hostile: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "images of no batch": ("ScoreImages", score_images, {"images": torch.zeros(0, 8, 8, 3)}),
    "images without pixels": ("ScoreImages", score_images, {"images": torch.zeros(1, 0, 8, 3)}),
    "images of five channels": ("ScoreImages", score_images, {"images": torch.zeros(1, 8, 8, 5)}),
    "images of three axes": ("ScoreImages", score_images, {"images": torch.zeros(8, 8, 3)}),
    "images of whole numbers": (
        "ScoreImages",
        score_images,
        {"images": torch.zeros(1, 8, 8, 3, dtype=torch.uint8)},
    ),
    "images of text": ("ScoreImages", score_images, {"images": "picture.png"}),
    "images from -1": ("ScoreImages", score_images, {"images": good * 2 - 1}),
    "images to 255": ("ScoreImages", score_images, {"images": good * 255}),
    "images without end": (
        "ScoreImages",
        score_images,
        {"images": torch.zeros(1, 1, 1, 3).expand(1025, 1, 1, 3)},
    ),
    "images of a huge size": (
        "ScoreImages",
        score_images,
        {"images": torch.zeros(1, 1, 1, 3).expand(1, 2**16, 2**16, 3)},
    ),
    "prompt too long": ("ScoreImages", score_images, {"prompt": "x" * 100_000}),
    "prompt with NUL": ("ScoreImages", score_images, {"prompt": "a\0b"}),
    "prompt with half a character": ("ScoreImages", score_images, {"prompt": "a\ud800b"}),
    "prompt line too long": ("ScoreImages", score_images, {"prompt": "a\n" + "x" * 2001}),
    "prompt list of another length": ("ScoreImages", score_images, {"prompt": ["a", "b", "c"]}),
    "prompt of a number": ("ScoreImages", score_images, {"prompt": 3}),
    "k of none": ("SelectBest", select, {"k": 0}),
    "k of too many": ("SelectBest", select, {"k": 10**9}),
    "scores of another length": ("SelectBest", select, {"scores": [0.5]}),
    "scores of nan": ("SelectBest", select, {"scores": [math.nan, math.nan]}),
    "scores of infinity": ("SelectBest", select, {"scores": [math.inf, 0.0]}),
    "scores of text": ("SelectBest", select, {"scores": ["high", "low"]}),
    "threshold above all": ("SelectBest", select, {"use_threshold": True, "threshold": 0.75}),
    "threshold of nan": ("SelectBest", select, {"use_threshold": True, "threshold": math.nan}),
    "rollout without latents": ("ScoreRollout", score_rollout, {"rollout": odd(latents=None)}),
    "rollout of two prompts": (
        "ScoreRollout",
        score_rollout,
        {"rollout": odd(latents=rollout.rollout.latents.expand(2, -1, -1, -1, -1))},
    ),
    "rollout of video": (
        "ScoreRollout",
        score_rollout,
        {"rollout": odd(latents=torch.zeros(1, count, 16, 5, 8, 8))},
    ),
    "vae of another model": ("ScoreRollout", score_rollout, {"vae": SimpleNamespace(latent_channels=4)}),
    "vae of video": ("ScoreRollout", score_rollout, {"vae": fake_vae([5, 8, 8, 3])}),
    "vae of one channel": ("ScoreRollout", score_rollout, {"vae": fake_vae([8, 8, 1])}),
    "rollout prompt too long": ("ScoreRollout", score_rollout, {"prompt": "x" * 2001}),
    "votes missing": ("ScoresFromValues", from_values, {"votes": ""}),
    "votes too few": ("ScoresFromValues", from_values, {"votes": "1, 2"}),
    "votes of words": ("ScoresFromValues", from_values, {"votes": "good, <b>bad</b>"}),
    "votes of infinity": ("ScoresFromValues", from_values, {"votes": votes.replace("0", "inf", 1)}),
    "votes beyond float": ("ScoresFromValues", from_values, {"votes": votes.replace("0", "1e39", 1)}),
    "votes without end": ("ScoresFromValues", from_values, {"votes": "1," * 100_000}),
    "votes and values": ("ScoresFromValues", from_values, {"values": [1.0] * count}),
    "values of infinity": (
        "ScoresFromValues",
        {"rollout": rollout, "votes": " "},
        {"values": [math.inf] * count},
    ),
    "pictures of another count": ("ScoresFromValues", from_values, {"pictures": good}),
    "scores of another rollout": (
        "Advantages",
        to_advantages,
        {"scores": dataclasses.replace(scores, values=scores.values[:, :-1])},
    ),
    "scores that judge nothing": (
        "Advantages",
        to_advantages,
        {"scores": dataclasses.replace(scores, values=scores.values * math.nan)},
    ),
    "infinite scores": (
        "Advantages",
        to_advantages,
        {"scores": dataclasses.replace(scores, values=scores.values / 0.0)},
    ),
    "rollout without branches": (
        "Advantages",
        to_advantages,
        {"rollout": odd(plan=deterministic), "scores": dataclasses.replace(scores, values=torch.zeros(2, 1))},
    ),
    "clamp of nan": ("Advantages", to_advantages, {"clamp": math.nan}),
    "clamp below zero": ("Advantages", to_advantages, {"clamp": -1.0}),
    "std_floor without end": ("Advantages", to_advantages, {"std_floor": math.inf}),
    "weights of zero": ("MixRewards", mixing, {"weight_1": 0.0, "weight_2": 0.0}),
    "weights that cancel": ("MixRewards", mixing, {"weight_1": 1.0, "weight_2": -1.0}),
    "weight of nan": ("MixRewards", mixing, {"weight_1": math.nan}),
    "weight without end": ("MixRewards", mixing, {"weight_2": 1e30}),
    "reward of a path": ("LoadReward", {"reward": "../../secret"}, {}),
}
spoken: dict[str, str] = {}
for name, (node, inputs, changes) in hostile.items():
    graph: dict[str, Any] = {}
    for key, value in {**inputs, **changes}.items():
        graph[key] = thing(key, value, many=isinstance(value, list))
    graph["block"] = block(node, **{key: [key, 0] for key in graph})
    ran = comfy_side.run_prompt(graph, {"out": ("block", 0)})
    spoken[name] = ran.error or str(ran.problems or "")
answers["hostile"] = spoken

# And the widgets themselves. Core refuses numbers out of bounds, but 0.3.64 lets any text pass as a choice:
# the block must refuse it.
refused = {}
for name, (node, widgets) in {
    "reward": ("LoadReward", {"reward": "../../secret"}),
    "k": (
        "SelectBest",
        {"k": 0, "use_threshold": False, "threshold": 0.0, "images": ["images", 0], "scores": ["scores", 0]},
    ),
    "clamp": (
        "Advantages",
        {"rollout": ["r", 0], "scores": ["s", 0], "clamp": -1.0, "std_floor": 0.0, "per_branch": False},
    ),
}.items():
    graph = {
        "images": thing("images", good),
        "scores": thing("scores", [0.5, 0.5], many=True),
        "r": thing("r", rollout),
        "s": thing("s", scores),
    }
    ran = comfy_side.run_prompt({**graph, "block": block(node, **widgets)}, {"out": ("block", 0)})
    refused[name] = not ran.ok
answers["refused"] = refused

# Random inputs: a result or a ValueError of our own, never another exception.
rng, strange, outcomes = random.Random(0), [], {"ok": 0, "refused": 0}
ALPHABET = "a1 ,;\n\t\0\ud800é日.-+eE_naif<>&\"'\\/"
SIZES = [0, *range(1, 9)]


def random_images() -> Any:
    """Make something like an IMAGE."""
    shape = [rng.choice(SIZES) for _ in range(rng.choice([3, 4, 4, 4, 4, 5]))]
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
