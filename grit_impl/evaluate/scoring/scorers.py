"""The scorers that the project brings."""

from __future__ import annotations

import re

from grit_impl.errors import GRITError
from grit_impl.evaluate.scoring.index import score_aqi
from grit_impl.evaluate.scoring.knowledge import Said, judge
from grit_impl.evaluate.scoring.registry import Item, scorer, truths_of
from grit_impl.evaluate.scoring.text import normalise, plain, spoken
from grit_impl.evaluate.scoring.values import conclusion, number_of


@scorer("contains-as-answer")
def contains_as_answer(item: Item, answer: str) -> Said:
    """The answer is stated, alone or in a sentence: not denied, not beside another, not elsewhere only."""
    return judge(str(item.get("features", "")), truths_of(item), answer)


@scorer("exact")
def exact(item: Item, answer: str) -> Said:
    """The first line is the answer, but for case, punctuation and articles."""
    given = normalise(next((line for line in plain(answer).splitlines() if line.strip()), ""))
    return "right" if given in map(normalise, truths_of(item)) and given else "wrong" if given else "none"


@scorer("numeric")
def numeric(item: Item, answer: str) -> Said:
    """The number that the answer ends at: signs, units, separators and number words are understood."""
    wanted = [number for truth in truths_of(item) if (number := number_of(truth.split("####")[-1]))]
    if not wanted:
        raise GRITError(f"scorer numeric: the truth {truths_of(item)[0][:60]!r} is not a number")
    said = [conclusion(str(item.get("features", "")), each, plain(answer)) for each in wanted]
    if not any(said):
        return "none"
    right = any(found and all(n.equals(each) for n in found) for found, each in zip(said, wanted, strict=True))
    return "right" if right else "wrong"


@scorer("choice")
def choice(item: Item, answer: str) -> Said:
    """One of the item's `choices` is stated, and it is the right one."""
    options = [str(each) for each in item.get("choices") or ()]
    said = {each: judge(str(item.get("features", "")), [each], answer) for each in {*options, *truths_of(item)}}
    chosen = [each for each, verdict in said.items() if verdict == "right"]
    if not chosen:
        return "wrong" if "wrong" in said.values() and not options else "none"
    return "right" if all(each in truths_of(item) for each in chosen) else "wrong"


@scorer("regex")
def regex(item: Item, answer: str) -> Said:
    """The truth is a regular expression that is found in the answer, case aside."""
    text = spoken(answer)
    try:
        found = any(re.search(pattern, text, re.IGNORECASE) for pattern in truths_of(item))
    except re.error as error:
        raise GRITError(f"scorer regex: {truths_of(item)[0][:60]!r} is no regular expression ({error})") from None
    return "right" if found else "wrong" if text else "none"


@scorer("aqi")
def aqi(item: Item, answer: str) -> Said:
    """An air quality index or its category, as it is stated; right by its category."""
    scores = score_aqi(item, answer)
    return "none" if scores["unparsable"] else "right" if scores["category_right"] else "wrong"
