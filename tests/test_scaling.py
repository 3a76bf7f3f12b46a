"""Beyond one machine: what --ray refuses, the arithmetic of docs/scaling.md, and its files; without Ray."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from program import leave
from test_commands import parse

from g2rpo_trainer.cluster.cluster_options import Cluster, cluster_of, cluster_settings
from g2rpo_trainer.cluster.connecting import check_address, resources_of
from g2rpo_trainer.cluster.part_bound import LEAST, UNKNOWN, VARIABLE, PartBound, given_bound
from g2rpo_trainer.commands.arguments import CommandError
from g2rpo_trainer.config.reading import load
from g2rpo_trainer.cost.cluster_hours import Load, shared

DOCS = Path(__file__).parent.parent / "docs"
FILES = sorted((DOCS / "scaling").iterdir())
LOAD = Load(prompts=64, rollout=60.0, update=64 * 6.0, adapter=90e6, part=8e6)
COUNTS = (1, 3, 7, 15, 31, 63)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rollout-workers", "2"], "--rollout-workers is for a run on Ray; give --ray ADDRESS"),
        (["--staleness", "1"], "--staleness is for a run on Ray"),
        (["--reward-workers", "1"], "--reward-workers is for a run on Ray"),
        (["--ray", "local", "--rollout-workers", "2", "--reward-workers", "3"], "give 2 at most"),
        (["--ray", " "], "--ray is empty"),
        (["--ray", "local", "--set", "method.prompt_choice=signal"], "prompt_choice signal"),
        (["--ray", "local", "--set", "rewards=[votes]", "--set", "heldout_rewards=[agreement]"], "votes"),
    ],
)
def test_what_does_not_go_with_ray_is_refused_in_one_line(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, error = leave(capsys, "train", "demo", "--quiet", "--out", tmp_path / "run", *words)
    assert code == 2 and says in error and not (tmp_path / "run").exists()
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("count", ["0", "-1", "4097", "some"])
def test_a_number_of_reward_workers_that_is_none_is_refused(
    count: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = "--ray", "local", "--reward-workers", count
    code, _, error = leave(capsys, "train", "demo", "--quiet", "--out", tmp_path / "run", *words)
    assert code == 2 and "--reward-workers" in error and not (tmp_path / "run").exists()


def test_a_bound_comes_from_what_parts_took_unless_it_is_given() -> None:
    bound = PartBound()
    assert bound.seconds() == UNKNOWN and bound.seconds(2) == 4 * UNKNOWN
    bound.took(2.0)
    assert bound.seconds() == LEAST
    for seconds in (1000.0, 3.0):
        bound.took(seconds)
    assert bound.seconds() == 4000 and bound.seconds(1) == 8000
    given = PartBound(7.0)
    given.took(1000.0)
    assert given.seconds(3) == 7


@pytest.mark.parametrize("given", ["soon", "nan", "1", "-5", "1e99"])
def test_a_bound_that_is_none_is_named(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert given_bound() is None
    monkeypatch.setenv(VARIABLE, "90")
    assert given_bound() == 90
    monkeypatch.setenv(VARIABLE, given)
    with pytest.raises(ValueError, match=rf"{VARIABLE} is .*; give seconds, from 2 to"):
        given_bound()


def test_several_processes_and_ray_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CommandError, match="exclude each other"):
        cluster_of("local", None, None)
    assert cluster_of(None, None, None) is None


def test_without_ray_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    words = "train", "demo", "--out", tmp_path / "run", "--ray", "local", "--json"
    code, out, error = leave(capsys, *words)
    assert code == 2 and "pip install 'ray>=" in error.strip().splitlines()[-1]
    assert "pip install" in json.loads(out.splitlines()[-1])["error"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["nowhere", "host:", ":1", "a:b", "ray://x", "host:99999"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(CommandError, match="give auto, HOST:PORT"):
        check_address(address)


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check_address(f"127.0.0.1:{port}")
        check_address(f"ray://127.0.0.1:{port}")
    with pytest.raises(CommandError, match="nobody answers there"):
        check_address(f"127.0.0.1:{port}")
    check_address("auto")
    check_address("local")


def test_a_cluster_brings_the_settings_that_it_needs() -> None:
    made = load("demo", ["train.prompts_per_step=5"])
    assert cluster_settings(made, None, False, True) == []
    parts, clip = "train.prompts_at_once=3", "method.objective=clip"
    assert cluster_settings(made, Cluster("local", 2, 1), False, True) == [parts, clip]
    assert cluster_settings(made, Cluster("local", 2, 0), False, True) == [parts]
    # A run that goes on may not change what it learns by.
    assert cluster_settings(made, Cluster("local", 2, 1), True, True) == [parts]
    given = load("demo", ["train.prompts_at_once=1", "method.objective=clip"])
    assert cluster_settings(given, Cluster("local", 2, 1), False, True) == []


@pytest.mark.parametrize(
    ("there", "workers", "here", "takes"),
    [
        ({"CPU": 8.0}, 3, True, {"num_cpus": 1}),
        ({"CPU": 8.0, "GPU": 1.0}, 2, True, {"num_cpus": 1, "num_gpus": 0.5}),
        ({"CPU": 8.0, "GPU": 3.0}, 2, True, {"num_cpus": 1, "num_gpus": 1}),
        ({"CPU": 8.0, "GPU": 3.0}, 9, False, {"num_cpus": 1, "num_gpus": 1}),
    ],
)
def test_a_worker_takes_a_card_where_there_is_one(
    there: dict[str, float], workers: int, here: bool, takes: dict[str, float]
) -> None:
    assert resources_of(there, workers, here) == takes


def test_the_arithmetic_of_workers() -> None:
    load_ = Load(prompts=4, rollout=10.0, update=8.0, adapter=1e9, part=5e8, bandwidth=1e9)
    # Two prompts a worker, two adapters and four parts over the wire, then the update.
    waits = shared(load_, 2, 0)
    assert waits.seconds == 2 * 10 + (2 + 2) + 8 and waits.idle == 1 - 8 / 32
    assert waits.efficiency == 48 / (32 * 3)
    assert shared(load_, 2, 1).seconds == 24
    # With workers enough the learner is the limit, and never waits.
    quick = Load(prompts=4, rollout=1.0, update=8.0, adapter=0, part=0)
    assert shared(quick, 4, 1).seconds == 8 and shared(quick, 4, 1).idle == 0


def table() -> list[str]:
    """Write the table of docs/scaling.md."""
    lines = [
        "| cards | s a step, staleness 0 | 1 | learner waits, 0 | 1 | efficiency, 0 | 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for workers in COUNTS:
        both = [shared(LOAD, workers, staleness) for staleness in (0, 1)]
        cells = [
            f"{workers + 1}",
            *(f"{each.seconds:.0f}" for each in both),
            *(f"{each.idle:.0%}" for each in both),
            *(f"{each.efficiency:.0%}" for each in both),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def test_the_table_of_the_page_is_the_functions() -> None:
    text = (DOCS / "scaling.md").read_text("utf-8")
    assert "\n".join(table()) in text, "\n".join(table())
    for told in ("64 prompts", "60 seconds per prompt", "6 seconds per prompt", "90 MB", "8 MB", "10 Gbit/s"):
        assert told in " ".join(text.split())


def test_every_file_is_on_the_page() -> None:
    text = (DOCS / "scaling.md").read_text("utf-8")
    assert {path.name for path in FILES} == set(re.findall(r"\(scaling/([\w.]+)\)", text))


def texts(path: Path) -> list[str]:
    """Return the shell text in a file."""
    if path.suffix == ".sbatch":
        return [path.read_text("utf-8")]
    tree = yaml.safe_load(path.read_text("utf-8"))
    if tree.get("kind") == "RayJob":
        return [tree["spec"]["entrypoint"]]
    return [tree["setup"], tree["run"]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_shell_in_a_file_is_sound(path: Path) -> None:
    for text in texts(path):
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
    if path.suffix == ".sbatch":
        lines = path.read_text("utf-8").splitlines()
        first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
        options = [line for line in lines if line.startswith("#SBATCH")]
        # Slurm reads none that stand behind a command.
        assert lines[0] == "#!/bin/bash" and options and not any(o in lines[first:] for o in options)
        assert all(re.fullmatch(r"#SBATCH --[a-z-]+=\S+", option) for option in options)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_commands_in_a_file_are_the_programs_own(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = 0
    for text in texts(path):
        for line in text.replace("\\\n", " ").splitlines():
            start = re.search(r"\bg2rpo (?=train)|g2rpo_trainer\.cli ", line)
            if not start or line.lstrip().startswith("#"):
                continue
            rest = line[start.end() :].replace('"${go_on[@]}"', "--resume").replace("$go_on", "--resume")
            parse(shlex.split(re.sub(r"\$\{?[\w]+\}?", "x", rest)))
            found += 1
    assert found == 1


def test_the_rayjob_has_what_its_schema_requires() -> None:
    """By KubeRay's CRD of ray.io/v1: what is required, and no field that it does not know."""
    tree = yaml.safe_load((DOCS / "scaling/kuberay_job.yaml").read_text("utf-8"))
    assert (tree["apiVersion"], tree["kind"]) == ("ray.io/v1", "RayJob") and tree["metadata"]["name"]
    spec = tree["spec"]
    known = {"entrypoint", "entrypointNumGpus", "entrypointResources", "shutdownAfterJobFinishes"}
    assert set(spec) <= known | {"ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"}
    assert json.loads(spec["entrypointResources"])
    cluster = spec["rayClusterSpec"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert set(cluster) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    assert set(head) <= {"serviceType", "rayStartParams", "template"}
    assert set(workers) >= {"groupName", "minReplicas", "maxReplicas", "template"}
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (head, workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        for container in group["template"]["spec"]["containers"]:
            assert container["name"] and container["image"] and container["resources"]["limits"]
    assert f"--rollout-workers {workers['replicas']}" in " ".join(spec["entrypoint"].split())
    # What the learner asks for is there once, and only in the head.
    assert json.loads(json.loads(head["rayStartParams"]["resources"])) == json.loads(
        spec["entrypointResources"]
    )


def test_the_skypilot_task_has_fields_that_it_knows() -> None:
    tree: dict[str, Any] = yaml.safe_load((DOCS / "scaling/skypilot.yaml").read_text("utf-8"))
    known = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
    assert set(tree) <= known and set(tree["resources"]) <= {"accelerators", "disk_size", "infra"}
    assert f"--rollout-workers {tree['num_nodes'] - 1}" in tree["run"]
    for mount in tree["file_mounts"].values():
        assert mount["mode"] in ("MOUNT", "COPY", "MOUNT_CACHED")
