"""What a graph hands over: the trainer takes every job that the block can write.

A job that says more than it may is refused by name.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from graph_forms import model_file
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from some_cases import ALL
from test_routes import load_routes

from comfy_g2rpo.blocks.block_settings import TINY_MODEL
from comfy_g2rpo.recipes import FIELDS, RECIPES
from comfy_g2rpo.rewards import REWARDS
from comfy_g2rpo.run.pace import FIELDS as PACE
from g2rpo_trainer.config.comfyui_models import FOLDERS
from g2rpo_trainer.config.family_names import FAMILIES
from g2rpo_trainer.config.reading import from_dict
from g2rpo_trainer.jobs.graph_job import RefusedJobError, prepared
from g2rpo_trainer.service.job_schema import job_request
from g2rpo_trainer.workflows.graph_file import WorkflowError
from g2rpo_trainer.workflows.model_files import ModelFolders

load_routes()
write_job = importlib.import_module("g2rpo_pack_for_routes.nodes.host.write_job")
presets = importlib.import_module("g2rpo_pack_for_routes.comfy_g2rpo.blocks.train_presets")
# The block's own: the pack is loaded under another name here, as in ComfyUI.
Spool = importlib.import_module("g2rpo_pack_for_routes.comfy_g2rpo.files.spool").Spool
TINY = write_job.Model(TINY_MODEL, TINY_MODEL, "sd3", 4_000_000)
PLAIN: dict[str, Any] = {
    **{"model": TINY, "text_encoders": (), "vae": "", "reward": (write_job.Judge("agreement"),)},
    **{"heldout_reward": (), "mix": "zscore", "recipe": "g2rpo", "steps": 2, "prompts": "a red circle"},
    **{"heldout_prompts": "a blue square", "negative": "", "guidance": 1.0, "width": 64, "height": 64},
    **{"learning_rate": 1e-3, "rank": 2, "alpha": 2.0, "targets": "attention", "prompts_per_step": 1},
    **{"slots": 8, "eval_every": 0, "seed": 0, "changes": "num_steps = 2\ngroup_size = 2"},
}


def job_of(**changes: Any) -> dict[str, Any]:
    """Return the job of an order with plain settings but for some."""
    return write_job.job_of(write_job.Order(**{**PLAIN, **changes}))[0]


def typed(field: Any) -> st.SearchStrategy[str]:
    """Draw a line for `changes` out of a field's bounds or choices."""
    rule, default = field.metadata, field.default
    if rule["choices"]:
        values: st.SearchStrategy[Any] = st.sampled_from(rule["choices"])
    elif isinstance(default, bool):
        values = st.sampled_from(["true", "false"])
    elif isinstance(default, tuple):
        values = st.lists(st.integers(int(rule["low"]), int(min(rule["high"], 4))), min_size=1, max_size=3)
        values = values.map(lambda numbers: ", ".join(map(str, numbers)))
    elif isinstance(default, int):
        values = st.integers(int(rule["low"]), int(min(rule["high"], 40)))
    else:
        values = st.floats(rule["low"], rule["high"], allow_nan=False)
    return values.map(lambda value: f"{field.name} = {value}")


NAMES = st.sampled_from([*REWARDS, "pickscore", "clipscore"])
WEIGHTS = st.floats(-1000, 1000, allow_nan=False) | st.sampled_from([0.0, 1.0])
JUDGES = st.lists(
    st.builds(
        write_job.Judge,
        NAMES,
        WEIGHTS,
        st.none() | st.floats(-1e9, 1e9),
        st.none() | st.integers(1, 256),
        st.none() | st.sampled_from(["fp32", "bf16"]),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda judge: judge.name,
).map(tuple)
TEXTS = st.text(max_size=40).filter(lambda text: "\0" not in text)
LINES = st.lists(st.sampled_from([*FIELDS.values(), *PACE.values()]).flatmap(typed), max_size=4)
ORDERS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(
            [TINY, *(write_job.Model("checkpoints", "a.safetensors", f, 10**9) for f in FAMILIES)]
        ),
        "reward": JUDGES,
        "heldout_reward": st.just(()) | JUDGES,
        "mix": st.sampled_from(["zscore", "sum", "minimum", "rank_product"]),
        "recipe": st.sampled_from(list(RECIPES)),
        "steps": st.integers(1, 100_000),
        "prompts": st.lists(TEXTS, min_size=1, max_size=9).map("\n".join),
        "heldout_prompts": TEXTS,
        "negative": TEXTS,
        "guidance": st.floats(1, 30),
        "width": st.integers(16, 4096),
        "height": st.integers(16, 4096),
        "learning_rate": st.floats(0, 1),
        "rank": st.integers(1, 512),
        "alpha": st.floats(0.01, 4096),
        "targets": st.sampled_from(["attention", "attention+feed_forward"]),
        "prompts_per_step": st.integers(1, 1024),
        "slots": st.integers(1, 4096),
        "eval_every": st.integers(0, 100_000),
        "seed": st.integers(0, 2**31 - 1),
        "changes": LINES.map("\n".join),
        "preset": st.sampled_from(list(presets.PRESETS)),
    }
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> ModelFolders:
    """Make a models folder with a file of each kind."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("checkpoints", "diffusion_models", "clip", "vae"):
        for name in ("a.safetensors", "sub/b.safetensors"):
            model_file(root / kind / name, "flux")
    return ModelFolders.of([root])


@settings(
    max_examples=300 if ALL else 40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(order=ORDERS)
def test_every_job_that_the_block_writes_is_one_that_the_trainer_takes(
    order: dict[str, Any], folders: ModelFolders, tmp_path_factory: pytest.TempPathFactory
) -> None:
    try:
        job = job_of(**order)
    except ValueError as error:
        event("refused by the block")
        assert len(str(error).splitlines()) == 1
        assume(False)
    place = tmp_path_factory.getbasetemp() / "job"
    made = from_dict(prepared(job, folders, place)["recipe"])
    # A service takes it, too.
    content = json.dumps({"id": "one", "graph": job}).encode()
    assert job_request(content).job == job
    assert (made.model.width, made.train.seed) == (order["width"], job["recipe"]["train"]["seed"])
    event("taken")


def test_names_become_files_of_their_kind(folders: ModelFolders, tmp_path: Path) -> None:
    model = write_job.Model("diffusion_models", "sub/b.safetensors", "flux", 10**10)
    job = job_of(model=model, text_encoders=("a.safetensors", "sub/b.safetensors"), vae="a.safetensors")
    made = prepared(job, folders, tmp_path / "one", ["model.guidance=3.5"])
    root = folders.roots[0]
    assert made["recipe"]["model"] | {"dtype": "bf16", "family": "flux"} == made["recipe"]["model"]
    assert made["recipe"]["model"]["transformer"] == str(root / "diffusion_models/sub/b.safetensors")
    encoders = [str(root / "clip" / name) for name in ("a.safetensors", "sub/b.safetensors")]
    assert made["recipe"]["model"]["text_encoders"] == encoders
    assert made["recipe"]["model"]["vae"] == str(root / "vae/a.safetensors")
    assert made["recipe"]["memory"] == {"gradient_checkpointing": True}
    assert made["recipe"]["model"]["max_sequence_length"] == 256
    assert made["settings"] == ["model.guidance=3.5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.heldout.jsonl", "one.train.jsonl"]


BAD_NAMES = [
    "",
    "..",
    "../vae/a.safetensors",
    "sub/../../x",
    "/etc/passwd",
    "C:\\x",
    "C:x",
    "\\\\host\\x",
    "a\0b",
]
BAD_NAMES += ["sub\\..\\..\\x", "x" * 600, "gone.safetensors", "sub", "leads_out.safetensors", "\ud800"]


@pytest.mark.parametrize("name", [*BAD_NAMES, 7, None, ["a.safetensors"]], ids=ascii)
def test_a_name_that_leads_out_or_nowhere_is_refused(
    name: Any, folders: ModelFolders, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.safetensors"
    model_file(secret, "flux")
    link = folders.of_kind("checkpoints")[0] / "leads_out.safetensors"
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    job = job_of()
    job["models"] |= {"folder": "checkpoints", "model": name}
    with pytest.raises(WorkflowError, match=r"^models\.model asks for "):
        prepared(job, folders, tmp_path / "one")
    # The same file is fine where the worker's owner has given its folder.
    more = ModelFolders.of([*folders.roots, tmp_path])
    if name == link.name:
        made = prepared(job, more, tmp_path / "one")
        assert made["recipe"]["model"]["path"] == str(secret)


def test_folders_of_an_extra_model_paths_file_are_taken_if_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "big/checkpoints").mkdir(parents=True)
    (tmp_path / "big/checkpoints/a.safetensors").write_bytes(b"")
    (tmp_path / "big/unet").mkdir()
    (tmp_path / "big/unet/b.safetensors").write_bytes(b"")
    file = tmp_path / "extra.yaml"
    file.write_text("comfyui:\n  base_path: big\n  checkpoints: checkpoints\n  unet: |\n    gone\n    unet\n")
    found = ModelFolders.of([file])
    assert found.find("checkpoints", "a.safetensors", "f") == str(tmp_path / "big/checkpoints/a.safetensors")
    assert found.find("diffusion_models", "b.safetensors", "f") == str(tmp_path / "big/unet/b.safetensors")
    for content in ("[1", "- 1", "x: 1", "x: {checkpoints: {a: 1}}", "x: {base_path: [1]}"):
        file.write_text(content)
        try:
            found = ModelFolders.of([file])
        except WorkflowError as error:
            assert "--models" in str(error)
        else:
            assert not [place for kind in FOLDERS for place in found.of_kind(kind) if place.is_dir()]
    with pytest.raises(WorkflowError, match=r"--models .*gone is neither a folder nor a file"):
        ModelFolders.of([tmp_path / "gone"])


HOSTILE: dict[str, tuple[list[str], Any]] = {
    "model.path": (["recipe", "model", "path"], "/etc"),
    "model.tokenizers": (["recipe", "model", "tokenizers"], "/etc"),
    "model.lora": (["recipe", "model", "lora"], [{"path": "/etc/passwd"}]),
    "lora.init": (["recipe", "lora", "init"], "/etc/passwd"),
    "rewards.path": (["recipe", "rewards", 0, "path"], "evil.py:run"),
    "rewards.url": (["recipe", "rewards", 0, "url"], "http://example.com"),
    "rewards.reference": (["recipe", "rewards", 0, "reference"], "/etc/passwd"),
    "votes": (["recipe", "rewards", 0, "name"], "votes"),
    "rewards holds": (["recipe", "rewards", 0], "agreement"),
    "'rewards'": (["recipe", "rewards"], "agreement"),
    "'out'": (["recipe", "out"], "/tmp"),
    "'report'": (["recipe", "report"], {"trackers": ["wandb"]}),
    "'pairs'": (["recipe", "pairs"], {"runs": ["/etc"]}),
    "prompts.train": (["recipe", "prompts", "train"], "/etc/passwd"),
    "prompts.heldout": (["recipe", "prompts", "heldout"], [1]),
    "prompts holds": (["recipe", "prompts"], ["a"]),
    "no recipe": (["recipe"], ["model"]),
    "settings": (["settings"], ["rewards.0.path=evil.py:run"]),
    "no models": (["models"], "a"),
    "models.folder": (["models", "folder"], "loras"),
    "models.text_encoders": (
        ["models"],
        {"folder": "checkpoints", "model": "a.safetensors", "text_encoders": "a"},
    ),
}


@pytest.mark.parametrize("says", HOSTILE)
def test_a_job_that_says_more_than_it_may_is_refused_by_name(
    says: str, folders: ModelFolders, tmp_path: Path
) -> None:
    way, value = HOSTILE[says]
    job = copy.deepcopy(job_of())
    part: Any = job
    for step in way[:-1]:
        part = part[step]
    part[way[-1]] = value
    with pytest.raises(RefusedJobError, match=r"^[^\n]*$") as refused:
        prepared(job, folders, tmp_path / "one")
    assert says in str(refused.value) and not list(tmp_path.iterdir())


def handed(spool: Any, name: str, if_changed: str = "new", again: bool = False, **changes: Any) -> Any:
    """Hand a job over as the block does."""
    return write_job.hand_over(spool, spool.path.parent, name, job_of(**changes), if_changed, again)


def test_the_same_job_is_never_there_twice(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    assert [handed(spool, "mine").new for _ in range(3)] == [True, False, False]
    blank = [handed(spool, " ").job_id for _ in range(2)]
    assert blank[0] == blank[1] and blank[0].startswith("g2rpo-") and len(spool.ids()) == 2


def test_other_settings_take_a_number_or_are_asked_about(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    handed(spool, "mine")
    with pytest.raises(
        ValueError, match=r"^run: mine .*\(rank: 2 → 4\); give another name, or set if_"
    ) as said:
        handed(spool, "mine", "ask", rank=4)
    assert str(tmp_path) not in str(said.value)
    second = handed(spool, "mine", rank=4)
    assert (second.job_id, second.new) == ("mine-2", True) and "rank: 2 → 4" in second.remark
    assert handed(spool, "mine", rank=4) == write_job.HandedOver("mine-2", second.remark, False)
    (tmp_path / "mine-3").mkdir()
    other = handed(spool, "mine", prompts="a red circle\na green one", negative="", vae="x", mix="sum")
    assert other.job_id == "mine-4"
    reward = (write_job.Judge("jpeg", 2.0),)
    with pytest.raises(ValueError, match=r"reward: 1 agreement → 2 jpeg"):
        handed(spool, "mine", "ask", reward=reward)
    with pytest.raises(ValueError, match=r"mine-3 is the name of another run"):
        handed(spool, "mine-3", "ask")


@pytest.mark.parametrize("name", ["spool", "newest", "Upper", "a/b", "..", "nul", "x" * 65, "a b", "ä"])
def test_what_is_no_name_for_a_job_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^run: ") as said:
        handed(Spool(tmp_path / "spool"), name)
    assert str(tmp_path) not in str(said.value) and not (tmp_path / "spool").exists()


def test_a_damaged_job_and_a_full_spool_are_told_without_their_path(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    handed(spool, "mine")
    (spool.path / "mine.job.json").write_text("{")
    with pytest.raises(ValueError, match=r"^run: mine\.job\.json cannot be read as a job"):
        handed(spool, "mine")
    for i in range(write_job.MAX_JOBS):
        os.link(spool.path / "mine.job.json", spool.path / f"n{i}.job.json")
    with pytest.raises(ValueError, match=r"^run: the spool holds 1001 jobs; remove those that have ended"):
        handed(spool, "other")


def test_a_job_that_failed_is_taken_up_again_on_request_alone(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    handed(spool, "mine")
    assert not handed(spool, "mine", again=True).new
    for end in ("failed", "cancelled", "done"):
        spool.cancel("mine")
        spool.end("mine", end)
        assert not handed(spool, "mine").new and spool.state("mine") == end
        assert handed(spool, "mine", again=True).new is (end != "done")
        assert spool.state("mine") == ("done" if end == "done" else "waiting")
        assert spool.cancelled("mine") is (end == "done")


REFUSED = {
    "changes: warmup_steps is 5": {"changes": "warmup_steps = 5"},
    "negative: this model takes": {
        "model": write_job.Model("checkpoints", "a", "flux", 10**10, True),
        "negative": "blur",
    },
    "changes: objective is pairs": {"changes": "objective = pairs"},
    "changes: a tree of up to": {"changes": "group_size = 1024\nnum_steps = 1000\nmethod.steps = all"},
    "steps: ": {"steps": 100_000, "width": 4096, "height": 4096, "changes": "group_size = 100"},
    "reward: jpeg has the weight 2000": {"reward": (write_job.Judge("jpeg", 2000.0),)},
    "reward: every weight is 0": {"reward": (write_job.Judge("jpeg", 0.0),)},
    "heldout_reward: jpeg is trained on": {
        "reward": (write_job.Judge("jpeg"),),
        "heldout_reward": (write_job.Judge("jpeg", 0.5),),
    },
    "reward: 'a b' is no name": {"reward": (write_job.Judge("a b"),)},
    "prompts holds no prompt": {"prompts": "# none"},
    "heldout_prompts: ": {"heldout_prompts": "a red circle"},
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_could_not_be_trained_is_refused_before_it_is_handed_over(says: str) -> None:
    with pytest.raises(ValueError) as refused:
        job_of(**REFUSED[says])
    assert str(refused.value).startswith(says)


def test_a_reward_that_weighs_nothing_only_measures() -> None:
    reward = (write_job.Judge("jpeg", 0.0), write_job.Judge("agreement"), write_job.Judge("webp", 0.0, -5.0))
    recipe = job_of(reward=reward, heldout_reward=(write_job.Judge("agreement"),))["recipe"]
    assert [each["name"] for each in recipe["rewards"]] == ["agreement", "webp"]
    assert recipe["heldout_rewards"] == [{"name": "jpeg", "weight": 0.0}, {"name": "agreement"}]
    assert recipe["method"]["mix"] == "zscore"
