"""A run's configuration: every field has a type, bounds and a sentence; what is unknown is refused with the nearest known name."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, create_model, field_validator
from pydantic_core import PydanticCustomError

from comfy_g2rpo import pace, recipes

from .families import FAMILIES, Schedule
from .rewards import VOTES, check_reward

GATED = ("black-forest-labs/", "stabilityai/")


class ConfigError(ValueError):
    """A configuration that cannot be run, in one line per mistake."""


class Section(BaseModel):
    """A part of the configuration: closed and unchangeable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where they would pass for 1 and 0."""
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise PydanticCustomError("other", "true or false")
        return value


class FrozenLora(Section):
    """A LoRA file that belongs to the model that is aligned."""

    path: str = Field(description="LoRA file of any form, added to the model before anything else; it is not trained.")
    strength: float = Field(1.0, ge=-100, le=100, description="Its strength, as in ComfyUI's loader.")


class ModelSection(Section):
    """The model that is aligned."""

    family: Literal[tuple(FAMILIES)] = Field("sd3", description="Kind of model.")
    path: str = Field(description="Folder of the model, or the name of one that the Hugging Face cache holds; nothing is downloaded.")
    transformer: str | None = Field(
        None, description="Single file whose transformer replaces the folder's, such as one of ComfyUI's models/diffusion_models (flux)."
    )
    lora: tuple[FrozenLora, ...] = Field((), description="LoRA files that the model already wears, and keeps.")
    guidance: float = Field(
        1.0, ge=0, le=50, description="Guidance; 1 is none, more doubles the cost of a forward; FLUX.1 takes it as an input."
    )
    width: int = Field(512, ge=16, le=4096, description="Width of the pictures in pixels.")
    height: int = Field(512, ge=16, le=4096, description="Height of the pictures in pixels.")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="Precision of the model; the method's own arithmetic is always fp32.")
    schedule: Schedule = Field(
        "method", description="Noise levels: by method.shift, or as the model's own pipeline (by resolution) or ComfyUI shifts them."
    )
    max_sequence_length: int = Field(256, ge=0, le=512, description="Tokens for the T5 encoder; 0 where the model has none.")


class LoraSection(Section):
    """The adapter that is trained."""

    rank: int = Field(16, ge=1, le=512, description="Rank of the adapter.")
    alpha: float = Field(16.0, gt=0, le=4096, description="Its scale is alpha / rank.")
    targets: Literal["attention", "attention+feed_forward"] = Field("attention", description="Layers that get an adapter.")
    init: str | None = Field(None, description="LoRA file to continue from.")


class RewardSection(Section):
    """A reward: built in, installed, your own (`path`), or a judge over HTTP (`url`)."""

    name: str = Field(description="Name of the reward; with path or url, what metrics call it.")
    path: str | None = Field(None, description="Your own reward, as rewards.py:function or package.module:object.")
    url: str | None = Field(None, description="Address of a judge over HTTP.")
    protocol: Literal["g2rpo", "yes_no", "rating", "pairwise"] = Field(
        "g2rpo", description="What the judge speaks: this project's protocol, or OpenAI's with a kind of question."
    )
    model: str | None = Field(None, description="Model that the judge is asked to use.")
    question: str | None = Field(None, description="Question to the judge; {prompt} stands for the prompt.")
    reference: str | None = Field(None, description="Picture to compare with; a prompt's own column of that name goes first.")
    palette: tuple[str, ...] | None = Field(None, description="Colours to compare with, such as ['#ff8800']; a prompt's own go first.")
    timeout: float = Field(60.0, ge=0.1, le=3600, description="Seconds to wait for an answer of the judge.")
    retries: int = Field(3, ge=0, le=20, description="Further attempts after a failed question.")
    concurrency: int = Field(8, ge=1, le=64, description="Questions that are asked at once.")
    batch: int = Field(32, ge=1, le=1024, description="Pictures that a reward model scores at once.")
    device: str = Field("auto", description="Where a reward model runs: auto, cpu, cuda, mps.")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="Precision of a reward model's trunk; its head is always fp32.")


class TrainedReward(RewardSection):
    """One of the rewards that are trained on."""

    weight: float = Field(1.0, ge=-1000, le=1000, description="Weight of its advantage; negative trains against it, 0 leaves its gate.")
    gate: float | None = Field(
        None, description="Score below which (above, for a negative weight) a picture is the worst of its group in every reward."
    )


class HeldoutReward(RewardSection):
    """One of the rewards that only measure."""

    weight: float = Field(
        1.0, ge=-1000, le=1000, description="Its say in the watch and in the choice of the best step; 0 has none, below 0 less is better."
    )


class PromptSection(Section):
    """Where prompts come from."""

    train: str = Field(description="File of prompts to train on: .txt, one per line, or .jsonl.")
    heldout: str | None = Field(None, description="File of prompts that only measure.")
    heldout_share: float = Field(0.0, ge=0, lt=1, description="Without a held-out file: share of the prompts that is set aside.")


def _field(field: dataclasses.Field[Any], annotation: Any, default: Any) -> tuple[Any, Any]:
    """Make a field of the configuration from one that documents itself: its type, bounds and sentence."""
    rule = field.metadata
    bounds = {"ge": rule["low"], "le": rule["high"]} if rule["low"] is not None else {}
    if rule["choices"]:
        annotation = Literal[rule["choices"]]
    elif get_origin(annotation) is tuple:
        annotation = tuple[Annotated[get_args(annotation)[0], Field(**bounds)], ...]
        bounds = {"min_length": 1}
    if default is None:
        annotation = annotation | None
    return annotation, Field(default, description=rule["help"], **({} if rule["choices"] else bounds))


MethodSection = create_model(
    "MethodSection",
    __base__=Section,
    __doc__="A named method and what differs from it.",
    name=(Literal[tuple(recipes.RECIPES)], Field("g2rpo", description="Method to start from.")),
    **{name: _field(recipes.FIELDS[name], kind, None) for name, kind in get_type_hints(recipes.Recipe).items()},
)

TrainSection = create_model(
    "TrainSection",
    __base__=Section,
    __doc__=pace.Pace.__doc__,
    **{name: _field(pace.FIELDS[name], kind, pace.FIELDS[name].default) for name, kind in get_type_hints(pace.Pace).items()},
)


class Config(Section):
    """All of a run."""

    model: ModelSection
    lora: LoraSection = LoraSection()
    method: MethodSection = MethodSection()
    rewards: tuple[TrainedReward, ...] = Field(min_length=1, description="Rewards to train on.")
    heldout_rewards: tuple[HeldoutReward, ...] = Field(
        (), description="Rewards that only measure, by name or as a section; those trained on are measured anyway."
    )
    prompts: PromptSection
    train: TrainSection = TrainSection()
    out: str | None = Field(None, description="Run folder; runs/<recipe> where it is not given.")

    @field_validator("heldout_rewards", mode="before")
    @classmethod
    def take_names(cls, value: Any) -> Any:
        """Take a name for a reward of that name."""
        return [{"name": item} if isinstance(item, str) else item for item in value] if isinstance(value, (list, tuple)) else value


def make_recipe(config: Config) -> recipes.Recipe:
    """Make the engine's recipe: the named one with the fields that the configuration sets."""
    changes = {name: value for name, value in config.method if name != "name" and value is not None}
    try:
        return recipes.recipe(config.method.name, **changes)
    except ValueError as error:
        raise ConfigError(f"method.{error}") from error


def make_pace(config: Config) -> pace.Pace:
    """Make the engine's pace."""
    return pace.Pace(**dict(config.train))


def load(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a recipe by path or by the name of a bundled one, with `section.key=value` overrides."""
    path = find_recipe(source)
    return from_dict(apply_overrides(read_yaml(path), overrides), near=path.parent)


def from_dict(tree: Mapping[str, Any], near: Path | None = None) -> Config:
    """Check a nested mapping; relative paths are looked up near the recipe, in the current folder and among the bundled files."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in _causes(error.errors()))) from error
    make_recipe(config)
    resolved = resolve_paths(config, near or Path())
    check_rewards(resolved)
    return resolved


def find_recipe(source: str | Path) -> Path:
    """Return a recipe's file."""
    path = Path(source)
    if path.is_file():
        return path
    known = {item.stem: item for item in bundled_folder("recipes").glob("*.yaml")}
    if str(source) in known:
        return known[str(source)]
    nearest = recipes.nearest(str(source), known)
    raise ConfigError(f"recipe {str(source)!r} is neither a file nor bundled{nearest}; bundled are: {', '.join(sorted(known))}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe file."""
    try:
        tree = yaml.safe_load(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {(error.strerror or str(error)).lower()}; check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {_yaml_problem(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} is not a recipe; it must have sections such as model, rewards and prompts")
    return tree


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the tree with every `a.b=value` set; values are YAML."""
    changed = dict(tree)
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"--set {override!r} has no value; write it as section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: the value is not YAML: {_yaml_problem(error)}") from error
        changed = _replaced(changed, key.strip().split("."), value)
    return changed


def _replaced(tree: Any, names: Sequence[str], value: Any) -> Any:
    """Copy a tree of mappings and lists with one value replaced."""
    name, *rest = names
    if isinstance(tree, list) and name.isdigit() and int(name) < len(tree):
        at, branch = int(name), list(tree)
        old = branch[at]
    else:
        at, branch = name, dict(tree) if isinstance(tree, Mapping) else {}
        old = branch.get(name)
    branch[at] = _replaced(old, rest, value) if rest else value
    return branch


def check_rewards(config: Config) -> None:
    """Refuse rewards that cannot be there, come twice or weigh nothing."""
    for part in ("rewards", "heldout_rewards"):
        names = [reward.name for reward in getattr(config, part)]
        if len(set(names)) < len(names):
            remedy = "add up its weights" if part == "rewards" else "remove one, or name it differently"
            raise ConfigError(f"{part} names {max(names, key=names.count)!r} twice; {remedy}")
    trained = {reward.name for reward in config.rewards}
    for reward in config.heldout_rewards:
        if reward.name in trained and reward != HeldoutReward(name=reward.name):
            raise ConfigError(f"heldout_rewards describes {reward.name!r}, which is trained on and measured anyway; name it differently")
    for reward in (*config.rewards, *(reward for reward in config.heldout_rewards if reward.name not in trained)):
        check_reward(reward)
    if any(reward.weight == 0 and reward.gate is None for reward in config.rewards):
        raise ConfigError("rewards has a weight of 0; list that reward under heldout_rewards, where it only measures")
    if not any(reward.weight for reward in config.rewards):
        raise ConfigError("rewards are gates alone; give at least one of them a weight")
    check_votes(config)


def check_votes(config: Config) -> None:
    """Refuse what people cannot be asked: to judge the held-out prompts."""
    heldout = {reward.name for reward in config.heldout_rewards}
    if VOTES in heldout:
        raise ConfigError("heldout_rewards names votes, but people vote on groups and not on held-out pictures; remove it there")
    if {reward.name for reward in config.rewards} == {VOTES} and not heldout and (config.prompts.heldout or config.prompts.heldout_share):
        raise ConfigError("heldout_rewards is empty, and votes cannot measure the held-out prompts; name a reward there")


def resolve_paths(config: Config, near: Path) -> Config:
    """Replace relative paths by the files they mean."""
    prompts, changes = config.prompts, {}
    for name in ("train", "heldout"):
        if (given := getattr(prompts, name)) is not None:
            changes[name] = str(find(f"prompts.{name}", given, near))
    model: dict[str, Any] = {"path": str(find("model.path", config.model.path, near, hub=True))}
    if config.model.transformer:
        model["transformer"] = str(find("model.transformer", config.model.transformer, near))
    if config.model.lora:
        model["lora"] = tuple(
            each.model_copy(update={"path": str(find(f"model.lora.{i}.path", each.path, near))}) for i, each in enumerate(config.model.lora)
        )
    lora = {"init": str(find("lora.init", config.lora.init, near))} if config.lora.init else {}
    return config.model_copy(
        update={
            "prompts": prompts.model_copy(update=changes),
            "model": config.model.model_copy(update=model),
            "lora": config.lora.model_copy(update=lora),
            "rewards": tuple(_resolved(reward, near) for reward in config.rewards),
            "heldout_rewards": tuple(_resolved(reward, near) for reward in config.heldout_rewards),
        }
    )


def _resolved(reward: RewardSection, near: Path) -> RewardSection:
    """Replace the relative paths of a reward by the files they mean; a module's dotted name stands for itself."""
    changes, (place, sign, attribute) = {}, (reward.path or "").rpartition(":")
    if place.endswith(".py"):
        changes["path"] = f"{find(f'path of reward {reward.name!r}', place, near)}{sign}{attribute}"
    if reward.reference:
        changes["reference"] = str(find(f"reference of reward {reward.name!r}", reward.reference, near))
    return reward.model_copy(update=changes)


def find(field: str, given: str, near: Path, hub: bool = False) -> Path | str:
    """Find a path near the recipe, in the current folder or among the bundled files; `hub` lets an owner/name stand for itself."""
    for place in places(given, near):
        if place.exists():
            return place.resolve()
    if hub and re.fullmatch(r"(?!models/)[\w.-]+/[\w.-]+", given):
        return given
    raise ConfigError(f"{field} is {given!r}, which does not exist; looked beside the recipe, in {Path.cwd()} and among the bundled files")


def model_folder(path: str) -> Path:
    """Return the folder of a model that is given by folder or, if the Hugging Face cache holds it, by name."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except LocalEntryNotFoundError as error:
        licence = f" (it may ask for its licence: accept it at https://huggingface.co/{path} and run: hf auth login)"
        fetch = f"fetch it with: hf download {path}{licence if path.startswith(GATED) else ''}"
        raise ConfigError(f"model.path is {path!r}, which this machine does not have; {fetch}") from error


def places(given: str, near: Path) -> Iterator[Path]:
    """List where a relative path may lie."""
    path = Path(given).expanduser()
    yield near / path
    yield path
    kind, *rest = path.parts
    if kind in ("models", "prompts") and ".." not in rest:
        yield bundled_folder(kind).joinpath(*rest)


def bundled_folder(kind: str) -> Path:
    """Return where recipes, prompts or models lie: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return here / kind if (here / kind).is_dir() else here.parent / kind


def fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """List every field as dotted name (`0` for a place in a list) and sentence."""
    for name, field in section.model_fields.items():
        kind, item = field.annotation, get_args(field.annotation)[:1]
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{prefix}{name}.")
        elif item and isinstance(item[0], type) and issubclass(item[0], BaseModel):
            yield from fields(item[0], f"{prefix}{name}.0.")
        else:
            yield f"{prefix}{name}", field.description or ""


def dump(config: Config) -> dict[str, Any]:
    """Return what goes into a run's config.json: the configuration and, spelt out, the recipe that it made."""
    return {"config": config.model_dump(mode="json"), "recipe": dataclasses.asdict(make_recipe(config))}


EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "string": "text",
    "bool": "true or false",
    "tuple": "a list, such as [1, 2]",
    "other": "something other than true or false",
    "model": "a section with keys of its own",
}


def _causes(errors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Leave out a list that is called empty only because what it holds is wrong."""
    parents = {error["loc"][:depth] for error in errors for depth in range(len(error["loc"]))}
    return [error for error in errors if error["type"] != "too_short" or error["loc"] not in parents]


def _explain(error: Mapping[str, Any]) -> str:
    """Say in one line which field is wrong, how, and what would be right."""
    where = ".".join(str(part) for part in error["loc"])
    kind, context, given = error["type"], error.get("ctx", {}), repr(error["input"])[:80]
    if kind == "extra_forbidden":
        return f"{where} is unknown{_nearest_field(where)}; remove it or correct its name"
    if kind == "missing":
        return f"{where} is missing; add it to the recipe"
    if kind == "literal_error":
        choices = [part.strip(" '") for part in re.split(r", | or ", context["expected"])]
        return f"{where} is {given}{recipes.nearest(str(error['input']), choices)}; choose one of: {', '.join(choices)}"
    for bound, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        if bound in context:
            return f"{where} is {given}; it must be {words} {context[bound]:.10g}"
    if kind == "too_short":
        return f"{where} is empty; list at least one"
    return f"{where} is {given}; it must be {EXPECTED.get(kind.split('_')[0], error['msg'].lower())}"


def _nearest_field(where: str) -> str:
    """Name the field that a misspelt one most likely means: the same name elsewhere, a close one beside it, a close one elsewhere."""
    known = [*(name for name, _ in fields()), *Config.model_fields]
    section, _, own = where.rpartition(".")
    by_name = {name.rpartition(".")[2]: name for name in reversed(known)}
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    for choices, likeness in ((by_name, 1.0), (beside, 0.6), (by_name, 0.75)):
        if close := difflib.get_close_matches(own, list(choices), 1, likeness):
            return f" (did you mean {choices[close[0]]}?)"
    return ""


def _yaml_problem(error: Exception) -> str:
    """Say in one line what YAML stumbled over, and where."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "it cannot be read"
    return f"{problem}, line {mark.line + 1}, column {mark.column + 1}" if mark else problem
