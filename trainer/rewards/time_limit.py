"""Calls that may hang: run in a thread of their own, and given up after a time.

A reward's import and its scores are timed; its smaller methods run where they are called.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from comfy_g2rpo.rewards import Reward, RewardError
from comfy_g2rpo.rewards.protocol import Wrapped, exit_error

DEFAULT_SECONDS = 600.0
"""How long an own reward may take for a batch of images, unless its section says otherwise."""


class Worker:
    """One thread in which a reward is imported and scores, so that what belongs to a thread stays in it.

    It is a daemon: a call that never returns does not keep the program from ending.
    """

    def __init__(self, name: str) -> None:
        self.asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self.serve, name=name, daemon=True).start()

    def serve(self) -> None:
        """Answer calls one after another; whatever they raise goes back to who asked."""
        with torch.no_grad():
            while True:
                call = self.asked.get()
                try:
                    self.answers.put((call(), None))
                except BaseException as error:  # raised again in the thread that waits
                    self.answers.put((None, error))

    def call(self, function: Callable[[], Any], seconds: float) -> Any:
        """Return what a function returns, raise what it raises, or TimeoutError after so many seconds."""
        self.asked.put(function)
        try:
            answer, error = self.answers.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        if error is not None:
            raise error
        return answer


def _forward_safely(member: str) -> property:
    """Forward a method that must not end the program; None where there is none."""

    def found(self: TimeLimited) -> Callable[..., Any] | None:
        method = getattr(self.reward, member)

        def call(*given: Any) -> Any:
            try:
                return method(*given)
            except SystemExit as error:
                raise exit_error(f"reward {self.reward.name!r}", error) from error

        return None if method is None else call

    return property(found)


class TimeLimited(Wrapped):
    """A reward that is given up, by RewardError, when it does not answer in time or ends the program."""

    check_prompts, can_judge, noise = map(_forward_safely, ("check_prompts", "can_judge", "noise"))
    settle, embed, cancel = map(_forward_safely, ("settle", "embed", "cancel"))
    keep_forks = _forward_safely("keep_forks")

    def __init__(self, reward: Reward, worker: Worker, seconds: float) -> None:
        self.reward, self.worker, self.seconds = reward, worker, seconds

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the reward's scores [B]."""
        return call_in_time(
            self.worker,
            lambda: self.reward.score(images, prompts),
            self.seconds,
            f"reward {self.reward.name!r}",
        )


def call_in_time(worker: Worker, function: Callable[[], Any], seconds: float, what: str) -> Any:
    """Return what a function returns in a worker; RewardError where it hangs or ends the program."""
    try:
        return worker.call(function, seconds)
    except TimeoutError as error:
        raise RewardError(
            f"{what} did not answer within {seconds:g} s; mend it, or give it longer by its timeout, and "
            "resume the run"
        ) from error
    except SystemExit as error:
        raise exit_error(what, error) from error
