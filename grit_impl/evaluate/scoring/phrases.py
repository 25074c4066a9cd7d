"""How models word an index: what it is called, what joins it to its value, and what makes a number another thing.

The words are those of English, German, French, Spanish, Chinese and Arabic answers; a category counts in English alone.
"""

from __future__ import annotations

import re


def _any(*forms: str) -> str:
    return "(?:" + "|".join(forms) + ")"


NUMBER = r"\d+(?:[.,]\d+)?"
_POINT = r"(?<![A-Za-z0-9_.,])(?P<value>-?\d+(?:,\d{3})*(?:[.,]\d+)?)(?![A-Za-z0-9_]|[.,]?\d)"
INDEX = _any(
    r"\b(?:aqi|air quality index|(?:luftqualitäts|luftgüte)index)\b",
    r"aqi(?=[为约是])",
    r"\bindice de (?:la )?qualité de l'air\b",
    r"\bíndice de (?:la )?calidad del aire\b",
    "空气质量指数",
    "مؤشر جودة الهواء",
)
_VERB = _any(
    r"\b(?:is|are|was|were|be|equals?|becomes|reads|(?:has |have )?reach(?:ed|es|ing)|(?:stands|sits) at)\b",
    r"\b(?:comes? (?:to|out (?:to|at))|corresponds to|translates to|ist|beträgt|liegt bei|entspricht|est|es)\b",
    r"\b(?:would|will) be\b",
    "\u0647\u0648",
    "[大约]*[为是]|约",
)
_ROUGHLY = "approximately|about|around|roughly"
_ABOUT = _any(
    rf"\b(?:{_ROUGHLY}|(?:calculated|estimated|computed|found|reported) (?:as|at|to be)|equal to)\b",
    r"\b(?:now|currently|then|d'environ|environ|de)\b",
    r"\b(?:etwa|ungefähr|rund|aproximadamente)\b",
    rf"\bnot {NUMBER},? but\b",
    r"\bmax(?:imum)?\s*(?:\([^()\n]*\))?\s*=",
    r"\bthe \w*(?:max\w*|highest|largest)\b[^.:\d\n]*:",
    "[~≈:]|大?约",
)
_POLLUTANT = r"(?:pm ?(?:2\.5|10)|o3|ozone|[sn]o2|co2?)(?: \([^()\n]{1,40}\))?"
VALUE = re.compile(
    rf"(?P<whole>\b(?:overall|final)\s+(?:\w+ )?)?(?P<an>(?:\b(?:an|eine[mnr]?|une?)\s+|\()(?:overall )?)?"
    rf"{INDEX}(?:\s*\([^()\n]{{1,60}}\))?(?:\s*(?:value|level|score|index)\b)?"
    # "AQI 57"; "AQI is 57", "AQI of PM10: 57"; "an AQI of 57", but not "the AQI of 57", which names what is given.
    rf"(?:\s*(?=-?\d)|:?\s*{_POLLUTANT}(?:\s*:\s*|\s+)(?=\d)|(?(whole)\s+of\b|(?(an)\s+(?:of|von|de|d')|(?!)))"
    r"|(?P<of>\s+(?:of|for|at|in|due to|corresponding|correspondiente|correspondant|für|bei|pour|de|con|para)\s"
    rf"(?:(?!{_VERB})[^=:\n]){{0,120}}?)?"
    rf"\s*(?:{_VERB}|:|(?P<sign>[=≈])|[-=]+>|→))"
    rf"(?:\s*{_ABOUT})*\s*{_POINT}\s*%?"
    r"(?P<category>\s*(?:[(,:-]|which is|and is)*\s*(?:(?:very )?unhealthy[a-z ]*|good|moderate|hazardous|usg)\b)?",
    re.IGNORECASE,
)
"""An index with its value."""
REFERRING = re.compile(
    rf"(?:\b(?:it|this|that|(?:the )?(?:correct )?(?:answer|result|value|index|total))\s*(?:{_VERB}|:)"
    r"|\b(?:so|hence|thus|therefore)\b,?|->|→"
    r"|\bround(?:s|ed|ing)?\b(?: \w+)?(?: to)?(?: the nearest [a-z]+(?: number)?)?[:,]?"
    r"(?: we get)?|\bwe (?:get|obtain|find)|\b(?:gives|giving|yields|yielding)\b)"
    rf"(?:\s*{_ABOUT})*\s*{_POINT}(?P<category>(?!))?(?P<whole>(?!))?",
    re.IGNORECASE,
)
"""A value whose sentence says "it" or "the answer" for the index that another one names."""
NAMED_BEHIND = re.compile(
    rf"(?<!\()\b(?:{_POINT})\s*%?\s+(?:[io]n (?:the )?)?(?:us )?aqi\b(?! ?(?:\d|categor))(?P<whole>(?!))?",
    re.IGNORECASE,
)
"""A value before its index: "57 on the AQI"."""
WHOLE = re.compile(r"\b(?:overall|final|highest|higher|maximum|max|largest|larger|worst)\b", re.IGNORECASE)
CONCLUDED = re.compile(
    r"^(?:so|this means|which means|therefore|thus|hence|finally|the final|overall|the answer)\b", re.IGNORECASE
)
FORMULA = re.compile(r"aqi ?\d* *[-+*/] *\(?aq|aqi\w* *(?:=|≈) *[^\n]*(?:[-+*/\u00d7(]|=|\baqi)", re.IGNORECASE)
AVERAGED = re.compile(r"(?<=[\s(])\d+ ?-?(?:h|hr|hour)s?\b", re.IGNORECASE)
NOISE = re.compile(
    rf"pm[\s_-]?(?:2[.,]5|10)(?!\d)(?:\s*[:=]?\s+{NUMBER})?"  # names with a number in them, and their values
    # concentrations
    rf"|(?:{NUMBER}\s*(?:[-\u2013]|to|and)\s*)?{NUMBER}\s*(?:[uμ]g|mg|pp[mb]|%|°|degrees?\b|micrograms?\b|parts per)"
    r"(?:\s*/\s*m\^?3)?"
    rf"|\b(?:o3|ozone|co|so2|no2)\s*[:=]?\s*{NUMBER}"  # an echo of the features
    r"|\d+\s*-?\s*(?:h|hr|hour)s?\b"  # averaging times
    r"|\bno\. ?\d+|\b(?:in|since) (?:19|20)\d\d\b|\bby \d+\b|\b\d+ (?:aqi )?categor"  # ranks, years, factors
    r"|(?:/|out of|on a scale (?:of|from))\s*(?:[01]\s*(?:-|to)\s*)?500\b",  # the scale
    re.IGNORECASE,
)
GOES_ON = re.compile(
    r"\s*(?:(?:[-+*/=^\u00d7\u2013\u2014\u2261]|\((?!(?!AQI)[A-Za-z]{3})|x(?=\s*\d))\s*[\dA-Za-z(]|to \d|:?\d"
    r"|or (?:below|less|lower|above|more|higher)\b"
    r"|%? ?(?:times|percent|points|lower|higher|codes?|standards?|systems?|scale|models?)\b)"
)
"""What makes the number before it a part of a formula, a range, a ratio, a share or a name."""
