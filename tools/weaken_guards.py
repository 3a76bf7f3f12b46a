"""Weaken every guard of the files that protect a user's data, one by one, and see that a test notices.

A guard is a condition whose body raises, returns, skips or breaks off, or a predicate of several parts. It is
weakened so: it never holds; a part of an `or` is gone, or of an `and` that is returned or denied; a bound
lets its own value pass.

    python tools/weaken_guards.py                      # all guarded files, about an hour
    python tools/weaken_guards.py --changed HEAD~1     # those that changed since then
    python tools/weaken_guards.py comfy_g2rpo/run/folder.py --list
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("test_runs", "test_damaged_runs", "test_odd_files", "test_run_safety")
LORAS = ("test_lora", "test_lora_inputs", "test_lora_kinds", "test_lora_convert")
GUARDED: dict[str, tuple[str, ...]] = {
    "comfy_g2rpo/files/safe.py": ("test_runs", "test_damaged_runs", "test_lora_inputs", "test_odd_files"),
    "comfy_g2rpo/files/one_writer.py": ("test_run_safety",),
    "comfy_g2rpo/run/folder.py": RUNS,
    "comfy_g2rpo/run/checkpoint.py": ("test_run_safety",),
    "comfy_g2rpo/run/rank_guard.py": ("test_speed", "test_guard"),
    "comfy_g2rpo/lora/__init__.py": LORAS,
    "comfy_g2rpo/lora/forms.py": LORAS,
    "comfy_g2rpo/votes/ballots.py": ("test_votes", "test_vote_command"),
    "nodes/inputs/checks.py": ("test_input_checks",),
    "nodes/host/routes.py": ("test_routes",),
    "trainer/commands/vote.py": ("test_vote_command",),
    "trainer/config/input_files.py": ("test_run_inputs",),
    "trainer/rewards/judges/server.py": ("test_judges_server", "test_judges_log"),
    "trainer/jobs/run_job.py": ("test_run_job",),
    "trainer/jobs/forward_job.py": ("test_forward_steps", "test_forward_jobs"),
    "trainer/jobs/mirrored_run.py": ("test_forward_steps", "test_forward_jobs"),
    "trainer/service/http_guard.py": ("test_http_guard", "test_job_server"),
    "trainer/service/job_schema.py": ("test_job_schema", "test_job_server"),
    "trainer/service/job_server.py": ("test_job_server", "test_job_queue", "test_remote"),
    "trainer/service/remote_client.py": ("test_remote", "test_remote_answers", "test_forward_jobs"),
}
"""Files whose guards keep data and people safe, and the tests that should notice a weak one."""
LONG_TOO = ("-m", "not browser")
"""What notices a weak guard may take long."""
QUICK = ("-m", "not browser and not long", "-k", "not weakened")
QUICK_ENOUGH = ("trainer/service/", "trainer/jobs/forward_job.py", "trainer/jobs/mirrored_run.py")
"""Files whose long tests are about endurance. Tests that weaken a file's text themselves would notice any."""
IN_COMFYUI = ("nodes/",)
"""Where tests run in other processes, so that it cannot be told which of them meet a line."""
SECONDS = 400
LITTLE = 10.0  # seconds
TOO_LONG = 124  # as `timeout` has it
MEMORY = 6 * 2**30
"""Bytes that a process of the tests may take: without its guard a file may be read that has no end."""
WARM = """
import importlib, json, os, resource, signal, sys
from contextlib import suppress
for name in ("torch", "scipy", "PIL.Image", "safetensors.torch", "pydantic", "yaml", "typer",
             "aiohttp.test_utils", "hypothesis.strategies", "pytest"):
    with suppress(ImportError):
        importlib.import_module(name)
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if not pid:
        signal.alarm(order["seconds"])
        resource.setrlimit(resource.RLIMIT_DATA, (order["memory"],) * 2)
        for handle in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), handle)
        sys.path.insert(0, os.getcwd())
        os._exit(sys.modules["pytest"].main(order["words"]))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""A process that has what is installed loaded, but nothing of ours, and runs tests in forks of itself."""
EQUIVALENT: dict[str, str] = json.loads((Path(__file__).with_suffix(".json")).read_text())
"""Weakened guards that no test can notice, and why."""


@dataclass(frozen=True)
class Mutant:
    """One weakened guard: where it is, its name, and the text of the whole file with it."""

    file: str
    line: int
    last: int  # of the lines of its condition: Python counts the first of several as met in none
    name: str
    text: str


def leaves(body: Sequence[ast.stmt]) -> bool:
    """Return whether statements end by leaving: then their condition guards what follows."""
    return isinstance(body[-1], (ast.Raise, ast.Return, ast.Continue, ast.Break))


def weaker(test: ast.expr) -> Iterator[tuple[ast.expr, str]]:
    """List what weakens a condition: the node to replace and what with, as source."""
    yield test, "False"
    for node in ast.walk(test):
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
            for part in node.values:
                yield part, "False"
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield from weaker_predicate(node.operand)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            looser = {ast.GtE: ">", ast.LtE: "<"}.get(type(node.ops[0]))
            if looser:
                yield node, f"{ast.unparse(node.left)} {looser} {ast.unparse(node.comparators[0])}"


def weaker_predicate(value: ast.expr) -> Iterator[tuple[ast.expr, str]]:
    """List what weakens a predicate of several parts: each of them always holds."""
    for node in ast.walk(value):
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
            for part in node.values:
                yield part, "True"


def mutants(file: str) -> list[Mutant]:
    """List the weakened versions of a file."""
    source = (ROOT / file).read_text("utf-8")
    found: dict[str, Mutant] = {}
    tree = ast.parse(source)
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for node in ast.walk(function):
            changes: Iterator[tuple[ast.expr, str]] = iter(())
            if isinstance(node, ast.If) and leaves(node.body):
                changes = weaker(node.test)
            elif isinstance(node, ast.Return) and isinstance(node.value, ast.BoolOp):
                changes = weaker_predicate(node.value)
            for old, new in changes:
                name = f"{file}::{function.name}::{ast.unparse(old)} -> {new}"
                text = replaced(source, old, f"({new})")
                last = (node.test if isinstance(node, ast.If) else node).end_lineno
                found.setdefault(name, Mutant(file, node.lineno, last, name, text))
    return list(found.values())


def replaced(source: str, node: ast.expr, new: str) -> str:
    """Return source with the text of one expression replaced; positions count bytes of UTF-8."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    head = b"".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
    tail = lines[node.end_lineno - 1][node.end_col_offset :] + b"".join(lines[node.end_lineno :])
    made = (head + new.encode() + tail).decode()
    ast.parse(made)
    return made


def git(*words: str) -> list[str]:
    """Return the lines that git answers; leave with what it says where it cannot, as in a shallow clone."""
    ran = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"git {' '.join(words)}: {ran.stderr.strip()}")
    return ran.stdout.splitlines()


class Copy:
    """A copy of the checkout in which files are weakened and tests run."""

    def __init__(self, place: Path) -> None:
        self.place = place
        names = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for name in names:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
        # The package's own names stand before an installed checkout.
        packages = place / ".packages"
        packages.mkdir()
        for name, folder in (("comfy_g2rpo", "comfy_g2rpo"), ("g2rpo_trainer", "trainer")):
            (packages / name).symlink_to(place / folder)

        paths = os.pathsep.join([str(place / ".packages"), os.environ.get("PYTHONPATH", "")])
        self.seconds: dict[str, float] = {}
        self.warm = subprocess.Popen(
            [sys.executable, "-B", "-c", WARM],
            cwd=place,
            env=os.environ | {"PYTHONPATH": paths.strip(os.pathsep), "PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def pytest(self, file: str, *words: str, seconds: int = SECONDS) -> int:
        """Run tests of a file in the order given; return the exit code, TOO_LONG after so many seconds."""
        chosen = QUICK if file.startswith(QUICK_ENOUGH) else LONG_TOO
        order = {"words": ["-q", "-p", "no:cacheprovider", *chosen, *words], "seconds": seconds}
        print(json.dumps(order | {"memory": MEMORY}), file=self.warm.stdin, flush=True)
        code = int(self.warm.stdout.readline())
        return TOO_LONG if code == -signal.SIGALRM else code

    def meeting(self, file: str, tests: Sequence[str]) -> dict[int, list[str]] | None:
        """Return which tests meet each line of a file, the quickest first; all must pass.

        None if that cannot be told.
        """
        data, times = self.place / ".coverage", self.place / ".times.xml"
        elsewhere = file.startswith(IN_COMFYUI)
        measure = [f"--cov={self.place / Path(file).parent}", "--cov-context=test", "--cov-report="]
        measure += [f"--junitxml={times}", "-o", "junit_duration_report=call"]
        words = () if elsewhere else measure
        if code := self.pytest(file, *words, *tests, seconds=5 * SECONDS):
            raise SystemExit(f"{file}: its tests fail as they are (pytest: {code}); mend that first")
        if elsewhere:
            return None
        from coverage import CoverageData

        held = CoverageData(str(data))
        held.read()
        name = next((name for name in held.measured_files() if os.path.samefile(name, self.place / file)), "")
        lines = held.contexts_by_lineno(name) if name else {}
        found = {line: sorted({each.split("|")[0] for each in met if each}) for line, met in lines.items()}
        # What runs at import only is met by no test of its own: then any may notice.
        found = {line: met or list(tests) for line, met in found.items()}
        self.seconds = seconds_of(times)
        for met in found.values():
            met.sort(key=lambda test: self.seconds.get(test, 0.0))
        return found


def seconds_of(report: Path) -> dict[str, float]:
    """Return how long each test took, by its name, as pytest's report in XML has it."""
    cases = ElementTree.parse(report).iter("testcase")
    return {
        f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}": float(case.get("time"))
        for case in cases
    }


def spaced(found: Sequence[Mutant], count: int | None) -> list[Mutant]:
    """Choose so many at even spaces; all of them where they are no more, or no number is given."""
    if count is None or len(found) <= count:
        return list(found)
    return [found[i * len(found) // count] for i in range(count)]


def quick_and_others(tests: Sequence[str], seconds: Mapping[str, float]) -> Iterator[Sequence[str]]:
    """Part tests, the quickest first: those that take little together, and the others."""
    spent = list(accumulate(seconds.get(test, SECONDS) for test in tests))
    count = sum(each <= LITTLE for each in spent)
    yield from filter(None, (tests[:count], tests[count:]))


def survivors(file: str, weak: Sequence[Mutant], copy: Copy) -> Iterator[Mutant]:
    """List the weakened guards of a file that no test notices."""
    tests = [f"tests/{name}.py" for name in GUARDED[file]]
    met = copy.meeting(file, tests)
    original = (copy.place / file).read_text("utf-8")
    for mutant in weak:
        lines = range(mutant.line, mutant.last + 1)
        meeting = [test for line in lines for test in met.get(line, ())] if met is not None else tests
        chosen = list(dict.fromkeys(meeting))
        (copy.place / file).write_text(mutant.text, "utf-8")
        begin = time.monotonic()
        code = limit = 0
        for part in quick_and_others(chosen, copy.seconds):
            # Without its guard something may wait for ever: that much longer is no slow machine's doing.
            limit = min(int(60 + 20 * sum(copy.seconds.get(test, SECONDS) for test in part)), SECONDS)
            if code := copy.pytest(file, "-x", *part, seconds=limit):
                break
        (copy.place / file).write_text(original, "utf-8")
        word = {0: "SURVIVED", TOO_LONG: "hung" if limit < SECONDS else "TOO LONG"}.get(code, "noticed")
        print(f"{word:8}  {time.monotonic() - begin:4.0f} s  line {mutant.line}  {mutant.name}", flush=True)
        if word.isupper():
            yield mutant


def changed_since(revision: str) -> list[str]:
    """List the guarded files that changed since a revision."""
    return [name for name in git("diff", "--name-only", revision, "--") if name in GUARDED]


def main(arguments: Sequence[str] | None = None) -> int:
    """Weaken guards; return 1 if one of them survives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", choices=[[], *GUARDED], help="guarded files [default: all]")
    parser.add_argument("--changed", metavar="REVISION", help="only files that changed since then")
    parser.add_argument("--at-most", type=int, metavar="N", help="only so many, at even spaces")
    parser.add_argument("--list", action="store_true", help="list the weakened guards and run nothing")
    options = parser.parse_args(arguments)
    files = options.files or list(GUARDED)
    if options.changed:
        files = [name for name in changed_since(options.changed) if name in files]
    found = [mutant for file in files for mutant in mutants(file)]
    if options.list:
        for mutant in found:
            print(mutant.name, "(equivalent)" if mutant.name in EQUIVALENT else "")
        return 0
    weak = spaced([mutant for mutant in found if mutant.name not in EQUIVALENT], options.at_most)
    left: list[Mutant] = []
    with tempfile.TemporaryDirectory() as place:
        copy = Copy(Path(place)) if weak else None
        for file in dict.fromkeys(mutant.file for mutant in weak):
            left += survivors(file, [mutant for mutant in weak if mutant.file == file], copy)
    print(f"{len(left)} of {len(weak)} weakened guards survived")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
