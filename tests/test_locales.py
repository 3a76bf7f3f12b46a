"""Every language has every text of the nodes, in the glossary's words, and none from before a change."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import check_locales as locales  # noqa: E402

ENGLISH = locales.read(locales.LOCALES / "en/nodeDefs.json")
NODES = locales.read(locales.NODES)
GLOSSARY = {"terms": {"reward": ["Reward"], "Score Rollout": ["Rollout bewerten"]}, "same": ["Rollout"]}
METHOD = {"reward", "rollout", "advantage", "branch", "group", "granularity", "held-out", "gate", "run"}
METHOD |= {"recipe", "prompt", "noise", "sampler", "LoRA", "step"}
KIND = ["phash", "exact", "new", "ask"]


def test_the_promised_languages_are_there() -> None:
    assert {"de", "es", "fr", "ja", "zh"} <= set(locales.languages())


@pytest.mark.parametrize("language", locales.languages())
def test_a_language_is_complete_and_up_to_date(language: str) -> None:
    assert locales.check(language) == []


@pytest.mark.parametrize("language", locales.languages())
def test_no_two_nodes_have_one_name(language: str) -> None:
    blocks = locales.read(locales.LOCALES / language / "nodeDefs.json").values()
    names = [block["display_name"] for block in blocks]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("language", locales.languages())
def test_a_glossary_is_as_the_tool_writes_it(language: str) -> None:
    path = locales.GLOSSARY / f"{language}.json"
    assert locales.written(locales.read(path)) == path.read_text("utf-8"), (
        "run tools/check_locales.py --translated"
    )


@pytest.mark.parametrize("language", locales.languages())
def test_a_glossary_has_the_method_s_words(language: str) -> None:
    there = locales.read(locales.GLOSSARY / f"{language}.json")["terms"]
    assert METHOD - set(there) == set()


def test_the_english_texts_hold_no_marks_of_the_page() -> None:
    found = {path: text for path, text in locales.texts(ENGLISH) if set(text) & set(locales.SPECIAL)}
    assert found == {}


def test_the_english_file_has_what_the_nodes_have() -> None:
    assert {node: block["display_name"] for node, block in ENGLISH.items()} == {
        node: block["name"] for node, block in NODES.items()
    }
    assert {node: list(block.get("inputs", {})) for node, block in ENGLISH.items()} == {
        node: [entry["id"] for entry in block["inputs"]] for node, block in NODES.items()
    }


@pytest.mark.parametrize(
    ("english", "text", "said"),
    [
        ("The 'kind' counts.", "Die Art zählt.", "drops 'kind'"),
        ("From models/loras/g2rpo.", "Aus dem Ordner.", "drops 'models/loras/g2rpo'"),
        ("Only with use_threshold.", "Nur mit Schwelle.", "drops 'use_threshold'"),
        ("Update LoRA (GRPO)", "LoRA aktualisieren", "drops 'GRPO'"),
        ("phash: the layout.", "Der Aufbau.", "drops 'phash'"),
        ("new starts, ask stops.", "new beginnt, fragen hält an.", "drops 'ask'"),
        ("At most 256.", "Höchstens 265.", "has other numbers"),
        ("Up to 1.5.", "Bis 1,5.", "has other numbers"),
        ("Width.", "Width.", "is still English"),
        ("The width.", "Die Breite of the Bilder.", "has English words: the"),
        ("Width.", "Breite | Höhe.", "which the page reads as marks"),
        ("Width.", "Breite", "a full stop"),
        ("One reward.", "Eine Belohnung.", "'reward' is Reward"),
        ("Two rewards.", "Zwei Belohnungen.", "'reward' is Reward"),
        ("For Score Rollout.", "Für Score Rollout.", "'Score Rollout' is Rollout bewerten"),
    ],
)
def test_a_fault_of_a_text_shows(english: str, text: str, said: str) -> None:
    assert [one for one in locales.text_problems(english, text, GLOSSARY, KIND) if said in one]


@pytest.mark.parametrize(
    ("english", "text"),
    [
        ("Rollout", "Rollout"),
        ("The 'kind' of the VAE: 2 rewards.", "Die Art „kind“ der VAE: 2 Rewards."),
        ("VAE of both.", "両方のVAE。"),
        ("In models/reward; scikit-reward has none.", "In models/reward; scikit-reward hat keine."),
        ("the published code's end, exact is usual", "das Ende im Code, üblich ist exact"),
    ],
)
def test_a_good_text_passes(english: str, text: str) -> None:
    assert locales.text_problems(english, text, GLOSSARY, KIND) == []


def small(**changed: str) -> dict[str, Any]:
    """Return the texts of a node with one input."""
    tip = {"name": "width", "tooltip": "Breite."} | changed
    return {"G2RPO_Node": {"display_name": "Knoten", "inputs": {"width": tip}}}


SOURCE = {"G2RPO_Node": {"display_name": "Node", "inputs": {"width": {"name": "width", "tooltip": "Width."}}}}
CURRENT = GLOSSARY | {"sources": locales.sources_of(SOURCE)}
AT = "G2RPO_Node/inputs/width"


def test_a_finished_language_has_no_problems() -> None:
    assert locales.problems(SOURCE, small(), CURRENT, {}) == []


@pytest.mark.parametrize(
    ("there", "glossary", "said"),
    [
        ({"G2RPO_Node": {"display_name": "Knoten"}}, CURRENT, f"{AT}/tooltip: is missing"),
        (small(more="Mehr."), CURRENT, f"{AT}/more: has no English text"),
        (small(name="breite"), CURRENT, f"{AT}/name: names stay 'width'"),
        (small(), GLOSSARY, f"{AT}/tooltip: is stale"),
    ],
)
def test_a_fault_of_a_language_shows(there: dict[str, Any], glossary: dict[str, Any], said: str) -> None:
    assert [line for line in locales.problems(SOURCE, there, glossary, {}) if line.startswith(said)]


@pytest.mark.parametrize("shown", ["Score Rollout", "Score Rollout (SR)"])
def test_a_text_calls_another_node_by_its_name_in_that_language(shown: str) -> None:
    source = {
        "A": {"display_name": shown},
        "B": {"display_name": "Beta", "description": "From Score Rollout."},
    }
    there = {"A": {"display_name": shown.replace("Score Rollout", "Rollout ordnen")}}
    there["B"] = {"display_name": "Zweites", "description": "Von Rollout bewerten."}
    said = locales.problems(source, there, GLOSSARY | {"sources": locales.sources_of(source)}, {})
    assert len(said) == 1 and "'Score Rollout' is Rollout ordnen" in said[0]


def test_a_changed_english_text_makes_its_translations_stale() -> None:
    changed = json.loads(json.dumps(SOURCE).replace("Width.", "Width in pixels."))
    said = locales.problems(changed, small(), CURRENT, {})
    assert said == [f"{AT}/tooltip: is stale, the English text has changed: Width in pixels."]
