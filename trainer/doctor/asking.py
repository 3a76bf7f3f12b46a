"""One question to an address, which is asked nowhere else: no proxy, no redirection, no waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import aiohttp

SECONDS, MOST = 5.0, 2**16


def ask(url: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """Return the status and the beginning of the answer; OSError says why there is none."""

    async def asked() -> tuple[int, bytes]:
        limit = aiohttp.ClientTimeout(total=SECONDS)
        async with (
            aiohttp.ClientSession(timeout=limit, headers=headers) as session,
            session.get(url, allow_redirects=False) as said,
        ):
            return said.status, await said.content.read(MOST)

    try:
        return asyncio.run(asked())
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
        raise OSError(" ".join(str(error).split()) or f"no answer within {SECONDS:g} s") from error
