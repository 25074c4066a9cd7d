"""Hand-written evidence: run records, verdicts, exports and answers whose verdicts are known by construction."""

from __future__ import annotations

import gzip
import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from grit_impl.evaluate.results import Evaluation
from grit_impl.evaluate.speed import CLONE
from grit_impl.probe.findings import FILE as PROBE
from grit_impl.probe.findings import ProbeReport, Requirement
from grit_impl.record import RunRecord, sha256_file
from grit_impl.verify.claims import Claim, Evidence, catalogue
from grit_impl.verify.options import Options

STEPS = 40
CATEGORIES = ("Good", "Moderate", "Unhealthy", "Hazardous")
ITEMS = 200


@dataclass
class Verdict:
    """What the ledger would say."""

    cause: str
    effective: bool | None
    summary: str = "as planted"
    numbers: dict[str, Any] = field(default_factory=dict)


VERDICTS = {
    "baseline": Verdict("no-modifier", False),
    "rerun": Verdict("no-modifier", False),
    "pure": Verdict("effective", True, "consumed at 39 of 40 steps", {"update_cosine": 0.63, "text": "x"}),
    "hybrid": Verdict("effective", True),
    "hybrid_late": Verdict("modified-too-late", False),
    "recommended": Verdict("effective", True),
}
# Share of AQI items that each model gets right, and of knowledge items.
RIGHT = {
    "base": (0.25, 0.9),
    "baseline": (0.60, 0.85),
    "hybrid": (0.62, 0.85),
    "pure": (0.61, 0.86),
    "recommended": (0.64, 0.86),
}
GRIT = ("pure", "hybrid", "recommended")


def ledger_rows(arm: str) -> list[dict[str, Any]]:
    """A ledger of two tensors: turned before the optimizer (pure, hybrid), after it (hybrid_late), or never."""
    rows: list[dict[str, Any]] = [{"kind": "run", "tensors": 2}]
    for step in range(1, STEPS + 1):
        rows.append({"kind": "step", "step": step})
        for side in "AB":
            row = {"kind": "tensor", "step": step, "name": f"layers.0.q_proj.lora_{side}.default.weight"}
            row |= {"raw": 1.0, "entry": 1.0, "update": 0.1, "update_raw": 0.1}
            if arm in GRIT and step > 5:
                row |= {"turn": 0.3, "mods": 1}
            if arm == "hybrid_late" and step > 5:
                row |= {"late": "callback"}
            rows.append(row)
    return rows


def write_run(folder: Path, arm: str, offset: float = 0.0, **changes: Any) -> RunRecord:
    """A finished run whose loss falls from 4 to about 1, shifted by `offset` after the first step."""
    spectra = [
        {"step": s, "top_a": [1 / s, 0.1], "top_g": [2 / s, 0.2], "effective_rank_a": 2.0, "effective_rank_g": 2.0}
        for s in (10, 20, 30, 40)
    ]
    grit = {"inversions": 4, "coverage": 0.975, "spectra": spectra} if arm in GRIT else None
    record = RunRecord.create(
        folder / "runs" / f"{arm}-seed3407",
        **{
            "arm": arm,
            "base_model": "tiny",
            "seed": 3407,
            "steps": STEPS,
            "config": {"learning_rate": 3e-3},
            "grit": None,
            "versions": {"torch": "2.13.0"},
            "machine": {"cpus": 2},
            "started": "2026-01-01T00:00:00+00:00",
            "finished": "2026-01-01T00:01:00+00:00",
            "train_seconds": 60.0,
            "peak_memory_bytes": 2**30,
            "fingerprint": f"f-{arm}",
            "grit_report": grit,
            **changes,
        },
    )
    noise = random.Random(1)
    rows = [
        {
            "step": step,
            "loss": 1 + 3 * math.exp(-step / 12) + 0.1 * noise.random() + (offset if step > 1 else 0.0),
            "grad_norm": 1.0 + noise.random() + (offset if step > 1 else 0.0),
            "learning_rate": 3e-3 * (1 - step / STEPS),
            "tokens": 300 + step,
            "seconds": 0.1 + 0.01 * noise.random(),
            "memory_bytes": 2**30,
        }
        for step in range(1, STEPS + 1)
    ]
    (record.path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if arm.startswith("hybrid"):
        good = Requirement("what is written there enters the optimizer, bit for bit", True, "28 of 28 tensors, AdamW")
        ProbeReport("peft", "AdamW", {"transformers": "5"}, (), (good,)).write(record.path / PROBE)
    record.adapter.mkdir()
    (record.adapter / "adapter_model.safetensors").write_bytes(arm.encode())
    with gzip.open(record.ledger, "wt") as handle:
        handle.write("".join(json.dumps(row) + "\n" for row in ledger_rows(arm)))
    record.finish()
    return record


def write_evaluation(right: dict[str, tuple[float, float]], items: int = ITEMS) -> Evaluation:
    """Answers that are right on the first part of the items, so that models differ on known ones."""
    answers = []
    for model, (aqi, knowledge) in right.items():
        for suite, share in (("aqi", aqi), ("knowledge", knowledge)):
            for i in range(items):
                good = i < round(share * items)
                row = {
                    "label": model,
                    "suite": suite,
                    "item": f"{suite}-{i}",
                    "prompt": f"question {i}",
                    "answer": "AQI 57 (Moderate)",
                    "eval_count": 9,
                    "eval_duration": 10_000_000,
                    "key": "k",
                }
                if suite == "aqi":
                    row["scores"] = {
                        "value": 57,
                        "category": "Moderate",
                        "category_right": good,
                        "exact": good,
                        "within5": good,
                        "absolute_error": 0.0 if good else 40.0,
                        "note": "",
                        "unparsable": False,
                    }
                    row |= {"true_category": CATEGORIES[i % len(CATEGORIES)], "pollutant": "pm25"}
                else:
                    row["scores"] = {"correct": good, "note": "", "unparsable": False}
                row["correct"] = good
                answers.append(row)
    noise = random.Random(2)
    speed = [
        {"round": k, "label": model, "tokens_per_second": 900 + noise.random()}
        for k in range(30)
        for model in [*right, CLONE]
    ]
    return Evaluation({model: model for model in right}, answers, speed)


@pytest.fixture
def claims() -> list[Claim]:
    """The catalogue without what only a GPU can decide."""
    return [claim for claim in catalogue().values() if claim.family != "gpu"]


@pytest.fixture
def make_evidence(tmp_path: Path) -> Any:
    """Builds evidence in which every gating claim holds, unless told otherwise."""

    def build(
        *,
        right: dict[str, tuple[float, float]] | None = None,
        offsets: dict[str, float] | None = None,
        folder: Path = tmp_path / "reports",
        **options: Any,
    ) -> Evidence:
        shifted = {
            "baseline": 0.0,
            "rerun": 0.0,
            "hybrid_late": 0.0,
            "pure": 0.02,
            "hybrid": 0.015,
            "recommended": 0.01,
            **(offsets or {}),
        }
        records = {arm: write_run(folder, arm, offset) for arm, offset in shifted.items()}
        exports = {}
        for model in RIGHT:
            path = folder / "runs" / model / "model-q8_0.gguf"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"GGUF" + model.encode())
            exports[model] = {"path": str(path), "sha256": sha256_file(path)}
        return Evidence(
            Options(**{"steps": STEPS, "reports_dir": folder, **options}),
            records=records,
            verdicts=dict(VERDICTS),
            exports=exports,
            evaluation=write_evaluation({**RIGHT, **(right or {})}),
        )

    return build
