"""Whether an answer in sentences gives the answer asked for, by the field's conventions.

Words are compared as SQuAD's evaluation script does; beyond that an answer counts where it is *stated*: in the sentence
that answers (its headline, or the conclusion of a calculation), not negated ("not late but punctual"), not beside an
alternative ("flew or flied"), and not used elsewhere only ("... is Sydney, while Canberra ...").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from grit_impl.evaluate.scoring.clauses import clauses
from grit_impl.evaluate.scoring.forms import canonical
from grit_impl.evaluate.scoring.text import REFUSAL, STOP, Number, corrected, normalise, plain, sentences, words
from grit_impl.evaluate.scoring.values import conclusion, number_of

Said = Literal["right", "wrong", "none"]
SHORT = 4
"""Words up to which an answer needs no verb to be one."""

_COPULA = re.compile(
    r"\b(?:is|are|was|were|be|called|equals?|means|stands for|est|ist|es|sono|\u00e8)\b|=|:|\u662f|\u306f",
    re.IGNORECASE,
)


def judge(question: str, truths: Sequence[str], answer: str) -> Said:
    """What an answer says.

    Args:
        question: What was asked; words and numbers that only repeat it are no answer.
        truths: Equally good answers.
        answer: What the model wrote.

    Returns:
        `right`, `wrong` (another answer, several, or the right one denied), or `none` (nothing that answers).
    """
    text = canonical(corrected(plain(answer)))
    question, truths = canonical(question), [canonical(truth) for truth in truths]
    if not words(text):
        return "none"
    if any(normalise(text) == normalise(truth) for truth in truths if not number_of(truth)):
        return "right"
    if REFUSAL.search(text) and len(words(text)) <= 4 * SHORT:
        return "none"
    if {truth.casefold() for truth in truths} <= set(_TRUTHS):
        return _yes_or_no(question, truths[0].casefold(), text)
    if letter := _letter(question, truths):
        chosen = _CHOSEN.search(text)
        if chosen:
            return "right" if (chosen[1] or chosen[2]).casefold() == letter else "wrong"
    listed = {_enumerates(text, truth) for truth in truths}
    if listed & {"right", "wrong"}:
        return "right" if "right" in listed else "wrong"
    verdicts = [_judge_one(question, truth, text, truths) for truth in truths]
    return "right" if "right" in verdicts else "wrong" if "wrong" in verdicts else "none"


def _judge_one(question: str, truth: str, text: str, truths: Sequence[str]) -> Said:
    wanted = number_of(truth)
    return _numeric(question, wanted, text) if wanted else _textual(question, truth, text, truths)


_CHOSEN = re.compile(r"\(([a-z])\)|(?:^|\b(?:answer|option|choice)(?: is)?:?\s+)([a-z])(?=[.):]|\s*$)", re.IGNORECASE)


def _letter(question: str, truths: Sequence[str]) -> str:
    """The right option's letter, where the question lists options; else ""."""
    letter = next((truth.casefold() for truth in truths if re.fullmatch(r"\(?[A-Za-z]\)?", truth)), "").strip("()")
    return letter if letter and re.search(rf"\(?{letter}[).:]", question, re.IGNORECASE) else ""


_RELATIVE = r",?\s+(?:which|who|that|because|since)\b"


def _items(text: str) -> list[str]:
    return [item for item in re.split(r",\s+(?:and |or )?|;|\s+(?:and|&|und|et|y)\s+", text) if words(item)]


def _enumerates(text: str, truth: str) -> Said:
    """Whether an answer lists what a truth lists, in any order: all of it and nothing else (`right`), or more."""
    wanted = [words(item) for item in _items(truth)]
    if len(wanted) < 2 or _MONTHS & set(words(truth)):
        return "none"
    lines = [line.strip() for line in text.split("\n") if words(line)]
    opened = next((number + 1 for number, line in enumerate(lines) if line.endswith(":")), 0)
    mark = r"^(?:\d+[.)]|[-\u2022*])\s+"
    lines = [line for line in lines if re.match(mark, line)] or lines[opened:]
    lines = [re.sub(mark, "", line).split(":")[0] for line in lines]
    headline = "".join(sentences(text)[:1])
    ends = [match.end() for match in _COPULA.finditer(headline)]
    said = [
        words(item)
        for item in (lines if len(lines) > 1 else _items(re.split(_RELATIVE, headline[ends[-1] if ends else 0 :])[0]))
    ]
    missing = [
        each for each in wanted if not any(item[: len(each)] == each or item == each[: len(item)] for item in said)
    ]
    if missing or len(said) < len(wanted):
        return "none"
    return "right" if len(said) == len(wanted) else "wrong" if max(map(len, said)) <= SHORT // 2 else "none"


def _numeric(question: str, wanted: Number, text: str) -> Said:
    said = conclusion(question, wanted, text)
    if said is None:
        return "none"
    return "right" if said and all(number.equals(wanted) for number in said) else "wrong"


# -- words ------------------------------------------------------------------------------------------------------------

_CONTEXT = re.compile(r"^(?:answer|since then|now|today|it|this|that|so|therefore|in|these|they)\b", re.IGNORECASE)
_DOUBT = re.compile(
    r"\b(?:disputed|no consensus|uncertain|(?:also|sometimes) (?:believed|thought|said to be|claimed)"
    r"|not (?:sure|certain))\b",
    re.IGNORECASE,
)
_DEEDS = "written|painted|composed|invented|discovered|made|novel|play|poem|book|painting|symphony|opera"
_RELATIONS = frozenset(("of", "after", "before", "follows", "follow", "precedes", "precede"))
_MONTHS = frozenset(words("January February March April May June July August September October November December"))


def _textual(question: str, truth: str, text: str, truths: Sequence[str]) -> Said:
    target = _Target(question, truth, truths)
    parts = [part for part in sentences(text) if not _echo(part, question)]
    for number, part in enumerate(parts):
        found = clauses(part)
        main = [clause.text for clause in found if clause.role == "main"]
        hits = [clause for clause in main if target.in_(clause)]
        related = number == 0 or len(words(part)) <= SHORT or _CONTEXT.search(part) or target.topic & set(words(part))
        if hits and related:
            doubt = _DOUBT.search(" ".join(parts[number : number + 2]))
            right = not doubt and any(target.stated(clause) for clause in hits)
            if right and any(target.given_to_another(later) for later in parts[number + 1 :]):
                return "wrong"
            return "right" if right else "wrong" if not target.alternatives or target.compares(hits[0]) else "none"
        denied = any(target.in_(clause.text) for clause in found if clause.role == "denied")
        if (denied and not target.alternatives) or _states(" ".join(main), target):
            return "wrong"
    dated = _MONTHS & set(target.words) and _MONTHS & set(words(text))
    short = len(words(text)) <= SHORT and len(text) <= 12 * SHORT
    return "wrong" if dated or (parts and short) else "none"


class _Target:
    """The words that are looked for, and what in the question tells an answer from an echo."""

    def __init__(self, question: str, truth: str, truths: Sequence[str]) -> None:
        self.truth, self.words = truth, _dated(words(truth))
        self.others = {word for other in truths for word in words(other)}
        self.question = words(question)
        self.asks_a_name = question.rstrip(" ?").endswith("called")
        self.topic = {word for word in self.question if word not in STOP}
        # Symbols such as C or Li are nothing but words in lower case.
        self.symbol = len(truth) <= 2 and truth[:1].isupper() and truth.isascii()
        # "An elephant or a mouse"; "a kilogram of iron or a pound of iron": what differs.
        pair = re.search(r"([\w ]+) or ([\w ]+)", question.casefold())
        one, other = (words(part) for part in pair.groups()) if pair else ([], [])
        offered = {*one[-len(other) :], *other} - (set(one) & set(other))
        self.alternatives = offered if set(words(truth)) & offered else set()
        self.relations = {(a, b) for a, b in pairwise(self.question) if b in _RELATIONS}

    def in_(self, text: str) -> bool:
        """Whether the words stand in a text."""
        return bool(self.spans(text))

    def spans(self, text: str) -> list[tuple[int, int]]:
        if not self.words or (self.symbol and not re.search(rf"(?<![\w']){re.escape(self.truth)}(?!\w)", text)):
            return []
        if not self.truth.isascii() and re.search("[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]", self.truth):
            return [(0, 0)] if self.truth in text else []
        if not normalise(self.truth):
            # An article asked for: "the first word is The".
            last = text.casefold().strip(" .\"'").split()[-1:]
            return [(0, 0)] if [word.strip("\"'") for word in last] == [self.truth.casefold()] else []
        said, size = _dated(words(text)), len(self.words)
        dates = bool(_MONTHS & set(self.words))
        places = []
        for start in range(len(said) - size + 1):
            window = said[start : start + size]
            same = window[:-1] == self.words[:-1] and _same(window[-1], self.words[-1])
            # "Marie Sklodowska Curie"
            if self.truth.istitle() and [said[start], *said[start + 2 : start + 3]] == self.words:
                places.append((start, start + 3))
            if same or (dates and sorted(window) == sorted(self.words)):
                places.append((start, start + size))
        return places

    def given_to_another(self, sentence: str) -> bool:
        """Whether a later sentence says all that was asked of something else."""
        before = set(words(_COPULA.split(sentence)[0]))
        return self.topic <= before <= set(self.question) and not self.in_(sentence) and _states(sentence, self)

    def compares(self, clause: str) -> bool:
        """Whether a clause decides between the alternatives that the question offers."""
        return bool(((self.topic - self.alternatives) | {"answer"}) & set(words(clause)))

    def stated(self, clause: str) -> bool:
        """Whether a clause that holds the words gives them as the answer."""
        if _offers(clause, self):
            return False
        said = words(clause)
        asked = [self.question[i : i + 3] for i in range(len(self.question) - 2) if self.question[i + 1] in _RELATIONS]
        if any(said[i : i + 3] in asked for i in range(len(said))):
            return True  # "the capital city of Egypt is the city of Cairo": what is asked is named, too
        for start, _ in self.spans(clause):
            # "January comes after February", "the opposite of late is early": the words in the place of the question's.
            before = tuple(["", *said][max(0, start - 1) : start + 1])
            if before in self.relations or (before[-1:] and before[-1] in {b for _, b in self.relations} - {"of"}):
                return False
        if self.alternatives and len(said) > 2:
            places = {word: said.index(word) for word in self.alternatives if word in said}
            mine = min((place for word, place in places.items() if word in self.words), default=len(said))
            first = all(mine <= place for place in places.values())
            return first and self.compares(clause)
        return True


def _dated(said: list[str]) -> list[str]:
    """Without the ordinals of dates: 4th is 4, and "of" goes where a month is."""
    if not _MONTHS & set(said):
        return said
    return [re.sub(r"^(\d+)(?:st|nd|rd|th)$", r"\1", word) for word in said if word != "of"]


def _same(word: str, truth: str) -> bool:
    return word == truth or (len(truth) > 3 and word in (f"{truth}s", f"{truth}es"))


def _offers(clause: str, target: _Target) -> bool:
    """Whether the words stand beside an alternative: "flew or flied"."""
    truth = r"[\s\W]+".join(re.escape(word) for word in target.truth.casefold().split())
    article = r"(?:an? |the )?[\"']?"
    near = rf"(\w+)[\"']?(?: in \w+)? or {article}{truth}\b|\b{truth}[\"']? or {article}(\w+)"
    for match in re.finditer(near, clause.casefold()):
        other = match[1] or match[2]
        if other not in target.others and target.alternatives == set():
            return True
    # "By the Dutch master Rembrandt, a contemporary of Vermeer": somebody else's deed.
    deed = re.search(rf"\b(?:{_DEEDS}) by ([^,;()]*[A-Z][^,;()]*)", clause)
    if deed and not set(words(deed[1])) & target.others:
        return True
    # "The novel by Orwell was written by Nabokov": two names for one deed.
    names = [words(match[1]) for match in re.finditer(r"\bby ((?:[A-Z][\w.'-]*\s?)+)", clause)]
    return len(names) > 1 and any(not set(name) & target.others for name in names)


def _echo(sentence: str, question: str) -> bool:
    """Whether a sentence repeats what is asked (the question's last sentence; the ones before it tell)."""
    last = " ".join(words(sentences(plain(question))[-1])) if words(question) else ""
    said = " ".join(words(sentence))
    return said in last and 2 * len(said) > len(last)


def _states(text: str, target: _Target) -> bool:
    """Whether a text answers with something else: the question's words, a verb, and then a short or a quoted end."""
    topic = target.topic
    for copula in _COPULA.finditer(text):
        before, after = words(text[: copula.start()]), text[copula.end() :].strip()
        missing = [word for word in topic if word not in before]
        if topic and topic <= set(words(after)) and before and len(before) <= SHORT and set(before) - STOP - topic:
            return True
        if not topic or len(missing) > (len(topic) > 2):
            continue
        end = re.split(r"[,.;(]|\b(?:that|which|and)\b", after)[0]
        slot = [word for word in words(end) if word not in topic]
        quoted = after.startswith('"')
        if not set(slot) - STOP or (not quoted and re.search(r"(?:ed|ing)$", slot[0])):
            continue
        # "A young dog is a classic trope" describes; "is a kitten" and "is called a kitten" name.
        longest = 1 if target.asks_a_name and copula[0].casefold() != "called" else SHORT
        if quoted or len(slot) <= longest:
            return True
    return False


_NEGATED = re.compile(r"\bnot\b|n't\b|\bno\b|\bnever\b", re.IGNORECASE)


_TRUTHS = {"yes": True, "no": False, "true": True, "false": False}
_SAID = _TRUTHS | {"ja": True, "nein": False, "oui": True, "non": False, "s\u00ed": True}
_EXPLICIT = re.compile(
    rf"^\W*({'|'.join(_SAID)})\b|\banswer(?: is|:)?\W*(yes|no|true|false)\b"
    r"|\b(?:so|statement is),? (yes|no|true|false)\b",
    re.IGNORECASE,
)


def _yes_or_no(question: str, truth: str, text: str) -> Said:
    first = sentences(text)[0]
    topic = {word for word in words(question) if word not in STOP and word not in _TRUTHS}
    if explicit := _EXPLICIT.search(text):
        said = _SAID[str(explicit[explicit.lastindex or 1]).casefold()]
    elif len(topic & set(words(first))) >= max(1, len(topic) - 1):
        said = not _NEGATED.search(first)
    else:
        return "none"
    return "right" if said == _TRUTHS[truth] else "wrong"
