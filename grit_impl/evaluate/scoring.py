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

import re
import string
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from text_to_num import alpha2digit  # type: ignore[import-untyped]

from grit_impl.aqi import CATEGORIES
from grit_impl.aqi import category as aqi_category

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


_NUMBER = r"\d+(?:[.,]\d+)?"
_NOISE = re.compile(
    rf"pm[\s_-]?(?:2[.,]5|10)(?!\d)(?:\s*[:=]?\s+{_NUMBER})?"  # names with a number in them, and their values
    rf"|{_NUMBER}\s*(?:[uμ]g|mg|pp[mb]|%|°|degrees?\b|micrograms?\b|parts per)(?:\s*/\s*m\^?3)?"  # concentrations
    rf"|\b(?:o3|ozone|co|so2|no2)\s*[:=]?\s*{_NUMBER}"  # an echo of the features
    r"|\d+\s*-?\s*(?:h|hr|hour)s?\b"  # averaging times
    r"|(?:/|out of|on a scale (?:of|from))\s*(?:[01]\s*(?:-|to)\s*)?500\b",  # the scale
    re.IGNORECASE,
)
_QUANTITY = re.compile(
    r"(?P<bound>above|over|more than|greater than|exceed(?:s|ing)?|at least|below|under|less than|up to|at most"
    r"|[<>]=?)?"
    rf"\s*(?<![\w.,])(?P<low>-?{_NUMBER})"
    rf"(?:\s*(?:[-\u2013\u2014]|to|through|and)\s*(?P<high>{_NUMBER}))?(?P<plus>\+)?(?![\w]|[.,]\d)",
    re.IGNORECASE,
)
_ANCHOR = re.compile(r"(?:aqi|air quality index|index|指数)[^\d.;\n]{0,40}$", re.IGNORECASE)
_FINAL = re.compile(
    r"(?:overall|final|therefore|answer)[^\d.;\n]{0,20}(?:aqi|air quality index|index)[^\d.;\n]{0,40}$", re.IGNORECASE
)
_CATEGORY = re.compile(
    r"(?<!\bnot )(?<!n't )(?<!\bnot very )\b(?:(?P<usg>unhealthy\s+for\s+sens\w*(?:\s+gr\w*)?|unhealthy\s+for$|usg)"
    r"|(?P<very>very\s+unhealthy)|(?P<unhealthy>unhealthy)|(?P<hazardous>hazardous)|(?P<moderate>moderate)"
    r"|(?P<good>good(?!\s+(?:question|day|morning|afternoon|evening|luck|news|point|idea|job))))\b",
    re.IGNORECASE,
)
_GROUP_CATEGORY = dict(zip(("good", "moderate", "usg", "unhealthy", "very", "hazardous"), NAMES, strict=True))
_REFUSAL = re.compile(
    r"\bi(?:'m| am) sorry|\bi (?:can(?:no|')t|do(?:n't| not) (?:know|have)|am unable|refuse)|\bas an ai\b|\bunable to\b"
    r"|\b(?:cannot|can't) (?:be|predict|determine|provide|help|answer)|\bnot (?:possible|enough)|\binsufficient\b",
    re.IGNORECASE,
)
_NEAR = 40
"""Characters between a number and the category that belongs to it."""


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
    text = unicodedata.normalize("NFKC", answer)
    text = re.sub(r"<think>.*?(?:</think>|$)", " ", text, flags=re.DOTALL)
    text = re.sub(r"\\(?:boxed|text|mathbf)\s*\{([^{}]*)\}", r"\1", text.split("###")[0])
    text = re.sub(r"[*_`$#\\]", "", text).replace("\u2019", "'")
    text = re.sub(r"(aqi|指数为?)(?=\d)", r"\1 ", text, flags=re.IGNORECASE)
    return re.sub(r"[ \t]+", " ", alpha2digit(text, "en")).strip()


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
        before = text[: match.start()]
        rank = 2 if _FINAL.search(before) else 1 if _ANCHOR.search(before) else 0
        found.append(_Quantity(low, high, low == high and not bound, rank, match.start("low"), match.end()))
    return found


def _categories(text: str) -> list[tuple[str, int, int]]:
    return [(_GROUP_CATEGORY[str(m.lastgroup)], m.start(), m.end()) for m in _CATEGORY.finditer(text)]


def _stated(text: str, chosen: _Quantity | None) -> str | None:
    """The one category that the text states, or the one beside the number; None if that is undecided."""
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
        return Parsed(note="empty")
    plain = _NOISE.sub(" ", text)
    quantities = _quantities(plain)
    best = max((q.rank for q in quantities), default=0)
    candidates = [q for q in quantities if q.rank == best]
    refused = _REFUSAL.search(plain) is not None and best == 0
    if refused:
        return Parsed(note="refusal")
    possible = [q for q in candidates if q.low >= 0 and (q.low <= HIGHEST or not q.point)]
    distinct = {(q.low, q.high) for q in possible}
    chosen = possible[0] if len(distinct) == 1 else None
    value = chosen.low if chosen is not None and chosen.point else None
    category = _stated(plain, chosen)
    if category is not None:
        note = "" if value is not None else "category only" if not quantities else _why(candidates, possible, chosen)
        return Parsed(value, category, True, note)
    if value is not None:
        return Parsed(value, category_of(value), False, "")
    if len({name for name, _, _ in _categories(plain)}) > 1:
        return Parsed(note="several categories")
    if possible and len(ends := {category_of(min(end, HIGHEST)) for q in possible for end in (q.low, q.high)}) == 1:
        return Parsed(None, ends.pop(), False, _why(candidates, possible, chosen))
    return Parsed(note=_why(candidates, possible, chosen))


def _why(candidates: list[_Quantity], possible: list[_Quantity], chosen: _Quantity | None) -> str:
    if not candidates:
        return "no answer"
    if not possible:
        return "out of range"
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


# -- general knowledge ------------------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans(string.punctuation, " " * len(string.punctuation))


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (as SQuAD's evaluation script, Rajpurkar et al. 2016)."""
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", folded).split())


def score_knowledge(item: Mapping[str, Any], answer: str, match: str = "exact") -> dict[str, Any]:
    """One answer against its item's `answer` (a string, or a list of equally good ones).

    Args:
        item: With `answer`.
        answer: What the model wrote; only its first non-empty line counts.
        match: `exact` (after `normalise`), or `contains` for models that answer in sentences.

    Returns:
        `correct`, `unparsable` (nothing but white space or punctuation) and `note`.
    """
    truths: Iterable[Any] = item["answer"] if isinstance(item["answer"], list | tuple) else [item["answer"]]
    given = normalise(next((line for line in answer.split("###")[0].splitlines() if line.strip()), ""))
    wanted = [normalise(str(truth)) for truth in truths]
    inside = match == "contains" and any(f" {truth} " in f" {given} " for truth in wanted)
    right = inside or given in wanted
    return {"correct": bool(given) and right, "unparsable": not given, "note": "" if given else "empty"}
