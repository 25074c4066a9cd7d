"""What a sentence states, what it denies, and what it says beside that."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal


@dataclass(frozen=True, slots=True)
class Clause:
    """A part of a sentence: `main` states, `denied` says what is not so, `aside` adds or contrasts."""

    text: str
    role: Literal["main", "denied", "aside"]


_MARK = re.compile(
    r"(?P<denied>\b(?:(?:is|are|was|were|do|does|did|can|could|would|has|have)n't|cannot|not(?! only)|never|no longer"
    r"|nor|neither|rather than|instead of|unlike|contrary to|as opposed to|to be confused with"
    r"|(?:different|distinct) from)\b)"
    r"|(?P<but>\bbut\b)"
    r"|(?P<aside>\b(?:although|though|while|whereas|formerly|previously|however|despite|even though)\b"
    r"|,\s*(?:which|who|where|whose|when)\b)",
    re.IGNORECASE,
)
_CONCEDES = re.compile(
    r"\b(?:(?:many|most|some) (?:people |would )?|often |commonly |widely )"
    r"(?:think|believe|say|assume|thought|believed|assumed|mistaken)|\b(?:misconception|myth) that\b",
    re.IGNORECASE,
)
_VERB_DENIED = re.compile(
    r"(?<!that )(?<!which )(?<!who )\b(?:is|are|was|were|does|do|did|can|could|has|have)\W*$", re.IGNORECASE
)


def clauses(sentence: str) -> list[Clause]:
    """A sentence by what its parts are: stated, denied or said beside it."""
    marks = list(_MARK.finditer(sentence))
    head = sentence[: marks[0].start()] if marks else sentence
    found = [Clause(head, "aside" if len(marks) and _CONCEDES.search(head) else "main")]
    for mark, following in zip_longest(marks, marks[1:]):
        body = sentence[mark.start() : following.start() if following else len(sentence)]
        last = found[-1]
        if mark["denied"]:
            if last.role == "main" and ("n't" in mark[0] or _VERB_DENIED.search(last.text)):
                # "Sydney is not the capital" denies its subject, too.
                found[-1] = Clause(last.text, "denied")
            # "Instead of Sydney, it is Canberra": what is denied ends at the comma.
            denied, comma, rest = body.partition(",")
            found += [Clause(denied, "denied"), *([Clause(rest, "main")] if comma else [])]
        elif mark["but"]:
            answers = last.role != "main" or any(clause.role == "denied" for clause in found[-2:])
            found.append(Clause(body, "main" if answers else "aside"))
        else:
            leading = not "".join(clause.text for clause in found).strip(" ,")
            aside, comma, rest = body.lstrip(", ").partition(",")
            found += [Clause(aside, "aside"), *([Clause(rest, "main")] if comma and leading else [])]
    return [clause for clause in found if clause.text.strip(" ,")]
