"""The command line, run in the process of a test."""

import pytest

from g2rpo_trainer import cli


def call(*words: object) -> int:
    """Run a command; return its exit code."""
    with pytest.raises(SystemExit) as left:
        cli.main([str(word) for word in words])
    return int(left.value.code or 0)


def leave(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Run a command; return its exit code and what it printed."""
    code = call(*words)
    printed = capsys.readouterr()
    return code, printed.out, printed.err
