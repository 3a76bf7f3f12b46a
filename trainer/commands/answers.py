"""`--json` on every command: what it has found as JSON on the output, and nothing else there.

A command prints for people as ever, and says `answer(…)` once, at its end; one that trains also says a row at
a time. Where --json is given, the former goes to the error output.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperCommand

from .exit_codes import MISTAKE

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]


def json_option() -> Any:
    """Make the option, which the command's function is not handed: by typer, whose own classes change."""
    app = typer.Typer()

    @app.command()
    def command(as_json: AsJson = False) -> None:
        """Have the option."""

    option = next(each for each in typer.main.get_command(app).params if each.name == "as_json")
    option.expose_value = False
    return option


JSON = json_option()


class Verb(TyperCommand):
    """A command that takes --json beside its own options."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return its options."""
        return [*super().get_params(ctx), JSON]


class Program(typer.Typer):
    """A program whose commands all take --json."""

    def command(self, name: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Make a command of a function."""
        return super().command(name, cls=Verb)


class Answers:
    """Where answers go, and how many there were."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.count = stream, 0

    def give(self, content: Any) -> None:
        """Write an answer in a line."""
        print(json.dumps(plain(content), ensure_ascii=False, allow_nan=False), file=self.stream, flush=True)
        self.count += 1


TAKEN: ContextVar[Answers | None] = ContextVar("answers", default=None)


@contextmanager
def answering(asked: bool) -> Iterator[Answers | None]:
    """Take answers inside the context, if JSON is asked for; what is printed otherwise is for people."""
    answers = Answers(sys.stdout) if asked else None
    token = TAKEN.set(answers)
    try:
        with redirect_stdout(sys.stderr if asked else sys.stdout):
            yield answers
    finally:
        TAKEN.reset(token)


def answer(content: Any) -> None:
    """Give what a command has found, if JSON is asked for."""
    if answers := TAKEN.get():
        answers.give(content)


def wanted() -> bool:
    """Return whether JSON is asked for."""
    return TAKEN.get() is not None


def plain(value: Any) -> Any:
    """Return what JSON can hold: numbers that are none become null, and all else text."""
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


class Ended(Exception):
    """An end that is no mistake: a line for people, and the exit code."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.code = code


def explain(error: object, code: int = MISTAKE, label: str = "error: ") -> None:
    """Print one line, and leave; without a line, another process has said it."""
    if line := " ".join(str(error).split()):
        print(f"{label}{line}", file=sys.stderr)
        answer({"error": line})
    raise SystemExit(code)


def leave(code: int) -> None:
    """Leave; who was asked for JSON has answered then, in any case."""
    if code and (answers := TAKEN.get()) and not answers.count:
        answers.give({"error": f"ended with exit code {code}"})
    raise SystemExit(code)
