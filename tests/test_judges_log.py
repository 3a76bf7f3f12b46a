"""The log of the judge's server: whatever comes in makes at most one line, and never a traceback."""

import logging
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from guarded import STRANGERS, TOKEN, send
from test_judges_server import BAD_REQUESTS, ODD, Bright, ask, serving

from g2rpo_trainer.service import http_guard

HEAD = f"POST /score HTTP/1.1\r\nHost: HOST\r\nAuthorization: Bearer {TOKEN}\r\n"
BROKEN: dict[str, str] = {
    "another protocol": "GET /about HTTP/9.9\r\n\r\n",
    "no address": "GET * HTTP/1.1\r\nHost: HOST\r\n\r\n",
    "no host": "GET /about HTTP/1.1\r\n\r\n",
    "a long address": f"GET /{'x' * 9000} HTTP/1.1\r\n\r\n",
    "a long header": f"{HEAD}X: {'y' * 20_000}\r\n\r\n",
    "many headers": HEAD + "".join(f"X{i}: 1\r\n" for i in range(500)) + "\r\n",
    "a length below nothing": f"{HEAD}Content-Length: -1\r\n\r\n",
    "two lengths": f"{HEAD}Content-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n",
    "a part without length": f"{HEAD}Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
    "half a body": f"{HEAD}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{",
    "signs that steer a terminal": "GET /about HTTP/1.1\r\nHost: \x1b[31m\r\n\r\n",
    "bytes of TLS": "\x16\x03\x01\x02\x00\x01\x00",
}


@pytest.fixture(autouse=True)
def one_line_each(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """See that every record is one line, as a terminal would show it."""
    caplog.set_level(logging.INFO)
    yield
    shown = [logging.Formatter().format(record) for record in caplog.records if record.name != "asyncio"]
    assert len(shown) == len(caplog.records)
    for line in shown:
        assert line.isprintable() and "Traceback" not in line and len(line) <= http_guard.MAX_LOGGED


def speak(port: int, content: str, hang_up: bool) -> None:
    """Send bytes as they are; hang up at once and hard, or wait for what comes."""
    with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        connection.sendall(content.replace("HOST", f"127.0.0.1:{port}").encode("latin-1"))
        if hang_up:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        try:
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        except (TimeoutError, ConnectionError, OSError):
            pass


@pytest.mark.parametrize("hang_up", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_request_makes_one_line(name: str, hang_up: bool, caplog: pytest.LogCaptureFixture) -> None:
    with serving() as (port, _):
        speak(port, BROKEN[name], hang_up)
        time.sleep(0.2)
        assert send(port, "POST", "/score", body=ask()) == 200
    assert len(caplog.records) <= 1


@pytest.mark.parametrize("name", [*STRANGERS, *ODD, *BAD_REQUESTS])
def test_a_refused_request_makes_one_line_that_says_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    headers, body = STRANGERS.get(name, ({},))[0], BAD_REQUESTS.get(name, ask())
    if name in ODD:
        headers, body, _ = ODD[name]
    with serving() as (port, _):
        status = send(port, "POST", "/score", headers, body, patience=2)
    assert len(caplog.records) == 1
    assert str(status) in caplog.records[0].getMessage()


class Faulty(Bright):
    """A reward that breaks."""

    fault: BaseException

    def score(self, images: object, prompts: object) -> object:
        """Fail."""
        raise self.fault


FAULTS: dict[str, tuple[BaseException, str]] = {
    "an error": (RuntimeError("no kernel\nimage is available"), "no kernel image is available"),
    "an exit": (SystemExit(), "called sys.exit(None)"),
    "an exit without fault": (SystemExit(0), "called sys.exit(0)"),
    "an exit in words": (SystemExit("no\nlicence"), "called sys.exit("),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_reward_that_breaks_makes_one_line_and_is_served_on(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    reward = Faulty()
    reward.fault, words = FAULTS[name]
    with serving(reward) as (port, _):
        assert send(port, "POST", "/score", body=ask()) == 500
        assert send(port, "GET", "/about") == 200
    assert len(caplog.records) == 1 and words in caplog.text


def test_what_goes_well_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as (port, _):
        assert send(port, "GET", "/about") == send(port, "POST", "/score", body=ask()) == 200
    assert caplog.records == []
