"""From what a model wrote to right or wrong: a tolerant parser, strict scores, and nothing thrown away.

Models answer in prose, in words, in ranges, in other languages, or not at all. An answer that names no air quality
index and no category is wrong *and* counted as unparsable with its reason, so that a model that learned the format is
not confused with one that learned the task.

What counts, in this order: a number attached to "AQI" beats other numbers ("overall AQI" beats both); the category next
to that number beats other categories; a category that is stated beats the one that the number implies. Concentrations,
averaging times and names such as PM2.5 are no candidates. A range or a bound is never an exact value, but it implies a
category when all of it lies in one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from text_to_num import alpha2digit  # type: ignore[import-untyped]

from grit_impl.aqi import CATEGORIES
from grit_impl.aqi import category as aqi_category
from grit_impl.evaluate.scoring.phrases import (
    AVERAGED,
    CONCLUDED,
    FORMULA,
    GOES_ON,
    INDEX,
    NAMED_BEHIND,
    NOISE,
    NUMBER,
    REFERRING,
    VALUE,
    WHOLE,
)
from grit_impl.evaluate.scoring.text import REFUSAL, corrected, plain, sentences, spoken, words

NAMES = tuple(CATEGORIES)
HIGHEST = 999
"""Larger numbers are years, populations or nonsense; the index itself ends at 500 and is reported beyond it."""
WITHIN = 5
"""Index points of the tolerant score."""
AQI_METRICS = ("category", "exact", "within5")
"""Scores that are right or wrong per item, so that one of them can be the accuracy; the first is the default."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What an answer says.

    Attributes:
        value: Air quality index, or None if the answer names no single number.
        category: One of the six names, stated or implied, or None.
        stated: Whether the category is in the words (and not only implied by the number).
        note: Why the answer is unparsable (neither value nor category), or how it is incomplete; empty if neither.
    """

    value: float | None = None
    category: str | None = None
    stated: bool = False
    note: str = ""

    @property
    def unparsable(self) -> bool:
        """Whether the answer names neither a value nor a category."""
        return self.value is None and self.category is None


def category_of(value: float) -> str:
    """The category of an index, rounded to a whole number as the rule reports it."""
    return aqi_category(round(value))


_QUANTITY = re.compile(
    r"(?P<bound>above|over|more than|greater than|exceed(?:s|ing)?|at least|below|under|less than|up to|at most"
    r"|(?<!-)[<>]=?)?"
    rf"\s*(?<![A-Za-z0-9_.,])(?P<low>-?{NUMBER})"
    rf"(?:\s*(?:[-\u2013\u2014]|to|through|and)\s*(?P<high>{NUMBER}))?(?P<plus>\+)?(?![A-Za-z0-9_]|[.,]\d)",
    re.IGNORECASE,
)
_ANCHOR = re.compile(r"(?:aqi|air quality index|index|指数)[^\d.;\n]{0,40}$", re.IGNORECASE)
_FINAL = re.compile(
    r"(?:overall|final|therefore|answer)[^\d.;\n]{0,20}(?:aqi|air quality index|index)[^\d.;\n]{0,40}$", re.IGNORECASE
)
_CATEGORY = re.compile(
    r"(?<!\bnot )(?<!n't )(?<!\bnot very )(?<![A-Za-z])"
    r"(?:(?P<usg>unhealthy\s+for\s+sens\w*(?:\s+gr\w*)?|unhealthy\s+for$|usg)"
    r"|(?P<very>very\s+unhealthy)|(?P<unhealthy>unhealthy(?! for (?:people|some|those)\b))|(?P<moderate>moderate)"
    r"|(?P<hazardous>hazardous(?! to (?:human|health|your|the)\b))"
    r"|(?P<good>good(?!\s+(?:question|day|morning|afternoon|evening|luck|news|point|idea|job))))(?![A-Za-z])",
    re.IGNORECASE,
)
_LISTED = re.compile(
    r"(?:(?:unhealthy|good|moderate|hazardous)\W*,\s*(?:very )?){2}(?:unhealthy|good|moderate|hazardous)", re.IGNORECASE
)
_GROUP_CATEGORY = dict(zip(("good", "moderate", "usg", "unhealthy", "very", "hazardous"), NAMES, strict=True))
_NEAR = 40
"""Characters between a number and the category that belongs to it."""


ASIDE = 6
"""Words up to which a number without "AQI" is an answer."""
TERSE = 16
"""Words up to which an answer is read as a whole; a longer one must state its value in a sentence."""
_LEADING = re.compile(
    r"^\W{0,5}(?:[A-Za-z ]{1,20}[:,]\s*)?\W{0,5}(?:very )?(?:unhealthy(?: for [a-z ]+)?|good|moderate|hazardous)\b"
    r"(?=\W*(?:[,.;(-]|$))",
    re.IGNORECASE,
)
_SCALE = re.compile(
    r"\brang(?:es? (?:from|between)|ing)\b|\bscale\b.*\bto\b|(?<!\bis )(?<!\bbe )(?<!lies )\bbetween\b.*\band\b"
    r"|\bcategories\b|\d\s*%",
    re.IGNORECASE,
)
_DECLARES = re.compile(
    r"\bcategory\b|\bconsidered\b|\b(?:categori[sz]ed|classified|rated) as\b|\bfalls (?:in|into|within|under)\b"
    r"|\b(?:aqi|(?:the )?air(?: quality)?(?: index)?|this|^that|it)\s+(?:level\s+|value\s+)?"
    r"(?:is|are|falls|corresponds|means|indicates)\b|\b(?:that|it)'s\b|\bhas an?\b(?=.{0,20} aqi\b)",
    re.IGNORECASE,
)
_PLACED = re.compile(
    r"\b(?<!not )(?:in|into|within|under) the [\"']?"
    r"((?:very )?(?:unhealthy(?: for [a-z ]+?)?|good|moderate|hazardous))[\"']? (?:aqi )?"
    r"(?:range|category|level|band|zone)\b",
    re.IGNORECASE,
)
_DENIED = re.compile(r"(?:\bnot|n't|\bnever|\brather than|\binstead of)\s+(?:\w+ ){0,2}[\"']?$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Quantity:
    low: float
    high: float
    point: bool
    rank: int
    start: int
    end: int


def _number(text: str) -> float:
    return float(text.replace(",", "") if re.fullmatch(r"-?\d{1,3},\d{3}", text) else text.replace(",", "."))


def _clean(answer: str) -> str:
    text = re.sub(r"[_`$#]", "", plain(answer))
    text = re.sub(r"<(\w+)>([^<>]*)</\1>", r"\2", text)
    text = re.sub(r"<([\w ]{1,40})>", r"\1", text)  # the placeholders' own brackets
    for own in re.findall(rf"{INDEX}\s*\((\w{{2,8}})\)|\b((?-i:[A-Z]{{2,5}})) \(AQI\)", text, re.IGNORECASE):
        # "the \u00cdndice de Calidad del Aire (ICA) ... the ICA is 57"
        text = re.sub(rf"\b{''.join(own)}\b", "AQI", text)
    # A formula's AQI1 is a name; an answer's AQI57 is a value.
    text = re.sub(r"(^aqi|\u6307\u6570\u4e3a?)(?=\d)", r"\1 ", text, flags=re.IGNORECASE)
    return re.sub(r"[ \t]+", " ", str(alpha2digit(text, "en"))).strip()


def _quantities(text: str) -> list[_Quantity]:
    found = []
    for match in _QUANTITY.finditer(text):
        low = _number(match["low"])
        high = _number(match["high"]) if match["high"] else low
        bound = (match["bound"] or "").lower()
        if (
            match["plus"]
            or bound in ("above", "over", "more than", "greater than", "at least", ">", ">=")
            or (bound.startswith("exceed"))
        ):
            low, high = low + (0 if match["plus"] or bound in ("at least", ">=") else 1), float("inf")
        elif bound:
            low, high = 0.0, low - (0 if bound in ("up to", "at most", "<=") else 1)
        before = text[max(0, match.start() - 4 * _NEAR) : match.start()]
        rank = 2 if _FINAL.search(before) else 1 if _ANCHOR.search(before) else 0
        found.append(_Quantity(low, high, low == high and not bound, rank, match.start("low"), match.end()))
    return found


def _categories(text: str) -> list[tuple[str, int, int]]:
    return [(_GROUP_CATEGORY[str(m.lastgroup)], m.start(), m.end()) for m in _CATEGORY.finditer(text)]


def _stated(text: str, chosen: _Quantity | None) -> str | None:
    """The one category that the text states, or the one beside the number; None if that is undecided."""
    if _LISTED.search(text):
        return None
    mentions = _categories(text)
    if len({name for name, _, _ in mentions}) == 1:
        return mentions[0][0]
    if chosen is None:
        return None
    after = [(start - chosen.end, name) for name, start, _ in mentions if 0 <= start - chosen.end <= _NEAR]
    before = [(chosen.start - end, name) for name, _, end in mentions if 0 <= chosen.start - end <= _NEAR]
    return min(after or before)[1] if after or before else None


def parse_aqi(answer: str) -> Parsed:
    """What an answer to "Predict AQI given: ..." says. Any text is accepted, none raises."""
    text = _clean(answer)
    if not text:
        return Parsed(note="only reasoning" if answer.strip() and not spoken(answer) else "empty")
    if len(words(text)) <= TERSE and not FORMULA.search(text):
        terse, prose = _terse(text), _prose(text)
        several = re.search(r"\b(?:no|or)\b", text, re.IGNORECASE) and len(set(VALUE.findall(text))) > 1
        return prose if prose.value is not None and terse.value is None and not several else terse
    return _prose(text)


def _terse(text: str) -> Parsed:
    """An answer of a few words: the numbers and categories in it, by rank."""
    pure = NOISE.sub(" ", text)
    quantities = _quantities(pure)
    best = max((q.rank for q in quantities), default=0)
    # A bare number outside the index is a year or a population; "AQI 1497" is an answer, if an absurd one.
    told = len(words(re.sub(rf"{NUMBER}|{_CATEGORY.pattern}", " ", pure, flags=re.IGNORECASE))) > ASIDE
    candidates = [
        q for q in quantities if q.rank == best and (best or (not told and (not q.point or 0 <= q.low <= HIGHEST)))
    ]
    if REFUSAL.search(pure) is not None and best == 0:
        return Parsed(note="refusal")
    if quantities and not candidates and not _categories(pure):
        return Parsed(note="out of range")
    distinct = {(q.low, q.high) for q in candidates}
    chosen = candidates[0] if len(distinct) == 1 else None
    value = chosen.low if chosen is not None and chosen.point else None
    category = _stated(pure, chosen)
    if category is not None:
        note = "" if value is not None else "category only" if not quantities else _why(candidates, chosen)
        return Parsed(value, category, True, note)
    if value is not None:
        return _valued(value)
    if len({name for name, _, _ in _categories(pure)}) > 1:
        return Parsed(note="several categories")
    possible = [q for q in candidates if q.low >= 0 and (q.low <= HIGHEST or not q.point)]
    if possible and len(ends := {category_of(min(end, HIGHEST)) for q in possible for end in (q.low, q.high)}) == 1:
        return Parsed(None, ends.pop(), False, _why(candidates, chosen))
    return Parsed(note=_why(candidates, chosen))


def _valued(value: float) -> Parsed:
    """A value without a stated category; one outside the index implies none."""
    inside = 0 <= value <= HIGHEST
    return Parsed(value, category_of(value) if inside else None, False, "" if inside else "out of range")


def _prose(text: str) -> Parsed:
    """An answer in sentences: the value and the category that are stated, the headline's before later ones."""
    if REFUSAL.search(text) and not VALUE.search(text) and not REFERRING.search(text):
        return Parsed(note="refusal")
    if (found := _table(text) or _json(text)) is not None:
        return found
    parts, formula = sentences(corrected(text)) or [text], FORMULA.search(text)
    statements = [
        (part, match)
        for number, part in enumerate(parts)
        for match in VALUE.finditer(AVERAGED.sub(" ", _concluded(part)))
        if _whole(match)
        and not (number and formula and match["sign"] and not match["category"] and not CONCLUDED.search(part))
    ]
    referring = [(part, match) for part in parts for match in REFERRING.finditer(part) if _bare(match)]
    referring += [(part, match) for part in parts if not formula for match in NAMED_BEHIND.finditer(part)]
    # "186 ppb (AQI 151)": the ends of a range, where the index itself is stated, too.
    statements = [e for e in statements if not re.match(r"\W*\(\s*aqi", _around(e[1]), re.IGNORECASE)] or statements
    if not statements and re.search(INDEX, text, re.IGNORECASE):
        statements = referring[-1:]
    clauses = [clause for part in parts for clause in re.split(r"\b(?:but|while|whereas)\b", part)]
    final = [each for each in statements if CONCLUDED.search(each[0])]
    overall = [each for each in statements if each[1]["whole"]] or [e for e in referring if WHOLE.search(e[0])]
    headline = [each for each in statements if each[0] == parts[0]]
    chosen = next(iter(overall or headline or final[-1:] or statements), None)
    if chosen and len({match["value"] for part, match in statements if part == chosen[0]}) > 2:
        return Parsed(note="several numbers")
    value = _number(chosen[1]["value"]) if chosen else _alone(text)
    beside = (_beside(match) for _, match in statements + referring if chosen and match["value"] == chosen[1]["value"])
    category = next(filter(None, beside), None) or _declared(clauses)
    if category is None and chosen and len(names := {name for name, _, _ in _categories(chosen[0])}) == 1:
        category = names.pop()
    if category is None and not _LISTED.search(parts[0]) and (leading := _LEADING.search(parts[0])):
        category = _category(leading[0])
    if category is None and chosen and "|" in text:
        rows = [line for line in text.split("\n") if "|" in line and chosen[1]["value"] in re.findall(NUMBER, line)]
        category = next(filter(None, map(_category, rows)), None)
    if category is not None:
        return Parsed(value, category, True, "" if value is not None else "category only")
    if value is not None:
        return _valued(value)
    return Parsed(note="no answer")


def _around(match: re.Match[str]) -> str:
    return match.string[max(0, match.start() - 1) : match.end()]


def _json(text: str) -> Parsed | None:
    """What an object with the key "aqi" or "category" states; None if there is none."""
    found = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        given = json.loads(found[0]) if found else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict):
        return None
    fields = {str(key).casefold(): value for key, value in given.items()}
    number = re.fullmatch(rf"\s*(-?{NUMBER})\s*", str(fields.get("aqi")))
    category = _category(str(fields.get("category", "")))
    if number is None and category is None:
        return None
    value = _number(number[1]) if number else None
    return Parsed(value, category, True, "" if number else "category only") if category else _valued(value or 0.0)


def _beside(match: re.Match[str]) -> str | None:
    """The category that follows a value in its sentence, unless another number comes between."""
    behind = re.split(r"\d", match.string[match.end("value") :], maxsplit=1)[0][: _NEAR + 30]
    found = [name for name, start, _ in _categories(behind) if start <= _NEAR and not _DENIED.search(behind[:start])]
    return found[0] if found and not _LISTED.search(behind) else None


def _bare(match: re.Match[str]) -> bool:
    """Whether a number is whole and no concentration."""
    return _whole(match) and NOISE.match(match.string[match.start("value") :]) is None


def _alone(text: str) -> float | None:
    """The number that is a line of its own, the last one."""
    lines = re.findall(rf"^[ \[\"]*(-?{NUMBER})[ \]\"]*(?:\(-?{NUMBER}\))?$", text, re.MULTILINE)
    return _number(lines[-1]) if lines else None


def _table(text: str) -> Parsed | None:
    """What a table with a column for the index states: its row of the whole, or its first; None if there is none."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.split("\n") if "|" in line]
    rows = [row for row in rows if any(re.search(r"\w", cell) for cell in row)]
    if len(rows) < 2 or VALUE.search(re.sub(r".*\|.*", "", text)):
        return None
    columns = [i for i, name in enumerate(rows[0]) if re.search(r"\baqi\b|\bindex\b", name, re.IGNORECASE)]
    if len(columns) != 1 or "," in rows[0][columns[0]]:
        return None
    whole = [row for row in rows[1:] if re.match(r"overall|total|max|final", row[0], re.IGNORECASE)]
    row = (whole or rows[1:])[0]
    number = re.match(rf"\W*({NUMBER})\W*$", row[columns[0]]) if len(row) > columns[0] else None
    category = next(filter(None, map(_category, row[1:])), None)
    if number is None and category is None:
        return None
    value = _number(number[1]) if number else None
    return Parsed(value, category, True) if category else _valued(value or 0.0)


def _concluded(sentence: str) -> str:
    """A sentence that draws the conclusion, its chain "AQI = 15 * 10 = 150" with the last value only."""
    chain = r"(\baqi\s*)=[^=\n]*[-+*/\u00d7][^\n]*=(?=\s*[\d.,]+\W*$)"
    return re.sub(chain, r"\1=", sentence, flags=re.IGNORECASE) if CONCLUDED.search(sentence) else sentence


def _whole(match: re.Match[str]) -> bool:
    """Whether the number is all there is to the right of "AQI is": no formula, no range, no ratio, no share."""
    return bool(match["category"]) or not GOES_ON.match(match.string[match.end("value") :])


def _category(text: str) -> str | None:
    names = {name for name, _, _ in _categories(text)}
    return names.pop() if len(names) == 1 else None


def _declared(clauses: list[str]) -> str | None:
    """The category that the first clause with one gives as this item's; None if that gives several."""
    for clause in clauses:
        if placed := _PLACED.search(clause):
            return _category(placed[1])
        ends = [] if _SCALE.search(clause) else [match.end() for match in _DECLARES.finditer(clause)]
        names = {
            name
            for name, start, stop in _categories(clause)
            if any(0 <= start - end <= _NEAR for end in ends)
            and not _DENIED.search(clause[:start])
            and not re.match(r"[\"']? (?:can|could|may|might) be\b", clause[stop:])
        }
        if names:
            return names.pop() if len(names) == 1 else None
    return None


def _why(candidates: list[_Quantity], chosen: _Quantity | None) -> str:
    if not candidates:
        return "no answer"
    if chosen is None:
        return "several numbers"
    return "bound" if chosen.high == float("inf") or chosen.low == 0.0 else "range"


def score_aqi(item: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """One answer against its item.

    Args:
        item: With `aqi_value` (number or None) and `category` (or None, then implied by the value).
        answer: What the model wrote.

    Returns:
        `value`, `category`, `note`, `unparsable`, and the scores `exact`, `within5`, `category_right` (True, False, or
        None where the item has no truth for it) and `absolute_error` (index points, None without a value).
    """
    parsed = parse_aqi(answer)
    truth = item.get("aqi_value")
    wanted = item.get("category") or (category_of(float(truth)) if truth is not None else None)
    error = abs(parsed.value - float(truth)) if parsed.value is not None and truth is not None else None
    return {
        "value": parsed.value,
        "category": parsed.category,
        "note": parsed.note,
        "unparsable": parsed.unparsable,
        "exact": None if truth is None else error == 0,
        "within5": None if truth is None else error is not None and error <= WITHIN,
        "category_right": None if wanted is None else parsed.category == wanted,
        "absolute_error": error,
    }
