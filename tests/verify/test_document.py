"""The documentation of the claims is generated, and current."""

from __future__ import annotations

from pathlib import Path

from grit_impl.verify.claims import catalogue
from grit_impl.verify.claims.document import document

ROOT = Path(__file__).parents[2]


def test_catalogue_page_is_current():
    """Oracle: the page generated now. If it fails: python -m grit_impl.verify.claims.document docs/claims.md"""
    assert (ROOT / "docs" / "claims.md").read_text() == document()


def test_every_gating_claim_has_a_suite():
    """Oracle: the sources of the suites name each gating claim, but the one for other people's trainers."""
    sources = "".join(path.read_text() for path in (ROOT / "suites").glob("*/test_*.py"))
    sources += "".join(f"evaluation.{arm}-{what}" for arm in ("baseline", "hybrid", "pure") for what in EVALUATED)
    unnamed = [
        name for name, claim in catalogue().items() if claim.gates and claim.family != "gpu" and name not in sources
    ]
    assert unnamed == ["gradients.trainer-effective"]


EVALUATED = ("delta-aqi", "speed", "retention")
