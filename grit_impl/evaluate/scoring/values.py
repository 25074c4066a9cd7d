"""The number that an answer in sentences ends at."""

from __future__ import annotations

import re
from collections.abc import Sequence

from grit_impl.evaluate.scoring.clauses import clauses
from grit_impl.evaluate.scoring.text import (
    STOP,
    Number,
    numbers,
    plain,
    sentences,
    spell,
    unit_of,
    units_in,
    without_unit,
    words,
)

_FINAL = re.compile(r"####|\banswer(?:\s+to\b[^.\n]{0,60})?\s*(?:is|:|=)+", re.IGNORECASE)
_CONCLUDES = re.compile(
    r"^(?:and |so|therefore|thus|hence|finally|in total|altogether|in conclusion|the final)\b", re.IGNORECASE
)
_CALCULATION = re.compile(r"=|\b(?:multipl|divid|calculat|subtract|add(?:ing|ed)?\b|solve\b)", re.IGNORECASE)
_SEVERAL = re.compile(r"^\W*\w{0,12}\W*\s*(?:or|to|and|-|/)\s*$", re.IGNORECASE)


def number_of(text: str) -> Number | None:
    """The number that a text is, with its unit; None if it says more than one, or anything else."""
    spelled = spell(plain(text))
    found = numbers(spelled)
    if len(found) != 1:
        return None
    rest = (spelled[: found[0].start] + " " + without_unit(spelled[found[0].end :])).strip()
    return None if words(rest) else found[0]


def conclusion(question: str, wanted: Number, text: str) -> list[Number] | None:
    """The value that an answer ends at: one number, or several that are offered; None if it gives none.

    A final line ("#### 12", "The answer is 12") wins; else the last concluding sentence of a calculation that is not
    cut off in a formula, or the first sentence with a number that is not the question's own.
    """
    asked = numbers(spell(plain(question)))
    finals = [text[match.end() :].strip().split("\n")[0] for match in _FINAL.finditer(text)]
    for tail in reversed(finals):
        if found := _picked(tail, [], wanted, question):
            return found
    parts = [spell(part) for part in sentences(text)]
    calculated = len(parts) > 1 and _CALCULATION.search(text) is not None
    if calculated:
        concluding = [part for part in parts if _CONCLUDES.search(part)]
        parts = [*reversed(concluding), *reversed(parts)]
        if parts and _unfinished(text):
            return None
    for part in parts:
        if found := _picked(part, asked, wanted, question):
            return found
    return None


def _unfinished(text: str) -> bool:
    """Whether a calculation breaks off before its value."""
    last = spell(sentences(text)[-1])
    found = numbers(last)
    return bool(found) and (found[-1].operand or re.search(r"[-+*/=\u00d7x(]\s*\$?$", last) is not None)


def _picked(sentence: str, asked: Sequence[Number], wanted: Number, question: str) -> list[Number]:
    """The number or numbers that a sentence gives."""
    repeats = any(number.equals(wanted) for number in asked)
    spelled = spell(sentence)
    kept = [
        number
        for number in numbers(spelled)
        if not number.operand and (repeats or not any(number.equals(other) for other in asked))
    ]
    denied = _denied(spelled) if kept else []
    kept = [number for number in kept if not any(start <= number.start < end for start, end in denied)]
    if re.search(r"\byear\b", question, re.IGNORECASE):
        whole = [n for n in kept if n.value == int(n.value) and 100 <= abs(n.value) < 3000]
        kept = [n for n in whole if n.value >= 1000] or whole or kept
    counted = re.search(r"\bhow many (\w+)", question, re.IGNORECASE)
    asked_unit = unit_of(counted[1]) if counted else ""
    units = {wanted.unit or asked_unit} if wanted.unit or asked_unit else units_in(question)
    if len(units) == 1:
        kept = [n for n in kept if n.unit in units] or kept
    outside = [n for n in kept if spelled.count("(", 0, n.start) == spelled.count(")", 0, n.start)]
    kept = outside or kept
    if not kept:
        return []
    equals = spelled.rfind("=")
    kept = [n for n in kept if n.start > equals] or kept
    parts = [(m.start(), m.end(), set(words(m[0]))) for m in re.finditer(r"[^,]+(?:,(?=\d)[^,]+)*", spelled)]
    topic = {word for word in words(question) if word not in STOP}
    told = [next((len(topic & said) for start, end, said in parts if start <= n.start < end), 0) for n in kept]
    # "A normal year has 365 days, a leap year has 366 days": the part that speaks of what was asked.
    kept = kept[told.index(max(told)) :] + kept[: told.index(max(told))]
    first, *rest = kept
    rises = re.search(r"\b(?:by|from)\W*$", spelled[: first.start], re.IGNORECASE)
    if rest and rises and re.search(r"^\W*(?:\w+ )?to\W*$", spelled[first.end : rest[0].start], re.IGNORECASE):
        return [rest[0]]  # "by 2 to 7": where it ends
    if rest and _SEVERAL.match(spelled[first.end : rest[0].start]):
        return [first, rest[0]]
    return [first]


def _denied(sentence: str) -> list[tuple[int, int]]:
    """Where a sentence says what is not so."""
    found, position = [], 0
    for clause in clauses(sentence):
        position = sentence.find(clause.text, position)
        if clause.role == "denied":
            found.append((position, position + len(clause.text)))
    return found
