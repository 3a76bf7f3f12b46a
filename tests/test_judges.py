"""Judges over HTTP, against a local one that is slow, flaky, hangs, talks nonsense and hangs up: never a
wrong score, never a leak.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import threading
import time
from pathlib import Path

import judge_host
import numpy as np
import pytest
import torch
from aiohttp import web
from judge_host import JudgeHost, after, ask, completion, hang, judging, section, sometimes, status
from torch import Tensor

from comfy_g2rpo.prompts import Prompt
from comfy_g2rpo.rewards import RewardError, checked
from g2rpo_trainer.rewards.judges import connect, key_of
from g2rpo_trainer.rewards.judges.cache import Cache, digest
from g2rpo_trainer.rewards.judges.client import Client, Limits, retry_after
from g2rpo_trainer.rewards.judges.openai import KINDS, read
from g2rpo_trainer.rewards.judges.pairwise import draw_pairs, win_rates

patient = judge_host.patient


def images_of(count: int, seed: int = 0, size: int = 8) -> Tensor:
    """Draw distinct pictures [B, H, W, 3] of 8-bit levels."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, size, size, 3))).float() / 255


def truth(images: Tensor) -> Tensor:
    """Return what a sound answer is."""
    return images.mean((1, 2, 3))


def right_or_dropped(scores: Tensor, images: Tensor) -> bool:
    """Say whether every score is that of its own picture, or none."""
    return bool((scores.isnan() | ((scores - truth(images)).abs() < 1e-5)).all())


# What is asked, and how an answer is read


def test_yes_or_no_is_a_probability_of_the_words_that_were_asked_for() -> None:
    with judging() as (host, judge):
        images = images_of(20)
        scores = checked(judge, images, ["a cat"] * 20)
    assert torch.allclose(scores, truth(images), atol=1e-5)
    assert host.bodies[1]["logprobs"] is True and host.bodies[1]["temperature"] == 0
    assert {judge_host.text_of(body) for body in host.bodies[1:]} == {
        KINDS["yes_no"].question.format(prompt="a cat")
    }


def test_a_rating_is_expected_over_its_digits() -> None:
    with judging(protocol="rating") as (_, judge):
        images = images_of(5)
        assert torch.allclose(ask(judge, images), 1 + 4 * truth(images), atol=1e-5)


def test_a_question_of_ones_own_takes_the_prompt_and_its_columns_in_one_pass() -> None:
    with judging(question="Are there {target} in {prompt}? {other}") as (host, judge):
        judge.score(images_of(1), [Prompt("a {target} b", {"target": 3})])
    assert judge_host.text_of(host.bodies[-1]) == "Are there 3 in a {target} b? {other}"


def test_the_only_model_of_a_server_needs_no_name() -> None:
    with JudgeHost() as host:
        assert connect(section(url=host.url, model=None)).licence == "that of toy"


WORDS = {"message": {"content": " Yes."}}
ANSWERS = {
    "words count where there are no probabilities": ({"choices": [WORDS]}, True, 1.0),
    "a blank first token is passed over": (completion({"yes": 0.75, "no": 0.25}, blank=True), False, 0.75),
    "marks and case do not matter": (completion({"▁YES": 0.5, "ĠNo": 0.25, '"yes"': 0.25}), False, 0.75),
    "an impossible word weighs nothing": (completion({"yes": 1.0, "no": 0.0}), False, 1.0),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_read(name: str) -> None:
    answer, words, expected = ANSWERS[name]
    assert read(answer, KINDS["yes_no"].worth, words) == pytest.approx(expected)


def with_logprob(value: object) -> dict:
    answer = completion({"yes": 0.75, "no": 0.25})
    answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = value
    return answer


NONSENSE = {
    "nothing": None,
    "a list": [],
    "no choice": {"choices": []},
    "other words": completion({"Maybe": 0.9, "yes": 0.06, "no": 0.04}),
    "no probabilities after all": {"choices": [WORDS]},
    "a chance above one": with_logprob(2.0),
    "a chance that is no number": with_logprob(math.nan),
    "a chance that is true": with_logprob(True),
    "a chance in words": with_logprob("-0.1"),
    "a number too large for any": with_logprob(10**400),
    "chances that add up to two": completion({"yes": 1.0, "Yes": 1.0}),
    "tokens that are none": {
        "choices": [WORDS | {"logprobs": {"content": [{"token": 3, "top_logprobs": []}]}}]
    },
    "deep": json.loads("[" * 500 + "]" * 500),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_no_score_and_spoils_no_other(name: str, caplog: pytest.LogCaptureFixture) -> None:
    dark = lambda body: judge_host.brightness(judge_host.pictures_of(body)[0]) < 0.5  # noqa: E731

    def behave(host: JudgeHost, request: web.Request, body: dict) -> web.Response | None:
        nonsense = web.Response(text=json.dumps(NONSENSE[name]), content_type="application/json")
        return nonsense if dark(body) else None

    with judging(after(1, behave)) as (_, judge):
        images = images_of(40)
        scores = ask(judge, images)
    assert right_or_dropped(scores, images) and torch.equal(scores.isnan(), truth(images) < 0.5)
    assert sum(judge.chat.client.faults.values()) == int(scores.isnan().sum())
    assert len(caplog.records) == len(judge.chat.client.faults) == 1 and "judge 'judge'" in caplog.text


@pytest.mark.parametrize("text", ["6", "0", "3.5", "1 or 2", "10", "", "five", "-1", "٣"])
def test_a_rating_in_words_is_one_of_five_digits(text: str) -> None:
    def behave(host: JudgeHost, request: web.Request, body: dict) -> dict:
        return {"choices": [{"message": {"content": "4" if host.asked == 1 else text}}]}

    with judging(behave, protocol="rating") as (_, judge):
        assert judge.chat.words and ask(judge, images_of(1)).isnan().all()


def test_a_server_without_probabilities_is_named_and_its_words_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def behave(host: JudgeHost, request: web.Request, body: dict) -> object:
        if "logprobs" in body:
            return web.json_response({"error": "logprobs are not supported"}, status=400)
        word = "No" if judge_host.pictures_of(body)[0].mean() < 128 else "Yes"
        return {"choices": [{"message": {"content": word}}]}

    with judging(behave) as (_, judge):
        images = images_of(10)
        assert torch.equal(ask(judge, images), (truth(images) >= 128 / 255).float())
    assert "gives no log-probabilities" in caplog.text


def test_a_server_that_names_the_bound_of_an_answer_otherwise_is_understood() -> None:
    def behave(host: JudgeHost, request: web.Request, body: dict) -> web.Response | None:
        return web.Response(status=400, text="use max_completion_tokens") if "max_tokens" in body else None

    with judging(behave) as (host, judge):
        images = images_of(3)
        assert torch.allclose(ask(judge, images), truth(images), atol=1e-5) and host.asked == 5


# What is broken before a run begins

NOWHERE, TWO = "http://127.0.0.1:9/v1", {"data": [{"id": "a"}, {"id": "b"}]}
BROKEN = {
    "no server": ({"url": NOWHERE}, None, f"judge 'judge' at {NOWHERE}: connection failed"),
    "no key": ({}, status(401), "HTTP 401; put its key into G2RPO_JUDGE_KEY"),
    "no such address": ({}, status(404), "HTTP 404; check url and model"),
    "led elsewhere": ({}, status(302, Location=NOWHERE), "HTTP 302"),
    "another word": ({}, lambda *_: completion({"<think>": 0.99}), "the answer is none of yes, no"),
    "another protocol": ({"protocol": "g2rpo"}, lambda *_: {"hello": 1}, "start it with g2rpo rewards serve"),
    "several models": ({"model": None}, lambda *_: TWO, "has 2 models, such as a, b; name one under model"),
    "no models": ({"model": None}, lambda *_: [3], "has 0 models; name one under model"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_judge_that_cannot_work_is_refused_before_the_run(name: str) -> None:
    about, behave, words = BROKEN[name]
    with JudgeHost(behave) as host, pytest.raises(RewardError, match=words.replace("(", r"\(")):
        connect(section(**{"url": host.url, **about}))


ADDRESSES = ["ftp://host/v1", "ftp://me:secret@host/v1", "file:///etc/passwd", "http://me:secret@host/v1"]
ADDRESSES += ["http://host/v1?key=secret", "host:80", ""]


@pytest.mark.parametrize("url", ADDRESSES)
def test_an_address_is_plain_http_without_secrets(url: str) -> None:
    with pytest.raises(RewardError, match="url") as error:
        connect(section(url=url))
    assert "secret" not in str(error.value)


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("G2RPO_JUDGE_KEY", "for-all")
    monkeypatch.setenv("G2RPO_JUDGE_KEY_MY_JUDGE", "sk-mine")

    def echo(host: JudgeHost, request: web.Request, body: dict) -> web.Response:
        return web.Response(status=403, text=f"bad key {request.headers['Authorization']}")

    with judging(after(1, echo), name="my-judge") as (host, judge):
        ask(judge, images_of(1))
    assert host.headers[0]["Authorization"] == "Bearer sk-mine" and key_of("other") == "for-all"
    assert "HTTP 403" in caplog.text and "sk-mine" not in caplog.text and "for-all" not in caplog.text


def test_a_key_with_a_line_break_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("G2RPO_JUDGE_KEY", "secret\r\nX-Evil: 1")
    with pytest.raises(RewardError, match="G2RPO_JUDGE_KEY holds blanks") as error:
        key_of("judge")
    assert "secret" not in str(error.value)


# What breaks while it runs


def test_a_flaky_judge_is_asked_again_and_every_score_is_right() -> None:
    with judging(sometimes(0.3, status(500)), retries=8) as (host, judge):
        images = images_of(200)
        assert torch.allclose(ask(judge, images), truth(images), atol=1e-5)
    assert host.asked > 240 and not judge.chat.client.faults


def test_a_hopeless_judge_drops_samples_and_soon_stops_being_asked() -> None:
    with judging(after(1, status(500)), retries=1, concurrency=4) as (host, judge):
        scores = ask(judge, images_of(300))
        assert scores.isnan().all() and host.asked < 40
        # One attempt of the next call says whether it has come back.
        asked = host.asked
        assert ask(judge, images_of(3)).isnan().all() and host.asked == asked + 1
        host.behave = None
        assert ask(judge, images_of(3)).isfinite().all()
    assert judge.chat.client.faults["not asked, because the judge kept failing"] > 250


def test_a_judge_that_hangs_costs_a_known_time() -> None:
    with judging(after(1, hang), retries=1, timeout=0.2, concurrency=4) as (_, judge):
        begin = time.perf_counter()
        assert ask(judge, images_of(100)).isnan().all()
    assert time.perf_counter() - begin < 15 and judge.chat.client.faults["no answer within 0.2 s"] >= 8


def test_an_answer_that_breaks_off_is_asked_for_again() -> None:
    with judging(after(1, sometimes(0.5, judge_host.close_mid_body)), retries=20) as (host, judge):
        images = images_of(30)
        assert torch.allclose(ask(judge, images), truth(images), atol=1e-5)
    assert host.asked > 40


ONCE = {400: 1, 401: 1, 404: 1, 408: 3, 422: 1, 429: 3, 500: 3, 503: 3, 302: 1}


@pytest.mark.parametrize("code", ONCE)
def test_only_what_may_pass_is_asked_again(code: int) -> None:
    with judging(after(1, status(code)), retries=2) as (host, judge):
        assert ask(judge, images_of(1)).isnan().all()
    assert host.asked == 1 + ONCE[code]


def test_the_judge_says_how_long_to_wait_up_to_a_limit() -> None:
    def behave(host: JudgeHost, *_: object) -> web.Response | None:
        return web.Response(status=429, headers={"Retry-After": "3600"}) if host.asked == 2 else None

    with judging(behave) as (_, judge):
        begin = time.perf_counter()
        assert ask(judge, images_of(1)).isfinite().all()
    assert 0.3 <= time.perf_counter() - begin < 15


def test_retry_after_is_read_as_seconds_or_as_a_date() -> None:
    assert retry_after("7") == 7 and retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after("Wed, 21 Oct 2093 07:28:00 GMT") > 3e8
    assert [retry_after(value) for value in ("", "-3", "soon", "nan", "9" * 400)] == [0, 0, 0, 0, 0]


def test_waits_double_up_to_a_limit_and_are_spread_by_a_seed() -> None:
    limits = Limits(first_wait=1, longest_wait=4)
    first, second = (Client("a", "http://a", limits=limits, seed=3) for _ in range(2))
    waits = [first._wait(attempt, 0) for attempt in range(5)]
    assert waits == [second._wait(attempt, 0) for attempt in range(5)]
    assert all(top / 2 <= wait <= top for wait, top in zip(waits, (1, 2, 4, 4, 4), strict=True))


@pytest.mark.parametrize("kind", ["large", "packed"])
def test_an_answer_cannot_fill_the_memory(kind: str) -> None:
    def behave(host: JudgeHost, request: web.Request, body: dict) -> web.Response:
        if kind == "large":
            return web.Response(body=b"[" + b" " * 2**21 + b"]", content_type="application/json")
        answer = web.json_response(judge_host.sound(body))
        answer.enable_compression(web.ContentCoding.gzip)
        return answer

    with judging(after(1, behave)) as (_, judge):
        assert ask(judge, images_of(1)).isnan().all()


def test_a_call_can_be_broken_off_from_another_thread_and_the_judge_used_again() -> None:
    with judging(after(1, hang), timeout=60) as (host, judge):
        timer = threading.Timer(0.3, judge.cancel)
        timer.start()
        begin = time.perf_counter()
        with pytest.raises(RewardError, match="judge 'judge' was broken off"):
            ask(judge, images_of(20))
        assert time.perf_counter() - begin < 5
        host.behave = None
        assert ask(judge, images_of(2)).isfinite().all()


def test_no_more_are_asked_at_once_than_agreed() -> None:
    with judging(judge_host.slow, concurrency=3) as (host, judge):
        ask(judge, images_of(12))
    assert host.most == 3


def open_files() -> int:
    """Count this process's open files."""
    return len(list(Path("/proc/self/fd").iterdir()))


def resident() -> int:
    """Return this process's memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_a_thousand_pictures_at_concurrency_8_leave_nothing_behind() -> None:
    with judging(keep=False) as (host, judge):
        first, images = (images_of(1000, seed=seed, size=32) for seed in (1, 2))
        # What is loaded once, and the memory that is needed for so many, is there after it.
        ask(judge, first)
        gc.collect()
        before = open_files(), threading.active_count(), len(gc.get_objects()), resident()
        found = ask(judge, images)
        gc.collect()
        deadline = time.monotonic() + 5
        while (host.connections() or open_files() > before[0]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert torch.allclose(found, truth(images), atol=1e-5)
        assert host.asked == 2001 and host.most <= 8 and host.connections() == 0
        assert open_files() <= before[0] and threading.active_count() == before[1]
        assert len(gc.get_objects()) < before[2] + 500 and resident() < before[3] + 64 * 2**20
        assert not judge.chat.client._running


# What is remembered


def test_what_was_asked_once_is_not_asked_again() -> None:
    with judging() as (host, judge):
        images = images_of(4)
        twice = torch.cat([images, images])
        first = judge.score(twice, ["x"] * 8)
        assert host.asked == 5 and torch.equal(first[:4], first[4:])
        assert torch.equal(judge.score(twice, ["x"] * 8), first) and host.asked == 5
        judge.score(images, ["another"] * 4)
        assert host.asked == 9


def test_a_failure_is_not_remembered() -> None:
    with judging(after(1, status(400))) as (host, judge):
        assert ask(judge, images_of(2)).isnan().all()
        host.behave = None
        assert ask(judge, images_of(2)).isfinite().all()


def test_scores_survive_in_a_folder_but_not_under_another_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("G2RPO_JUDGE_CACHE", str(tmp_path / "cache"))
    with judging() as (host, judge):
        first = ask(judge, images_of(5))
        again = ask(connect(section(url=host.url)), images_of(5))
        assert torch.equal(again, first) and host.asked == 1 + 5 + 1
        ask(connect(section(url=host.url, question="Is it bright?")), images_of(5))
        assert host.asked == 1 + 5 + 1 + 1 + 5


def test_a_damaged_cache_loses_its_damaged_lines_alone(tmp_path: Path) -> None:
    cache, key, other = Cache(tmp_path), digest("a"), digest("b")
    cache.put({key: 0.25})
    hostile = ['{"key": "' + key, "[" * 10_000, '{"key": 3, "score": 1}']
    hostile += [f'{{"key": "{other}", "score": {value}}}' for value in ("NaN", "true")]
    with open(tmp_path / "scores.jsonl", "ab") as file:
        file.write("\n".join(hostile).encode() + b'\n\xff\n{"key": "torn')
    again = Cache(tmp_path)
    again.put({other: 0.5})
    assert Cache(tmp_path).scores == {key: 0.25, other: 0.5}


def test_memory_of_scores_is_bounded() -> None:
    cache = Cache(most=3)
    cache.put({digest(i): float(i) for i in range(10)})
    assert list(cache.scores.values()) == [7, 8, 9]


def test_a_cache_that_cannot_be_written_is_said_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "folder") if os.name == "nt" else Cache(None)
    cache.path = tmp_path / "file" / "folder" / "scores.jsonl"
    cache.put({digest(1): 1.0})
    assert cache.scores and cache.path is None and "kept in memory alone" in caplog.text


# Win rates


def test_a_win_rate_orders_a_group_and_cancels_the_liking_for_a_place() -> None:
    with judging(protocol="pairwise") as (host, judge):
        images = torch.stack([torch.full((8, 8, 3), float(level)) for level in (10, 240, 60, 120, 200)]) / 255
        scores = ask(judge, images)
    assert scores.argsort().tolist() == truth(images).argsort().tolist()
    assert scores.mean().item() == pytest.approx(0.5, abs=1e-6) and host.asked == 1 + 5 * 4
    assert judge.needs_group and not judge.compares_across_prompts


def test_equal_pictures_are_not_asked_about_and_win_one_half() -> None:
    with judging(protocol="pairwise") as (host, judge):
        assert ask(judge, images_of(1).repeat(4, 1, 1, 1)).tolist() == [0.5] * 4 and host.asked == 1
        assert ask(judge, images_of(1)).isnan().all()


def test_large_groups_meet_a_bounded_number_of_others_each_as_often() -> None:
    pairs = draw_pairs([digest(i) for i in range(96)], 8)
    met = [sum(i in pair for pair in pairs) for i in range(96)]
    assert set(met) == {8} and len({frozenset(pair) for pair in pairs}) == len(pairs) == 96 * 4
    assert pairs == draw_pairs([digest(i) for i in range(96)], 8)


@pytest.mark.parametrize("count", range(2, 13))
def test_every_pair_of_a_group_is_drawn_at_most_once(count: int) -> None:
    pairs = draw_pairs([digest(i) for i in range(count)], 8)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) and all(i != j for i, j in pairs)


def test_a_picture_without_half_of_its_comparisons_has_no_win_rate() -> None:
    pairs = [(0, 1), (0, 2), (1, 2)]
    wins = {(0, 1): 1.0, (1, 0): 0.0, (0, 2): 1.0, (1, 2): 1.0, (2, 1): 0.0}
    assert win_rates(3, pairs, wins).tolist() == [1.0, 0.5, 0.0]
    rates = win_rates(3, pairs, {(0, 1): 1.0, (1, 0): 0.0})
    assert rates[:2].tolist() == [1.0, 0.0] and rates[2].isnan()
    assert win_rates(2, [(0, 1)], {(0, 1): 1.0}).isnan().all()


def test_failed_comparisons_drop_pictures_and_never_turn_one_round() -> None:
    with judging(after(1, sometimes(0.3, status(400))), protocol="pairwise") as (_, judge):
        images = images_of(12, size=2)
        scores, again = ask(judge, images), ask(judge, images)
    logging.getLogger(__name__).info("win rates %s, and with the missing asked again %s", scores, again)
    assert (scores.isnan() | ((scores >= 0) & (scores <= 1))).all()
    assert again.isnan().sum() <= scores.isnan().sum()
