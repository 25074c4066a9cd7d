"""A model that says the same again and again is stopped, as Ollama stops it, however its answer comes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from grit_impl.serve.completion import REPEATS, WHOLE, Repeats, _suspects

TEXTS = {0: "a", 1: " a", 2: "b", 3: " ", 4: "\n", **{token: f"w{token}" for token in range(5, 300)}}


class Engine:
    """Says what a token means, and counts how often it was asked."""

    asked = 0

    async def detokenize(self, tokens: list[int]) -> str:
        self.asked += 1
        return "".join(TEXTS[token] for token in tokens)


def stopped(tokens: list[int]) -> tuple[bool, int]:
    """Whether the answer that came as one reply counts as a repetition, and how many tokens were looked up."""
    engine: Any = Engine()
    pieces, repeats = asyncio.run(_suspects(engine, tokens)), Repeats()
    return any([repeats.over(piece) for piece in pieces]), engine.asked


@pytest.mark.parametrize(
    "tokens",
    [
        [0] * (REPEATS + 2),
        [2, *[0, 1] * REPEATS],
        [3, 4] * REPEATS,
        [*range(5, 60), *[1] * (REPEATS + 2), *range(5, 60)],
        [0] * REPEATS,
        [0] * (REPEATS + 1),
        [0, 2] * REPEATS,
        [0] * 99 + [2] + [0] * 99,
        list(range(5, 300)),
        [],
    ],
)
def test_one_reply_is_judged_like_a_stream(tokens: list[int]) -> None:
    """Oracle: every token's text, one after another, as a stream brings them."""
    streamed = Repeats()
    assert stopped(tokens)[0] == any([streamed.over(TEXTS[token]) for token in tokens])


def test_an_answer_that_does_not_repeat_itself_is_not_looked_up() -> None:
    """Oracle: none of the tokens of ordinary text is worth a question to llama.cpp."""
    assert stopped(list(range(5, 5 + 2 * REPEATS))) == (False, 0)
    assert WHOLE > REPEATS
