"""The learning benchmark counts all model work, gives every arm the same freedoms and tries, reads several
budgets off one run, and compares arms on the seeds they share.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import learning_runs
import pytest
import torch
from learning import fresh, idea_jobs, ideas_here, main
from learning_arms import (
    ARMS,
    OWN,
    RATES,
    START,
    arms_here,
    describe,
    forms,
    make,
    neighbours,
    setting_of,
    start,
    weighted,
)
from learning_report import by_arm, differences, gains, ideas_report, interval, measures, reached, same, tries
from learning_runs import (
    LOOK,
    REFERENCE,
    Clock,
    Counted,
    configure,
    identity,
    jobs_again,
    missing,
    read,
    run_all,
    run_arm,
)
from learning_tuning import best_setting, next_setting, tried, tuning_jobs
from some_cases import some
from toys import SHAPE, ToyPolicy

RESULTS = Path(__file__).parent.parent / "benchmarks/results"
HERE = arms_here()[0]


def test_work_is_one_per_forward_and_two_more_per_backward():
    policy = Counted(ToyPolicy())
    x, sigma, conds = torch.randn(3, *SHAPE), torch.full((3,), 0.5), [0.1] * 3
    with torch.no_grad():
        policy.velocity(x, sigma, conds)
    assert policy.work == 3
    old = policy.velocity(x, sigma, conds).detach()
    assert policy.work == 6
    (policy.velocity(x, sigma, conds) - old).sum().backward()
    assert policy.work == 15


def climb(gain, tries, arm="mix_grpo"):
    gains = {}
    for _ in range(tries):
        setting = next_setting(gains, arm, start(arm))
        assert setting not in gains
        gains[setting] = gain(setting)
    return list(gains)


def test_tuning_tries_every_form_first_and_then_every_kind_of_neighbour():
    place = RATES.index(START.rate)
    up, down = RATES[place + 1], RATES[place - 1]
    single = START._replace(prompts=1)
    found = climb(
        lambda setting: (setting.form == OWN) + (setting.prompts == 1) - 0.1 * (setting != single), 9
    )
    assert found[:4] == [
        START,
        START._replace(form="one step"),
        START._replace(form="one step, stride 2"),
        single,
    ]
    rest = [single._replace(rate=up), single._replace(rate=down), single._replace(average=0.0)]
    assert found[4:8] == [*rest, single._replace(weights="balanced")]


def test_tuning_goes_on_from_the_form_that_pays():
    found = climb(lambda setting: float(setting.form == "one step"), 8)
    assert {setting.form for setting in found[3:]} == {"one step"}
    assert {setting.weights for setting in found[3:]} == {OWN}


def test_tuning_goes_on_in_the_direction_that_pays():
    tried = climb(lambda setting: -abs(setting.rate - 2 * START.rate), 8)
    assert max(setting.rate for setting in tried) >= 2 * START.rate


@pytest.mark.parametrize("rate", [RATES[0], RATES[-1]])
def test_rates_end_where_the_ladder_does(rate):
    near = [other.rate for other in neighbours("mix_grpo", START._replace(rate=rate))]
    assert {rate} < set(near) <= set(RATES)


@pytest.mark.long
@pytest.mark.parametrize("arm", some(HERE, 6))
def test_every_arm_gets_as_many_tries(arm):
    found = climb(lambda setting: setting.prompts + setting.rate, 20, arm)
    assert len(set(found)) == 20
    assert len({json.dumps(describe(arm, setting), sort_keys=True) for setting in found}) == 20


def test_the_published_method_stays_as_it_is():
    found = climb(lambda setting: setting.rate, 12, "g2rpo, published")
    assert {(setting.weights, setting.average, setting.form) for setting in found} == {(OWN, 0.0, OWN)}
    made = make(describe("g2rpo, published", found[0])["method"])
    assert (made.granularities, made.pick, made.steps) == ((1, 2), "every", "first_half")
    assert (made.update, made.objective, made.terminal) == ("per_step", "clip", "published")
    assert (made.ema, made.max_grad_norm, made.step_weight) == (0.0, 1.0, "uniform")


def test_every_baseline_gets_the_leaders_freedoms():
    for arm in ("flow_grpo", "flow_grpo_fast", "dance_grpo", "mix_grpo", "tempflow_grpo"):
        assert list(forms(arm))[:3] == [OWN, "one step", "one step, stride 2"]
        for form in list(forms(arm))[1:]:
            job = describe(arm, START._replace(form=form))
            made = make(job["method"])
            assert (made.steps, made.pick, made.pick_size) == ("first_half", "random", 1)
            assert made.objective == "on_policy"
        coarse = made.granularities == (2,) or job["set"]["speed.tail_stride"] == 2
        assert coarse
    assert [list(forms(arm)) for arm in HERE if ARMS[arm].ours] == [[OWN]] * sum(
        ARMS[arm].ours for arm in HERE
    )


def test_every_baseline_is_there_as_published_too():
    for arm in ("flow_grpo", "flow_grpo_fast", "dance_grpo", "mix_grpo", "tempflow_grpo"):
        job, plain = describe(f"{arm}, published", START), describe(arm, START)
        assert (job["method"], job["set"]) == (plain["method"], plain["set"])
        assert list(forms(f"{arm}, published")) == [OWN]
    assert not [arm for arm in HERE if arm.endswith(", published, published")]


def test_a_form_that_is_the_leader_by_another_name_is_said_to_be():
    def tuned(arm, **change):
        return {0: describe(arm, START._replace(**change))}

    arms = {"g2rpo {2}": tuned("g2rpo {2}"), "flow_grpo_fast": tuned("flow_grpo_fast", form="one step")}
    assert same(arms, "g2rpo {2}") == []
    arms["flow_grpo_fast"] = tuned("flow_grpo_fast", form="one step, stride 2", average=0.0)
    assert same(arms, "g2rpo {2}")[1].endswith("but for what was tuned: flow_grpo_fast.")


def test_an_arm_without_a_recipe_is_left_out():
    ARMS["nobody's"] = type(ARMS["awm"])({"name": "nobody"})
    ARMS["no such field"] = type(ARMS["awm"])({"name": "g2rpo", "no_such_field": 1})
    ARMS["refused"] = type(ARMS["awm"])({"name": "flow_grpo", "granularities": [3]})
    try:
        assert {"nobody's", "no such field", "refused"} <= set(arms_here()[1])
    finally:
        for name in ("nobody's", "no such field", "refused"):
            del ARMS[name]
    assert {"g2rpo, published", "g2rpo {2}", "flow_grpo", "dance_grpo"} <= set(arms_here()[0])


def results(arm, setting, gains):
    jobs = tuning_jobs(arm, setting, [1.0])
    return [
        {**job, "curve": [{"cpu": 1.0, "agreement": gain}]} for job, gain in zip(jobs, gains, strict=False)
    ]


def test_a_setting_counts_with_the_mean_of_all_tuning_seeds():
    other = START._replace(weights="balanced", form="one step, stride 2")
    found = [*results("mix_grpo", START, [0.1, 0.3, 0.5]), *results("mix_grpo", other, [9.0])]
    assert tried(found, "mix_grpo") == {START: pytest.approx(0.3)}
    found += results("mix_grpo", other, [9.0, 0.0, 0.0])[1:]
    assert best_setting(found, "mix_grpo") == other
    with pytest.raises(SystemExit, match="flow_grpo was not tuned"):
        best_setting(found, "flow_grpo")


def test_a_published_form_takes_the_best_of_its_arm_in_that_form():
    other, form = START._replace(rate=2e-3), START._replace(form="one step")
    tuned = [("mix_grpo", START, 0.1), ("mix_grpo", other, 0.2), ("mix_grpo", form, 0.9)]
    found = [run for arm, setting, gain in tuned for run in results(arm, setting, [gain] * 3)]
    assert best_setting(found, "mix_grpo, published") == other
    found += results("mix_grpo, published", START, [0.0] * 3)
    assert best_setting(found, "mix_grpo, published") == START


def test_a_slow_machines_seconds_count_less():
    took = iter([REFERENCE, 2 * REFERENCE, 4 * REFERENCE])
    clock = Clock(lambda: next(took))
    clock.add(LOOK)
    assert clock.spent == pytest.approx(LOOK)
    clock.add(0.1)  # now the machine is looked at again, and is half as fast
    clock.add(2 * LOOK)
    assert clock.spent == pytest.approx(LOOK + 0.1 + LOOK)
    clock.add(4.0)
    assert clock.spent == pytest.approx(LOOK + 0.1 + LOOK + 1.0)
    assert next(took, None) is None


def test_tuning_says_how_much_was_tried():
    other = START._replace(form="one step")
    found = [*results("mix_grpo", START, [0.1] * 3), *results("mix_grpo", other, [0.2] * 3)]
    lines = tries(found, ["mix_grpo"])
    assert lines[0].startswith("Tuning: 2 settings per arm, 2 in all, each on the seeds 1000 to 1002")
    assert lines[-1] == "| mix_grpo | 2 | one step +0.200 (1); own +0.100 (1) |"
    unequal = tries([*found, *results("awm", START, [0.1] * 3)], ["mix_grpo", "awm"])[0]
    assert "1 to 2 (unequal) settings per arm" in unequal


@pytest.mark.parametrize("arm", HERE)
def test_every_form_of_every_arm_can_be_configured(arm):
    for form in forms(arm):
        setting = start(arm)._replace(form=form)
        job = describe(arm, setting, split="tune", seed=0, noises=1)
        assert setting_of(json.loads(json.dumps(job))) == setting
        config = configure(job)
        assert config.method.max_grad_norm == (1.0 if arm == "g2rpo, published" else 3e-5)
        assert config.speed.tail_stride == job["set"].get("speed.tail_stride", 1)


def test_step_weights_matter_where_an_update_has_several_steps():
    single = [arm for arm in HERE if not weighted(arm)]
    assert {"g2rpo {1}", "g2rpo {2}", "g2rpo {1,2}", "g2rpo {1,3}", "g2rpo {2,4}"} <= set(single)
    assert {"flow_grpo", "mix_grpo", "tempflow_grpo"}.isdisjoint(single)
    assert not weighted("mix_grpo", "one step")


def run(arm, seed, gain, work=10, seconds=10):
    curve = [{"cpu": 5, "work": 4, "agreement": gain / 2, "strict": 0.0}]
    curve.append({"cpu": 10, "work": work, "agreement": gain, "strict": gain / 4})
    return {"arm": arm, "seed": seed, "cpu_seconds": seconds, "work": 8, "curve": curve}


def test_a_budget_is_read_where_it_was_spent():
    made = run("a", 0, 0.2)
    made["curve"][0]["work"] = 9
    assert [reached(made, "cpu", 10)["agreement"], reached(made, "work", 8)["agreement"]] == [0.2, 0.1]


def test_several_budgets_are_points_of_one_run():
    runs = [run("a", 0, 0.4, seconds=[5, 10]), run("a", 1, 0.2, seconds=[5])]
    lines = gains(by_arm(runs), measures(runs))
    assert lines[0].startswith(
        "| arm | seeds | agreement, 5 CPU s | agreement, 10 CPU s | agreement, 8 work |"
    )
    assert "| a | 2 | +0.150 ± 0.635 | +0.400 ± nan (1) |" in lines[2]
    assert lines[2].endswith("| +0.400, 10 CPU s |")


def test_a_long_run_holds_a_shorter_one_and_not_the_other_way_round():
    long, short, old = ({"arm": "a", "seed": 0, "cpu_seconds": s} for s in ([12.0, 60.0], [12.0], 12.0))
    assert missing([short], [long]) == missing([short], [old]) == []
    assert missing([long], [short]) == [long]
    other = {**short, "cpu_seconds": [60.0]}
    assert missing([long], [short, other]) == [long]
    assert missing([{**short, "seed": 1}], [long]) == [{**short, "seed": 1}]
    assert by_arm([long, short])["a"][0] is long


def test_arms_are_compared_on_the_seeds_and_budgets_that_both_have():
    runs = [run("a", seed, gain, seconds=[5, 10]) for seed, gain in enumerate((0.3, 0.4, 9.0))]
    runs += [run("b", 0, 0.2, seconds=[5, 10]), run("b", 1, 0.3, seconds=[5])]
    lines = differences(by_arm(runs), "a", ["b"], measures(runs))
    assert lines[2].startswith("| b | 2 | +0.050 ± 0.000 | +0.100 ± nan (1) | +0.100 ± 0.000 |")


def test_the_interval_is_students():
    mean, width = interval([1.0, 2.0, 3.0])
    assert (mean, width) == (2.0, pytest.approx(4.3027 / 3**0.5, rel=1e-4))


def test_a_recorded_run_is_made_again_up_to_its_own_updates():
    recorded = run("a", 0, 0.2) | {"before": {}}
    recorded["curve"] = [{**point, "updates": i} for i, point in enumerate(recorded["curve"], start=3)]
    (job,) = jobs_again([recorded])
    assert [point["updates"] for point in job["points"]] == [3, 4]
    assert not {"before", "curve"} & set(job)
    assert all(set(point) == {"cpu", "work", "updates"} for point in job["points"])


RECORDED = {
    "refined_final": "| g2rpo {2} | 30 | +0.120 ± 0.007 | +0.120 ± 0.007 | +0.104 ± 0.012 |",
    "clean_final": "| flow_grpo_fast | 15 | +0.092 ± 0.009 | +0.079 ± 0.009 | +0.092 ± 0.014 |",
    "scaled_final": "| tempflow_grpo | 14 | +0.103 ± 0.006 | +0.059 ± 0.012 | +0.078 ± 0.014 |",
    "confirm": "| mix_grpo | 22 | +0.103 ± 0.006 | +0.063 ± 0.006 | +0.043 ± 0.020 |",
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_results_stay_readable(name, tmp_path, capsys):
    (tmp_path / f"{name}.jsonl").write_bytes((RESULTS / f"{name}.jsonl").read_bytes())
    main(["report", "--out", str(tmp_path), "--runs", name, "--plot", str(tmp_path / "drawn.png")])
    assert RECORDED[name] in (tmp_path / f"{name}.md").read_text()
    assert (tmp_path / "drawn.png").stat().st_size > 10_000
    assert capsys.readouterr().out.startswith("| arm | form | lr |")


def test_a_run_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def fake(job):
        if job["seed"] == 1:
            raise ValueError("no such thing")
        return job | {"curve": [{"cpu": 1.0, "agreement": 0.1, "strict": 0.0}]}

    monkeypatch.setattr(
        learning_runs, "ProcessPoolExecutor", lambda workers, **how: ThreadPoolExecutor(workers)
    )
    monkeypatch.setattr(learning_runs, "run_arm", fake)
    common = {"cpu_seconds": [1.0], "work": 0, "split": "tune", "noises": 1}
    jobs = [describe("mix_grpo", START, seed=seed, **common) for seed in range(4)]
    with pytest.raises(SystemExit, match="1 of 4 runs failed, the first of them mix_grpo, seed 1"):
        run_all(jobs, tmp_path / "runs.jsonl", 1)
    done = read(tmp_path / "runs.jsonl")
    assert [run["seed"] for run in done] == [0, 2, 3]
    assert [job["seed"] for job in missing(jobs, done)] == [1]


def test_arms_that_are_the_same_share_a_run(tmp_path, monkeypatch):
    ran = []

    def fake(job):
        ran.append((job["arm"], job["seed"]))
        return job | {"curve": [{"cpu": 1.0, "agreement": 0.1, "strict": 0.0}]}

    monkeypatch.setattr(
        learning_runs, "ProcessPoolExecutor", lambda workers, **how: ThreadPoolExecutor(workers)
    )
    monkeypatch.setattr(learning_runs, "run_arm", fake)
    common = {"cpu_seconds": [1.0], "work": 0, "split": "tune", "noises": 1}
    arms = ("mix_grpo", "mix_grpo, published", "flow_grpo")
    jobs = [describe(arm, START, seed=seed, **common) for seed in (0, 1) for arm in arms]
    found = run_all(jobs, tmp_path / "runs.jsonl", 1)
    assert ran == [("mix_grpo", 0), ("flow_grpo", 0), ("mix_grpo", 1), ("flow_grpo", 1)]
    assert {(run["arm"], run["seed"]) for run in found} == {(arm, seed) for arm in arms for seed in (0, 1)}
    assert missing(jobs, read(tmp_path / "runs.jsonl")) == []
    late = describe("flow_grpo, published", START, seed=1, **common)
    assert run_all([late], tmp_path / "runs.jsonl", 1)[-1]["arm"] == "flow_grpo, published"
    assert len(ran) == 4


def test_ideas_run_beside_the_leader_seed_by_seed():
    leader = describe("flow_grpo", START._replace(form="one step, stride 2"), split="tune")
    ideas = {"wider": {"lora.rank": 32}, "calmer": {"method.lr_schedule": "linear", "train.steps": 80}}
    jobs = idea_jobs(leader, ideas, range(7, 9))
    assert [(job["seed"], job["arm"]) for job in jobs[:3]] == [(7, "flow_grpo"), (7, "wider"), (7, "calmer")]
    assert len(jobs) == 6
    config = configure({**jobs[2], "noises": 1})
    assert (config.method.lr_schedule, config.train.steps, config.speed.tail_stride) == ("linear", 80, 2)
    assert len({identity(job) for job in jobs}) == 6


IDEAS = ideas_here(json.loads((RESULTS.parent / "ideas.json").read_text()))


def test_an_idea_whose_field_is_not_there_is_left_out(capsys):
    assert ideas_here({"a": {"method.ema": 0.5}, "b": {"method.nobody": 1}}) == {"a": {"method.ema": 0.5}}
    assert capsys.readouterr().out.endswith("lacks a field of theirs: b\n")


@pytest.mark.parametrize("name", IDEAS)
def test_every_idea_can_be_configured(name):
    leader = describe("g2rpo {2}", START, split="tune", noises=1)
    job = idea_jobs(leader, {name: IDEAS[name]}, [3])[1]
    made = configure(job).model_dump()
    for key, value in IDEAS[name].items():
        section, _, option = key.partition(".")
        found = made[section][option]
        assert (list(found) if isinstance(found, tuple) else found) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name --seeds, first and the one after the last"),
        (["--seeds", "999", "1003"], "the leader was tuned on the seeds"),
        (["--seeds", "3", "5", "--confirm", "wide"], "2 seeds confirm nothing; take at least 12"),
    ],
)
def test_ideas_need_fresh_seeds_and_enough_of_them(arguments, message, tmp_path):
    tuned = results("g2rpo {2}", START, [0.1] * 3)
    (tmp_path / "field_tune.jsonl").write_text("".join(json.dumps(run) + "\n" for run in tuned))
    (tmp_path / "ideas.json").write_text(json.dumps({"wide": {"lora.rank": 32}}))
    with pytest.raises(SystemExit, match=message):
        main(["ideas", "--out", str(tmp_path), "--ideas", str(tmp_path / "ideas.json"), *arguments])


def test_the_number_of_ideas_stands_beside_what_they_gain():
    runs = [run("a", seed, 0.1) | {"idea": {}, "split": "tune"} for seed in (0, 1)]
    runs += [run("wide", seed, 0.3) | {"idea": {"lora.rank": 8}, "split": "tune"} for seed in (0, 1)]
    lines = ideas_report(runs, "a", 5)
    assert lines[0].startswith("1 ideas on the tune prompts, of 5 that were tried; each minus a")
    assert lines[4].startswith('| wide | `{"lora.rank": 8}` | 2 | +0.200 ± 0.000 |')


def test_an_idea_can_be_compared_with_another_idea():
    ideas = {"wide": {"lora.rank": 8}, "and fast": {"lora.rank": 8, "method.ema": 0.5, "minus": "wide"}}
    jobs = idea_jobs(describe("flow_grpo", START, split="tune"), ideas, [7])
    assert jobs[2]["set"] == {"lora.rank": 8, "method.ema": 0.5}
    runs = [run(job["arm"], 7, gain) | job for job, gain in zip(jobs, (0.1, 0.3, 0.4), strict=True)]
    row = ideas_report(runs, "flow_grpo", 2)[5]
    assert row.startswith("| and fast |") and "| 1 | +0.100 ± nan |" in row


def test_seeds_that_were_used_are_refused(tmp_path):
    (tmp_path / "old.jsonl").write_text(json.dumps({"seed": 5, "split": "heldout"}) + "\n")
    (tmp_path / "tuned.jsonl").write_text(json.dumps({"seed": 9, "split": "tune"}) + "\n")
    (tmp_path / "searches.jsonl").write_text(json.dumps({"seeds": [5], "split": "heldout"}) + "\n")
    options = type("Options", (), {"out": tmp_path, "seeds": [4, 8]})
    with pytest.raises(SystemExit, match=r"old.jsonl holds runs of the seeds \[5\]"):
        fresh(options, tmp_path / "mine.jsonl")
    assert list(fresh(options, tmp_path / "old.jsonl")) == [4, 5, 6, 7]
    options.seeds = [8, 12]
    assert list(fresh(options, tmp_path / "mine.jsonl")) == [8, 9, 10, 11]


@pytest.mark.long
def test_one_run_gives_every_budget_and_is_not_made_twice(tmp_path, monkeypatch):
    """Time counts updates here, so the points lie where they must."""
    ticks = iter(range(1000))
    monkeypatch.setattr(learning_runs.time, "process_time", lambda: float(next(ticks)))
    monkeypatch.setattr(learning_runs, "piece", lambda policy, shape: learning_runs.REFERENCE)
    setting = START._replace(prompts=1)
    common = {"seed": 3, "split": "tune", "noises": 1, "work": 100, "updates": 2}
    made = run_arm(describe("g2rpo {2}", setting, cpu_seconds=[1.0, 3.0], **common))
    assert [(point["cpu"], point["updates"]) for point in made["curve"]][-1] == (3.0, 3)
    assert [reached(made, "cpu", goal)["updates"] for goal in (1.0, 3.0)] == [1, 3]
    assert reached(made, "work", 100)["work"] >= 100
    assert reached(made, "updates", 2)["updates"] == 2
    assert [m.title for m in measures([made])][2:4] == ["agreement, 100 work", "agreement, 2 updates"]
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(made) + "\n")
    assert missing([describe("g2rpo {2}", setting, cpu_seconds=[1.0], **common)], read(path)) == []
