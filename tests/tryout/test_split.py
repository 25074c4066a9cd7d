"""The split: no question on two sides. Oracle: what `question` calls the same, counted side by side."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grit_impl.errors import GRITError
from grit_impl.tryout.split import FEWEST, MOST, SHARES, question, split

WORDS = st.lists(st.sampled_from(["a", "b", "Ä", "x.", "7"]), min_size=1, max_size=4)
SPACE = st.sampled_from([" ", "\n", "  ", "\t \n"])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(WORDS, SPACE, WORDS), max_size=150), st.integers(0, 99), st.randoms(use_true_random=False))
def test_equal_questions_fall_on_one_side(
    rows: list[tuple[list[str], str, list[str]]], seed: int, source: random.Random
) -> None:
    """However white space, order and answers differ, and however many rows say the same."""
    padded = [(space.join(asked), " ".join(answer)) for asked, space, answer in rows]
    padded += [(f"row {number}", "y") for number in range(400)] + [(" a \n", "z")]
    source.shuffle(padded)
    questions = [question(prompt, answer) for prompt, answer in padded]
    found = split(questions, seed)
    sides = {name: {re.sub(r"\s+", " ", padded[n][0]).strip() for n in rows} for name, rows in found.rows.items()}
    assert (
        not sides["test"] & sides["validation"] | sides["test"] & sides["train"] | sides["validation"] & sides["train"]
    )
    assert sorted(number for rows in found.rows.values() for number in rows) == list(range(len(padded)))
    assert found.repeated == len(padded) - sum(map(len, sides.values()))


def test_rows_that_are_learnt_whole_are_told_apart_by_all_they_say() -> None:
    """A text has no question of its own; a conversation has what stands before its last answer."""
    assert question(" ", "all  of it") == "all of it"
    assert question("", "rendered <conversation>", "user: hello") == "user: hello"
    assert question("asked", "answered") == question(" asked\n", "otherwise")


def test_more_rows_leave_the_others_where_they_are() -> None:
    """A row's side is its own, as long as the shares are: up to the limit of held-out rows."""
    few, more = ([f"row {n}" for n in range(size)] for size in (300, 900))
    assert set(split(few, 5).rows["test"]) == {n for n in split(more, 5).rows["test"] if n < 300}
    assert split(few, 6).rows["test"] != split(few, 5).rows["test"]


def test_held_out_sides_are_bounded() -> None:
    """Oracle: six standard deviations of a binomial around the share, and around the most of a long file."""
    for size in (1000, 40_000):
        rows = split([str(n) for n in range(size)], 0).rows
        for side in SHARES:
            wanted = min(SHARES[side] * size, MOST)
            assert abs(len(rows[side]) - wanted) < 6 * wanted**0.5


@pytest.mark.parametrize("rows", [[], ["one"] * 500, [str(n) for n in range(4 * FEWEST)]])
def test_too_few_questions_are_refused(rows: list[str]) -> None:
    """Five hundred rows that ask one thing are one question."""
    with pytest.raises(GRITError, match="are too few"):
        split(rows, 0)
