"""A recipe as a workflow: the block Train LoRA with the recipe's settings, and what it hangs on.

What the graph cannot say is found by reading it back: any setting that comes out differently is named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfy_g2rpo import recipes
from comfy_g2rpo.blocks.block_settings import LARGE_FROM, block_fields
from comfy_g2rpo.blocks.reward_mix import MAX_WEIGHT, PALETTE
from comfy_g2rpo.prompts import Prompts, columns_of, image_of
from comfy_g2rpo.rewards import REWARDS
from comfy_g2rpo.rewards.likeness import KINDS
from comfy_g2rpo.run.pace import FIELDS as PACE
from comfy_g2rpo.run.pace import Pace

from ..config.bundled import bundled_folder
from ..config.comfyui_models import FOLDERS
from ..config.file_checks import parameters_of, read_prompts
from ..config.reading import Config, make_pace, make_recipe
from ..config.recipe_fields import spelt
from ..config.reward_checks import VOTES
from ..config.sections import RewardSection
from ..rewards import ocr
from .graph_canvas import Canvas, Socket, written
from .graph_file import WorkflowError
from .graph_models import CHECKPOINT, CLIP_WIDGETS, TINY
from .graph_rewards import LOAD, MIX, MIXED, REFERENCE
from .model_files import FAMILY_FACTS, Facts, ModelFolders
from .page_graph import PageGraph
from .training_recipe import BLOCK, recipe_of, training_block

MOST = {"steps": 100_000, "prompts_per_step": 1024, "slots": 4096, "eval_every": 100_000}
"""Where the block's widgets end before the recipe's fields do; more goes into changes."""
LEAST_ALPHA, BATCH, MOST_GUIDANCE = 0.01, 256, 30.0
"""Other ends of widgets."""


@dataclass(frozen=True)
class WrittenWorkflow:
    """A workflow's JSON, and what of the recipe it does not say, a line each."""

    text: str
    unsaid: list[str]


@dataclass(frozen=True)
class KnownFiles(ModelFolders):
    """The files that a written graph names, so that it can be read back where they do not lie."""

    names: dict[str, str] = field(default_factory=dict)
    told: Facts | None = None

    def find(self, kind: str, name: str, asked: str) -> str:
        """Return the file that was meant."""
        return self.names.get(name, name)

    def picture(self, name: str, asked: str) -> str:
        """Return the picture that was meant."""
        return self.names.get(name, name)

    def facts(self, path: str, asked: str) -> Facts:
        """Return what the recipe says of its model."""
        assert self.told is not None
        return self.told

    def reads_long_text(self, paths: Sequence[str]) -> bool:
        """Suppose the usual text encoders."""
        return True

    def called(self, path: str) -> str:
        """Return a file's name, and remember which file it is."""
        parts = Path(path).parts
        known = {folder for folders in FOLDERS.values() for folder in folders}
        # ComfyUI's names go on below the folder of a kind of files.
        below = next((parts[-i:] for i in range(1, len(parts)) if parts[-i - 1] in known), parts[-1:])
        name = "/".join(below)
        self.names[name] = path
        return name


def written_workflow(config: Config, name: str) -> WrittenWorkflow:
    """Write a recipe, which `name` calls."""
    canvas, prompts = Canvas(), read_prompts(config)
    files = KnownFiles(told=_facts(config))
    if any(map(image_of, (*prompts.train, *prompts.heldout))):
        raise WorkflowError("its prompts start from pictures, and blocks take texts alone; use: g2rpo train")
    unsaid = [f"reward {each.name}: {why}" for each in _all_rewards(config) if (why := _no_block(each))]
    canvas.column()
    wires = _loaders(canvas, config, files)
    wires |= _reward_wires(canvas, config, files)
    canvas.column()
    run = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.out).name if config.out else name)
    values = {**wires, **_widgets(config, prompts), "run": run.strip("._-")[:64].rstrip(".")}
    canvas.add(BLOCK, values, "Train LoRA on a Reward (G²RPO)")
    graph = PageGraph(canvas.tree(name))
    back = recipe_of(graph, training_block(graph), files)
    unsaid += differences(config, Config.model_validate(back.tree), prompts)
    canvas.column()
    canvas.note(_note(name, unsaid))
    return WrittenWorkflow(written(canvas.tree(name)), unsaid)


def _note(name: str, unsaid: Sequence[str]) -> str:
    lines = [
        f"**The recipe {name} as a graph.** Choose your model files in the loaders.",
        "Press **Run** to train here, or train without ComfyUI: *g2rpo run* and this file's name.",
    ]
    if unsaid:
        lines.append("**What the graph does not say:**\n\n" + "\n".join(f"- {line}" for line in unsaid))
    return "\n\n".join(lines)


def _is_tiny(config: Config) -> bool:
    tiny = bundled_folder("models") / "tiny"
    return config.model.path is not None and Path(config.model.path).resolve() == tiny.resolve()


def _facts(config: Config) -> Facts:
    """Return what is known of the recipe's model: by its file, or as the usual file of its family is."""
    section = config.model
    file = section.transformer or section.path
    if file and Path(file).is_file():
        return ModelFolders().facts(file, "the recipe")
    usual = FAMILY_FACTS[section.family]
    return Facts(section.family, bool(usual.get("guided")), parameters_of(section) or int(LARGE_FROM))


def _loaders(canvas: Canvas, config: Config, files: KnownFiles) -> dict[str, Socket]:
    """Add what loads the model."""
    section, usual = config.model, FAMILY_FACTS[config.model.family]
    if _is_tiny(config):
        model, clip, vae = canvas.add(TINY, {})
        return {"model": _loras(canvas, config, files, model), "clip": clip, "vae": vae}
    own = section.path if section.path and Path(section.path).is_file() else None
    lacks = not section.transformer or not section.text_encoders or not section.vae
    checkpoint = own or (usual.get("checkpoint") if lacks else None)
    found: dict[str, Socket] = {}
    if checkpoint:
        parts = canvas.add(CHECKPOINT, {"ckpt_name": files.called(checkpoint)})
        found = dict(zip(("model", "clip", "vae"), parts, strict=True))
    if file := section.transformer or (None if checkpoint else usual["transformer"]):
        kept = "fp8_e4m3fn" if config.memory.quantization == "fp8" else "default"
        (found["model"],) = canvas.add("UNETLoader", {"unet_name": files.called(file), "weight_dtype": kept})
    if texts := section.text_encoders or (() if checkpoint else tuple(usual["text_encoders"])):
        texts = texts[: len(CLIP_WIDGETS)]
        kind = list(CLIP_WIDGETS)[len(texts) - 1]
        names = dict(zip(CLIP_WIDGETS[kind], map(files.called, texts), strict=True))
        device = "cpu" if config.memory.text_encoders == "cpu" else "default"
        (found["clip"],) = canvas.add(kind, {**names, "type": usual["clip_type"], "device": device})
    if file := section.vae or (None if checkpoint else usual["vae"]):
        (found["vae"],) = canvas.add("VAELoader", {"vae_name": files.called(file)})
    return {**found, "model": _loras(canvas, config, files, found["model"])}


def _loras(canvas: Canvas, config: Config, files: KnownFiles, model: Socket) -> Socket:
    """Add the LoRAs that belong to the model."""
    for each in config.model.lora:
        values = {"model": model, "lora_name": files.called(each.path), "strength_model": each.strength}
        (model,) = canvas.add("LoraLoaderModelOnly", values)
    return model


def _all_rewards(config: Config) -> Iterator[RewardSection]:
    yield from config.rewards
    yield from (each for each in config.heldout_rewards if each.name not in {r.name for r in config.rewards})


def _no_block(reward: RewardSection) -> str:
    """Say why no block gives a reward."""
    if reward.url:
        return "it asks a judge over HTTP, and no block does"
    if reward.path:
        return "it is your own code, and no block runs that"
    if reward.name == VOTES:
        return "people are asked in another graph, the template Train on my votes"
    return "it reads text, and no block does" if reward.name == ocr.NAME else ""


def _reward_wires(canvas: Canvas, config: Config, files: KnownFiles) -> dict[str, Socket]:
    """Add the rewards that are trained on and those that only measure."""
    made = {each.name: _reward(canvas, each, files) for each in _all_rewards(config) if not _no_block(each)}
    trained = [(each.name, each.weight) for each in config.rewards if each.name in made]
    if not any(weight for _, weight in trained):
        raise WorkflowError("no block gives what this recipe trains on; train it with: g2rpo train")
    gates = {_in_graph(each): each.gate for each in config.rewards if each.gate is not None}
    lines = "\n".join(f"{name} = {gate!r}" for name, gate in gates.items() if name)
    how = make_recipe(config).mix
    wires = {"reward": _mixed(canvas, trained, made, how, lines, "Rewards: what is trained")}
    held = [(each.name, each.weight) for each in config.heldout_rewards if each.name in made]
    if held:
        if not any(weight for _, weight in held):
            held[0] = (held[0][0], 1.0)  # the block wants one
        wires["heldout_reward"] = _mixed(canvas, held, made, how, "", "Held-out rewards: only measure")
    return wires


def _in_graph(reward: RewardSection) -> str:
    """Return what gates call a reward in the graph; blank for a picture, which is called by its pixels."""
    if reward.name == PALETTE and reward.palette:
        digest = hashlib.sha256(" ".join(reward.palette).lower().encode()).hexdigest()
        return f"{reward.name}-{digest[:8]}"
    return "" if reward.name in KINDS else reward.name


def _reward(canvas: Canvas, reward: RewardSection, files: KnownFiles) -> Socket:
    """Add a reward's block."""
    if reward.name == PALETTE:
        values: dict[str, Any] = {"kind": reward.name, "colours": ", ".join(reward.palette or ())}
        return canvas.add(REFERENCE, values)[0]
    if reward.name in KINDS:
        picture = canvas.add("LoadImage", {"image": files.called(reward.reference or "")})[0]
        return canvas.add(REFERENCE, {"kind": reward.name, "reference": picture})[0]
    values = {"reward": reward.name, "precision": reward.dtype}
    if reward.name not in REWARDS:
        values["batch"] = min(reward.batch, BATCH)
    return canvas.add(LOAD, values)[0]


def _mixed(
    canvas: Canvas,
    given: Sequence[tuple[str, float]],
    made: Mapping[str, Socket],
    how: str,
    gates: str,
    title: str,
) -> Socket:
    """Add what makes one reward of several; of more than a block takes, the last ones are a mix within."""
    parts = [(made[name], min(max(weight, -MAX_WEIGHT), MAX_WEIGHT)) for name, weight in given]
    if len(parts) == 1 and parts[0][1] == 1 and not gates:
        return parts[0][0]
    if len(parts) > MIXED:
        parts.sort(key=lambda part: abs(part[1]))  # a mix within must have a weight
    if len(parts) == 1:
        # The block wants two; the same reward twice counts once, with the sum of its weights.
        parts = [(parts[0][0], parts[0][1] / 2)] * 2
    while True:
        last = parts[-MIXED:] if len(parts) > MIXED else parts
        values: dict[str, Any] = {"mix": how, "gates": gates if last is parts else ""}
        for i, (socket, weight) in enumerate(last, 1):
            values |= {f"reward_{i}": socket, f"weight_{i}": weight}
        mixed = canvas.add(MIX, values, title)[0]
        if last is parts:
            return mixed
        parts = [*parts[:-MIXED], (mixed, 1.0)]


def _widgets(config: Config, prompts: Prompts) -> dict[str, Any]:
    """Return the block's widgets; what differs from what they mean goes into changes."""
    section, recipe, pace = config.model, make_recipe(config), make_pace(config)
    typed: dict[str, Any] = {name: min(getattr(pace, name), most) for name, most in MOST.items()}
    typed |= {"seed": pace.seed, "learning_rate": recipe.learning_rate}
    method, train = block_fields(typed, {}, "")
    mix = {"mix": recipe.mix} if len(config.rewards) > 1 else {}
    plain = recipes.recipe(config.method.name, **method, **mix)
    changed = {name: getattr(recipe, name) for name in recipes.FIELDS}
    changed = {name: value for name, value in changed.items() if value != getattr(plain, name)}
    if section.schedule == "method":
        changed["shift"] = recipe.shift
    usual = Pace(**train)
    lines = [(f"method.{name}" if name in PACE else name, value) for name, value in changed.items()]
    for name in PACE:
        if getattr(pace, name) != getattr(usual, name):
            lines.append((f"train.{name}" if name in recipes.FIELDS else name, getattr(pace, name)))
    guided = _facts(config).guided
    return typed | {
        "recipe": config.method.name,
        "prompts": "\n".join(prompts.train),
        "heldout_prompts": "\n".join(prompts.heldout),
        "negative": section.negative_prompt or "",
        "guidance": 1.0 if guided else min(max(section.guidance, 1.0), MOST_GUIDANCE),
        "width": section.width,
        "height": section.height,
        "rank": config.lora.rank,
        "alpha": max(config.lora.alpha, LEAST_ALPHA),
        "targets": config.lora.targets,
        "changes": "\n".join(f"{name} = {_line(value)}" for name, value in lines),
    }


def _line(value: Any) -> str:
    """Write a value as a line of changes has it."""
    if isinstance(value, tuple):
        return ", ".join(map(_line, value)) or "none"
    return repr(value) if isinstance(value, float) else spelt(value)


def differences(config: Config, back: Config, prompts: Prompts) -> list[str]:
    """Name every setting that is another in the graph."""
    lines = []
    mine, theirs = _flat(config), _flat(back)
    for name in dict.fromkeys((*mine, *theirs)):
        if mine.get(name) != theirs.get(name):
            lines.append(f"{name} is {_short(mine.get(name))} in the recipe, {_short(theirs.get(name))} here")
    again = read_prompts(back)
    if (prompts.train, prompts.heldout) != (again.train, again.heldout):
        here = f"{len(again.train)} and {len(again.heldout)} held-out ones here"
        lines.append(f"prompts: {len(prompts.train)} and {len(prompts.heldout)} held-out ones, {here}")
    if columns := sorted({key for each in (*prompts.train, *prompts.heldout) for key in columns_of(each)}):
        lines.append(f"prompts: only their texts are here, without {', '.join(columns)}")
    return lines


def _short(value: Any) -> str:
    return spelt(tuple(value) if isinstance(value, list) else value)[:80]


def _flat(config: Config) -> dict[str, Any]:
    """List what a recipe's results depend on, by dotted name; rewards by their own."""
    tree = config.model_dump(mode="json", exclude={"prompts", "out"})
    tree["method"] = {"name": config.method.name, **dataclasses.asdict(make_recipe(config))}
    if tree["model"]["schedule"] != "method":
        del tree["method"]["shift"]
    if _is_tiny(config):
        tree["model"]["path"] = "models/tiny"
    found: dict[str, Any] = {}
    for section, fields in tree.items():
        if isinstance(fields, list):
            for each in fields:
                found |= {f"{section}.{each['name']}.{key}": value for key, value in each.items()}
        else:
            found |= {f"{section}.{key}": value for key, value in fields.items()}
    return found
