"""A run's configuration; what is unknown in it is refused with the nearest known name."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from comfy_g2rpo import options, recipes
from comfy_g2rpo.prompts import is_text
from comfy_g2rpo.run import pace
from comfy_g2rpo.speed.cheap_completions import Speed

from .bundled import bundled_folder, bundled_recipes
from .recipe_fields import Config, fields
from .reward_checks import VOTES, check_reward
from .sections import HeldoutReward, RewardSection

GATED = ("black-forest-labs/", "stabilityai/")


class ConfigError(ValueError):
    """A configuration that cannot be run, in one line per mistake."""


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


def make_speed(config: Config) -> Speed:
    """Make the engine's description of cheaper completions."""
    return Speed(**dict(config.speed))


def load(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a recipe by path or by the name of a bundled one, with `section.key=value` overrides."""
    path = find_recipe(source)
    return from_dict(apply_overrides(read_yaml(path), overrides), near=path.parent)


def load_run(folder: Path, overrides: Sequence[str] = (), recipe: str | Path | None = None) -> Config:
    """Load the configuration of a run with overrides; of its recipe, if that is given, with the run's own.

    What may not change on resume is refused when the run is opened.
    """
    from comfy_g2rpo.run.folder import RunFolder

    content = RunFolder(Path(folder)).config()
    if not isinstance(content.get("config"), dict):
        raise ConfigError(f"{folder} holds no run of this program; check the path")
    if recipe and isinstance(former := content.get("settings"), list):
        return as_made(load(recipe, [*map(str, former), *overrides]), content.get("recipe"))
    return as_made(from_dict(apply_overrides(content["config"], overrides)), content.get("recipe"))


def as_made(config: Config, was: Any) -> Config:
    """Return a run's configuration with what its method's name meant then, where it means another thing now.

    `was` is the recipe that the run was made with; a field that it lacks was as a field's default is.
    """
    if not isinstance(was, Mapping):
        return config
    kept = {}
    for name, field in recipes.FIELDS.items():
        then, now = was.get(name, field.default), getattr(recipes.RECIPES[config.method.name], name)
        then = tuple(then) if isinstance(then, list) else then
        if getattr(config.method, name) is None and then != now:
            kept[name] = then
    if not kept:
        return config
    try:
        method = type(config.method).model_validate({**dict(config.method), **kept})
    except ValidationError as error:
        wrong = "; ".join(_explain(item) for item in _causes(error.errors()))
        raise ConfigError(f"the run's config.json is damaged, in recipe: {wrong}; restore it") from error
    return config.model_copy(update={"method": method})


def from_dict(tree: Mapping[str, Any], near: Path | None = None) -> Config:
    """Check a nested mapping; relative paths are found near the recipe, here, or among bundled files."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in _causes(error.errors()))) from error
    if (warm := make_recipe(config).warmup_steps) and warm >= (steps := config.train.steps):
        raise ConfigError(f"method.warmup_steps is {warm}, but train.steps is {steps}; set it below that")
    resolved = resolve_paths(config, near or Path())
    check_rewards(resolved)
    check_pairs(resolved)
    return resolved


def find_recipe(source: str | Path) -> Path:
    """Return a recipe's file."""
    path = Path(source)
    if path.is_file():
        return path
    known = bundled_recipes()
    if str(source) in known:
        return known[str(source)]
    nearest = options.nearest(str(source), known)
    raise ConfigError(
        f"recipe {str(source)!r} is neither a file nor bundled{nearest}; bundled are: "
        f"{', '.join(sorted(known))}"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe file."""
    try:
        tree = yaml.load(path.read_bytes().decode("utf-8"), UniqueKeys)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {(error.strerror or str(error)).lower()}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except RepeatedKeyError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {_yaml_problem(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} is not a recipe; it must have sections such as model, rewards and prompts")
    return tree


class RepeatedKeyError(ConfigError):
    """A key that a mapping has twice."""


class UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that comes twice: the second would reset the first.

    Of keys that come by a merge (`<<`), the mapping's own are the stronger ones, as YAML has it.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a mapping of keys that differ."""
        seen: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = key.value, key.start_mark.line + 1
            if name in seen:
                raise RepeatedKeyError(
                    f"the key {name[:80]!r} stands twice, in lines {seen[name]} and {line}; make them one"
                )
            seen[name] = line
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Make a value; YAMLError for one that is not of the kind that its tag or its form says."""
        try:
            return super().construct_object(node, deep)
        except RepeatedKeyError:
            raise
        except (ValueError, LookupError, AttributeError) as error:
            problem = "a value is not what its tag or form says; write a plain value, or in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the tree with every `a.b=value` set; values are YAML."""
    changed = dict(tree)
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"--set {override!r} has no value; write it as section.key=value")
        try:
            value = yaml.load(text, UniqueKeys)
        except RepeatedKeyError as error:
            raise ConfigError(f"--set {override!r:.80}: {error}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: the value is not YAML: {_yaml_problem(error)}") from error
        changed = _replaced(changed, key.strip().split("."), value)
    return changed


def _replaced(tree: Any, names: Sequence[str], value: Any) -> Any:
    """Copy a tree of mappings and lists with one value replaced."""
    name, *rest = names
    if isinstance(tree, list) and name.isdigit() and int(name) < len(tree):
        at, branch = int(name), list(tree)
        old = {"name": branch[at]} if isinstance(branch[at], str) else branch[at]  # a reward by its name
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
            raise ConfigError(
                f"heldout_rewards describes {reward.name!r}, which is trained on and measured anyway; "
                "name it differently"
            )
    for reward in (
        *config.rewards,
        *(reward for reward in config.heldout_rewards if reward.name not in trained),
    ):
        # Whoever asks for a price, or draws, needs no reward model: a run asks for them when it starts.
        check_reward(reward, here=False)
    if any(reward.weight == 0 and reward.gate is None for reward in config.rewards):
        raise ConfigError(
            "rewards has a weight of 0; list that reward under heldout_rewards, where it only measures"
        )
    if not any(reward.weight for reward in config.rewards):
        raise ConfigError("rewards are gates alone; give at least one of them a weight")
    check_votes(config)


def check_votes(config: Config) -> None:
    """Refuse what people cannot be asked: to judge the held-out prompts."""
    heldout = {reward.name for reward in config.heldout_rewards}
    voted = [reward for reward in config.rewards if reward.name == VOTES]
    if voted and config.model.frames > 1 and voted[0].frames != "strip":
        raise ConfigError(
            f"rewards has votes, but people are not asked about each of {config.model.frames} frames; "
            "set its frames: strip"
        )
    if VOTES in heldout:
        raise ConfigError(
            "heldout_rewards names votes, but people vote on groups and not on held-out pictures; "
            "remove it there"
        )
    if (
        {reward.name for reward in config.rewards} == {VOTES}
        and not heldout
        and (config.prompts.heldout or config.prompts.heldout_share)
    ):
        raise ConfigError(
            "heldout_rewards is empty, and votes cannot measure the held-out prompts; name a reward there"
        )


def check_pairs(config: Config) -> None:
    """Refuse to learn from kept votes without any, or from rollouts beside them."""
    learns = make_recipe(config).objective == "pairs"
    runs, prefer = config.pairs.runs, getattr(config.pairs, "from")
    names = [reward.name for reward in config.rewards]
    if learns and not runs:
        raise ConfigError(
            "pairs.runs is empty, and method.objective pairs learns from votes that runs keep; start it "
            "with: g2rpo pairs RUN"
        )
    if runs and not learns:
        raise ConfigError("pairs.runs needs method.objective: pairs; set it, or start with: g2rpo pairs RUN")
    if learns and prefer == "votes" and names != [VOTES]:
        raise ConfigError(
            f"rewards has {', '.join(names)}, but pairs.from is votes; set rewards to [votes], or pairs.from "
            "to rewards"
        )
    if learns and prefer == "rewards" and VOTES in names:
        raise ConfigError(
            "pairs.from is rewards, but rewards has votes; name what judges the kept pictures, such as "
            "rewards=[agreement]"
        )
    if learns and prefer == "rewards" and config.model.frames > 1:
        raise ConfigError(
            "pairs.from is rewards, but ballots keep strips of a clip's frames; set it to votes"
        )


def resolve_paths(config: Config, near: Path) -> Config:
    """Replace relative paths by the files they mean."""
    prompts, changes = config.prompts, {}
    for name in ("train", "heldout"):
        if (given := getattr(prompts, name)) is not None and not is_text(given):
            changes[name] = str(find(f"prompts.{name}", given, near))
    model: dict[str, Any] = {}
    for name in ("path", "transformer", "vae", "tokenizers"):
        if (given := getattr(config.model, name)) is not None:
            model[name] = str(find(f"model.{name}", given, near, hub=name == "path"))
    if not model.get("path") and not model.get("transformer"):
        raise ConfigError(
            "model.path is missing; add it to the recipe, or give model.transformer, "
            "model.text_encoders and model.vae"
        )
    files = config.model.text_encoders
    model["text_encoders"] = tuple(
        str(find(f"model.text_encoders.{i}", each, near)) for i, each in enumerate(files)
    )
    if config.model.lora:
        model["lora"] = tuple(
            each.model_copy(update={"path": str(find(f"model.lora.{i}.path", each.path, near))})
            for i, each in enumerate(config.model.lora)
        )
    runs = tuple(str(find(f"pairs.runs.{i}", each, near)) for i, each in enumerate(config.pairs.runs))
    lora = {"init": str(find("lora.init", config.lora.init, near))} if config.lora.init else {}
    return config.model_copy(
        update={
            "prompts": prompts.model_copy(update=changes),
            "model": config.model.model_copy(update=model),
            "lora": config.lora.model_copy(update=lora),
            "pairs": config.pairs.model_copy(update={"runs": runs}),
            "rewards": tuple(_resolved(reward, near) for reward in config.rewards),
            "heldout_rewards": tuple(_resolved(reward, near) for reward in config.heldout_rewards),
        }
    )


def _resolved(reward: RewardSection, near: Path) -> RewardSection:
    """Replace a reward's relative paths by the files they mean; a dotted module stands for itself."""
    changes, (place, sign, attribute) = {}, (reward.path or "").rpartition(":")
    if place.endswith(".py"):
        changes["path"] = f"{find(f'path of reward {reward.name!r}', place, near)}{sign}{attribute}"
    if reward.reference:
        changes["reference"] = str(find(f"reference of reward {reward.name!r}", reward.reference, near))
    return reward.model_copy(update=changes)


def find(field: str, given: str, near: Path, hub: bool = False) -> Path | str:
    """Find a path near the recipe, here, or bundled; `hub` lets an owner/name stand for itself."""
    for place in places(given, near):
        if place.exists():
            return place.resolve()
    if hub and re.fullmatch(r"(?!models/)[\w.-]+/[\w.-]+", given):
        return given
    raise ConfigError(
        f"{field} is {given!r}, which does not exist; looked beside the recipe, in {Path.cwd()} and "
        "among the bundled files"
    )


def model_folder(path: str | None, files: bool = False) -> Path | None:
    """Return the folder or checkpoint of a model, or the folder of one that is given by name if the Hugging
    Face cache holds it.

    With `files` of its own for the transformer, whoever lacks the folder hears that it may not be needed.
    """
    if path is None or Path(path).exists():
        return Path(path) if path else None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except LocalEntryNotFoundError as error:
        licence = (
            f" (it may ask for its licence: accept it at https://huggingface.co/{path} and run: hf auth "
            "login)"
        )
        fetch = f"fetch it with: hf download {path}{licence if path.startswith(GATED) else ''}"
        alone = ", or leave model.path empty and give model.text_encoders and model.vae, too" if files else ""
        raise ConfigError(
            f"model.path is {path!r}, which this machine does not have; {fetch}{alone}"
        ) from error


def places(given: str, near: Path) -> Iterator[Path]:
    """List where a relative path may lie."""
    path = Path(given).expanduser()
    yield near / path
    yield path
    kind, *rest = path.parts
    if kind in ("models", "prompts") and ".." not in rest:
        yield bundled_folder(kind).joinpath(*rest)


def defaults() -> dict[str, dict[str, Any]]:
    """Return the defaults of every section's fields as JSON has them, a listed section without its list."""
    found = {}
    for name, field in Config.model_fields.items():
        kind = next(
            (
                kind
                for kind in (field.annotation, *get_args(field.annotation))
                if hasattr(kind, "model_fields")
            ),
            None,
        )
        if kind:
            known = {key: each.default for key, each in kind.model_fields.items() if not each.is_required()}
            found[name] = TypeAdapter(dict[str, Any]).dump_python(known, mode="json")
    return found


def dump(config: Config, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Return a run's config.json: the configuration, the recipe that it makes, and what --set changed."""
    made = {"config": config.model_dump(mode="json"), "recipe": dataclasses.asdict(make_recipe(config))}
    return made | {"settings": list(settings)}


EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "string": "text",
    "bool": "true or false",
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
        return options.complaint(where, error["input"], choices=choices)
    if kind == "bounds":
        return f"{where}{context['sentence']}"
    if kind == "too_short":
        return f"{where} is empty; list at least one"
    if kind.startswith("tuple"):
        return f"{where} is {given}; it must be a list{_as_list(error['input'])}"
    return f"{where} is {given}; it must be {EXPECTED.get(kind.split('_')[0], error['msg'].lower())}"


def _as_list(value: Any) -> str:
    """Return how what was given would be written as a list, if that is short."""
    if isinstance(value, str):
        written = f"[{', '.join(part.strip(' []()') for part in value.split(','))}]"
    else:
        written = (
            "" if value is None else yaml.safe_dump([value], default_flow_style=True, width=1000).strip()
        )
    return f"; write {written}" if 2 < len(written) <= 60 else "; write its items in [ ]"


def _nearest_field(where: str) -> str:
    """Name the field that a misspelt one most likely means: of that name, close beside it, or elsewhere."""
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
