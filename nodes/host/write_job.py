"""A training run as a job for a worker: widgets and names become the sections of a recipe. Nothing here needs
ComfyUI, nor anything of the trainer.

    {"recipe": {section: {field: value}}, "settings": [], "models": {…}, "source": "graph"}

A job names what lies under somebody's models folder and never says where; its prompts are in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ...comfy_g2rpo import recipes
from ...comfy_g2rpo.blocks.block_settings import (
    ENCODERS,
    LARGE_FROM,
    NO_FILE,
    TINY_MODEL,
    block_fields,
    dtype_of,
)
from ...comfy_g2rpo.blocks.train_presets import WIDGETS, preset_numbers
from ...comfy_g2rpo.files.safe import FileError, finite, spelt_out
from ...comfy_g2rpo.files.spool import JobError, Spool, check_id
from ...comfy_g2rpo.run.pace import Pace
from ...comfy_g2rpo.run.setup import preview_shape
from .changed_settings import WIDGETS as NAMES
from .changed_settings import WIRES, Change, both, rewards, said, told, widgets_of
from .run_limits import Typed, check_recipe, price, read_prompts

SPOOL = "spool"
"""The spool's folder among the runs, whose name no run may have."""
IF_CHANGED = (NEW, ASK) = ("new", "ask")
"""What a name does that other settings have already: a job is never changed once it is handed over."""
MAX_WEIGHT = 1000.0
MAX_JOBS, MAX_NUMBER = 1000, 10_000
REWARD_NAME = re.compile(r"[\w.+-]{1,64}")


@dataclass(frozen=True)
class Model:
    """A model by names: the folder of models that has it, and what its file says."""

    folder: str
    name: str
    family: str
    parameters: int
    guidance_is_input: bool = False


@dataclass(frozen=True)
class Judge:
    """A reward as a recipe names it."""

    name: str
    weight: float = 1.0
    gate: float | None = None
    batch: int | None = None
    dtype: str | None = None

    def section(self, weighted: bool = True) -> dict[str, Any]:
        """Return its section of a recipe."""
        fields = {"gate": self.gate, "batch": self.batch, "dtype": self.dtype}
        given = {"weight": self.weight, **fields} if weighted else {}
        return {"name": self.name, **{key: value for key, value in given.items() if value is not None}}


@dataclass(frozen=True, kw_only=True)
class Order(Typed):
    """What is to be handed over: a block's widgets, and what stands behind its wires and names."""

    model: Model
    text_encoders: tuple[str, ...]
    vae: str
    reward: tuple[Judge, ...]
    heldout_reward: tuple[Judge, ...]
    mix: str


def job_of(order: Order) -> tuple[dict[str, Any], str]:
    """Return the job, and what it will cost, in words; ValueError names the widget that is wrong."""
    numbers = preset_numbers(order.preset, order.model.parameters, order.recipe)
    order = replace(order, **{name: numbers[name] for name in numbers if name in WIDGETS})
    fields, paced = block_fields(vars(order), numbers, order.changes)
    pace = Pace(**paced)
    trained, measured = judges(order)
    if len(trained) > 1:
        fields = {"mix": order.mix, **fields}
    made = recipes.recipe(order.recipe, **fields)
    check_recipe(made)
    preview_shape(pace, lambda width, height: (width, height))
    if made.warmup_steps and made.warmup_steps >= pace.steps:
        raise ValueError(
            f"changes: warmup_steps is {made.warmup_steps}, but steps is {pace.steps}; set it below that"
        )
    prompts = read_prompts(order.prompts, order.heldout_prompts, pace.seed)
    cost = price(made, pace, len(prompts.heldout), (order.width, order.height))
    if numbers:
        used = {**numbers, **paced, **fields}
        cost += f"; preset {order.preset}: " + ", ".join(f"{key} {said(used[key])}" for key in numbers)
    large = order.model.parameters >= LARGE_FROM
    sections = {
        "model": {**model_section(order), "schedule": "method" if "shift" in fields else "comfyui"},
        "memory": {"gradient_checkpointing": large},
        "lora": {name: getattr(order, name) for name in ("rank", "alpha", "targets")},
        "method": {"name": order.recipe, **fields},
        "rewards": [judge.section() for judge in trained],
        "heldout_rewards": measured,
        "prompts": {"train": list(prompts.train), "heldout": list(prompts.heldout)},
        "train": paced,
    }
    models = {"folder": order.model.folder, "model": order.model.name}
    models |= {"text_encoders": list(order.text_encoders), "vae": order.vae}
    return finite({"recipe": sections, "settings": [], "models": models, "source": "graph"}), cost


def model_section(order: Order) -> dict[str, Any]:
    """Return what a recipe says of the model beside where it lies."""
    section: dict[str, Any] = {"family": order.model.family, "dtype": dtype_of(order.model.parameters)}
    section |= {name: getattr(order, name) for name in ("width", "height", "guidance")}
    if order.model.folder == TINY_MODEL:
        section["max_sequence_length"] = 0
    if order.negative.strip() and order.model.guidance_is_input:
        raise ValueError(
            "negative: this model takes its guidance as an input and knows no negative prompt; leave it blank"
        )
    if order.negative.strip() and order.guidance > 1:
        section["negative_prompt"] = order.negative
    return section


def judges(order: Order) -> tuple[list[Judge], list[dict[str, Any]]]:
    """Return the rewards that are trained on, and the sections of those that only measure."""
    for widget, found in (("reward", order.reward), ("heldout_reward", order.heldout_reward)):
        for judge in found:
            if not REWARD_NAME.fullmatch(judge.name):
                raise ValueError(f"{widget}: {judge.name[:80]!a} is no name that a job can have; rename it")
            if not abs(judge.weight) <= MAX_WEIGHT:
                raise ValueError(
                    f"{widget}: {judge.name} has the weight {judge.weight:g}; at most {MAX_WEIGHT:g} is "
                    "allowed, lower it"
                )
    if not any(judge.weight for judge in order.reward):
        raise ValueError("reward: every weight is 0, so nothing is trained; give one of them another")
    # What weighs nothing and passes all only measures: recipes list that among the held-out rewards.
    idle = [judge for judge in order.reward if judge.weight == 0 and judge.gate is None]
    trained = [judge for judge in order.reward if judge not in idle]
    names = {judge.name for judge in trained}
    measured = {judge.name: judge for judge in (*idle, *order.heldout_reward)}
    for judge in order.heldout_reward:
        if judge.name in names and judge.weight != 1:
            raise ValueError(
                f"heldout_reward: {judge.name} is trained on and measured anyway, with weight 1; leave it out"
            )
    return trained, [replace(judge, gate=None).section(name not in names) for name, judge in measured.items()]


@dataclass(frozen=True)
class HandedOver:
    """A job that lies in the spool: its id, what is to be said, and whether it is new there."""

    job_id: str
    remark: str
    new: bool


def hand_over(
    spool: Spool, runs: Path, name: str, job: Mapping[str, Any], if_changed: str, again: bool = False
) -> HandedOver:
    """Write a job under a name, or under the first of its numbers that is free or has these very settings.

    A blank name is made of the settings. The same job is never written twice; `again` takes it up once more
    where it failed or was stopped. Raises ValueError in the words of the block.
    """
    first = name.strip() or name_of(job)
    remark = ""
    for job_id in islice(numbered(first), MAX_NUMBER):
        try:
            check_free_name(job_id)
            known = spool.job(job_id) if job_id in (ids := spool.ids()) else None
            if known is None and len(ids) >= MAX_JOBS:
                raise JobError(f"the spool holds {len(ids)} jobs; remove those that have ended from {SPOOL}")
            if known is None and not (runs / job_id).exists():
                return HandedOver(job_id, remark, spool.submit(job_id, job))
            if known == job:
                return HandedOver(job_id, remark, new=again and spool.again(job_id))
        except FileError as error:
            raise ValueError(f"run: {plain(error, spool)}") from error
        why = refusal(known, job)
        if if_changed != NEW:
            raise ValueError(f"run: {job_id} {why}; give another name, or set if_settings_changed to new")
        remark = remark or f"because {first} {why}"
    raise ValueError(f"run: all numbers of {first} are taken; give another name")


def numbered(name: str) -> Iterator[str]:
    """Yield a name, then name-2, name-3, …"""
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1


def check_free_name(job_id: str) -> None:
    """Refuse what is no name of a job, or stands for something else; JobError."""
    if check_id(job_id) in (SPOOL, "newest"):
        raise JobError(f"{job_id} stands for something else; give another name")


def plain(error: Exception, spool: Spool) -> str:
    """Tell an error about the spool without its path."""
    return str(error).replace(f"{spool.path}{os.sep}", "").replace(str(spool.path), SPOOL)


def refusal(known: Mapping[str, Any] | None, job: Mapping[str, Any]) -> str:
    """Say why a name cannot be had."""
    if known is None:
        return "is the name of another run"
    changes = job_changes(known, job)
    return f"was handed over with other settings ({told(changes) or widgets_of(changes) or 'models'})"


def job_changes(known: Mapping[str, Any], job: Mapping[str, Any]) -> list[Change]:
    """List what a job says otherwise than another one, by the block's widgets."""
    changes = []
    for name, widget in (("model", "model"), ("text_encoders", ENCODERS[0]), ("vae", "vae")):
        before, now = (spelt_out(each.get("models")).get(name) for each in (known, job))
        if before != now:
            changes.append(Change(f"models.{name}", widget, both(name, before, now)))
    was, now = spelt_out(known.get("recipe")), job["recipe"]
    for section in now:
        if section in WIRES:
            if was.get(section) != now[section]:
                text = f"{rewards(was.get(section))} → {rewards(now[section])}"
                changes.append(Change(section, WIRES[section], text))
            continue
        old, new = spelt_out(was.get(section, {})), now[section]
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                field = f"{section}.{key}"
                widget = {"negative_prompt": "negative"}.get(key, NAMES.get(field, key))
                changes.append(Change(field, widget, both(key, old.get(key), new.get(key))))
    return changes


def name_of(job: Mapping[str, Any]) -> str:
    """Return the name of a job by its content."""
    content = json.dumps(job, sort_keys=True).encode()
    return f"{job['recipe']['method']['name']}-{hashlib.blake2b(content, digest_size=4).hexdigest()}"


def chosen_files(names: Sequence[str]) -> tuple[str, ...]:
    """Return the files among the choices, each once."""
    return tuple(dict.fromkeys(name for name in names if name != NO_FILE))
