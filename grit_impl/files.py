"""Files that come with the project: the tiny base model, the frozen test sets, recorded null distributions."""

from __future__ import annotations

from pathlib import Path

_INSTALLED = Path(__file__).parent / "fixtures"
FIXTURES = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).resolve().parents[1] / "fixtures"
"""Their folder: in the package where a wheel was installed, at the root of a checkout."""
