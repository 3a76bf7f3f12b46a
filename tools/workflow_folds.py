"""What the workflows fold into one node: core's loaders, encoders and samplers, which everybody knows."""

from __future__ import annotations

from workflow_graph import Fold, Graph, Node, Socket
from workflow_parts import (
    FLUX,
    STEP,
    TINY,
    Family,
    Model,
    against,
    branching,
    empty,
    encode,
    guide,
    load,
    named_files,
    next_column,
    promote_files,
    reward,
    sample,
    schedule,
    submit,
    training,
    write_prompt,
)

VOTE_STEPS, VOTE_GROUP = "1,3", 6  # twelve pictures: what a person still compares
SEARCHES = ("best of n", "coarse first", "particles")
FASTER = 3  # times the learning rate, for a person makes few updates


def draw_images(graph: Graph, family: Family) -> Fold:
    """Fold core's usual way from a prompt to pictures."""
    inner = graph.fold("Draw images")
    next_column(inner)
    model = load(inner, family)
    text = write_prompt(inner, family)
    next_column(inner)
    positive = encode(inner, family, model.clip, text)
    negative = against(inner, family, model.clip, positive)
    latent = empty(inner, family, 8)
    inner.promote(latent, "batch_size", "how many")
    next_column(inner)
    wires = {"model": model.model, "positive": positive, "negative": negative}
    sampler = sample(inner, family, wires | {"latent_image": latent["LATENT"]}, 7)
    inner.promote(sampler, "seed", "seed")
    promote_files(inner, model)
    next_column(inner)
    pictures = inner.add("VAEDecode", {"samples": sampler["LATENT"], "vae": model.vae})
    inner.give("images", pictures["IMAGE"])
    inner.give("prompt", text)
    return inner


def judges(graph: Graph, family: Family) -> Fold:
    """Fold two rewards and their mix."""
    inner = graph.fold("Judge: two rewards, mixed")
    next_column(inner)
    wires = {}
    for i, (name, _) in enumerate(family.rewards, 1):
        loaded = inner.add("G2RPO_LoadReward", {"reward": name})
        wires[f"reward_{i}"] = loaded["reward"]
        inner.promote(loaded, "reward", f"reward {i}")
    next_column(inner)
    weights = {f"weight_{i}": weight for i, (_, weight) in enumerate(family.rewards, 1)}
    mixed = inner.add("G2RPO_MixRewards", wires | weights)
    for weight in weights:
        inner.promote(mixed, weight, weight.replace("_", " "))
    inner.give("reward", mixed["reward"])
    return inner


def model_and_prompt(graph: Graph, family: Family) -> Fold:
    """Fold what a rollout starts from."""
    inner = graph.fold("Model and prompt")
    next_column(inner)
    model = load(inner, family)
    text = write_prompt(inner, family)
    starts(inner, family, model, model.model, text, 5)
    return inner


def model_and_lora(graph: Graph, family: Family, run: str) -> Fold:
    """Fold what a rollout with a LoRA that learns starts from."""
    inner = graph.fold("Model, LoRA and prompt")
    next_column(inner)
    model = load(inner, family)
    text = write_prompt(inner, family)
    next_column(inner)
    learner = policy(inner, family, model.model, family.learning_rate, run)
    inner.promote(learner, "run", "run")
    inner.give("policy", learner["policy"])
    starts(inner, family, model, learner["model"], text, learner["step"])
    return inner


def policy(graph: Graph, family: Family, model: Socket, rate: float, run: str | Socket) -> Node:
    """Add the LoRA that a graph trains by itself."""
    settings = {"rank": family.rank, "alpha": float(family.rank), "learning_rate": rate, "run": run}
    return graph.add("G2RPO_LoRAPolicy", {"model": model} | settings)


def starts(
    inner: Fold, family: Family, model: Model, sampled: Socket, text: Socket, seed: int | Socket
) -> None:
    """Add guider, noise, noise levels and latent, and give them to the graph around."""
    next_column(inner)
    positive = encode(inner, family, model.clip, text)
    negative = against(inner, family, model.clip, positive) if family.cfg > 1 else None
    next_column(inner)
    guider = guide(inner, family, sampled, positive, negative)
    noise = inner.add("RandomNoise", {"noise_seed": seed})
    sigmas = schedule(inner, family, sampled)
    latent = empty(inner, family)["LATENT"]
    if isinstance(seed, int):
        inner.promote(noise, "noise_seed", "seed")
    promote_files(inner, model)
    given = {"vae": model.vae, "prompt": text, "guider": guider, "noise": noise["NOISE"]}
    for name, socket in (given | {"sigmas": sigmas, "latent": latent}).items():
        inner.give(name, socket)


def prompt_and_guidance(graph: Graph, family: Family) -> Fold:
    """Fold what a search starts from, with the strength of guidance in sight."""
    inner = graph.fold("Model, prompt and guidance")
    next_column(inner)
    model = load(inner, family)
    text = write_prompt(inner, family)
    next_column(inner)
    positive = encode(inner, family, model.clip, text)
    if family is FLUX:
        inner.promote(inner.nodes[-1], "guidance", "guidance")
        negative = None
    else:
        blank = {"clip": model.clip, "text": ""}
        below(inner, 1, 280)
        negative = inner.add("CLIPTextEncode", blank, "Negative prompt")["CONDITIONING"]
    next_column(inner)
    guider = guide(inner, family, model.model, positive, negative)
    if negative is not None:
        inner.promote(inner.nodes[-1], "cfg", "guidance")
    last = round(inner.columns[-1].x / STEP)
    below(inner, last, 200)
    noise = inner.add("RandomNoise", {"noise_seed": 3})
    inner.promote(noise, "noise_seed", "seed")
    promote_files(inner, model)
    below(inner, last, 360)
    given = {"guider": guider, "noise": noise["NOISE"], "sigmas": schedule(inner, family, model.model)}
    below(inner, last, 560)
    given |= {"latent": empty(inner, family)["LATENT"], "vae": model.vae, "prompt": text}
    for name, socket in given.items():
        inner.give(name, socket)
    return inner


def searched_and_measured(graph: Graph, family: Family) -> Fold:
    """Fold the reward that is searched, and another one that is only measured."""
    inner = graph.fold("Rewards")
    next_column(inner)
    for name, label in ((family.searched, "searched"), (family.unsearched, "only measured")):
        loaded = inner.add("G2RPO_LoadReward", {"reward": name})
        inner.promote(loaded, "reward", label)
        inner.give(label.removeprefix("only "), loaded["reward"])
    return inner


def searches(graph: Graph, family: Family) -> Fold:
    """Fold an ordinary image and three searches at one budget from the same noise."""
    inner = graph.fold("Three Search Samplers")
    taken = {"guider": "GUIDER", "noise": "NOISE", "sigmas": "SIGMAS", "latent": "LATENT", "vae": "VAE"}
    taken |= {"prompt": "STRING", "searched": "G2RPO_REWARD", "measured": "G2RPO_REWARD"}
    wires = {name: inner.take(name, kind) for name, kind in taken.items()}
    start = {name: wires[name] for name in ("guider", "noise", "sigmas")} | {"latent_image": wires["latent"]}
    below(inner, 0, 0)
    euler = inner.add("KSamplerSelect", {"sampler_name": "euler"})
    below(inner, 0, 130)
    budget = inner.add("PrimitiveInt", {"value": family.search_images * family.forwards}, "Budget")
    inner.promote(budget, "value", "budget")
    below(inner, 0, 290)
    names = "\n".join(("ordinary", *SEARCHES))
    names = inner.add("PrimitiveStringMultiline", {"value": names}, "Names")
    below(inner, 1, 0)
    plain = inner.add("SamplerCustomAdvanced", start | {"sampler": euler["SAMPLER"]}, "Ordinary sampling")
    settings = {"vae": wires["vae"], "reward": wires["searched"], "prompt": wires["prompt"]}
    settings |= {"budget": budget["INT"]}
    settings |= {"slots": family.slots, "judge_at": family.judge_at, "strength": family.strength}
    below(inner, 2, 0)
    images = inner.add("VAEDecode", {"samples": plain["output"], "vae": wires["vae"]})["IMAGE"]
    for i, method in enumerate(SEARCHES, 1):
        below(inner, i, 260)
        way = {"method": method}
        found = inner.add("G2RPO_SearchSampler", start | settings | way)["images"]
        below(inner, i + 2, 0)
        images = inner.add("ImageBatch", {"image1": images, "image2": found})["IMAGE"]
    inner.give("images", images)
    if family is TINY:
        next_column(inner)
        # Pages draw small images no larger than they are.
        large = {"image": images, "upscale_method": "bicubic", "scale_by": 4.0}
        inner.give("shown", inner.add("ImageScaleBy", large)["IMAGE"])
    inner.give("names", names["STRING"])
    judged_by(inner, wires)
    return inner


def judged_by(inner: Fold, wires: dict[str, Socket]) -> None:
    """Hand on what the images are judged by: the prompt, and both rewards, of which the first one ranks."""
    below(inner, 0, 460)
    inner.give("prompt", inner.add("StringTrim", {"string": wires["prompt"], "mode": "Both"})["STRING"])
    below(inner, 0, 700)
    both = {"reward_1": wires["searched"], "reward_2": wires["measured"]}
    mixed = inner.add("G2RPO_MixRewards", both | {"weight_1": 1.0, "weight_2": 0.0, "mix": "sum"})
    inner.give("reward", mixed["reward"])


def below(graph: Graph, column: int, top: int) -> None:
    """Go on in a column of a folded graph, far enough down for nodes whose heights are not known."""
    graph.column(STEP * column, 300, top)


def draw_group(graph: Graph, family: Family) -> Fold:
    """Fold everything that stands before the vote."""
    inner = graph.fold("Draw twelve images")
    next_column(inner)
    model = load(inner, family)
    text = write_prompt(inner, family)
    run = inner.add("PrimitiveString", {"value": f"{family.name}-vote"}, "Run")
    inner.promote(run, "value", "run")
    next_column(inner)
    learner = policy(inner, family, model.model, FASTER * family.learning_rate, run["STRING"])
    positive = encode(inner, family, model.clip, text)
    negative = against(inner, family, model.clip, positive)
    next_column(inner)
    guider = guide(inner, family, learner["model"], positive, negative if family.cfg > 1 else None)
    wires = {"guider": guider, "noise": inner.add("RandomNoise", {"noise_seed": learner["step"]})["NOISE"]}
    wires |= {"sigmas": schedule(inner, family, learner["model"])}
    wires |= {"latent_image": empty(inner, family)["LATENT"]}
    next_column(inner)
    settings = branching(family, "1") | {"branch_steps": VOTE_STEPS, "group_size": VOTE_GROUP}
    tree = inner.add("G2RPO_Rollout", wires | settings)
    next_column(inner)
    pictures = inner.add("VAEDecode", {"samples": tree["completions"], "vae": model.vae})
    promote_files(inner, model)
    given = {"policy": learner["policy"], "positive": positive, "negative": negative, "vae": model.vae}
    given |= {"rollout": tree["rollout"], "pictures": pictures["IMAGE"], "prompt": text, "run": run["STRING"]}
    for name, socket in given.items():
        inner.give(name, socket)
    return inner


def learn(graph: Graph, family: Family) -> Fold:
    """Fold the update and a picture after it."""
    inner = graph.fold("Learn from the votes")
    next_column(inner)
    taken = {"policy": "G2RPO_POLICY", "positive": "CONDITIONING", "negative": "CONDITIONING", "vae": "VAE"}
    taken |= {"rollout": "G2RPO_ROLLOUT", "scores": "G2RPO_SCORES"}
    wires = {name: inner.take(name, kind) for name, kind in taken.items()}
    worth = inner.add("G2RPO_Advantages", {"rollout": wires["rollout"], "scores": wires["scores"]})
    latent = empty(inner, family)["LATENT"]
    next_column(inner)
    learner = {"policy": wires["policy"], "advantages": worth["advantages"]}
    updated = inner.add("G2RPO_UpdateLoRA", learner | {"micro_batch": family.micro_batch})
    next_column(inner)
    conditioning = {"positive": wires["positive"], "negative": wires["negative"], "latent_image": latent}
    sampler = sample(inner, family, {"model": updated["model"]} | conditioning, 1)
    inner.promote(sampler, "seed", "seed of the picture")
    next_column(inner)
    pictures = inner.add("VAEDecode", {"samples": sampler["LATENT"], "vae": wires["vae"]})
    inner.give("images", pictures["IMAGE"])
    inner.give("lora", updated["lora"])
    return inner


def one_image(graph: Graph, family: Family) -> Fold:
    """Fold an image of a model that has learned."""
    inner = graph.fold("Draw an image")
    next_column(inner)
    taken = {"model": "MODEL", "clip": "CLIP", "vae": "VAE"}
    wires = {name: inner.take(name, kind) for name, kind in taken.items()}
    text = write_prompt(inner, family)
    next_column(inner)
    positive = encode(inner, family, wires["clip"], text)
    negative = against(inner, family, wires["clip"], positive)
    latent = empty(inner, family)["LATENT"]
    next_column(inner)
    conditioning = {"positive": positive, "negative": negative, "latent_image": latent}
    sampler = sample(inner, family, {"model": wires["model"]} | conditioning, 1)
    inner.promote(sampler, "seed", "seed")
    next_column(inner)
    pictures = inner.add("VAEDecode", {"samples": sampler["LATENT"], "vae": wires["vae"]})
    inner.give("images", pictures["IMAGE"])
    return inner


def train_folded(graph: Graph, family: Family, title: str) -> Fold:
    """Fold Train LoRA: its node is taller than a page, and few of its settings are touched often."""
    inner = graph.fold(title)
    next_column(inner)
    taken = {"model": "MODEL", "clip": "CLIP", "vae": "VAE", "reward": "G2RPO_REWARD"}
    wires = {
        name: inner.take(name, kind) for name, kind in (taken | {"heldout_reward": taken["reward"]}).items()
    }
    trained = inner.add("G2RPO_TrainLoRA", wires | training(family, family.steps))
    shown = {"prompts": "prompts", "heldout_prompts": "held-out prompts", "steps": "steps"}
    for name, label in (shown | {"learning_rate": "learning rate", "run": "run"}).items():
        inner.promote(trained, name, label)
    for name in ("model", "lora", "run"):
        inner.give(name, trained[name])
    return inner


def submit_folded(graph: Graph, family: Family, title: str) -> Fold:
    """Fold Submit Training, which is as tall as Train LoRA."""
    inner = graph.fold(title)
    next_column(inner)
    wires = {name: inner.take(name, "G2RPO_REWARD") for name in ("reward", "heldout_reward")}
    handed = submit(inner, family, wires)
    shown = {"prompts": "prompts", "heldout_prompts": "held-out prompts", "steps": "steps"}
    for name, label in (shown | {"learning_rate": "learning rate", "run": "run"}).items():
        inner.promote(handed, name, label)
    for name, label in named_files(family):
        inner.promote(handed, name, label)
    inner.give("run", handed["run"])
    return inner


def train_short(graph: Graph, family: Family) -> Fold:
    """Fold Train LoRA with its held-out reward, to be compared with the model as it was."""
    inner = graph.fold("Train, or take the finished run")
    next_column(inner)
    taken = {"model": "MODEL", "clip": "CLIP", "vae": "VAE", "reward": "G2RPO_REWARD"}
    wires = {name: inner.take(name, kind) for name, kind in taken.items()}
    wires["heldout_reward"] = reward(inner, family.watch)
    next_column(inner)
    trained = inner.add("G2RPO_TrainLoRA", wires | training(family, family.steps))
    for name in ("steps", "run"):
        inner.promote(trained, name, name)
    for name in ("model", "lora", "run"):
        inner.give(name, trained[name])
    return inner
