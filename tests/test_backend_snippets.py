"""The proxies and the unit that docs/backend.md shows: the programs that read them take them, where they are
installed; else their form is read here.
"""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs/backend.md").read_text("utf-8")
BLOCKS = [text for _, text in re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)]
PORT = "127.0.0.1:8766"


def block(start: str) -> str:
    """Return the block of the page that begins so."""
    (found,) = [text for text in BLOCKS if text.startswith(start)]
    return found


def test_the_unit_is_one(tmp_path: Path) -> None:
    text = block("[Unit]")
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string(text)
    assert unit["Service"]["ExecStart"].split()[:2] == ["/opt/g2rpo/bin/g2rpo", "serve"]
    assert unit["Install"]["WantedBy"] and re.fullmatch(r"\d+min", unit["Service"]["TimeoutStopSec"])
    # The folder that is written to is the one of the jobs.
    assert re.search(r"--jobs (\S+)", text)[1] in unit["Service"]["ReadWritePaths"].split()
    if checker := shutil.which("systemd-analyze"):
        place = tmp_path / "g2rpo.service"
        place.write_text(text.replace("/opt/g2rpo/bin/g2rpo", "/bin/true"), "utf-8")
        ran = subprocess.run([checker, "verify", "--man=no", str(place)], capture_output=True, text=True)
        ours = [line for line in (ran.stdout + ran.stderr).splitlines() if "g2rpo.service" in line]
        assert not ours, ours


def statements(text: str) -> list[list[str]]:
    """Read directives of nginx: words that end with a semicolon or open a block; braces must match."""
    found: list[list[str]] = []
    words: list[str] = []
    depth = 0
    for word in re.findall(r"[{};]|[^\s{};]+", text):
        if word not in "{};":
            words.append(word)
            continue
        depth += {"{": 1, "}": -1, ";": 0}[word]
        assert depth >= 0 and bool(words) == (word != "}"), (word, words)
        if words:
            found.append(words)
        words = []
    assert not depth and not words
    return found


def test_nginx_passes_on_to_the_service_and_holds_no_events_back(tmp_path: Path) -> None:
    text = block("location")
    said = {words[0]: words[1:] for words in statements(text) if words[0] != "proxy_set_header"}
    assert said["proxy_pass"] == [f"http://{PORT}"] and said["proxy_buffering"] == ["off"]
    assert said["client_max_body_size"] == ["256k"] and "proxy_set_header Host $host;" in text
    if program := shutil.which("nginx"):
        place = tmp_path / "nginx.conf"
        place.write_text(
            f"pid {tmp_path}/pid; error_log stderr; events {{}} http {{ access_log off; "
            f"server {{ listen 127.0.0.1:1; {text} }} }}"
        )
        ran = subprocess.run([program, "-t", "-c", str(place)], capture_output=True, text=True)
        assert "syntax is ok" in ran.stderr, ran.stderr


def test_caddy_passes_on_to_the_service_and_holds_no_events_back(tmp_path: Path) -> None:
    text = block("gpu.example.com {")
    assert text.count("{") == text.count("}") == 2 and f"reverse_proxy {PORT} {{" in text
    assert "flush_interval -1" in text
    if program := shutil.which("caddy"):
        (tmp_path / "Caddyfile").write_text(text)
        words = [program, "validate", "--adapter", "caddyfile", "--config", str(tmp_path / "Caddyfile")]
        ran = subprocess.run(words, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("text", ["a b", "a b; }", "{ a; }", "a { b; "])
def test_what_nginx_would_not_read_is_noticed(text: str) -> None:
    with pytest.raises(AssertionError):
        statements(text)
