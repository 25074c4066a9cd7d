"""The cells that `gpu_step.py` has measured, as lines and as a table with verdicts."""

from __future__ import annotations

from typing import Any

from grit_impl.cost.bench import ENOUGH_RATIOS, TARGETS, misses, spread


def line(row: dict[str, Any]) -> str:
    """One cell in one line."""
    text = (
        f"{row['plain_seconds']:.3f} s -> {row['grit_seconds']:.3f} s, x {spread(row['ratios'])} "
        f"(n={len(row['ratios'])}), device x {row['device_ratio'] or float('nan'):.4f}, "
        f"memory x {row['memory_ratio']:.4f} of {row['plain_peak_gib']:.2f} GiB, "
        f"{row['factors']} inversions {row['invert_ms']:.2f} ms, {row['ready']}/{row['layers']} ready, "
        f"waits {row['waits']}"
    )
    return text + (f", ledger x {spread(row['ledger_ratios'])}" if "ledger_ratios" in row else "")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: every target stands beside its measurement."""
    lines = [
        "| stack | shape | r | tokens | checkpointing | step, plain | step ratio (n) | device ratio | memory ratio | "
        "inversions, ms (device) | ledger (n) | targets |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        step, judged = spread(row["ratios"]), row["shape"] != "1b" and row["gpu"]
        ledger = spread(row["ledger_ratios"]) if "ledger_ratios" in row else None
        device = "-" if row["invert_device_ms"] is None else f"{row['invert_device_ms']:.2f}"
        kernels = "-" if row["device_ratio"] is None else f"{row['device_ratio']:.4f}"
        missed = [
            name
            for name, bad in (
                ("step", step.n >= ENOUGH_RATIOS and misses(step, TARGETS["gpu step"])),
                # The buffers of the statistics do not shrink with the layers: in a small model they weigh more.
                ("memory", row["shape"] == "8b" and row["memory_ratio"] > TARGETS["gpu memory"]),
                ("inversions", (row["invert_device_ms"] or row["invert_ms"]) > TARGETS["inversion of 448 factors, ms"]),
                ("ledger", ledger is not None and ledger.n >= ENOUGH_RATIOS and misses(ledger, TARGETS["ledger"])),
            )
            if bad
        ]
        open_ = [
            name
            for name, found, target in (("step", step, "gpu step"), ("ledger", ledger, "ledger"))
            if found is not None and (found.n < ENOUGH_RATIOS or found.high > TARGETS[target])
        ]
        verdict = "MISSED: " + ", ".join(missed) if missed else "open: " + ", ".join(open_) if open_ else "met"
        verdict = verdict if judged else "-"
        lines.append(
            f"| {row['stack']} | {row['shape']} | {row['rank']} | 2 x {row['length']} x 4 | "
            f"{'on' if row['checkpointing'] else 'off'} | {row['plain_seconds']:.3f} s | {step} ({step.n}) | "
            f"{kernels} | {row['memory_ratio']:.4f} of {row['plain_peak_gib']:.2f} GiB | "
            f"{row['invert_ms']:.2f} ({device}) | {f'{ledger} ({ledger.n})' if ledger else '-'} | {verdict} |"
        )
    return "\n".join(lines)
