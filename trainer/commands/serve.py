"""`g2rpo rewards serve`: offer one reward over HTTP, from an environment of its own."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .answers import answer

TOKEN_FILE = Path("~/.cache/g2rpo/judge.token")


def serve(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Name of a reward, built in or installed; with --path, what it is called."
        ),
    ],
    path: Annotated[
        str | None, typer.Option(help="Your own reward, as rewards.py:function or package.module:object.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="IP address to listen at; anything but this machine's own is not encrypted.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8765,
    known_as: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="Another name that clients use; repeat for several."),
    ] = None,
    token_file: Annotated[
        Path, typer.Option(help="File of the token that clients must give; made where there is none.")
    ] = TOKEN_FILE,
    device: Annotated[str, typer.Option(help="Where a reward model runs: auto, cpu, cuda, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Precision of a reward model's trunk: fp32 or bf16.")] = "fp32",
    batch: Annotated[
        int, typer.Option(min=1, max=1024, help="Pictures that a reward model scores at once.")
    ] = 32,
) -> None:
    """Offer a reward to `g2rpo train` over HTTP, until Ctrl-C."""
    import asyncio

    from comfy_g2rpo.rewards import RewardError

    from ..config.reward_checks import check_reward
    from ..config.sections import RewardSection
    from ..model.inference import device as best_device
    from ..rewards.build import build
    from ..rewards.judges.server import JudgeServer
    from ..service.http_guard import Guard, listen, names_of, token_of
    from ..service.http_guard import serve as run

    if dtype not in ("fp32", "bf16"):
        raise RewardError(f"--dtype is {dtype[:20]!a}; choose fp32 or bf16")
    section = RewardSection(name=name, path=path, device=device, dtype=dtype, batch=batch)
    check_reward(section)
    place = token_file.expanduser()
    with listen(host, port) as at, closing(JudgeServer(build(section, best_device()))) as server:
        names = names_of(host, at.getsockname()[1], known_as or [])
        guard = Guard(token_of(place), names, server.find)
        try:
            asyncio.run(run(guard, at, partial(say_ready, name, f"http://{names[0]}", place)))
        except KeyboardInterrupt:
            typer.echo("stopped")


def say_ready(name: str, url: str, token_file: Path) -> None:
    """Say where the reward is offered, and what its clients need."""
    typer.echo(f'serving {name} at {url}\nthe other side needs: export G2RPO_JUDGE_KEY="$(cat {token_file})"')
    answer({"name": name, "url": url, "token_file": token_file})
