"""What the service takes: the sections of a recipe, strictly typed, with names where they have paths.

A name is looked up below the folders that whoever runs the service has named, and among the files that come
with the program. What could run code, open a connection or write elsewhere is no field here at all.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from comfy_g2rpo.blocks.block_settings import TINY_MODEL
from comfy_g2rpo.files.spool import NAME, JobError, check_id

from ..config.bundled import bundled_folder
from ..config.comfyui_models import LONGEST
from ..config.reading import Config, apply_overrides, from_dict, model_folder
from ..config.reward_checks import VOTES, rewards_root
from ..jobs.graph_job import MAX_PROMPTS, Owner, may_set

MAX_DEPTH = 8
MAX_ITEMS, MAX_TEXT = 64, 2000
FILES = {
    *(f"model.{name}" for name in ("path", "transformer", "text_encoders", "vae", "tokenizers")),
    *("model.lora.path", "lora.init", "prompts.train", "prompts.heldout", "pairs.runs"),
    *("rewards.reference", "heldout_rewards.reference"),
}
"""Fields that name files or folders, without places in lists."""
JUDGE = ("path", "url", "protocol", "model", "question", "timeout", "retries", "concurrency")
REFUSED = {
    *("out", "report.project"),
    *(f"{part}.{name}" for part in ("rewards", "heldout_rewards") for name in JUDGE),
}
"""Fields that are not taken: foreign code, foreign addresses, places to write to."""
PART = r"[A-Za-z0-9_][A-Za-z0-9_ .+-]*"
"""A part of a name: neither `..` nor hidden."""
HUB = re.compile(rf"{PART}/{PART}")
SETTING = re.compile(r"[a-z_]\w{0,40}(\.\w{1,40}){0,4}=.*", re.ASCII | re.DOTALL)

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Reads the same, ten times as fast, where PyYAML was built with it."""
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(max_length=200, pattern=rf"^{PART}(/{PART})*$")]
FileName = Annotated[str, Field(max_length=LONGEST)]
RewardName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]{1,64}$")]


class RequestError(ValueError):
    """A job that is not taken, in one printable line that names the field and the remedy."""

    def __init__(self, words: str) -> None:
        super().__init__("".join(sign if sign.isprintable() else "?" for sign in words))


class Form(BaseModel):
    """A part of a request: closed, and of exactly these types."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


@dataclass(frozen=True)
class Rules:
    """How the form of a recipe differs from the recipe: fields that it lacks, and kinds that are others."""

    takes: Callable[[str], bool]
    kinds: Mapping[str, Any]
    title: str = ""


def strict(section: type[BaseModel], rules: Rules, prefix: str = "") -> type[BaseModel]:
    """Make the strict form of a section of a recipe."""
    fields = {
        name: _field(field, prefix + name, rules)
        for name, field in section.model_fields.items()
        if rules.takes(prefix + name)
    }
    parts = re.split(r"[._]", prefix)
    title = rules.title + "".join(part.capitalize() for part in parts) + "Section"
    return create_model(title, __base__=Form, __doc__=section.__doc__, **fields)


def _field(field: FieldInfo, place: str, rules: Rules) -> tuple[Any, Any]:
    """Make the strict form of a field: its kind, and its default with its sentence."""
    rule = field.json_schema_extra or {}
    bounds = {"ge": rule["low"], "le": rule["high"]} if "low" in rule else {}
    default = field.default
    if isinstance(default, (tuple, BaseModel)):
        default = list(default) if isinstance(default, tuple) else {}
    elif field.is_required():
        default = ...
    return _kind(field.annotation, place, bounds, rules), Field(default, description=field.description)


def _kind(kind: Any, place: str, bounds: Mapping[str, float], rules: Rules) -> Any:
    """Make the strict form of a kind: names for files, bounded texts, lists and numbers."""
    if place in rules.kinds:
        return rules.kinds[place]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return strict(kind, rules, f"{place}.")
    if kind is str:
        return Name if place in FILES else RewardName if place.endswith("rewards.name") else Text
    if kind in (int, float):
        return Annotated[kind, Field(ge=bounds.get("ge"), le=bounds.get("le"))]
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        item = _kind(parts[0], place, bounds, rules)
        if place in ("rewards", "heldout_rewards"):
            item = Union[RewardName, item]  # noqa: UP007
        if place == "rewards":
            return Annotated[list[item], Field(min_length=1, max_length=MAX_ITEMS)]
        return Annotated[list[item], Field(max_length=MAX_ITEMS)]
    if get_origin(kind) in (Union, UnionType):
        return Union[tuple(_kind(part, place, bounds, rules) for part in parts)]  # noqa: UP007
    return kind


TRACKERS = {"report.trackers": Annotated[list[Literal["tensorboard"]], Field(max_length=1)]}
RecipeForm = strict(Config, Rules(lambda place: place not in REFUSED, TRACKERS))
Prompts = Annotated[list[Text], Field(max_length=MAX_PROMPTS)]
GRAPH = Rules(may_set, {"prompts.train": Prompts, "prompts.heldout": Prompts}, "Graph")
GraphRecipeForm = strict(Config, GRAPH)


class JobRequest(Form):
    """A job: a recipe, and what differs from it."""

    id: Annotated[str, Field(pattern=f"^{NAME.pattern}$")] | None = Field(
        None, description="Name of the job; sent again, with the same content, it is the same job."
    )
    recipe: RecipeForm = Field(description="Sections of a recipe, such as model, rewards and prompts.")
    settings: list[Text] = Field(
        [], max_length=MAX_ITEMS, description="Changes such as method.eta=0.5, in order."
    )
    source: Annotated[str, Field(max_length=200)] = Field("", description="Who sends it, in your own words.")


class ModelsForm(Form):
    """The model of a graph's job, by names of files below the folders of models."""

    folder: Literal["checkpoints", "diffusion_models", TINY_MODEL] = Field(
        description="Kind of folder that has the model."
    )
    model: FileName = Field(description="File of the model there.")
    text_encoders: Annotated[list[FileName], Field(max_length=4)] = Field(
        [], description="Files among text_encoders."
    )
    vae: FileName = Field("", description="File among vae.")


class GraphForm(Form):
    """A job as the block Submit Training writes it: what to train, and models by name."""

    recipe: GraphRecipeForm = Field(description="Sections of a recipe; prompts are lists of texts.")
    settings: Annotated[list[Text], Field(max_length=0)] = Field([], description="Always empty.")
    models: ModelsForm = Field(description="The model by name.")
    source: Annotated[str, Field(max_length=200)] = Field("graph", description="Who made it.")


class GraphRequest(Form):
    """A job of a graph."""

    id: Annotated[str, Field(pattern=f"^{NAME.pattern}$")] = Field(
        description="Name of the job; sent again, with the same content, it is the same job."
    )
    graph: GraphForm = Field(description="The job.")
    again: Annotated[str, Field(max_length=40)] = Field(
        "", description="An end of this job (its `ended`): if that is its newest, it is tried once more."
    )


def read_json(content: bytes) -> Any:
    """Read JSON that has no key twice, no number beyond floats, and little depth."""
    try:
        text = content.decode("utf-8")
        if _depth(text) > MAX_DEPTH:
            raise RequestError(f"the body is nested more than {MAX_DEPTH} deep; send a recipe")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError("the body is not JSON in UTF-8") from error


def _depth(text: str) -> int:
    """Return how deep a text of JSON is nested."""
    depth = deepest = 0
    # A text that does not end is taken at once, too: else each of its signs would be tried as the first one.
    for sign in re.findall(r"[][{}]", re.sub(r'"(?:[^"\\]|\\.)*"?', "", text, flags=re.DOTALL)):
        depth += 1 if sign in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Make a table of keys that differ."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RequestError("a key stands twice in one table; make them one")
    return found


def _refuse(word: str) -> Any:
    """Refuse NaN and infinities, which JSON does not have."""
    raise RequestError(f"{word} is no number of JSON; send a finite one")


def _finite(text: str) -> float:
    """Read a number that a float can hold."""
    if not math.isfinite(number := float(text)):
        raise RequestError("a number is too large; send a finite one")
    return number


def validated(form: type[BaseModel], content: Any) -> BaseModel:
    """Check content by a form; RequestError names the first field that is wrong."""
    try:
        return form.model_validate_json(json.dumps(content))
    except ValidationError as error:
        # Of what may be a name or a section, the error inside the section says more.
        first = max(error.errors(include_url=False, include_input=False), key=lambda each: len(each["loc"]))
        place = ".".join(part for part in map(str, first["loc"]) if not part.endswith(("Section", "-str")))
        raise RequestError(f"{place or 'the body'}: {first['msg']}"[:300]) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError("the recipe holds what JSON has no word for; use texts and numbers") from error


@dataclass(frozen=True)
class Asked:
    """A job that is asked for: what the spool keeps of it, its id if it has one, and what is tried again."""

    job: dict[str, Any]
    id: str | None
    again: str = ""


def job_request(content: bytes) -> Asked:
    """Read a job from a body."""
    sent = read_json(content)
    if isinstance(sent, dict) and "graph" in sent:
        given = validated(GraphRequest, sent)
        asked = Asked(sent["graph"], given.id, given.again)
    else:
        given = validated(JobRequest, sent)
        check_settings(given.settings)
        job = {"recipe": sent["recipe"], "settings": given.settings, "source": given.source}
        asked = Asked(job, given.id)
    if asked.id is not None:
        try:
            check_id(asked.id)  # which knows names that Windows keeps for itself, too
        except JobError as error:
            raise RequestError(str(error)) from error
    return asked


def check_settings(settings: Sequence[str]) -> None:
    """Refuse settings that are none, or whose value could grow when it is read."""
    for text in settings:
        if not SETTING.fullmatch(text):
            raise RequestError(f"settings has {text[:40]!a}; write it as section.key=value")
        depth = deepest = 0
        try:
            for event in yaml.parse(text.partition("=")[2], LOADER):
                depth += isinstance(event, yaml.CollectionStartEvent)
                depth -= isinstance(event, yaml.CollectionEndEvent)
                deepest = max(deepest, depth)
                if isinstance(event, yaml.AliasEvent) or deepest > MAX_DEPTH:
                    raise RequestError(f"settings has {text[:40]!a}; write a plain value")
        except yaml.YAMLError as error:
            raise RequestError(f"settings has {text[:40]!a}, whose value is not YAML; mend it") from error


def is_of_graph(job: Mapping[str, Any]) -> bool:
    """Return whether a job of the spool is one of a graph."""
    return "models" in job


def check_job(job: Mapping[str, Any], roots: Sequence[Path], owner: Owner) -> None:
    """Refuse a job that could not be run here; RequestError."""
    if not is_of_graph(job):
        ready_job(job, roots)
        return
    try:
        owner.check(job)
    except ValueError as error:
        raise RequestError(without(str(error), [*roots, rewards_root().parent])) from error


def ready_job(job: Mapping[str, Any], roots: Sequence[Path]) -> dict[str, Any]:
    """Return a job with its settings in its recipe, and files for names; ValueError where it is refused."""
    check_settings(job["settings"])
    try:
        tree = apply_overrides(job["recipe"], job["settings"])
        validated(RecipeForm, tree)
        found = {name: _found(part, name, roots) for name, part in tree.items()}
        config = from_dict(found, near=Path(__file__).parent)
        if any(reward.name == VOTES for reward in (*config.rewards, *config.heldout_rewards)):
            raise RequestError("rewards has votes, and nobody votes here; name a reward that judges")
        model_folder(config.model.path, bool(config.model.transformer))
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(without(str(error), roots)) from error
    return {"recipe": found, "settings": []}


def _found(part: Any, place: str, roots: Sequence[Path]) -> Any:
    """Put files in the place of names, at any depth."""
    if isinstance(part, dict):
        return {name: _found(each, f"{place}.{name}", roots) for name, each in part.items()}
    if isinstance(part, list):
        return [_found(each, place, roots) for each in part]
    return find_name(part, place, roots) if place in FILES and isinstance(part, str) else part


def find_name(name: str, field: str, roots: Sequence[Path]) -> str:
    """Find what a name stands for below the roots, or among the bundled files; links lead nowhere else."""
    kind, _, rest = name.partition("/")
    bundled = [(bundled_folder(kind), rest)] if kind in ("models", "prompts") and rest else []
    for root, part in [*((root, name) for root in roots), *bundled]:
        place = (root / part).resolve()
        if place.exists() and place.is_relative_to(root.resolve()):
            return str(place)
    if field == "model.path" and HUB.fullmatch(name):
        return name
    raise RequestError(f"{field} is {name!a}, which is in no folder of this service (--models)")


def without(text: str, roots: Sequence[Path]) -> str:
    """Return a line without the places of this machine's folders."""
    for root in sorted((*roots, bundled_folder("models").parent), key=lambda root: -len(str(root))):
        text = text.replace(f"{root.resolve()}/", "").replace(f"{root}/", "")
    return " ".join(text.split())[:600]
