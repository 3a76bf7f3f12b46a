"""Rewards of a configuration, checked without loading anything."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from comfy_g2rpo.rewards import REWARDS, RewardError
from comfy_g2rpo.rewards.likeness import KINDS, palette

from ..rewards import ocr
from ..rewards.references import column_of

if TYPE_CHECKING:
    from .sections import RewardSection


VOTES = "votes"  # people, asked by the run itself (vote_reward.py)


def rewards_root() -> Path:
    """Return the folder of installed reward models: $G2RPO_REWARDS, or ~/.cache/g2rpo/rewards."""
    return Path(os.environ.get("G2RPO_REWARDS") or Path.home() / ".cache" / "g2rpo" / "rewards").expanduser()


def check_reward(section: RewardSection, here: bool = True) -> None:
    """Refuse a reward that cannot be there, without loading anything; `here`: a model must be installed."""
    name = section.name
    if not re.fullmatch(r"[\w.+-]{1,64}", name):
        raise RewardError(
            f"reward {name[:80]!a}: its name must be 1 to 64 letters, digits and _ . + -; change it"
        )
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,2})?", section.device):
        raise RewardError(
            f"reward {name!r}: device is {section.device[:20]!a}; choose auto, cpu, cuda, cuda:1 … or mps"
        )
    if section.path and section.url:
        raise RewardError(f"reward {name!r} has a path and a url; give one of them")
    if (section.path or section.url) and is_built_in(name):
        raise RewardError(f"reward {name!r} is built in; give your own another name")
    if section.path:
        check_path(name, section.path)
    elif section.url:
        check_url(name, section.url)
    elif name == ocr.NAME:
        ocr.check_installed()
    elif not is_built_in(name):
        check_installed(name, here)
    check_reference(section)


def is_built_in(name: str) -> bool:
    """Return whether a reward of this name needs no weights, path or address."""
    return name in REWARDS or name in KINDS or name in (VOTES, ocr.NAME)


def check_reference(section: RewardSection) -> None:
    """Refuse references where nothing is compared, colours that are none, and SSIM without scikit-image."""
    name, column = section.name, column_of(section.name)
    for field, kinds in (
        ("palette", ["palette"]),
        ("reference", [kind for kind in KINDS if kind != "palette"]),
    ):
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
        raise RewardError(
            f"reward {name!r}: path is {path[:200]!a}; write it as my_rewards.py:function or "
            "package.module:object"
        )
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise RewardError(
                f"reward {name!r}: path names {place!r}, which does not exist; looked beside the "
                f"recipe and in {Path.cwd()}"
            )
    elif not all(part.isidentifier() for part in place.split(".")) or not is_installed(
        place.partition(".")[0]
    ):
        raise RewardError(
            f"reward {name!r}: path names the module {place[:200]!a}, which is not installed; check its name"
        )


def is_installed(module: str) -> bool:
    """Return whether a top-level module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:
        return False


def check_url(name: str, url: str) -> None:
    """Refuse an address that is not one, or that holds a secret, which config.json would keep."""
    try:
        parts = urlsplit(url)
        sound = (
            parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        sound = False
    if not sound:
        shown = re.sub(r"//[^/]*@", "//…@", url)
        raise RewardError(f"reward {name!r}: url is {shown[:200]!a}; write it as http://host:port/…")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise RewardError(
            f"reward {name!r}: url holds a user, password, query or fragment; leave them out, "
            "config.json would keep them"
        )


def missing_models(sections: Iterable[RewardSection]) -> str:
    """Name the published reward models that are not installed, and the commands that fetch them."""
    from comfy_g2rpo.rewards.models.installed import KNOWN, installed

    present = installed(rewards_root())
    wanted = dict.fromkeys(each.name for each in sections if not each.path and not each.url)
    missing = [name for name in wanted if name in KNOWN and name not in present]
    if not missing:
        return ""
    one = len(missing) == 1
    subject = f"reward {missing[0]!r} is" if one else f"rewards {', '.join(missing)} are"
    how = " && ".join(KNOWN[name].how_to_get for name in missing)
    return f"{subject} not installed in {rewards_root()}; get {'it' if one else 'them'} with: {how}"


def check_installed(name: str, here: bool = True) -> None:
    """Refuse a name that is neither built in nor installed, nor, unless it must be `here`, published."""
    from comfy_g2rpo.rewards.models.installed import KNOWN, installed

    present = installed(rewards_root())
    if name in present or (name in KNOWN and not here):
        return
    if name in KNOWN:
        raise RewardError(
            f"reward {name!r} is not installed in {rewards_root()}; get it with: {KNOWN[name].how_to_get}"
        )
    known = [*REWARDS, *KINDS, ocr.NAME, *present, *(known for known in KNOWN if known not in present)]
    nearest = "".join(f", did you mean '{near}'?" for near in get_close_matches(name, known, 1))
    raise RewardError(f"reward {name[:80]!a} is unknown{nearest or ';'} known: {', '.join(known)}")
