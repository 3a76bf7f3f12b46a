"""The bundled recipes' rewards: worth their cost, counted, and named with their commands where they are
missing.
"""

import pytest
from program import leave

from comfy_g2rpo.rewards.models.catalogue import KNOWN
from g2rpo_trainer.config.bundled import bundled_recipes
from g2rpo_trainer.config.reading import load as load_recipe
from g2rpo_trainer.cost.count_model import footprint

HOW = "g2rpo rewards fetch pickscore && g2rpo rewards fetch clipscore"
LACKING = ["--set", "rewards=[{name: pickscore}]", "--set", "heldout_rewards=[clipscore, jpeg]"]


def test_a_run_whose_reward_models_are_missing_names_the_commands_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("G2RPO_REWARDS", str(tmp_path / "none"))
    code, _, error = leave(capsys, "train", "demo", "--out", tmp_path / "run", *LACKING)
    says = f"rewards pickscore, clipscore are not installed in {tmp_path / 'none'}; get them with: {HOW}"
    assert (code, error) == (2, f"error: {says}\n") and not (tmp_path / "run").exists()


def test_a_price_and_a_picture_need_no_reward_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("G2RPO_REWARDS", str(tmp_path / "none"))
    code, printed, _ = leave(capsys, "plan", "demo", *LACKING)
    assert code == 0 and printed.count(f"get them with: {HOW}") == 1 and "time, estimated" in printed
    words = ["sample", "--prompt", "a red circle", "--out", tmp_path / "a.png"]
    assert leave(capsys, *words, *LACKING)[0] == 0 and (tmp_path / "a.png").exists()


@pytest.mark.parametrize("recipe", sorted(name for name in bundled_recipes() if name[:4] != "demo"))
def test_real_recipes_train_on_what_people_prefer_and_hold_out_another_model(recipe):
    made = load_recipe(recipe)
    assert made.rewards[0].name == "pickscore"
    assert any(each.name in KNOWN and each.weight for each in made.heldout_rewards)
    assert HOW in bundled_recipes()[recipe].read_text("utf-8")


@pytest.mark.long
def test_the_memory_of_reward_models_is_counted_before_they_are_here(tmp_path, monkeypatch):
    monkeypatch.setenv("G2RPO_REWARDS", str(tmp_path / "none"))
    made = {
        (turns, device): footprint(
            load_recipe(
                "demo",
                [
                    f"rewards=[{{name: pickscore, device: {device}}}]",
                    "heldout_rewards=[clipscore]",
                    f"memory.rewards_in_turn={turns}",
                ],
            )
        )
        for turns in ("false", "true")
        for device in ("auto", "cpu")
    }
    assert made["false", "auto"].parts["rewards"] == round(3.9e9 + 1.7e9)
    assert made["false", "cpu"].parts["rewards"] == round(1.7e9)
    turns = made["true", "auto"]
    assert turns.parts["rewards"] == 0 and turns.phase == "decode"
    assert 3.9e9 < turns.need < made["false", "auto"].need - 1.6e9
    assert turns.peaks["update"] == made["false", "auto"].peaks["update"] - round(3.9e9 + 1.7e9)
