"""Root of the suites: settings that have to be made before torch and tokenizers are imported."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("CI"):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
