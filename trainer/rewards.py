"""Make the rewards of a configuration: your own by path, a judge by address, a built-in or an installed one by name."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from comfy_g2rpo.rewards import REWARDS, Reward, RewardError, Rule
from comfy_g2rpo.rewards.frames import DEFAULT, OfFrames
from comfy_g2rpo.rewards.protocol import needs_group
from comfy_g2rpo.rewards.reference import KINDS, palette

from .references import column_of, compared

if TYPE_CHECKING:
    from .config import Config
    from .sections import RewardSection


VOTES = "votes"  # people, asked by the run itself (voting.py)


def rewards_root() -> Path:
    """Return the folder of installed reward models: $G2RPO_REWARDS, or ~/.cache/g2rpo/rewards."""
    return Path(os.environ.get("G2RPO_REWARDS") or Path.home() / ".cache" / "g2rpo" / "rewards").expanduser()


def build_all(config: Config, device: torch.device | str = "cpu", run: Path | None = None) -> tuple[tuple[Reward, ...], tuple[Reward, ...]]:
    """Load a configuration's rewards: those that are trained on; and all that judge, which are these and the held-out ones."""
    trained = {section.name: build(section, device, run) for section in config.rewards}
    heldout = {section.name: build(section, device, run) for section in config.heldout_rewards if section.name not in trained}
    if comparing := [name for name, reward in heldout.items() if needs_group(reward)]:
        raise RewardError(f"heldout_rewards names {comparing[0]!r}, which only compares the pictures of one group; name another to measure")
    # A place in its group says nothing about a single held-out picture.
    measuring = [reward for reward in trained.values() if not needs_group(reward)]
    return tuple(trained.values()), (*measuring, *heldout.values())


def build(section: RewardSection, device: torch.device | str = "cpu", run: Path | None = None) -> Reward:
    """Load one reward; `device` is what `auto` means, `run` the run folder for rewards that keep something there."""
    reward = found(section, device, run)
    return reward if section.frames == DEFAULT else OfFrames(reward, section.frames)


def found(section: RewardSection, device: torch.device | str, run: Path | None) -> Reward:
    """Load what a section names."""
    if section.path:
        return custom(section.name, section.path)
    if section.url:
        from .judges import connect

        return connect(section)
    if section.name in REWARDS:
        return REWARDS[section.name]
    if section.name in KINDS:
        return compared(section)
    if section.name == VOTES:
        from .voting import VoteReward

        if run is None:
            raise RewardError("votes belong to a run, and there is none here; train with them")
        return VoteReward(run)
    from comfy_g2rpo.rewards.library import load_installed

    where = str(device) if section.device == "auto" else section.device
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[section.dtype]
    return load_installed(rewards_root(), section.name, device=where, dtype=dtype, batch=section.batch)


def check_reward(section: RewardSection) -> None:
    """Refuse a reward that cannot be there, without loading anything."""
    name = section.name
    if not re.fullmatch(r"[\w.+-]{1,64}", name):
        raise RewardError(f"reward {name[:80]!a}: its name must be 1 to 64 letters, digits and _ . + -; change it")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,2})?", section.device):
        raise RewardError(f"reward {name!r}: device is {section.device[:20]!a}; choose auto, cpu, cuda, cuda:1 … or mps")
    if section.path and section.url:
        raise RewardError(f"reward {name!r} has a path and a url; give one of them")
    if (section.path or section.url) and (name in REWARDS or name in KINDS or name == VOTES):
        raise RewardError(f"reward {name!r} is built in; give your own another name")
    if section.path:
        check_path(name, section.path)
    elif section.url:
        check_url(name, section.url)
    elif name not in REWARDS and name not in KINDS and name != VOTES:
        check_installed(name)
    check_reference(section)


def check_reference(section: RewardSection) -> None:
    """Refuse something to compare with where nothing is compared, colours that are none, and SSIM where scikit-image is missing."""
    name, column = section.name, column_of(section.name)
    for field, kinds in (("palette", ["palette"]), ("reference", [kind for kind in KINDS if kind != "palette"])):
        if getattr(section, field) is not None and (name not in kinds or section.path or section.url):
            raise RewardError(f"reward {name!r} takes no {field}; leave it out, it is for {', '.join(kinds)}")
    if column == "palette" and section.palette is not None:
        palette(section.palette)
    if name == "ssim" and importlib.util.find_spec("skimage") is None:
        raise RewardError("reward 'ssim' needs scikit-image; install it with: pip install scikit-image")


def check_path(name: str, path: str) -> None:
    """Refuse a path that names no file or module, or no attribute."""
    place, _, attribute = path.rpartition(":")
    if not place or not attribute.isidentifier():
        raise RewardError(f"reward {name!r}: path is {path[:200]!a}; write it as my_rewards.py:function or package.module:object")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise RewardError(f"reward {name!r}: path names {place!r}, which does not exist; looked beside the recipe and in {Path.cwd()}")
    elif not all(part.isidentifier() for part in place.split(".")) or not is_installed(place.partition(".")[0]):
        raise RewardError(f"reward {name!r}: path names the module {place[:200]!a}, which is not installed; check its name")


def is_installed(module: str) -> bool:
    """Say whether a top-level module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:
        return False


def check_url(name: str, url: str) -> None:
    """Refuse an address that is not one, or that holds a secret, which config.json would keep."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not sound:
        shown = re.sub(r"//[^/]*@", "//…@", url)
        raise RewardError(f"reward {name!r}: url is {shown[:200]!a}; write it as http://host:port/…")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise RewardError(f"reward {name!r}: url holds a user, password, query or fragment; leave them out, config.json would keep them")


def check_installed(name: str) -> None:
    """Refuse a name that is neither built in nor installed."""
    from comfy_g2rpo.rewards.library import KNOWN, installed

    here = installed(rewards_root())
    if name in here:
        return
    if name in KNOWN:
        raise RewardError(f"reward {name!r} is not installed in {rewards_root()}; get it with: {KNOWN[name].how_to_get}")
    known = [*REWARDS, *KINDS, *here, *(known for known in KNOWN if known not in here)]
    nearest = "".join(f", did you mean '{near}'?" for near in get_close_matches(name, known, 1))
    raise RewardError(f"reward {name[:80]!a} is unknown{nearest or ';'} known: {', '.join(known)}")


def custom(name: str, path: str) -> Reward:
    """Load your own reward: a function (images [B, H, W, 3], prompts [B]) → scores [B], or an object with a reward's members."""
    place, _, attribute = path.rpartition(":")
    module = module_at(place)
    if not hasattr(module, attribute):
        raise RewardError(f"reward {name!r}: {place} has no {attribute!r}; check the end of path")
    found: Any = getattr(module, attribute)
    missing = [member for member in ("name", "licence", "compares_across_prompts", "score") if not hasattr(found, member)]
    if isinstance(found, type):
        raise RewardError(f"reward {name!r}: {path} is a class; make an object of it in that file, and name the object")
    if not missing and found.name != name:
        raise RewardError(f"reward {name!r}: {path} calls itself {str(found.name)[:80]!a}; write that under name")
    if not missing:
        return found
    if callable(found):
        return Rule(name, located(name, found, module), compares_across_prompts=False, licence="your own")
    raise RewardError(f"reward {name!r}: {path} is no function and lacks {', '.join(missing)}; give a function or an object")


def located(name: str, function: Callable[[Tensor, Sequence[str]], Any], module: ModuleType) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Let a function answer with a list as well (None = cannot judge), and name the line where it fails."""

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        try:
            answer = function(images, prompts)
            if isinstance(answer, (list, tuple)):
                return torch.tensor([math.nan if value is None else float(value) for value in answer])
            return answer.float() if isinstance(answer, Tensor) else torch.as_tensor(answer, dtype=torch.float32)
        except RewardError:
            raise
        except Exception as cause:
            lines = [frame.lineno for frame in extract_tb(cause.__traceback__) if frame.filename == module.__file__]
            where = f" in {module.__file__}, line {lines[-1]}" if lines else ""
            raise RewardError(f"reward {name!r} failed with {type(cause).__name__}{where}: {cause}") from cause

    return score


def module_at(place: str) -> ModuleType:
    """Import a module by file or dotted name."""
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        # A name of its own, so that a file called rewards.py or torch.py hides nothing.
        spec = importlib.util.spec_from_file_location(f"g2rpo_custom_{Path(place).stem}", place)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as cause:
        raise RewardError(f"cannot import {place}: {type(cause).__name__}: {cause}") from cause
