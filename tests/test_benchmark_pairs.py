"""The benchmark of kept votes: the share of wrong votes, what is left to run, and its tables."""

import json
import random
from types import SimpleNamespace

import pairs as benchmark
import pytest
from test_forks import kept, run  # noqa: F401

from comfy_g2rpo.plan import singular
from comfy_g2rpo.rewards import REWARDS, Rule
from comfy_g2rpo.votes import ballots


@pytest.mark.parametrize(("share", "wrong"), [(0.0, 0), (1.0, 6), (0.5, None)])
def test_so_many_pairs_are_turned_round_the_same_for_every_loss(run, monkeypatch, share, wrong):  # noqa: F811
    _, ballot = kept(run, singular(6, [0, 2], 3))
    keys = list(ballot.files)
    scores = Rule("agreement", lambda images, prompts: images.mean((1, 2, 3)), compares_across_prompts=True)
    monkeypatch.setitem(REWARDS, "agreement", scores)
    better = {key: ballots.read_png(file).mean().item() for key, file in ballot.files.items()}
    given = {}
    for loss in ("dpo", "ropo"):
        (votes,) = ballots.read(benchmark.vote(run, share, 3, loss))
        given[loss] = votes.pairs
    assert given["dpo"] == given["ropo"] and set(votes.pictures) == set(keys)
    # Three pairs at each of two forks, none across them.
    assert len(votes.pairs) == 6
    turned = sum(better[first] < better[second] for first, second in votes.pairs)
    assert turned == wrong if wrong is not None else 0 < turned < 6
    assert ballots.read(run) == []


def runs_of(**gains):
    return [
        {
            "loss": loss,
            "flips": share,
            "seed": seed,
            "gains": {"agreement": gain + 0.01 * seed, "strict": 0.0},
        }
        for (loss, share), gain in {tuple(key.split("_")): gain for key, gain in gains.items()}.items()
        for seed in range(3)
    ]


def test_tables_have_every_loss_and_its_difference_on_the_same_seeds():
    text = benchmark.report(
        [
            {**one, "flips": float(one["flips"].replace("o", "."))}
            for one in runs_of(dpo_0o0=0.1, ropo_0o0=0.08, dpo_0o4=0.05)
        ]
    )
    assert "| dpo | +0.110 ± 0.025 (3) | +0.060 ± 0.025 (3) |" in text
    assert "| ropo | +0.090 ± 0.025 (3) | – |" in text
    assert "| ropo minus dpo | -0.020 ± 0.000 (3) | – |" in text
    assert "| strict, votes turned round | 0% | 40% |" in text


def test_what_is_recorded_is_not_run_again(tmp_path, monkeypatch):
    options = SimpleNamespace(split="tune", cpu_seconds=8.0, seeds=(0, 2), flips=(0.0, 0.4), losses=("dpo",))
    jobs = benchmark.jobs_of(options)
    assert len(jobs) == 4 and len({json.dumps(job) for job in jobs}) == 4
    place = tmp_path / "pairs.jsonl"
    chance = random.Random(0)
    place.write_text(
        "".join(json.dumps({**job, "gains": {}, "updates": chance.random()}) + "\n" for job in jobs)
    )
    monkeypatch.setattr(benchmark, "draw_forks", lambda *given: pytest.fail("nothing is left"))
    benchmark.run_all(jobs, place, tmp_path, 1)
    assert len(place.read_text().splitlines()) == 4
