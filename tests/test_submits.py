"""Many jobs a second, sent to the service from another process, which may be killed in between."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import aiohttp
import pytest
from guarded import TOKEN
from job_host import job, service

from comfy_g2rpo.files.spool import Spool

RATE = 200
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}


def start(folder: Path, queue: int, port: int = 0) -> tuple[subprocess.Popen[str], int]:
    """Serve jobs in a process of its own, which trains none; return it and its port."""
    command = [sys.executable, __file__, str(folder), str(queue), str(port)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return child, int(child.stdout.readline())


def memory(child: subprocess.Popen[str]) -> float:
    """Return the megabytes that a process holds now."""
    pages = Path(f"/proc/{child.pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize() / 2**20


async def send(session: aiohttp.ClientSession, port: int, number: int, begin: float) -> tuple[int, float]:
    """Send a job when its turn has come, again until there is an answer; return its status and seconds."""
    await asyncio.sleep(begin + number / RATE - time.monotonic())
    sent, deadline = time.monotonic(), time.monotonic() + 180
    while True:
        try:
            # Every job is sent twice, as after an answer that was lost.
            content = job(f"job-{number // 2}")
            async with session.post(f"http://127.0.0.1:{port}/jobs", data=content) as answer:
                await answer.read()
                return answer.status, time.monotonic() - sent
        except aiohttp.ClientConnectionError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("count", "killed"),
    [
        (400, False),
        pytest.param(6000, False, marks=pytest.mark.long),
        pytest.param(6000, True, marks=pytest.mark.long),
    ],
    ids=["two seconds", "30 seconds", "30 seconds and a restart"],
)
def test_of_many_who_submit_at_once_none_is_lost_or_taken_twice(
    count: int, killed: bool, tmp_path: Path
) -> None:
    room = count // 2 - 5
    child, port = start(tmp_path, room)

    async def all_of_them() -> tuple[list[tuple[int, float]], float, float]:
        nonlocal child
        connector = aiohttp.TCPConnector(limit=64)
        async with aiohttp.ClientSession(connector=connector, headers=HEADERS) as session:
            begin = time.monotonic()
            before = memory(child)
            sent = [asyncio.create_task(send(session, port, i, begin)) for i in range(count)]
            if killed:
                await asyncio.sleep(count / RATE / 2)
                child.kill()
                child.wait()
                child, _ = await asyncio.to_thread(start, tmp_path, room, port)
                before = memory(child)
            answers = await asyncio.gather(*sent)
            return answers, memory(child) - before, count / (time.monotonic() - begin)

    try:
        answers, grown, rate = asyncio.run(all_of_them())
    finally:
        child.kill()
        child.wait()
    taken = {f"job-{i // 2}" for i, (status, _) in enumerate(answers) if status == 200}
    kept = Spool(tmp_path / "spool").ids()
    assert {status for status, _ in answers} == {200, 429}
    assert set(kept) == taken and len(kept) == room
    assert grown < 60, f"{grown:.0f} MB more"
    seconds = sorted(each for _, each in answers)
    middle, late = seconds[count // 2], seconds[int(count * 0.99)]
    said = Counter(status for status, _ in answers)
    print(
        f"{rate:.0f} a second: {said}; an answer takes {middle:.3f} s, 99 % {late:.3f}; {grown:.1f} MB more"
    )


if __name__ == "__main__":
    with service(Path(sys.argv[1]), port=int(sys.argv[3]), queue=int(sys.argv[2])) as (at, _):
        print(at, flush=True)
        sys.stdin.read()
