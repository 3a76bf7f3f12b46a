"""The worker of a Ray cluster: holds the model and explores what it is told.

Its answers are bytes, or a table that says what went wrong: the learner's machine unpickles nothing of ours.
"""

from __future__ import annotations

import random
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from .judged_elsewhere import Judges

Answer = bytes | dict[str, str]


class RolloutActor:
    """A model with its rewards, in a process of its own. A process that came back is built anew."""

    def __init__(self) -> None:
        self.setup: Any = None
        self.digest = ""

    def here(self) -> dict[str, str]:
        """Say where this process is."""
        return {"host": socket.gethostname(), "node": ray.get_runtime_context().get_node_id()}

    def build(self, tree: Mapping[str, Any], threads: int, judges: Sequence[Any] = ()) -> Answer:
        """Load the model and the rewards of a configuration, these only where there are no `judges`, reward
        workers; return what tells one list of prompts from another.
        """
        return told(lambda: self._build(tree, threads, judges))

    def explore(self, order: Mapping[str, Any], adapter: bytes) -> tuple[Answer, float]:
        """Explore a part of a step with an adapter; say the seconds that it took, too."""
        begin = time.perf_counter()
        return told(lambda: self._explore(order, adapter)), time.perf_counter() - begin

    def _build(self, tree: Mapping[str, Any], threads: int, judges: Sequence[Any]) -> bytes:
        if self.setup is not None:
            return self.digest.encode()  # only the connection was lost
        import torch

        from comfy_g2rpo.curriculum.prompt_history import digest
        from comfy_g2rpo.run.batch_limits import Limits
        from comfy_g2rpo.run.setup import Learner

        from ..config.reading import from_dict
        from ..config.reward_checks import missing_models
        from ..model.quiet_libraries import quieten_libraries
        from ..processes import accelerator_of
        from ..run import prepare

        quieten_libraries()
        cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
        if cpu:
            torch.set_num_threads(threads)
        config = from_dict(tree)
        if not judges and (missing := missing_models(config.rewards)):
            raise ValueError(missing)
        rewards = Judges(judges, random.randrange(len(judges))).rewards() if judges else None
        self.setup = prepare(config, accelerator_of(cpu), rewards=rewards)
        # Nothing is learned here: no optimizer takes memory.
        self.learner = Learner(torch.optim.SGD([torch.zeros(1)]), [], limits=Limits.of(self.setup.pace))
        self.digest = digest(self.setup.prompts.train)
        return self.digest.encode()

    def _explore(self, order: Mapping[str, Any], adapter: bytes) -> bytes:
        from comfy_g2rpo.sharing.ahead import Order, work_off

        return work_off(self.setup, self.learner, Order(**order), adapter, lambda phase: None)


def told(work: Callable[[], bytes]) -> Answer:
    """Return what work returns, or what went wrong in words and of which kind."""
    from ..commands.exit_codes import ran_out

    try:
        return work()
    except Exception as error:  # a reward, a library or a file may raise anything; the learner says it
        traceback.print_exc(file=sys.stderr)
        kind = "mistake" if isinstance(error, (ValueError, OSError)) else "bug"
        kind = "memory" if ran_out(error) else kind
        text = " ".join(str(error).split())
        said = text if kind != "bug" else f"{type(error).__name__}: {text}"
        return {"kind": kind, "text": said, "host": socket.gethostname()}
