"""A model's answer as plain text: without reasoning and markup, in sentences, words and numbers."""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import pairwise

from text_to_num import alpha2digit  # type: ignore[import-untyped]

_TAG = r"(?:think|thinking|thought|reasoning)"
_REASONING = re.compile(rf"<(?P<tag>{_TAG})>.*?(?:</(?P=tag)>|$)", re.DOTALL | re.IGNORECASE)
_OPENED_BY_THE_TEMPLATE = re.compile(rf"^.*</{_TAG}>", re.DOTALL | re.IGNORECASE)
_NEXT_SECTION = re.compile(r"###\s*(?:instruction|response|input)\b.*$", re.DOTALL | re.IGNORECASE)
_QUOTES = str.maketrans(dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb\u300c\u300d\u300e\u300f", '"') | {"\u2019": "'"})
_SUPERSCRIPT = re.compile("[\u00b2\u00b3\u00b9\u2070-\u2079]+")
# A period ends a sentence before a capital, a digit, a quote or another script; "U.S. dollar" and "Dr. Who" go on.
_SENTENCE = re.compile(
    r"\n+|[\u3002]+|(?<!\bi\.e)(?<!\be\.g)(?<!\b[A-Z])(?<!\bDr)(?<!\bMr)(?<!\bSt)(?<!\bMrs)[.!?]+[\"')\]]*\s+(?=[\"'(A-Z0-9$\u0400-\uffff-])|;\s"
)


REFUSAL = re.compile(
    r"\bi(?:'m| am) sorry|\bi (?:can(?:no|')t|do(?:n't| not) (?:know|have)|am unable|refuse)|\bas an ai\b|\bunable to\b"
    r"|\b(?:cannot|can't) (?:be|predict|determine|provide|help|answer)|\bnot (?:possible|enough)|\binsufficient\b",
    re.IGNORECASE,
)
"""How an answer declines to answer."""


_CORRECTS = re.compile(
    r"\b(?:wait|scratch that|let me (?:correct|redo|recalculate|fix)(?: that| this| it)?"
    r"|(?:hmm+|no|oops|sorry)\W+(?:no\W+)?actually|correction"
    r"|(?:that|this|which) (?:is|was)(?: not (?:right|correct)|n't (?:right|correct)| incorrect| wrong)"
    r"|i (?:made|used) (?:a|an|the) (?:mistake|error|wrong))\b[\s,.:!-]*",
    re.IGNORECASE,
)


def corrected(text: str) -> str:
    """What is left after the last words that take back what was said before them ("Wait, actually ...")."""
    ends = [match.end() for match in _CORRECTS.finditer(text)]
    kept = text[ends[-1] :] if ends else text
    return kept if re.search(r"\d", kept) else text


def spoken(answer: str) -> str:
    """What an answer says outside its reasoning.

    A block that never ends is reasoning to the end; where only the closing tag is there, the template has opened it.
    """
    return _OPENED_BY_THE_TEMPLATE.sub("", _REASONING.sub(" ", answer)).strip()


def plain(answer: str) -> str:
    """What is spoken, without markup and a next section of the Alpaca format, in NFKC, quotes and minus signs alike."""
    text = _NEXT_SECTION.sub("", spoken(answer))
    # NFKC would turn 7 squared into 72, and a thousands space into a space.
    text = _SUPERSCRIPT.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
    text = re.sub("(?<=\\d)[\u00a0\u2009\u202f](?=\\d{3}(?!\\d))", "", text)
    text = unicodedata.normalize("NFKC", text.translate(_QUOTES)).replace("\u2212", "-")
    for _ in range(2):  # a box around a text
        text = re.sub(r"\$*\s*\\(?:boxed|text|mathbf|mathrm)\s*\{([^{}]*)\}\s*\$*", r"\1", text)
    text = re.sub(r"(?<=[A-Za-z)])_\{?(\d+)\}?", r"\1", text)
    text = re.sub(r"\\(?:times|cdot)\b", "*", re.sub(r"\\approx\b", "\u2248", text))
    text = re.sub(r"(\d[\d.]*) ?[*\u00d7x] ?10\^\{?(-?\d{1,2})\}?", _expanded, text)
    return re.sub(r"[ \t]+", " ", re.sub(r"\*\*|__|[`\\]|^\s*[*]+\s", "", text, flags=re.MULTILINE)).strip()


def _expanded(match: re.Match[str]) -> str:
    """A number in scientific notation as people write it: 3 * 10^8 is 300000000."""
    try:
        return f"{Decimal(match[1]).scaleb(int(match[2])):f}"
    except InvalidOperation:
        return match[0]


def sentences(text: str) -> list[str]:
    """Sentences and lines, in order, without the empty ones."""
    return [part.strip() for part in _SENTENCE.split(text) if part and part.strip(" .\"'")]


_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans(string.punctuation, " " * len(string.punctuation))


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (as SQuAD's evaluation script, Rajpurkar et al. 2016)."""
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", folded).split())


def words(text: str) -> list[str]:
    """Normalised words without accents; articles stay where there is nothing else."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    bare = bare.replace("'", "")
    return (normalise(bare) or bare.casefold().translate(_PUNCTUATION)).split()


STOP = frozenset(
    words(
        "what which who whom whose when where how many much is are was were be do does did in on at of to for from by "
        "and or that this these it its there you i me say called kind thing answer word with only one "
        "quelle quel que qui la le les de du est wie wer welche welcher der die das ist viel von el los cual es"
    )
)
"""Words of questions that say nothing about what is asked, also in the languages of the labelled answers."""


# -- numbers ----------------------------------------------------------------------------------------------------------

_UNITS = {
    "$": r"\$|usd|(?:us )?dollars?|bucks?",
    "EUR": r"\u20ac|eur|euros?",
    "GBP": r"\u00a3|gbp",
    "JPY": r"\u00a5|yen|\u5186|jpy",
    "CHF": r"chf|(?:swiss )?francs?",
    "cent": r"cents?|\u00a2",
    "%": r"%|percent|per cent",
    "C": r"\u00b0 ?c|degrees? c(?:elsius|entigrade)?|celsius",
    "F": r"\u00b0 ?f|degrees? f(?:ahrenheit)?|fahrenheit",
    "km": r"km|kilomet(?:er|re)s?",
    "cm": r"cm|centimet(?:er|re)s?",
    "mm": r"mm|millimet(?:er|re)s?",
    "m": r"m|met(?:er|re)s?",
    "mile": r"miles?",
    "ft": r"ft|feet|foot",
    "kg": r"kg|kilograms?|kilos?",
    "g": r"g|grams?",
    "h": r"h|hours?|hrs?",
    "min": r"min|minutes?",
    "s": r"seconds?",
    "K": r"kelvins?|(?-i:K)",
}
_UNIT = re.compile("|".join(f"(?P<u{i}>(?:{form})(?![a-z]))" for i, form in enumerate(_UNITS.values())), re.IGNORECASE)
_SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_FORM = r"\d{1,3}(?:[,']\d{3})+(?:\.\d+)?|\d{1,3}(?:\.\d{3})+,\d+|\d+(?:[.,]\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?<![\w.,^])(?P<sign>-|(?:minus|negative) )?(?P<before>(?:[$\u20ac\u00a3\u00a5]|usd|eur|gbp|jpy|chf) ?)?"
    rf"(?P<late>-)?(?P<digits>{_FORM})"
    rf"(?:st|nd|rd|th)?(?: ?(?P<scale>{'|'.join(_SCALES)})\b)?(?![.,]?\d)",
    re.IGNORECASE,
)
_OPERATION = re.compile(
    r"\s*(?:[^\s\d=]{0,12}\s)?\(?\s*(?:[*\u00d7x/\u00f7+]|\s-\s|times|plus|minus|divided by|multiplied by)\s*\(?\s*",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Number:
    """A number in a text: value, unit ("" if none is known), place, and whether it is an operand of a calculation."""

    value: float
    unit: str
    start: int
    end: int
    operand: bool = False

    def equals(self, other: Number) -> bool:
        """Same value, and no two different units."""
        same = abs(self.value - other.value) <= 1e-9 * max(1.0, abs(self.value))
        return same and (not self.unit or not other.unit or self.unit == other.unit)


def unit_of(text: str) -> str:
    """The unit that a text begins with, or ""."""
    match = _UNIT.match(text.lstrip(" -"))
    return list(_UNITS)[int(str(match.lastgroup)[1:])] if match else ""


def without_unit(text: str) -> str:
    """The text after the unit that it begins with."""
    stripped = text.lstrip(" -")
    match = _UNIT.match(stripped)
    return stripped[match.end() :] if match else text


def units_in(text: str) -> set[str]:
    """All units that are named in a text as words of their own."""
    starts = [match.start() for match in re.finditer(r"(?<![a-z])[a-z\u00b0%$\u20ac]", text, re.IGNORECASE)]
    return {unit for start in starts if (unit := unit_of(text[start:]))}


def _value(digits: str) -> float:
    if re.fullmatch(r"\d{1,3}(?:[,']\d{3})+(?:\.\d+)?", digits):
        return float(re.sub("[,']", "", digits))
    if re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d+", digits):
        return float(digits.replace(".", "").replace(",", "."))
    return float(digits.replace(",", "."))


def spell(text: str) -> str:
    """Number words as digits; "seven" is 7, "one" stays where it may be a pronoun."""
    text = re.sub(r"(?<![\d.,])(\d{1,3}) (?=\d{3}(?: \d{3})*(?![\d.,]))", r"\1", text)
    parts = re.split(r"(\b\d[\d.,]* (?:thousand|million|billion|trillion)\b)", text, flags=re.IGNORECASE)
    text = "".join(part if i % 2 else _spelled(part) for i, part in enumerate(parts))
    return re.sub(r"\b(\d+) (dollars?|euros?|pounds?) (?:and )?(\d\d) (?:cents?|pence)\b", r"\1.\3 \2", text)


def _spelled(text: str) -> str:
    core = text.strip()
    digits = {"one": "1", "zero": "0"}.get(core.casefold().strip(" .")) or str(alpha2digit(core, "en"))
    return text.replace(core, digits, 1) if core else text


def numbers(text: str) -> list[Number]:
    """The numbers in a text whose words are spelled as digits (`spell`), in order."""
    found: list[Number] = []
    for match in _NUMBER.finditer(text):
        start, sign = match.start(), bool(match["sign"] or match["late"])
        if match["sign"] and re.search(r"[\d)]\s*$", text[:start]):
            # "12 minus 7" and "12 -7": an operation, not a sign.
            start, sign = match.start("before" if match["before"] else "digits"), bool(match["late"])
        value = _value(match["digits"]) * (_SCALES[match["scale"].lower()] if match["scale"] else 1)
        unit = unit_of(match["before"]) if match["before"] else unit_of(text[match.end() : match.end() + 20])
        found.append(Number(-value if sign else value, unit, start, match.end()))
    gaps = [text[a.end : b.start] for a, b in pairwise(found)]
    joined = [_OPERATION.fullmatch(gap) is not None for gap in gaps]
    return [
        Number(n.value, n.unit, n.start, n.end, (i > 0 and joined[i - 1]) or (i < len(joined) and joined[i]))
        for i, n in enumerate(found)
    ]
