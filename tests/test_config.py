"""The configuration: what is accepted means what it says, what is wrong is named in one line."""

import math
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from comfy_g2rpo import prompts
from comfy_g2rpo.prompts import PromptCursor, PromptError, order_of_epoch
from comfy_g2rpo.recipes import FIELDS, RECIPES
from comfy_g2rpo.rewards import RewardError
from g2rpo_trainer.config import reading
from g2rpo_trainer.config.bundled import bundled_recipes
from g2rpo_trainer.config.reading import ConfigError

BUNDLED = sorted(bundled_recipes())


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Write a recipe with a model folder and prompts beside it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "train.txt").write_text("a red circle\n")
    tree = {"model": {"path": "model"}, "rewards": [{"name": "agreement"}], "prompts": {"train": "train.txt"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_recipes_load_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = reading.load(name)
    assert Path(loaded.prompts.train).is_file()
    assert reading.make_recipe(loaded).num_steps >= 8


def test_there_are_bundled_recipes() -> None:
    assert {"demo", "demo_awm", "demo_multi", "demo_gated", "sd35_medium"} <= set(BUNDLED)


def test_paths_are_looked_up_beside_the_recipe(recipe: Path) -> None:
    assert reading.load(recipe).prompts.train == str(recipe.parent / "train.txt")


@pytest.mark.parametrize("name", RECIPES)
def test_a_named_method_is_taken_as_it_is(recipe: Path, name: str) -> None:
    assert reading.make_recipe(reading.load(recipe, [f"method.name={name}"])) == RECIPES[name]


def test_every_field_of_a_method_can_be_set_and_explains_itself() -> None:
    explained = dict(reading.fields())
    assert all(explained[f"method.{name}"] == field.metadata["help"] for name, field in FIELDS.items())
    assert all(sentence.endswith(".") for name, sentence in explained.items())


def test_settings_override_the_recipe(recipe: Path) -> None:
    loaded = reading.load(
        recipe,
        ["method.eta=0.5", "method.granularities=[1, 3]", "method.learning_rate=1e-3", "rewards.0.weight=2"],
    )
    made = reading.make_recipe(loaded)
    assert (made.eta, made.granularities, made.learning_rate, loaded.rewards[0].weight) == (
        0.5,
        (1, 3),
        1e-3,
        2.0,
    )


@pytest.mark.parametrize(
    "value",
    ["!!bool foo", "!!timestamp foo", "!!int ''", "!!float ''", "2001-99-99", "!!map 3", "[2001-99-99]"],
)
def test_a_value_that_is_not_what_its_tag_says_is_refused_in_one_line(value: str, recipe: Path) -> None:
    with pytest.raises(reading.ConfigError, match=r"method\.eta=.*the value is not YAML: ") as said:
        reading.load(recipe, [f"method.eta={value}"])
    assert "\n" not in str(said.value)
    recipe.write_text(f"method: {{eta: {value}}}\n")
    with pytest.raises(reading.ConfigError, match=r"is not YAML: .*line 1"):
        reading.load(recipe, [])


def test_what_a_run_records_makes_the_same_configuration_again(recipe: Path) -> None:
    loaded = reading.load(recipe, ["method.granularities=[1, 3]"])
    assert reading.from_dict(reading.dump(loaded)["config"]) == loaded


WRONG = {
    "method.etta=1": "method.etta is unknown (did you mean method.eta?); remove it or correct its name",
    "train.stepz=3": "train.stepz is unknown (did you mean train.steps?); remove it or correct its name",
    "trian.steps=3": "trian is unknown (did you mean train?); remove it or correct its name",
    "shift=2": "shift is unknown (did you mean method.shift?); remove it or correct its name",
    "zzz=1": "zzz is unknown; remove it or correct its name",
    "rewards=[{name: agreement, weigth: 2}]": (
        "rewards.0.weigth is unknown (did you mean rewards.0.weight?); remove it or correct its name"
    ),
    "method.eta=-1": "method.eta is -1.0; it must lie between 0 and 10",
    "method.granularities=[0]": "method.granularities is (0,); it must lie between 1 and 1000",
    "method.granularities=[]": "method.granularities is empty; list at least one",
    "method.granularities=3": "method.granularities is 3; it must be a list; write [3]",
    "method.kernel=flowsde": (
        "method.kernel is 'flowsde' (did you mean 'flow_sde'?); choose one of: flow_sde, dance_sde, cps, ddim"
    ),
    "method.epochs=2": (
        "method.epochs above 1 and update per_step leave the rollout's policy; choose objective: clip"
    ),
    "train.steps=ten": "train.steps is 'ten'; it must be a whole number",
    "train.steps=2.5": "train.steps is 2.5; it must be a whole number",
    "train.steps=true": "train.steps is True; it must be something other than true or false",
    "train.seed=99999999999": "train.seed is 99999999999; it must lie between 0 and 2147483647",
    "lora.alpha=.nan": "lora.alpha is nan; it must be a finite number",
    "lora=3": "lora is 3; it must be a section with keys of its own",
    "model={}": (
        "model.path is missing; add it to the recipe, or give model.transformer, model.text_encoders and "
        "model.vae"
    ),
    "rewards=[]": "rewards is empty; list at least one",
    "rewards=[{name: jpeg}, {name: jpeg}]": "rewards names 'jpeg' twice; add up its weights",
    "rewards=[{name: jpeg, weight: 0}]": (
        "rewards has a weight of 0; list that reward under heldout_rewards, where it only measures"
    ),
    "train.steps": "--set 'train.steps' has no value; write it as section.key=value",
}


@pytest.mark.parametrize("setting", WRONG)
def test_a_mistake_is_named_with_its_remedy(recipe: Path, setting: str) -> None:
    with pytest.raises(ConfigError) as error:
        reading.load(recipe, [setting])
    assert str(error.value) == WRONG[setting]


def test_several_mistakes_are_named_at_once(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"^train\.steps is 0; .*; train\.slots is 0; [^\n]*$"):
        reading.load(recipe, ["train.steps=0", "train.slots=0"])


def test_an_unknown_reward_names_the_nearest(recipe: Path) -> None:
    with pytest.raises(RewardError, match="'agrement' is unknown, did you mean 'agreement'"):
        reading.load(recipe, ["heldout_rewards=[agrement]"])


@pytest.mark.parametrize("field", ["model.path", "prompts.train", "prompts.heldout", "lora.init"])
def test_a_path_that_does_not_exist_is_named(recipe: Path, field: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^{field} is 'nowhere', which does not exist; looked beside the recipe"
    ):
        reading.load(recipe, [f"{field}=nowhere"])


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'dmeo' is neither a file nor bundled \(did you mean 'demo'\?\)"):
        reading.load("dmeo")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [", "is not YAML: .*line 1"),
        (b"\x00", "is not YAML"),
        (b"\xff", "is not UTF-8"),
        (b"- 1", "is not a recipe"),
        (b"", "is not a recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        reading.load(tmp_path / "a.yaml")
    assert "\n" not in str(error.value)


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: !!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="is not YAML"):
        reading.load(tmp_path / "a.yaml")


def test_prompts_come_from_text_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(
        b"\xef\xbb\xbf# a comment\r\n\r\n a red circle \r\ntwo blue squares\r\na red circle\n"
    )
    assert prompts.read(tmp_path / "a.txt") == (
        ["a red circle", "two blue squares"],
        [f"{tmp_path / 'a.txt'}: 1 repeated prompts were dropped"],
    )


def test_prompts_come_from_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a fox", "tag": 1}\n\n{"prompt": "# an owl"}\n')
    assert prompts.read(tmp_path / "a.jsonl")[0] == ["a fox", "# an owl"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", None, "cannot read prompt file .*check the path"),
        ("a.txt", b"a\xffb", "is not UTF-8"),
        ("a.txt", b"# only\n\n", "holds no prompt"),
        ("a.txt", b"x" * 100_000, r"line 1: the prompt has 100000 characters; at most 2000"),
        ("a.jsonl", b"{\n", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": 1}\n', "line 1 has no prompt"),
        ("a.jsonl", b'{"prompt": " "}\n', "line 1 has no prompt"),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_named(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=words) as error:
        prompts.read(tmp_path / name)
    assert len(str(error.value)) < 1000


def test_training_on_held_out_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("two\nthree\n")
    with pytest.raises(PromptError, match="1 held-out prompts are trained on too, such as 'two'"):
        prompts.load(tmp_path / "a.txt", tmp_path / "b.txt")


@given(st.integers(2, 60), st.floats(0.1, 0.9), st.integers(0, 9))
def test_one_file_splits_by_a_seeded_share(
    tmp_path_factory: pytest.TempPathFactory, count: int, share: float, seed: int
) -> None:
    path = tmp_path_factory.mktemp("split") / "a.txt"
    path.write_text("\n".join(f"prompt {i}" for i in range(count)))
    if not 0 < round(share * count) < count:
        with pytest.raises(PromptError, match="leaves one side empty"):
            prompts.load(path, share=share, seed=seed)
        return
    made = prompts.load(path, share=share, seed=seed)
    assert made == prompts.load(path, share=share, seed=seed)
    assert len(made.heldout) == round(share * count)
    assert sorted(made.train + made.heldout) == sorted(prompts.read(path)[0])


@given(st.integers(1, 20), st.integers(1, 7), st.integers(0, 5))
def test_every_epoch_draws_every_prompt_once(count: int, per_step: int, seed: int) -> None:
    cursor = PromptCursor([str(i) for i in range(count)], per_step, seed)
    drawn = [prompt for step in range(count * 2) for prompt in cursor.batch(step)]
    assert set(Counter(drawn).values()) == {2 * per_step}
    assert len(set(drawn[:count])) == count


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    words = [str(i) for i in range(50)]
    assert PromptCursor(words, 4, 1).batch(7) == PromptCursor(words, 4, 1).batch(7)
    assert PromptCursor(words, 4, 1).batch(7) != PromptCursor(words, 4, 2).batch(7)


def test_the_order_of_a_seed_stays_what_runs_were_made_with() -> None:
    cursor = PromptCursor("abcdefg", 3, 5)
    assert ["".join(cursor.batch(step)) for step in range(5)] == ["gdb", "aec", "fed", "fag", "cbb"]


@pytest.mark.parametrize("count, per_step, steps", [(1000, 2, 500), (1000, 3, 1000), (7, 20, 30), (1, 4, 9)])
def test_an_epoch_is_shuffled_once_however_many_steps_it_has(count: int, per_step: int, steps: int) -> None:
    order_of_epoch.cache_clear()
    words = [str(i) for i in range(count)]
    for step in range(steps):
        # Every step of a run makes its cursor anew.
        PromptCursor(words, per_step).batch(step)
    assert order_of_epoch.cache_info().misses == math.ceil(steps * per_step / count)
