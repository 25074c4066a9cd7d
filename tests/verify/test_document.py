"""The documentation of the claims is generated, and current."""

from __future__ import annotations

from pathlib import Path

from grit_impl.verify.claims import FAMILIES
from grit_impl.verify.claims.document import document

ROOT = Path(__file__).parents[2]


def test_catalogue_page_is_current():
    """Oracle: the page generated now. If it fails: python -m grit_impl.verify.claims.document docs/claims.md"""
    assert (ROOT / "docs" / "claims.md").read_text() == document()


def test_every_family_has_a_suite():
    """Oracle: a folder of suites/ for each file of claims, and a line in it that takes whatever the file declares."""
    for name in FAMILIES:
        assert f'family("{name}")' in (ROOT / "suites" / name / f"test_{name}.py").read_text()
