"""The service for a remote GPU in a thread of a test, and jobs to send to it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from guarded import guarded

from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer.config.reading import find_recipe, read_yaml
from g2rpo_trainer.service import http_guard, job_server

DEMO = read_yaml(find_recipe("demo"))
SMALL = [
    "train.prompts_per_step=1",
    "train.eval_prompts=2",
    "train.eval_noises=1",
    "method.num_steps=4",
    "train.checkpoint_every=5",
]


@contextmanager
def service(
    folder: Path,
    works: bool = False,
    guard: ModuleType = http_guard,
    server: ModuleType = job_server,
    models: tuple[Path, ...] = (),
    port: int = 0,
    **quotas: float,
) -> Iterator[tuple[int, Any]]:
    """Serve jobs; give the port and the service, which trains only if it `works`."""
    made = server.JobService(folder, models, job_server.Quotas(**quotas))
    try:
        if works:
            made.start()
        with guarded(made.find, guard, port) as port:
            yield port, made
    finally:
        made.close()


@contextmanager
def connections_to(take: Callable[[socket.socket], None]) -> Iterator[int]:
    """Have each connection to a port taken in a thread of its own; give the port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def work() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=take, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=work, daemon=True).start()
        yield server.getsockname()[1]


def job(job_id: str | None = None, settings: tuple[str, ...] = (), **changes: Any) -> bytes:
    """Write a sound job with changes of its recipe."""
    content: dict[str, Any] = {"recipe": {**DEMO, **changes}, "settings": [*SMALL, *settings]}
    return json.dumps(content | ({"id": job_id} if job_id else {})).encode()


def grown_run(made: Any, job_id: str, rows: int) -> RunFolder:
    """Write the beginning of a run by hand: a configuration, and rows of metrics."""
    run = RunFolder.create(made.runs / job_id, {"config": {"train": {"steps": 99}}})
    lines = [json.dumps({"step": i, "reward/x/mean": i / 7}) for i in range(1, rows + 1)]
    with open(run.metrics_file, "ab") as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
    return run
