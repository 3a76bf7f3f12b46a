"""Letters of the drawings: Pillow's own font, and a font of the system for what that one lacks.

Pillow's own font knows little more than ASCII. Chinese, Japanese, Korean, Cyrillic, Greek and the like are
drawn with the first font of the system that has the letter; without one it becomes '?', never a box. So does
what Pillow cannot shape without help: scripts from right to left, and those whose letters change their form.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache, lru_cache
from itertools import groupby
from typing import Any

from PIL import ImageDraw, ImageFont

LONGEST = 2000  # characters of a text that are looked at
OWN = -1  # Pillow's font among SYSTEM's places
# Files that Windows, macOS and Linux bring along, by what they look best for; Pillow knows where they lie.
SYSTEM = (
    *("segoeui.ttf", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "LiberationSans-Regular.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "SourceHanSans-Regular.ttc"),
    *("msyh.ttc", "YuGothM.ttc", "meiryo.ttc", "malgun.ttf", "simsun.ttc"),
    *("Hiragino Sans GB.ttc", "PingFang.ttc", "AppleSDGothicNeo.ttc", "Arial Unicode.ttf"),
    *("wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf"),
)
_SHAPED = ((0x0590, 0x10A0), (0x1700, 0x18B0), (0xFB1D, 0xFE00), (0xFE70, 0xFF00))
_WORDS = dict.fromkeys("–—−·", "-") | dict.fromkeys("’‘", "'") | dict.fromkeys("“”", '"')
_WORDS |= {"×": "x", "→": "->", "…": "...", "ß": "ss", "±": "+/-", "≤": "<=", "≥": ">=", "≠": "!="}
# Between characters of East Asia a line may break, but not before a closing sign; elsewhere, between words.
_PIECES = re.compile(r"(?:[^ \u2e80-\uffef]+|.)[、。，．！？：；）」』】〉》,.!?;:)]* ?")


@cache
def font(size: int, place: int = OWN) -> Any:
    """Return Pillow's own font (before 10.1 that has one small size), or one of SYSTEM; None if missing."""
    if place != OWN:
        try:
            return ImageFont.truetype(SYSTEM[place], size)
        except (OSError, ImportError, ValueError):
            return None
    try:
        return ImageFont.load_default(size=size)
    except (TypeError, ImportError, OSError):
        return ImageFont.load_default()


@lru_cache(20_000)
def bearer(letter: str) -> int | None:
    """Return the place of the font that has a letter; None where no font has it, or it cannot be shaped."""
    if " " <= letter <= "~":
        return OWN
    shaped = any(low <= ord(letter) < high for low, high in _SHAPED)
    if shaped or unicodedata.category(letter)[0] in "MCZ" or ord(letter) > 0x2FFFF:
        return None
    return next((place for place in range(len(SYSTEM)) if has(place, letter)), None)


def has(place: int, letter: str) -> bool:
    """Return whether a font of the system draws a letter otherwise than a character that does not exist."""
    face = font(20, place)
    if face is None:
        return False
    drawn, nothing = face.getmask(letter), face.getmask("\uffff")
    return drawn.getbbox() is not None and (drawn.size, bytes(drawn)) != (nothing.size, bytes(nothing))


def plain(text: str) -> str:
    """Spell a text with letters that can be drawn: Latin accents go, what no font has becomes '?', control
    characters ' '.
    """
    whole = unicodedata.normalize("NFC", str(text)[:LONGEST])
    return " ".join("".join(map(spelt, whole)).split())


def spelt(letter: str) -> str:
    """Spell one character."""
    if letter.isspace() or letter < " ":
        return " "
    if letter in _WORDS:
        return _WORDS[letter]
    bare = "".join(c for c in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(c))
    if bare and all(" " <= c <= "~" for c in bare):
        return bare
    if not bare:
        return ""
    return "?" if bearer(letter) is None else letter


def runs(text: str) -> list[tuple[int, str]]:
    """Split a text into stretches of one font."""
    return [(place, "".join(part)) for place, part in groupby(text, lambda c: bearer(c) or 0)]


def length(text: str, size: int) -> float:
    """Measure a text in pixels."""
    if text.isascii():
        return font(size).getlength(text)
    return sum(font(size, place).getlength(part) for place, part in runs(text))


def write(
    pen: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    colour: str | tuple[int, int, int],
    size: int,
    anchor: str | None = None,
) -> None:
    """Write a text that `plain` has spelt at a place in pixels."""
    if text.isascii():
        pen.text(place, text, colour, font(size), anchor=anchor)
        return
    across, down = anchor or "la"
    left = place[0] - length(text, size) * {"l": 0, "m": 0.5, "r": 1}[across]
    rise, fall = font(size).getmetrics()
    line = place[1] + {"a": rise, "m": (rise - fall) / 2, "s": 0}[down]
    for at, part in runs(text):
        pen.text((left, line), part, colour, font(size, at), anchor="ls")
        left += font(size, at).getlength(part)


def fitted(text: str, size: int, width: float) -> str:
    """Cut a text to a width in pixels."""
    text = plain(text)
    if length(text, size) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        fits = length(text[:middle].rstrip() + "...", size) <= width
        low, high = (middle, high) if fits else (low, middle - 1)
    return text[:low].rstrip() + "..."


def wrapped(text: str, size: int, width: float, lines: int) -> list[str]:
    """Break a text between words into at most so many lines; the last one is cut."""
    pieces, made = _PIECES.findall(plain(text)), []
    while pieces and len(made) < lines - 1:
        count = 1
        while count < len(pieces) and length("".join(pieces[: count + 1]).rstrip(), size) <= width:
            count += 1
        made.append(fitted("".join(pieces[:count]), size, width))
        pieces = pieces[count:]
    return [*made, fitted("".join(pieces), size, width)] if pieces else made
