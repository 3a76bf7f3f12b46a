"""The judge's server: every address × method × mark of a stranger, sizes, forms.

And each check weakened once, which must show.
"""

from __future__ import annotations

import importlib.util
import io
import json
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from guarded import METHODS, STRANGERS, TOKEN, UPGRADE, guarded, send, send_for_answer
from judge_host import section
from PIL import Image
from program import leave

from comfy_g2rpo.prompts import Prompt, columns_of
from comfy_g2rpo.rewards import Reward, RewardError, Rule, checked
from g2rpo_trainer.rewards.judges import connect, server
from g2rpo_trainer.rewards.judges.client import Limits
from g2rpo_trainer.rewards.judges.judge_protocol import body
from g2rpo_trainer.rewards.judges.server import JudgeServer
from g2rpo_trainer.service import http_guard

ADDRESSES = ("/about", "/score", "/", "/about/", "//about", "/about?x=1", "/ABOUT", "/%61bout", "/nothing")
ADDRESSES += ("/score/../about", "*")
SERVED = {("GET", "/about"), ("POST", "/score")}


class Bright(Reward):
    """A reward that notes what it was asked."""

    name, licence, compares_across_prompts, note = "bright", "MIT", True, "ends in white"

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.go, self.entered = threading.Event(), threading.Event()
        self.go.set()

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Score by brightness; NaN for the prompt `unreadable`."""
        self.entered.set()
        self.go.wait(20)
        self.asked.append((images, list(prompts)))
        unreadable = torch.tensor([prompt == "unreadable" for prompt in prompts])
        return torch.where(unreadable, torch.nan, images.mean((1, 2, 3)))


@contextmanager
def serving(reward: Any = None, module: ModuleType = server) -> Iterator[tuple[int, Any]]:
    """Serve a reward in a thread; give its port and the reward."""
    reward = reward or Bright()
    judge = module.JudgeServer(reward)
    try:
        with guarded(judge.find) as port:
            yield port, reward
    finally:
        judge.close()


def png(size: tuple[int, int] = (4, 4), mode: str = "RGB", kind: str = "PNG", value: int = 128) -> str:
    """Write a picture of one value in base64."""
    buffer = io.BytesIO()
    Image.new(mode, size, value if mode in "LP" else (value,) * len(mode)).save(buffer, kind)
    return b64encode(buffer.getvalue()).decode()


def ask(**changes: Any) -> bytes:
    """Write a sound request with changes."""
    return json.dumps({"images": [png()], "prompts": ["x"]} | changes).encode()


ODD: dict[str, tuple[dict[str, Any], bytes, int]] = {
    "an upgrade": (UPGRADE, ask(), 400),
    "text": ({"Content-Type": "text/plain"}, ask(), 415),
    "a form": ({"Content-Type": "application/x-www-form-urlencoded"}, ask(), 415),
    "no type": ({"Content-Type": None}, ask(), 415),
    "packed": ({"Content-Encoding": "gzip"}, ask(), 415),
    "no length": ({"Content-Length": None, "Transfer-Encoding": "chunked"}, b"2\r\n{}\r\n0\r\n\r\n", 411),
    "too long": ({"Content-Length": str(73 * 2**20)}, b"", 413),
}


def audit(
    module: ModuleType = server, methods: Sequence[str] = METHODS, addresses: Sequence[str] = ADDRESSES
) -> Iterator[str]:
    """Ask for everything in every way; say what is answered otherwise than it should be."""
    with serving(module=module) as (port, reward):
        for method, path in product(methods, addresses):
            for name, (headers, status) in STRANGERS.items():
                # Where HTTP itself breaks off, which the parser sees to, 400 comes first.
                if (got := send(port, method, path, headers)) not in (status, 400):
                    yield f"{method} {path} by {name}: {got}"
            known = (405, 400) if path in ("/about", "/score") else (404, 400)
            expected = (200,) if (method, path) in SERVED else known
            if (got := send(port, method, path, body=ask() if method == "POST" else b"")) not in expected:
                yield f"{method} {path}: {got}"
        for name, (headers, body, status) in ODD.items():
            if (got := send(port, "POST", "/score", headers, body, patience=1)) != status:
                yield f"{name}: {got}"
        for name, content in BAD_REQUESTS.items():
            if (got := send(port, "POST", "/score", body=content)) != 400:
                yield f"{name}: {got}"
        if len(reward.asked) != 1:
            yield f"the reward was asked {len(reward.asked)} times"


BAD_REQUESTS = {
    "nothing": b"",
    "no JSON": b"{",
    "no UTF-8": b'{"images": ["\xff"]}',
    "a list": b"[]",
    "depth": b"[" * 100_000,
    "no images": ask(images=[]),
    "no prompts": ask(prompts=[]),
    "too few prompts": ask(images=[png()] * 2),
    "too many prompts": ask(prompts=["x", "y"]),
    "too many images": ask(images=[png()] * 65, prompts=["x"] * 65),
    "another key": ask(run="rm"),
    "a number for a prompt": ask(prompts=[3]),
    "a prompt too long": ask(prompts=["x" * 2001]),
    "null for an image": ask(images=[None]),
    "a number for images": ask(images=3),
    "columns of another count": ask(columns=[]),
    "columns that are none": ask(columns=[3]),
    "columns in columns": ask(columns=[{"a": {"b": 1}}]),
    "no base64": ask(images=["%%%"]),
    "a path": ask(images=["/etc/passwd"]),
    "an address": ask(images=["http://127.0.0.1/"]),
    "a JPEG": ask(images=[png(kind="JPEG")]),
    "a GIF": ask(images=[png(mode="P", kind="GIF")]),
    "half a PNG": ask(images=[png((64, 64))[:80]]),
    "a PNG with alpha": ask(images=[png(mode="RGBA")]),
    "a grey PNG": ask(images=[png(mode="L")]),
    "a PNG too wide": ask(images=[png((4097, 1))]),
    "too many pixels": ask(images=[png((3000, 3000))] * 2, prompts=["x"] * 2),
    "sizes that differ": ask(images=[png(), png((8, 8))], prompts=["x"] * 2),
}


def test_nobody_but_the_holder_of_the_token_gets_anything_at_any_address() -> None:
    assert len(STRANGERS) * len(METHODS) * len(ADDRESSES) > 2000
    assert list(audit()) == []


WEAKENED = {
    "addresses with more": ("self._routes.get(address)", 'self._routes.get(address.partition("?")[0])'),
    "counts that differ": ("not len(asked.images) == len(asked.prompts) == len(columns)", "False"),
    "any number of pixels": ("picture.shape[0] * picture.shape[1] * len(images) > MAX_PIXELS", "False"),
    "any sizes": ("found and picture.shape != found[0].shape", "False"),
}


@pytest.mark.parametrize("name", WEAKENED)
def test_a_weakened_check_shows(name: str, tmp_path: Path) -> None:
    old, new = WEAKENED[name]
    source = Path(server.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    (tmp_path / "weak.py").write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("g2rpo_trainer.rewards.judges.weak", tmp_path / "weak.py")
    weak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weak)
    holes = audit(weak, ("GET", "POST", "BREW"), ("/score", "/about?x=1", "/%61bout"))
    assert next(holes, None)
    holes.close()


# What it answers to those who may ask


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Bright]]:
    """Serve a reward and reach it as a recipe does."""
    monkeypatch.setenv("G2RPO_JUDGE_KEY", TOKEN)
    with serving() as (port, reward):
        yield connect(section(url=f"http://127.0.0.1:{port}", protocol="g2rpo", name="far", batch=4)), reward


def test_a_served_reward_scores_as_it_does_at_home(judge: tuple[Any, Bright]) -> None:
    far, home = judge
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 6, 5, 3))).float() / 255
    prompts = [f"prompt {i}" for i in range(49)] + ["unreadable"]
    scores, expected = checked(far, images, prompts), home.score(images, prompts)
    assert torch.allclose(scores[:49], expected[:49], atol=1e-7) and scores[49].isnan()
    about = (far.name, far.licence, far.compares_across_prompts, far.note)
    assert about == ("far", "MIT", True, "ends in white")
    assert max(len(asked) for _, asked in home.asked[:-1]) == 4
    for pictures, asked in home.asked[:-1]:
        for picture, prompt in zip(pictures, asked, strict=True):
            assert torch.equal(picture, images[prompts.index(prompt)])


def test_columns_travel_with_their_prompt_and_are_part_of_what_is_remembered(
    judge: tuple[Any, Bright],
) -> None:
    far, home = judge
    image = torch.rand(1, 4, 4, 3)
    for count in (2, 3, 3):
        far.score(image, [Prompt("a cat", {"count": count, "of": ["a", 1]})])
    sent = [dict(columns_of(prompts[0])) for _, prompts in home.asked]
    assert sent == [{"count": count, "of": ["a", 1]} for count in (2, 3)]


def test_paths_of_pictures_are_neither_sent_nor_taken(judge: tuple[Any, Bright]) -> None:
    _, home = judge
    prompt = Prompt("a cat", {"image": "/home/me/cat.png", "reference": "/etc/hostname", "count": 2})
    assert body([(np.zeros((4, 4, 3), np.uint8), prompt)])["columns"] == [{"count": 2}]
    assert len(server.judge(home, ask(columns=[{"reference": "/etc/hostname", "count": 2}]))) == 1
    assert [dict(columns_of(each)) for each in home.asked[-1][1]] == [{"count": 2}]


def test_large_pictures_go_in_as_many_requests_as_the_server_allows(judge: tuple[Any, Bright]) -> None:
    far, home = judge
    far.client.limits = Limits(concurrency=1)
    images = torch.zeros(2, 3000, 3000, 3)
    images[1] = 1
    assert far.score(images, ["x"] * 2).tolist() == [0, 1]
    assert [len(asked) for _, asked in home.asked] == [1, 1]


def test_a_reward_that_breaks_is_a_failure_in_words_not_a_score(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("G2RPO_JUDGE_KEY", TOKEN)
    with serving(Rule("broken", lambda images, prompts: torch.zeros(3), True)) as (port, _):
        far = connect(section(url=f"http://127.0.0.1:{port}", protocol="g2rpo", name="far", retries=0))
        assert far.score(torch.zeros(2, 4, 4, 3), ["x"] * 2).isnan().all()
    assert "HTTP 500" in caplog.text and "return one float per image" in caplog.text


WRONG_ANSWERS: dict[str, Any] = {
    "too few": {"scores": [0.5]},
    "too many": {"scores": [0.5] * 3},
    "a word": {"scores": [0.5, "0.5"]},
    "true": {"scores": [0.5, True]},
    "no list": {"scores": 0.5},
    "another key": {"score": [0.5, 0.5]},
    "beyond float32": {"scores": [0.5, 1e39]},
}


@pytest.mark.parametrize("name", WRONG_ANSWERS)
@pytest.mark.parametrize("reading", ["g2rpo"])
def test_a_wrong_answer_drops_the_pictures_it_is_about(name: str, reading: str) -> None:
    from judge_host import JudgeHost

    about = {"protocol": "g2rpo-judge/1", "name": "a", "licence": "", "compares_across_prompts": True}
    with JudgeHost(lambda host, request, body: WRONG_ANSWERS[name] if body else about) as host:
        far = connect(section(url=host.address, protocol=reading, concurrency=1))
        assert far.score(torch.rand(2, 4, 4, 3), ["x"] * 2).isnan().all() and len(far.client.faults) == 1


def test_only_so_many_wait_and_the_rest_are_told_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_WAITING", 1)
    with serving() as (port, reward):
        reward.go.clear()
        first = threading.Thread(target=send, args=(port, "POST", "/score", None, ask()))
        first.start()
        assert reward.entered.wait(20)
        got = send_for_answer(port, "POST", "/score", body=ask(prompts=["y"]), patience=2)
        reward.go.set()
        first.join(20)
    assert got[0] == 503 and "Retry-After: 1" in got[1]


def test_what_nobody_waits_for_any_more_is_not_judged() -> None:
    with serving() as (port, reward):
        reward.go.clear()
        first = threading.Thread(target=send, args=(port, "POST", "/score", None, ask()))
        first.start()
        assert reward.entered.wait(20)
        send(port, "POST", "/score", body=ask(prompts=["given up"]), patience=0.5)
        time.sleep(0.2)
        reward.go.set()
        first.join(20)
        assert send(port, "POST", "/score", body=ask(prompts=["last"])) == 200
    assert [prompts for _, prompts in reward.asked] == [["x"], ["last"]]


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "BODY_SECONDS", 0.3)
    with serving() as (port, _):
        assert send(port, "POST", "/score", {"Content-Length": "100"}, b"{") == 408


def test_a_reward_that_needs_a_group_is_not_served() -> None:
    reward = Bright()
    reward.needs_group = True
    with pytest.raises(RewardError, match="compares the pictures of a group"):
        JudgeServer(reward)


MISTAKES = {
    "unknown reward": (["nothing"], "error: reward 'nothing' is unknown"),
    "every address": (["jpeg", "--host", "0.0.0.0", "--port", "0"], "error: --host 0.0.0.0 is every address"),
    "precision": (["jpeg", "--dtype", "fp8"], "error: --dtype is 'fp8'; choose fp32 or bf16"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = MISTAKES[name]
    code, _, error = leave(capsys, "rewards", "serve", *arguments, "--token-file", tmp_path / "token")
    assert code == 2 and error.startswith(words) and error.count("\n") == 1
