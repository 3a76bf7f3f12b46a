"""Judges over HTTP: vision-language models behind OpenAI's interface, and served rewards."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_g2rpo.rewards import Reward, RewardError

if TYPE_CHECKING:
    from ...config.sections import RewardSection
    from .client import Client

KEY, CACHE = "G2RPO_JUDGE_KEY", "G2RPO_JUDGE_CACHE"


def connect(section: RewardSection) -> Reward:
    """Reach the judge of a recipe's section; what would fail for every picture fails here, in words."""
    from ...config.reward_checks import check_url
    from .cache import Cache
    from .client import Client, Limits
    from .judge_protocol import connect_remote
    from .openai import KINDS, Chat, ChatReward
    from .pairwise import PairwiseReward

    name, folder = section.name, os.environ.get(CACHE)
    check_url(name, section.url or "")
    timeout = Limits.timeout if section.timeout is None else section.timeout
    limits = Limits(timeout=timeout, retries=section.retries, concurrency=section.concurrency)
    client = Client(
        name, section.url or "", key_of(name), limits, Cache(Path(folder).expanduser() if folder else None)
    )
    if section.protocol == "g2rpo":
        return connect_remote(client, section.batch)
    kind = KINDS[section.protocol]
    chat = Chat(client, section.model or only_model(client), kind.worth, section.question or kind.question)
    if section.protocol == "pairwise":
        return PairwiseReward(name, chat.tried(pictures=2), kind.note)
    return ChatReward(name, chat.tried(pictures=1), kind.note)


def key_of(name: str) -> str:
    """Return a judge's key: G2RPO_JUDGE_KEY_<NAME> or G2RPO_JUDGE_KEY, never from a file."""
    own = f"{KEY}_{re.sub(r'[^A-Z0-9]', '_', name.upper())}"
    variable = own if own in os.environ else KEY
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[\x21-\x7e]{0,4096}", key):
        raise RewardError(
            f"judge {name!r}: {variable} holds blanks or other signs that no key has; set it anew"
        )
    return key


def only_model(client: Client) -> str:
    """Ask an OpenAI-compatible server for its model, if it has but one."""

    def names(answer: Any) -> list[str]:
        rows = answer.get("data") if isinstance(answer, dict) else None
        return (
            [str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row]
            if isinstance(rows, list)
            else []
        )

    found = client.get("/models", names)
    if len(found) != 1:
        listed = f", such as {', '.join(found[:5])[:200]}" if found else ""
        raise RewardError(f"judge {client.name!r} has {len(found)} models{listed}; name one under model")
    return found[0]
