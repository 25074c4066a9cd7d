"""Whether arms train the same thing: loss and gradient norm of the first batch, before any update, must agree.

Up to there arms differ by nothing but rounding: same weights, same tokens, adapters that add nothing yet, and gradients
that nobody has touched. What differs by more is another model, other labels or another way to average.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

# Relative differences of loss and gradient norm that rounding explains, by the numbers that are multiplied. In float32
# TRL's way to the loss of a vocabulary of 49,152 is 6e-6 from transformers', its gradient 2e-5 (on a CPU). In bfloat16,
# of which one rounding is 4e-3, the same tokens of SmolLM2-135M (30 layers) had losses 3.33412 under Unsloth's kernels
# and 3.34949 under peft's on one H200, 4.6e-3 apart: rounding does not average out where all tokens share the weights
# that are rounded. Refused is what `grit compare` refuses, too (curves.compare.FIRST_LOSS_REFUSED): four times that.
# Padding in a loss was 11 times off.
ROUNDING = {"fp32": (1e-4, 1e-3), "fp16": (1e-3, 1e-2), "bf16": (2e-2, 1e-1)}


def first_batch(path: Path) -> dict[str, Any] | None:
    """What a run noted of its first batch, or None: it has not come so far, or is of an older version."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found


def disagreement(firsts: Iterable[tuple[str, dict[str, Any]]], precision: str) -> str | None:
    """Why two arms do not train the same thing, or None.

    Args:
        firsts: Name of each arm, and what it noted: `loss` in nats per token, `gradient_norm`, and `batch`, a checksum
            of the ids.
        precision: Key of `ROUNDING`.
    """
    for (one, mine), (other, theirs) in combinations(firsts, 2):
        if mine["batch"] != theirs["batch"]:
            return (
                f"{one} and {other} were given other tokens in the first batch (checksums {mine['batch']} and "
                f"{theirs['batch']}): nothing more is trained"
            )
        for name, allowed in zip(("loss", "gradient_norm"), ROUNDING[precision], strict=True):
            a, b = mine[name], theirs[name]
            apart = abs(a - b) / max(abs(a), abs(b), 1e-30)
            # Not "greater than": a loss that is no number agrees with nothing.
            if not apart <= allowed:
                return (
                    f"{one} and {other} do not train the same thing: before any update the first batch has {name} "
                    f"{a:.6g} and {b:.6g}, {apart:.1g} apart where {precision} explains {allowed:g}: nothing more is "
                    "trained"
                )
    return None
