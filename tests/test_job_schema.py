"""What the service takes as a job: whatever is sent, a job comes of it or one line that says why not."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from job_host import DEMO, job

from g2rpo_trainer.config.bundled import bundled_recipes
from g2rpo_trainer.config.reading import apply_overrides, read_yaml
from g2rpo_trainer.config.recipe_fields import fields
from g2rpo_trainer.service.job_schema import (
    FILES,
    MAX_DEPTH,
    REFUSED,
    RecipeForm,
    RequestError,
    find_name,
    job_request,
    read_json,
    ready_job,
    validated,
)

QUICK = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=30)
    | st.sampled_from(
        ["../x", "/etc/passwd", "x.py:f", "http://x", "votes", "a" * 3000, "models/tiny", "\x00"]
    )
)
VALUES = st.recursive(
    LEAVES, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=8), part, max_size=3)
)
TEXTS = VALUES.map(json.dumps).map(str.encode)
NAMES = sorted({name for name, _ in fields()})


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List every place in a tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(each for key, value in inner for each in places(value, (*path, key)))]


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Copy a tree with another value at a place."""
    if not path:
        return value
    made = copy.copy(tree)
    made[path[0]] = put(tree[path[0]], path[1:], value)
    return made


@QUICK
@given(st.data())
def test_a_recipe_with_anything_anywhere_is_a_job_or_a_refusal_in_one_line(data: st.DataObject) -> None:
    sent = {"recipe": DEMO, "settings": [], "source": "x"}
    sent = put(sent, data.draw(st.sampled_from(places(sent))), data.draw(VALUES))
    try:
        made = job_request(json.dumps(sent).encode()).job
        ready = ready_job(made, [])
    except RequestError as error:
        assert str(error).isprintable() and len(str(error)) < 1000
    else:
        validated(RecipeForm, made["recipe"])
        assert ready["recipe"]["model"]["path"].startswith("/")


@QUICK
@given(st.sampled_from(NAMES), VALUES.map(json.dumps) | st.text(max_size=60))
def test_a_setting_of_any_field_and_value_is_taken_or_refused_in_one_line(name: str, value: str) -> None:
    try:
        ready_job({"recipe": DEMO, "settings": [f"{name}={value}"]}, [])
    except RequestError as error:
        assert "\n" not in str(error)


@QUICK
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode) | TEXTS)
def test_what_is_read_is_what_json_says_or_nothing(content: bytes) -> None:
    try:
        found = read_json(content)
    except RequestError:
        return
    assert found == json.loads(content)


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1, 100_000])
def test_depth_counts_tables_and_lists_but_not_signs_within_texts(depth: int) -> None:
    text = json.dumps("[" * 99 + '"\\')
    content = f"{'[' * depth}{text}{']' * depth}".encode()
    if depth <= MAX_DEPTH:
        assert read_json(content)
        return
    with pytest.raises(RequestError, match="nested more than"):
        read_json(content)


def test_a_text_without_end_is_looked_at_once() -> None:
    with pytest.raises(RequestError, match="not JSON"):  # or after many minutes
        read_json(b'"\\' * 2**17)


@QUICK
@given(name=st.text(max_size=40) | st.lists(st.sampled_from(["..", ".", "a", "", "link", "~"])).map("/".join))
def test_no_name_leads_out_of_the_folders_of_the_service(name: str, tmp_path_factory: Any) -> None:
    place = tmp_path_factory.getbasetemp() / "names"
    if not place.exists():
        (place / "root/a").mkdir(parents=True)
        (place / "outside").mkdir()
        (place / "root/link").symlink_to(place / "outside")
        (place / "root/a/b.txt").touch()
    for asked in (name, f"a/{name}", f"link/{name}"):
        if "\0" in asked:
            continue  # refused by the pattern before it comes here
        try:
            found = find_name(asked, "prompts.train", [place / "root"])
        except (RequestError, OSError):
            continue
        bundled = ("models/", "prompts/")
        assert asked.startswith(bundled) or Path(found).is_relative_to((place / "root").resolve())


def test_every_field_is_taken_but_those_that_are_refused_on_purpose() -> None:
    plain = {name.replace(".0", "") for name in NAMES}
    assert plain > FILES and plain > REFUSED
    for name in NAMES:
        tree = apply_overrides({**DEMO, "heldout_rewards": [{"name": "jpeg"}]}, [f"{name}=null"])
        try:
            validated(RecipeForm, tree)
            words = ""
        except RequestError as error:
            words = str(error)
        assert ("Extra inputs" in words) == (name.replace(".0", "") in REFUSED), name


@pytest.mark.parametrize("name", bundled_recipes())
def test_every_bundled_recipe_is_taken_but_for_models_that_are_not_here(name: str) -> None:
    made = job_request(json.dumps({"recipe": read_yaml(bundled_recipes()[name])}).encode()).job
    try:
        ready_job(made, [])
    except RequestError as error:
        assert "which this machine does not have" in str(error)


def test_a_recipe_without_rewards_is_refused_by_its_form() -> None:
    with pytest.raises(RequestError, match=r"recipe\.rewards: List should have at least 1 item"):
        job_request(job(rewards=[]))


def test_names_become_files_and_settings_part_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/words.txt").write_text("a cat\na dog\n")
    made = job_request(job(settings=("prompts.train=mine/words.txt", "train.steps=7"))).job
    ready = ready_job(made, [tmp_path])
    assert ready["recipe"]["prompts"]["train"] == str(tmp_path / "mine/words.txt")
    assert ready["recipe"]["train"]["steps"] == 7 and ready["settings"] == []
    assert made["recipe"]["prompts"]["train"] == "prompts/shapes_train.txt"
    (tmp_path / "mine/style.safetensors").write_bytes(b"")
    made = job_request(job(settings=("model.lora=[{path: mine/style.safetensors}]",))).job
    (style,) = ready_job(made, [tmp_path])["recipe"]["model"]["lora"]
    assert style["path"] == str(tmp_path / "mine/style.safetensors")


def test_what_a_refusal_says_holds_no_place_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    made = job_request(
        job(rewards=[{"name": "psnr", "reference": "bad.safetensors"}], train={"steps": 5})
    ).job
    made["recipe"]["method"] = {"name": "g2rpo", "warmup_steps": 9}
    with pytest.raises(RequestError) as caught:
        ready_job(made, [tmp_path])
    assert str(tmp_path) not in str(caught.value)


def test_numbers_come_through_as_they_are() -> None:
    for number in (1e-5, 0.1, 5e-324, 1.7976931348623157e308, -0.0):
        assert math.copysign(1, read_json(json.dumps(number).encode())) == math.copysign(1, number)
        assert read_json(json.dumps(number).encode()) == number
