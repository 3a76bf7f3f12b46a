"""The benchmark of searches pairs what it compares, and spends what it says."""

import argparse

import alignment
import alignment_pools
import pytest


@pytest.fixture(scope="module")
def rows():
    """Search for three prompts, of which the hardest alone counts."""
    options = argparse.Namespace(split="tune", guidance=[1.0], seeds=(0, 2), budgets=[16], arms=None)
    texts = alignment.prompts_of("tune").read_text("utf-8").splitlines()[:3]
    plain = [alignment.answer_job(job) for job in alignment.plain_jobs(options, texts)]
    hard = alignment.hard_prompts(plain)
    options.arms = ["best of n", "funnel"]
    jobs = alignment.search_jobs(options, hard)
    options.arms, options.budgets, options.seeds = ["optimize noise"], [64], (0, 1)
    jobs += alignment.search_jobs(options, hard) + alignment.plain_jobs(options, hard, 2.0)
    left = [job for job in jobs if (job["arm"], job["guidance"]) != ("plain", 1.0)]
    return [*plain, *map(alignment.answer_job, left)]


@pytest.mark.long
def test_the_hard_prompts_are_those_on_which_plain_images_score_least(rows):
    (hard,) = alignment.hard_prompts(rows)
    plain = {
        row["prompt"]: sum(row["agreement"][:6]) / 6
        for row in rows
        if (row["arm"], row["guidance"]) == ("plain", 1.0)
    }
    assert len(plain) == 3 and plain[hard] == min(plain.values())
    assert {row["prompt"] for row in rows if row["arm"] != "plain"} == {hard}


def test_a_search_spends_its_budget_and_keeps_its_best(rows):
    best, funnel, noise = (row for row in rows if row["arm"] != "plain")
    assert noise["forwards"] == [8 + 7 * 8] and noise["scored"] == [6]
    assert best["forwards"] == [16, 16] and best["scored"] == [2, 2]
    assert all(8 < forwards <= 16 for forwards in funnel["forwards"])
    assert all(0 <= score <= 1 for row in (best, funnel) for score in (*row["agreement"], *row["strict"]))


def test_no_two_prompts_share_a_noise_and_all_searches_of_one_do(rows):
    seeds = [alignment.seed_of(prompt, number) for prompt in ("a", "b") for number in (0, 1, "plain", "pool")]
    assert len(set(seeds)) == 8
    assert alignment.seed_of("a", 0) == alignment.seed_of("a", 0)


def test_what_chose_a_prompt_is_not_shown():
    row = {"arm": "plain", "agreement": [0.0] * 6 + [0.5] * 3, "strict": [0.0] * 6 + [1.0] * 3}
    assert alignment.mean_of([alignment.shown(row)], "agreement") == 0.5
    assert alignment.shown({"arm": "funnel", "agreement": [0.1]})["agreement"] == [0.1]


def test_differences_are_paired_by_prompt():
    def row(prompt, *scores):
        return {"prompt": prompt, "agreement": list(scores)}

    base = [row("a", 0.2, 0.4), row("b", 0.9, 0.7), row("c", 0.5, 0.5)]
    found = [row("a", 0.4, 0.4), row("b", 0.9, 0.9), row("c", 0.6, 0.6)]
    assert alignment.gain(found, base, "agreement") == "+0.100 ± 0.000"
    assert alignment.gain(found, [], "agreement") == "–"


@pytest.mark.long
def test_the_report_has_every_arm_and_what_guidance_does(rows, tmp_path, capsys):
    alignment.report(rows, tmp_path / "out.md", tmp_path / "out.png")
    text = (tmp_path / "out.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip() and (tmp_path / "out.png").stat().st_size > 1000
    assert "**16 forwards, guidance 1, 1 hard prompts**" in text
    for arm in ("plain", "best of n", "funnel", "plain, guidance 2"):
        assert f"| {arm} |" in text
    assert "all 3 prompts" not in text
    (best, *_) = (row for row in rows if row["arm"] == "best of n")
    easy = next(row["prompt"] for row in rows if row["prompt"] != best["prompt"])
    alignment.report([*rows, {**best, "prompt": easy}], tmp_path / "out.md", tmp_path / "out.png")
    wide = (tmp_path / "out.md").read_text().partition("**16 forwards, guidance 1, all 3 prompts**")[2]
    assert "| best of n |" in wide and "| funnel |" not in wide


def test_the_settings_of_every_arm_exist():
    from comfy_g2rpo.sampling.search_settings import READS, SearchSettings

    for made in [*alignment.ARMS.values(), *alignment.TRIED.values()]:
        assert made["method"] in READS or made["method"] == "optimize_noise"
        SearchSettings(**{name: value for name, value in made.items() if name != "method"})


def test_every_recorded_search_can_be_run_again():
    files = (alignment.ROOT / "benchmarks/results").glob("alignment*.jsonl")
    arms = {row["arm"] for file in files for row in alignment.read(file)} - {"plain", "pool"}
    assert arms and arms <= {*alignment.ARMS, *alignment.TRIED}


def test_an_early_filter_s_quarter_is_chosen_by_its_gaps_alone():
    row = {"guidance": 1.0, "prompt": "a", "gaps": [float(i) for i in range(16)]}
    row |= {"agreement": [i / 100 for i in range(16)], "strict": [float(i > 11) for i in range(16)]}
    row["draws"] = {str(heat): [heat, 0.5] for heat in alignment_pools.HEATS}
    lines = alignment_pools.pools_report([row, {**row, "prompt": "b"}, {**row, "prompt": "easy"}], {"a", "b"})
    exact = "0.075 | +0.060 ± 0.000 | -0.060 ± 0.000 | 0.250 | +0.750 ± 0.000 | -0.250 ± 0.000"
    assert f"| 1 | {exact} |" in lines
    assert "| 1 | 0.05 | 0.050 | 0.500 |" in lines


def test_a_pool_is_scored_and_its_cold_draw_is_the_best():
    job = {"arm": "pool", "split": "tune", "guidance": 1.0, "budget": 0, "seeds": []}
    job["prompt"] = "a red circle"
    row = alignment.answer_job(job)
    assert len(row["gaps"]) == len(row["agreement"]) == 16 and min(row["gaps"]) > 0
    best = row["draws"]["0.0001"][0]
    assert best == pytest.approx(sum(sorted(row["agreement"])[-4:]) / 4)


def test_our_own_search_is_compared_with_its_nearest_rivals():
    def row(arm, prompt, score, budget=64):
        return {
            "arm": arm,
            "guidance": 1,
            "budget": budget,
            "prompt": prompt,
            "agreement": [score],
            "strict": [0.0],
        }

    found = [row("funnel", "a", 0.9), row("funnel", "b", 0.7)]
    found += [row("particles", "a", 0.8), row("particles", "b", 0.6)]
    lines = alignment.differences(found, 64)
    assert lines[-1] == "| funnel minus particles | +0.100 ± 0.000 | +0.000 ± 0.000 |"
    assert alignment.differences(found[:2], 64) == []
    found += [row("best of n", "a", 1.0, 128), row("best of n", "b", 0.8, 128)]
    twice = "| funnel minus best of n with 128 forwards | -0.100 ± 0.000"
    assert alignment.differences(found, 64)[-1].startswith(twice)
