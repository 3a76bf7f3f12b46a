"""Check the translations of the nodes' texts against the English ones, and say what is missing or stale.

python tools/check_locales.py                    (every language)
python tools/check_locales.py --translated de    (note that de now says what the English texts say)

tools/glossary/<language>.json has the words: "terms" gives each English term the forms its translation may
take, "same" the texts that stay English, and "sources" a hash of every English text when it was translated.
"""

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LOCALES = ROOT / "locales"
GLOSSARY = ROOT / "tools/glossary"
NODES = ROOT / "tests/snapshots/nodes.json"
SPECIAL = "{}|@"
"""What ComfyUI's page (vue-i18n) reads as its own marks within a text."""
KEPT = {
    "path or file": r"\.txt\b|\b\w+(?:/\w+)+",
    "colour": r"#[0-9a-f]{6}",
    "name with an underscore": r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b",
    "abbreviation or name with capitals": r"\b\w*[A-Z]\w*[A-Z]\w*",
    "option that is explained": r"(?:(?<=\. )|^)[a-z][a-z_]*(?=: )",
    "name": r"\b(?:alpha / rank|name-2|nan|bf16|fp32|diffusers|Stable Diffusion|Bradley–Terry)\b|sigmas\b",
}
QUOTED = re.compile(r"(?<!\w)'([^']+)'(?!\w)|`([^`]+)`")
ENGLISH = re.compile(r"(?<![A-Za-z])(?:the|and|with|from|that|which|you)(?![A-Za-z])", re.IGNORECASE)


def read(path: Path) -> dict[str, Any]:
    """Read a JSON file."""
    return json.loads(path.read_text("utf-8"))


def languages() -> list[str]:
    """List the languages that there are beside English."""
    return sorted(path.parent.name for path in LOCALES.glob("*/nodeDefs.json") if path.parent.name != "en")


def texts(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text with its path, such as G2RPO_Rollout/inputs/eta/tooltip."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from texts(value, f"{above}{key}/")
        else:
            yield f"{above}{key}", value


def source_hash(text: str) -> str:
    """Return a short hash of an English text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def holds(text: str, word: str) -> bool:
    """Say whether a text has a word or name, as scripts without spaces join it, too."""
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(word)}(?![A-Za-z0-9_])", text) is not None


def kept_words(english: str, options: list[str]) -> list[str]:
    """List what a translation has to keep: quoted words, files, names, and options that the text explains."""
    found = [one or two for one, two in QUOTED.findall(english)]
    found += [word for pattern in KEPT.values() for word in re.findall(pattern, english)]
    led = r"(?:^|[.,] |Keep )"
    found += [one for one in options if re.search(rf"{led}{re.escape(one)}(?![\w+])", english)]
    return list(dict.fromkeys(found))


def missing_terms(english: str, text: str, terms: Mapping[str, list[str]]) -> list[str]:
    """List the terms of an English text, longer ones first, whose translation is not in the other."""
    missing, rest = [], QUOTED.sub(" ", english)
    for term in sorted(terms, key=len, reverse=True):
        plural = "" if term[0].isupper() else "s?"
        pattern = rf"(?<![\w/-]){re.escape(term)}{plural}(?![\w/-])"
        rest, count = re.subn(pattern, " ", rest, flags=0 if term[0].isupper() else re.IGNORECASE)
        if count and not any(form.casefold() in text.casefold() for form in terms[term]):
            missing.append(f"{term!r} is {' or '.join(terms[term])} in the glossary")
    return missing


def text_problems(
    english: str, text: str, glossary: Mapping[str, Any], options: list[str] | None = None
) -> list[str]:
    """List what is wrong with one translated text."""
    said = [f"drops {word!r}" for word in kept_words(english, options or []) if not holds(text, word)]
    numbers, there = (Counter(re.findall(r"\d+(?:\.\d+)?", one)) for one in (english, text))
    if numbers != there:
        said.append(f"has other numbers: {sorted(there.elements())} for {sorted(numbers.elements())}")
    if text == english and text not in glossary["same"]:
        said.append("is still English")
    elif found := ENGLISH.findall(QUOTED.sub(" ", text)):
        said.append(f"has English words: {', '.join(found)}")
    if marks := sorted(set(SPECIAL) & set(text)):
        said.append(f"has {' '.join(marks)}, which the page reads as marks of its own")
    if text != text.strip() or english.endswith(".") != text.endswith((".", "。")):
        said.append("begins or ends in another way: a full stop or a space")
    return said + missing_terms(english, text, glossary["terms"])


def node_names(english: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, list[str]]:
    """Map the nodes' English names to those of a language, both without what stands in brackets."""
    pairs = [
        (english[node]["display_name"], there[node]["display_name"]) for node in english if node in there
    ]
    return {was.partition(" (")[0]: [re.split(r" ?[(（]", now)[0]] for was, now in pairs}


def problems(
    english: Mapping[str, Any],
    there: Mapping[str, Any],
    glossary: Mapping[str, Any],
    nodes: Mapping[str, Any],
) -> list[str]:
    """List what is missing, stale or wrong in a language, one line each."""
    source, translated = dict(texts(english)), dict(texts(there))
    words = glossary | {"terms": glossary["terms"] | node_names(english, there)}
    said = [f"{path}: is missing" for path in source if path not in translated]
    said += [f"{path}: has no English text" for path in translated if path not in source]
    options = {
        f"{node}/inputs/{entry['id']}/tooltip": entry.get("options", [])
        for node, block in nodes.items()
        for entry in block["inputs"]
    }
    for path in source.keys() & translated.keys():
        was, now = source[path], translated[path]
        if path.endswith("/name"):
            said += [f"{path}: names stay {was!r}"] if now != was else []
            continue
        said += [f"{path}: {what}: {now}" for what in text_problems(was, now, words, options.get(path))]
        if glossary.get("sources", {}).get(path) != source_hash(was):
            said.append(f"{path}: is stale, the English text has changed: {was}")
    return sorted(said)


def sources_of(english: Mapping[str, Any]) -> dict[str, str]:
    """Return the hash of every English text that is translated."""
    return {path: source_hash(text) for path, text in texts(english) if not path.endswith("/name")}


def check(language: str) -> list[str]:
    """List what is missing, stale or wrong in a language of the pack."""
    english, there = (read(LOCALES / one / "nodeDefs.json") for one in ("en", language))
    return problems(english, there, read(GLOSSARY / f"{language}.json"), read(NODES))


def written(glossary: Mapping[str, Any]) -> str:
    """Return a glossary as JSON with a line for each term and hash."""
    parts = []
    for name, entries in glossary.items():
        value = json.dumps(entries, ensure_ascii=False)
        if isinstance(entries, Mapping):
            pairs = [json.dumps({key: one}, ensure_ascii=False)[1:-1] for key, one in entries.items()]
            value = "{\n  " + ",\n  ".join(pairs) + "\n }"
        parts.append(f' "{name}": {value}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def note_translated(language: str) -> None:
    """Write into the glossary that a language's texts were made from the English ones of now."""
    path = GLOSSARY / f"{language}.json"
    now = read(path) | {"sources": sources_of(read(LOCALES / "en/nodeDefs.json"))}
    path.write_text(written(now), "utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--translated"]:
        note_translated(sys.argv[2])
    found = [f"{language}: {line}" for language in languages() for line in check(language)]
    print("\n".join(found) or f"{', '.join(languages())}: complete and up to date")
    sys.exit(bool(found))
