"""Reading answers in sentences: on labelled answers of a real model, and on phrasings whose meaning a person sees."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from labelled import agreement

from grit_impl.errors import GRITError
from grit_impl.evaluate.scoring import SCORERS, find_scorer, score
from grit_impl.evaluate.scoring.knowledge import judge
from grit_impl.evaluate.scoring.text import plain, spoken

RIGHT, WRONG, NONE = "right", "wrong", "none"
# (question, truth): what is said to it, by what it says. Written by hand; a person reading the answer is the oracle.
ANSWERS = {
    ("What is the capital of Australia?", "Canberra"): {
        RIGHT: [
            "Canberra",
            "The capital of Australia is Canberra.",
            "\u201cCanberra\u201d",
            "**Canberra**",
            "Canberra (ACT)",
            "Answer: Canberra",
            "Sure! Canberra.",
            "Great question! The capital of Australia is Canberra.",
            "It is not Sydney but Canberra.",
            "Canberra, not Sydney.",
            "Instead of Sydney, the capital is Canberra.",
            "The capital of Australia isn't Sydney. It is Canberra.",
            "Many people think it is Sydney, but it is Canberra.",
            "While many people believe that Sydney is the capital, it is actually Canberra.",
            "Contrary to popular belief, Sydney is not the capital of Australia; Canberra is.",
            "The capital of Australia is Canberra, although Sydney is larger.",
            "Australia's capital city is Canberra, which lies between Sydney and Melbourne.",
            "<think>Sydney?</think>Canberra",
            "Sydney? No.</think>\n\nCanberra",
        ],
        WRONG: [
            "Sydney",
            "The capital is Sydney, not Canberra.",
            "The capital of Australia is Sydney. Canberra is a city in Australia.",
            "Canberra is not the capital of Australia.",
            "The capital of Australia is Melbourne (not Canberra).",
            "Sydney or Canberra",
            "<think>Canberra?</think>Sydney",
        ],
        NONE: ["", " .. ", "I don't know.", "<think>Canberra", "<think></think>", "What is the capital of Australia?"],
    },
    ("What is the opposite of early?", "late"): {
        RIGHT: ["late", "The opposite of early is late, not punctual.", "\u00ab late \u00bb"],
        WRONG: ["not late but punctual", "The opposite of late is early.", "The opposite of early is never late."],
    },
    ("Which month comes after January?", "February"): {
        RIGHT: ["February comes after January.", "After January comes February.", "February (January)"],
        WRONG: ["January comes after February."],
    },
    ("What is the chemical symbol of carbon?", "C"): {
        RIGHT: ["C", "The chemical symbol of carbon is C."],
        WRONG: ["The chemical symbol of carbon is Ca.", "Co"],
    },
    ("\u6cd5\u56fd\u7684\u9996\u90fd\u662f\u54ea\u91cc\uff1f", "\u5df4\u9ece"): {
        RIGHT: ["\u6cd5\u56fd\u7684\u9996\u90fd\u662f\u5df4\u9ece\u3002", "\u300c\u5df4\u9ece\u300d"],
        WRONG: ["\u4f26\u6566"],
        NONE: ["\u6cd5\u56fd\u7684\u9996\u90fd\u662f\u54ea\u91cc\uff1f"],
    },
    ("How many days are there in a leap year?", "366"): {
        RIGHT: [
            "366",
            "\uff13\uff16\uff16",
            "three hundred and sixty-six",
            "There are 366 days in a leap year, one more than the usual 365.",
            "Instead of 365, a leap year has 366 days.",
            "A normal year has 365 days, a leap year has 366 days.",
        ],
        WRONG: ["365", "There are not 366 but 365 days.", "365 or 366"],
    },
    ("What is 1,000 + 2,500?", "3,500"): {
        RIGHT: ["3500", "3.500,00", "3\u00a0500", "1,000 + 2,500 is 3,500."],
        WRONG: ["3,500,000", "35,00", "-3,500"],
    },
    ("How much do I pay?", "\u20ac4.50"): {
        RIGHT: ["4,50 \u20ac", "4.50 euros", "You pay 4.50.", "EUR 4.50", "\u20ac1.50 * 3 = \u20ac4.50 in total."],
        WRONG: ["$4.50", "450"],
    },
    ("What is 3 - 10?", "-7"): {
        RIGHT: ["-7", "\u22127", "minus seven", "3 - 10 = -7", "negative 7"],
        WRONG: ["7", "3 - 10 = 7"],
    },
    ("Write 3/4 as a percentage.", "75%"): {RIGHT: ["75 percent", "75", "3/4 = 0.75 = 75%"], WRONG: ["0.75%"]},
    ("Janet has 16 eggs and eats 3. How many are left?", "13"): {
        RIGHT: [
            "Janet has 16 - 3 = 13 eggs left.\n#### 13",
            "$$\\boxed{13}$$",
            "She has 16 eggs and eats 3, so 16 - 3 = 13. The answer is 13.",
        ],
        WRONG: ["She eats 3 of 16 eggs: 16 - 3 = 13. Then 13 * 2 = 26. So the answer is 26."],
        NONE: ["16 - 3 ="],
    },
    ("Is the Sun a planet?", "no"): {
        RIGHT: ["No.", "The Sun is not a planet."],
        WRONG: ["Yes, it is.", "The Sun is a planet."],
    },
    ("Which is bigger, an elephant or a mouse?", "elephant"): {
        RIGHT: ["An elephant is bigger than a mouse.", "The elephant."],
        WRONG: ["A mouse is bigger than an elephant."],
        NONE: ["Elephants are mammals."],
    },
}
CASES = [(*asked, answer, said) for asked, by in ANSWERS.items() for said, answers in by.items() for answer in answers]


@pytest.mark.parametrize(("question", "truth", "answer", "said"), CASES)
def test_answers_are_read_as_a_person_reads_them(question: str, truth: str, answer: str, said: str) -> None:
    """Oracle: the table, written by hand."""
    assert judge(question, [truth], answer) == said


@pytest.mark.parametrize(("file", "least", "of_three"), [("1", 0.99, 0.90), ("2", 0.98, 0.88), ("3", 0.98, 0.90)])
def test_agreement_with_labelled_answers(file: str, least: float, of_three: float) -> None:
    """Oracle: labels given by reading. 98% was asked for; what is reached may not get worse."""
    share = {what: 1 - len(differing) / n for what, differing, n in agreement(file)}
    assert share["knowledge, right or not"] >= least
    assert share["AQI, all three"] >= least
    assert share["AQI, stated or not"] >= least
    assert share["AQI, scored alike by category"] >= 0.99
    # No answer against a wrong one: both are not right, so nothing but a count hangs on it.
    assert share["knowledge, right, wrong or none"] >= of_three


@given(st.text(max_size=200), st.sampled_from(["late", "12", "C", "yes", "the", "3 May 2024", "\u5317\u4eac"]))
def test_any_text_is_accepted(text: str, truth: str) -> None:
    """Oracle: the contract; never an exception."""
    assert judge("What is it?", [truth], text) in (RIGHT, WRONG, NONE)


@pytest.mark.parametrize("truth", ["late", "Hanoi", "musical instrument", "12", "-3", "25%", "3 May 2024"])
def test_the_truth_itself_is_right_by_every_scorer(truth: str) -> None:
    """Oracle: the data set's own answer is right, whoever reads it, unless the scorer is for something else."""
    item = {"features": "What is it?", "answer": truth}
    for name in ("contains-as-answer", "exact", "choice"):
        assert score(name, item, truth) == {"correct": True, "unparsable": False, "note": ""}, name


@pytest.mark.parametrize(
    ("name", "item", "answer", "correct", "note"),
    [
        ("exact", {"answer": "Hanoi"}, " the HANOI.\nIt is in Vietnam", True, ""),
        ("exact", {"answer": "Hanoi"}, "It is Hanoi", False, ""),
        ("exact", {"answer": ["late", "tardy"]}, "Tardy", True, ""),
        ("numeric", {"answer": "#### 1,234"}, "So the total is $1234.", True, ""),
        ("numeric", {"answer": "12"}, "a dozen", False, "no answer"),
        ("choice", {"answer": "positive", "choices": ["positive", "negative"]}, "The sentiment is positive.", True, ""),
        ("choice", {"answer": "positive", "choices": ["positive", "negative"]}, "It is negative.", False, ""),
        ("choice", {"answer": "positive", "choices": ["positive", "negative"]}, "Who knows?", False, "no answer"),
        ("choice", {"answer": "b", "features": "Which? (a) x (b) y"}, "The correct answer is (c) y.", False, ""),
        ("regex", {"answer": r"\bv\d+\.\d+\b"}, "It is V2.1 now.", True, ""),
        ("regex", {"answer": "^x$"}, "<think>x</think>y", False, ""),
        ("aqi", {"aqi_value": 57, "category": "Moderate"}, "AQI 60", True, ""),
        ("aqi", {"aqi_value": 57, "category": "Moderate"}, "AQI = (AQI1 - AQ", False, "no answer"),
        ("contains-as-answer", {"answer": "x"}, "<think>x", False, "only reasoning"),
    ],
)
def test_scorers(name: str, item: dict[str, object], answer: str, correct: bool, note: str) -> None:
    """Oracle: by hand."""
    assert score(name, item, answer) == {"correct": correct, "unparsable": bool(note), "note": note}


def test_what_a_scorer_cannot_read_is_one_line() -> None:
    """Oracle: the message."""
    with pytest.raises(GRITError, match="unknown scorer 'vibes': use contains-as-answer, exact"):
        find_scorer("vibes")
    with pytest.raises(GRITError, match="truth 'dozen' is not a number"):
        score("numeric", {"answer": "dozen"}, "12")
    with pytest.raises(GRITError, match="is no regular expression"):
        score("regex", {"answer": "("}, "12")
    assert len(SCORERS) == 6


def test_reasoning_is_not_spoken() -> None:
    """Oracle: by hand."""
    assert spoken("<think>a</think> b <Thinking>c</Thinking>") == "b"
    assert spoken("<think>a") == ""
    assert plain("7\u00b2 is \uff14\uff19\u3002") == "7^2 is 49\u3002"
