"""Claims declare themselves: what `@claim` makes of a function and its docstring, and what it refuses."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from grit_impl.errors import GRITError
from grit_impl.verify.claims import Evidence, Judgement, catalogue, claim, family, find
from grit_impl.verify.claims.registry import REGISTERED

LIMIT = 600


@pytest.fixture(autouse=True)
def _leave_the_catalogue_as_it_was():
    catalogue()
    with patch.dict(REGISTERED):
        yield


def test_a_function_becomes_a_claim():
    """Oracle: the declaration, by hand: texts on one line, constants filled in, behind the catalogue's own families."""

    @claim("own.quick", needs=["verdict:trainer"], gates=False)
    def quick(evidence):
        """It trains within {LIMIT}
        seconds.

        Nobody waits
        longer.
        """
        return Judgement("supported", "yes")

    found = find("own.quick")
    assert (found.statement, found.rationale) == ("It trains within 600 seconds.", "Nobody waits longer.")
    assert (found.requires, found.gates) == (("verdict:trainer",), False)
    assert found.judge(Evidence(verdicts={"trainer": None})).summary == "yes"
    assert list(catalogue())[-1] == "own.quick"


def test_one_function_makes_a_claim_for_each_variant():
    """Oracle: two arms, one of which gates; the function gets the values it takes, and no others."""

    @claim("own.{arm}-quick", needs=["record:{arm}"], gates=[True, False], arm=["hybrid", "pure"], name=["a", "b"])
    def quick(evidence, arm):
        """{arm} GRIT, called {name}, is quick.

        Nobody waits.
        """
        return Judgement("supported", arm)

    assert family("own") == ["own.hybrid-quick", "own.pure-quick"]
    pure = find("own.pure-quick")
    assert (pure.statement, pure.requires, pure.gates) == ("Pure GRIT, called b, is quick.", ("record:pure",), False)
    assert find("own.hybrid-quick").judge(Evidence(records={"hybrid": None})).summary == "hybrid"


def test_what_only_a_test_can_bring_is_no_part_of_a_family():
    """Oracle: the claim for other people's trainers."""
    assert "gradients.trainer-effective" in catalogue()
    assert "gradients.trainer-effective" not in family("gradients")
    with pytest.raises(GRITError, match="no claim belongs to the family 'gradient'; there are gradients, curves"):
        family("gradient")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("training.pure-learns", "S.\n\nR.", "two claims have the id 'training.pure-learns'"),
        ("own.x", None, "own.x: write its statement"),
        ("own.x", "Only a statement.", "own.x: write its statement"),
        ("own.x", "It holds within {BOUND}.\n\nR.", "BOUND"),
    ],
)
def test_a_declaration_that_is_incomplete_is_refused(name, text, message):
    """Oracle: one line that names the claim and what is wrong; the catalogue keeps what it had."""

    def decide(evidence):
        raise AssertionError

    decide.__doc__ = text
    before = dict(REGISTERED)
    with pytest.raises(GRITError, match=message):
        claim(name, needs=["record:pure"])(decide)
    assert before == REGISTERED
