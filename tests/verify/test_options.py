"""Options: every text that is accepted, and one clear line for every one that is not."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from grit_impl.errors import GRITError
from grit_impl.evaluate.commands import evaluate
from grit_impl.evaluate.options import Questions, Thresholds
from grit_impl.verify.options import Options

BAD = [
    ("min_delta_aqi", "abc", "--min-delta-aqi takes a number between -100 and 100, not 'abc'"),
    ("min_delta_aqi", "nan", "--min-delta-aqi takes a number between -100 and 100, not 'nan'"),
    ("min_delta_over_baseline", "101", "a number between -100 and 100, or nothing"),
    ("max_speed_loss", "-1", "a percentage between 0 and 100"),
    ("min_retention", "101", "a percentage between 0 and 100"),
    ("steps", "0", "a whole number of at least 1"),
    ("steps", "2.5", "a whole number of at least 1"),
    ("seed", "-1", "a whole number between 0 and"),
    ("ollama_url", "ftp://x", "an http address"),
    ("ollama_url", "http://host:port", "an http address"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_bad_text_is_one_line(name, text, message):
    """Oracle: the flag, what it takes and what it got, in one line."""
    with pytest.raises(GRITError) as error:
        Options.parse({name: text})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("min_delta_aqi", "-2.5", -2.5),
        ("min_delta_over_baseline", "3", 3.0),
        ("min_delta_over_baseline", "", None),
        ("min_retention", "75%", 75.0),
        ("steps", " 10 ", 10),
        ("ollama_url", "localhost:11434", "http://localhost:11434"),
        ("ollama_url", "https://host/", "https://host"),
        ("ollama_url", "", ""),
        ("strict_claims", True, True),
        ("base_model", "org/model", "org/model"),
    ],
)
def test_good_text(name, text, value):
    """Oracle: the value that was meant."""
    assert getattr(Options.parse({name: text}), name) == value


def test_defaults_parse_to_themselves():
    """Oracle: the defaults, given as texts."""
    texts = {
        each.name: each.default if isinstance(each.default, bool) else str(each.default) for each in fields(Options)
    }
    assert Options.parse(texts) == Options()
    assert Options.parse({}) == Options()


def test_a_threshold_is_declared_once():
    """Oracle: the tables: `grit evaluate` has all of theirs, with their defaults and words; pyproject has none."""
    root = Path(__file__).parents[2]
    given = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert {f"grit_{each.name}" for each in fields(Options)} & given.keys() == set()
    known = {each.name: each for each in evaluate.params}
    for each in (*fields(Thresholds), *fields(Questions)):
        option = known[each.name]
        assert option.callback(None, option, None) == each.default == getattr(Options(), each.name)
        assert each.metadata["help"][1:] in option.help
