"""Skips with the reason where there is no GPU."""

from __future__ import annotations

import pytest

from grit_impl.machine import has_gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu():
    if not has_gpu():
        pytest.skip("needs a CUDA GPU: found no NVIDIA driver")
