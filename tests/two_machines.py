"""Two machines on one: networks of their own for two processes, with a cable between them that can be cut.

It takes root on Linux, and the programs ip and ss.
"""

from __future__ import annotations

import os
import socket
import subprocess
from typing import Any

CABLE = "cable"
ADDRESSES = ("10.213.0.1", "10.213.0.2")


class Unavailable(Exception):
    """This machine cannot be made into two."""


class TwoMachines:
    """The names of the networks, and the cable between them."""

    def __init__(self) -> None:
        self.nets = [f"g2rpo-{os.getpid()}-{which}" for which in "ab"]
        try:
            self.lay()
            prove()
        except (OSError, subprocess.CalledProcessError) as error:
            self.remove()
            said = getattr(error, "stderr", "") or str(error)
            raise Unavailable(f"cannot make two networks here: {said.strip()[:200]}") from error

    def lay(self) -> None:
        """Make the networks and lay the cable."""
        for net in self.nets:
            called("ip", "netns", "add", net)
            called("ip", "-n", net, "link", "set", "lo", "up")
        near, far = self.nets
        called("ip", "-n", near, "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", far)
        for net, address in zip(self.nets, ADDRESSES, strict=True):
            called("ip", "-n", net, "address", "add", f"{address}/24", "dev", CABLE)
        self.mend()

    def remove(self) -> None:
        """Take all of it away."""
        for net in self.nets:
            subprocess.run(["ip", "netns", "delete", net], capture_output=True, check=False)

    def order(self, each: int = 1) -> dict[str, Any]:
        """Return what an order to the nursery says, so that each machine gets so many processes."""
        nets = [net for net in self.nets for _ in range(each)]
        return {"nets": nets, "address": ADDRESSES[0], "environment": {"GLOO_SOCKET_IFNAME": CABLE}}

    def cut(self) -> None:
        """Cut the cable: nothing comes through any more, and nobody is told."""
        for net in self.nets:
            called("ip", "-n", net, "link", "set", CABLE, "down")

    def mend(self) -> None:
        """Let the cable carry."""
        for net in self.nets:
            called("ip", "-n", net, "link", "set", CABLE, "up")

    def close_sockets(self, *which: str) -> None:
        """Let the second machine's kernel close connections, of which ss's filter may name some: one end is
        told, the other is sent a reset.
        """
        found = close_sockets(*which, net=self.nets[1])
        assert not found, found


def close_sockets(*which: str, net: str = "") -> str:
    """Let the kernel close connections of this machine's network, or of a named one; return what is left."""
    ask = *(("ip", "netns", "exec", net) if net else ()), "ss", "-H", "-t", "state", "established"
    called(*ask, "-K", *which)
    return called(*ask, *which)


def prove() -> None:
    """See that this kernel closes connections at all."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()),
        server.accept()[0],
    ):
        if close_sockets("dport", "=", f":{server.getsockname()[1]}"):
            raise OSError("ss -K closes no connections (CONFIG_INET_DIAG_DESTROY)")


def called(*words: str) -> str:
    """Run a program; return what it says."""
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout
