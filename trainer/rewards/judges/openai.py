"""Judges that speak OpenAI's chat completions: vLLM, SGLang, llama.cpp, OpenAI. One word is asked for; its
probabilities are the score.

    yes_no    P(yes) / (P(yes) + P(no)), as VQAScore has it (arXiv 2404.01291)
    rating    Σ d·P(d) / Σ P(d) over d = 1 … 5
    pairwise  the share of the group's other pictures to which one is preferred (pairwise.py)

The probabilities are those of the answer's first word among the server's `top_logprobs`. Whether it gives any
shows at the trial question with which every run begins; if not, the word itself counts, which is coarser.
What is neither is no score.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from comfy_g2rpo.prompts import columns_of
from comfy_g2rpo.rewards import Reward, RewardError

from .cache import digest
from .client import LOG, Client, Nonsense, Question
from .sent_pictures import levels, to_base64

PATH = "/chat/completions"
TOP = 20  # what OpenAI and vLLM give at most
LEAST_MASS = 0.5  # of the probability that must lie on the words that were asked for
TOKENS = 4  # some tokenizers begin an answer with a blank one
LIMITS = (
    "max_tokens",
    "max_completion_tokens",
)  # the field that bounds an answer; OpenAI's newer models know the second alone


@dataclass(frozen=True)
class Kind:
    """A kind of question: its words and what each is worth, and how it fails as a target."""

    question: str
    worth: Mapping[str, float]
    note: str


KINDS = {
    "yes_no": Kind(
        'Does this picture show exactly "{prompt}"? Answer with one word: yes or no.',
        {"yes": 1.0, "no": 0.0},
        "As a target it ends in pictures that show the words' objects and nothing else.",
    ),
    "rating": Kind(
        'Rate this picture of "{prompt}" for quality and for agreement with its description. '
        "Answer with one digit: 1 (bad), 2 (poor), 3 (fair), 4 (good) or 5 (excellent).",
        {str(digit): float(digit) for digit in range(1, 6)},
        "As a target it ends in whatever the model calls excellent; watch it with another judge.",
    ),
    "pairwise": Kind(
        (
            'Which of these two pictures is the better picture of "{prompt}"? Answer with one digit: 1 for '
            "the first, 2 for the second."
        ),
        {"1": 1.0, "2": 0.0},
        (
            "A win rate inside a group: its mean is one half whatever happens, so progress shows in other "
            "rewards alone."
        ),
    ),
}


class Answer(BaseModel):
    """A part of a server's answer: types are demanded, what else it says is passed over."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=True)


class Candidate(Answer):
    """A token that might have stood there; unlikely ones may be given as −∞."""

    token: str
    logprob: Annotated[float, Field(le=1e-3)]


class Position(Answer):
    """A token of the answer."""

    token: str
    top_logprobs: list[Candidate]


class Probabilities(Answer):
    """The tokens of the answer."""

    content: list[Position] | None = None


class Message(Answer):
    """The answer as text."""

    content: str | None = None


class Choice(Answer):
    """One answer."""

    message: Message
    logprobs: Probabilities | None = None


class Completion(Answer):
    """What a chat completion must hold."""

    choices: Annotated[list[Choice], Field(min_length=1)]


@dataclass(frozen=True)
class Chat:
    """One model of one server and one kind of question; `words`: it gives no probabilities."""

    client: Client
    model: str
    worth: Mapping[str, float]
    question: str
    words: bool = False
    limit: str = LIMITS[0]

    def key(self, pictures: Sequence[np.ndarray], prompt: str) -> str:
        """Name an answer in the cache."""
        return digest(self.client.url, self.model, list(self.worth), self.words, self.text(prompt), *pictures)

    def ask(self, wanted: Mapping[str, tuple[Sequence[np.ndarray], str]]) -> dict[str, float]:
        """Return the answers about pictures and prompts, by key; those that failed are missing."""
        known = self.client.cache.get(wanted)
        questions = [
            Question(
                (key,), partial(self.body, *asked), lambda answer: [read(answer, self.worth, self.words)]
            )
            for key, asked in wanted.items()
            if key not in known
        ]
        return known | (self.client.ask(PATH, questions) if questions else {})

    def body(self, pictures: Sequence[np.ndarray], prompt: str) -> dict[str, Any]:
        """Write a request: the pictures in their order, then the question."""
        shown = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{to_base64(picture)}"}}
            for picture in pictures
        ]
        content = [*shown, {"type": "text", "text": self.text(prompt)}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            self.limit: TOKENS,
            "temperature": 0,
        }
        return body if self.words else body | {"logprobs": True, "top_logprobs": TOP}

    def text(self, prompt: str) -> str:
        """Fill {prompt}, and the names of the prompt's other columns, into the question."""
        known = {**columns_of(prompt), "prompt": str(prompt)}
        return re.sub(r"\{(\w+)\}", lambda name: str(known.get(name[1], name[0])), self.question)

    def tried(self, pictures: int) -> Chat:
        """Ask a trial question, so that a wrong address, key or model shows before a run begins."""
        shown = [np.full((64, 64, 3), 40 + 150 * i, np.uint8) for i in range(pictures)]

        def has_words_alone(answer: Any) -> bool:
            words = not _positions(parsed(answer))
            read(answer, self.worth, words)
            return words

        ways = [replace(self, words=words, limit=limit) for words in (False, True) for limit in LIMITS]
        for i, way in enumerate(ways):
            try:
                words = self.client.answer(PATH, way.body(shown, "a dark square"), has_words_alone)
                break
            except RewardError as refused:
                # A server that does not know a field says 400.
                if "HTTP 400" not in str(refused) or i == len(ways) - 1:
                    raise
        if words:
            LOG.warning(
                "judge %r gives no log-probabilities; its words alone count, which is coarser",
                self.client.name,
            )
        return replace(way, words=words)


@dataclass(frozen=True)
class ChatReward(Reward):
    """A reward of single pictures."""

    name: str
    chat: Chat
    note: str
    compares_across_prompts: bool = True
    runs_elsewhere: bool = True

    @property
    def licence(self) -> str:
        """Name the licence."""
        return f"that of {self.chat.model}"

    def cancel(self) -> None:
        """Break off the call that is under way."""
        self.chat.client.cancel()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, H, W, 3] by prompts [B]: [B], NaN where there is no sound answer."""
        asked = [((picture,), prompt) for picture, prompt in zip(levels(images), prompts, strict=True)]
        keys = [self.chat.key(*one) for one in asked]
        found = self.chat.ask(dict(zip(keys, asked, strict=True)))
        return torch.tensor([found.get(key, math.nan) for key in keys], dtype=torch.float32)


def parsed(answer: Any) -> Choice:
    """Check the form of a server's answer."""
    try:
        return Completion.model_validate(answer).choices[0]
    except ValidationError as error:
        first = error.errors()[0]
        raise Nonsense(
            "the answer is no chat completion", f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error


def read(answer: Any, worth: Mapping[str, float], words: bool) -> float:
    """Read what a chat completion's word is worth: expected over its probabilities, or of the word itself."""
    choice, allowed = parsed(answer), ", ".join(worth)
    if words:
        word = _bare(choice.message.content or "").rstrip(".!")
        if word not in worth:
            raise Nonsense(f"the answer is none of {allowed}", ascii(choice.message.content)[:80])
        return worth[word]
    positions = _positions(choice)
    if not positions:
        raise Nonsense("the answer has no log-probabilities")
    first = next((position for position in positions if _bare(position.token)), positions[0])
    masses = dict.fromkeys(worth, 0.0)
    for candidate in first.top_logprobs:
        if (word := _bare(candidate.token)) in masses:
            masses[word] += math.exp(candidate.logprob)
    total = sum(masses.values())
    if not LEAST_MASS <= total <= 1.01:
        raise Nonsense(
            f"the answer is none of {allowed}",
            f"{ascii(first.token)[:60]}; {total:.2f} of the probability lies on them",
        )
    return sum(worth[word] * mass for word, mass in masses.items()) / total


def _positions(choice: Choice) -> list[Position]:
    return (choice.logprobs and choice.logprobs.content) or []


def _bare(token: str) -> str:
    """Strip a token of blanks, of tokenizers' marks for blanks, of quotes and of case."""
    return token.strip(" \t\r\n▁Ġ\"'*").lower()
