"""Figures as SVG text that takes its colours from the page, so that one drawing serves light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from grit_impl.cost import bench as cost
from grit_impl.curves.noise import MARGIN, rms
from grit_impl.verify.claims import Evidence
from grit_impl.verify.claims.curves import losses

INK, FAINT = "#010101", "#020202"
"""Stand-ins that become the page's text and grid colours."""
ARM_COLOURS = {
    "base": "#030301",
    "baseline": "#030302",
    "rerun": "#030303",
    "pure": "#030304",
    "hybrid": "#030305",
    "hybrid_late": "#030306",
    "other": "#030307",
    "recommended": "#030308",
}
ARM_STYLES = {
    "pure": (0, (6, 1.5)),
    "recommended": (0, (3, 1)),
    "rerun": (0, (1, 2)),
    "hybrid_late": (0, (4, 3)),
    "hybrid_starved": (0, (4, 2, 1, 2)),
}
WIDTH = 5.6
"""Inches; narrow, so that text stays legible when a phone scales the drawing down."""
SMOOTHING = 15

_VARIABLES = {INK: "var(--ink)", FAINT: "var(--grid)"} | {
    colour: f"var(--arm-{arm.replace('_', '-')})" for arm, colour in ARM_COLOURS.items()
}
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "grit",
}


def colour(arm: str) -> str:
    """The arm's stand-in colour."""
    return ARM_COLOURS.get(arm, ARM_COLOURS["other"])


@contextmanager
def _axes(height: float = 3.0) -> Iterator[tuple[Figure, Axes]]:
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained")
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element: no background, colours as CSS variables, ids that no other figure uses."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    text = re.sub(r'id="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", text)
    text = re.sub(r"font: ([0-9.]+)px[^;\"]*", r"font: \1px system-ui, sans-serif", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Sized by the page: the view box keeps the proportions.
    return re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r' height="[^"]*pt"', "", text, count=1), count=1)


def _smooth(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    window = min(SMOOTHING, max(1, len(values) // 8))
    padded = np.pad(np.asarray(values, dtype=float), (window // 2, window - 1 - window // 2), mode="edge")
    return np.convolve(padded, np.ones(window) / window, "valid")


def accuracies(evidence: Evidence) -> str | None:
    """Accuracy of every model with its interval, and a line where plain LoRA is."""
    if evidence.evaluation is None:
        return None
    found = {name: m.aqi_accuracy for name, m in evidence.evaluation.metrics.items() if m.aqi_accuracy}
    if not found:
        return None
    with _axes(0.7 + 0.28 * len(found)) as (figure, axes):
        for place, (name, share) in enumerate(found.items()):
            spread = [[share.estimate - share.low], [share.high - share.estimate]]
            axes.errorbar([share.estimate], [place], xerr=spread, fmt="o", markersize=5, color=colour(name))
        if "baseline" in found:
            axes.axvline(found["baseline"].estimate, color=colour("baseline"), linewidth=0.8, linestyle=(0, (3, 3)))
        axes.set_yticks(range(len(found)), list(found))
        axes.set(xlim=(0, 100), xlabel="AQI questions answered rightly, %, with 95% intervals")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        return svg(figure, "accuracy")


def loss_curves(evidence: Evidence) -> str | None:
    """Loss of every step, faint, with its running mean."""
    if not evidence.records:
        return None
    with _axes() as (figure, axes):
        for arm in evidence.records:
            values = losses(evidence, arm)
            steps = np.arange(1, len(values) + 1)
            axes.plot(steps, values, color=colour(arm), linewidth=0.6, alpha=0.3)
            axes.plot(steps, _smooth(values), color=colour(arm), linestyle=ARM_STYLES.get(arm, "-"), label=arm)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)")
        axes.legend(ncols=2)
        return svg(figure, "loss")


def loss_differences(evidence: Evidence) -> str | None:
    """Paired difference of each arm's loss to the baseline's, with the noise floor that reruns set."""
    others = [arm for arm in evidence.records if arm != "baseline"]
    if "baseline" not in evidence.records or not others:
        return None
    reference = losses(evidence, "baseline")
    with _axes() as (figure, axes):
        floor = 0.0
        for arm in others:
            gap = np.array([a - b for a, b in zip(losses(evidence, arm), reference, strict=False)])
            if arm == "rerun":
                floor = MARGIN * rms(gap)
            style = ARM_STYLES.get(arm, "-")
            axes.plot(np.arange(1, len(gap) + 1), gap, color=colour(arm), linestyle=style, linewidth=1, label=arm)
        if floor:
            axes.axhspan(-floor, floor, color=FAINT, alpha=0.5, linewidth=0, label="noise floor")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="optimizer step", ylabel="loss minus the baseline's")
        axes.legend(ncols=2)
        return svg(figure, "difference")


def aqi_by_category(evidence: Evidence) -> str | None:
    """Accuracy per true category and model, with its interval."""
    if evidence.evaluation is None:
        return None
    rows = evidence.evaluation.table("category")
    groups = [g for g in CATEGORIES if any(r["group"] == g for r in rows)]
    groups += sorted({r["group"] for r in rows} - set(groups))
    models = list(evidence.evaluation.models)
    if not groups:
        return None
    with _axes(0.9 + 0.62 * len(groups)) as (figure, axes):
        for place, model in enumerate(models):
            offset = (place - (len(models) - 1) / 2) * 0.7 / max(4, len(models))
            own = {r["group"]: r for r in rows if r["label"] == model}
            shown = [(i, own[g]) for i, g in enumerate(groups) if g in own]
            x = [r["accuracy"] for _, r in shown]
            spread = [[r["accuracy"] - r["low"] for _, r in shown], [r["high"] - r["accuracy"] for _, r in shown]]
            y = [i + offset for i, _ in shown]
            axes.errorbar(x, y, xerr=spread, fmt="o", markersize=4, linewidth=1, color=colour(model), label=model)
        counts = {g: max(r["n"] for r in rows if r["group"] == g) for g in groups}
        axes.set_yticks(range(len(groups)), [f"{_wrapped(g)}\n(n = {counts[g]})" for g in groups])
        axes.set(xlim=(-2, 102), xlabel="items with the right category (%)")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper center", ncols=len(models))
        return svg(figure, "category")


CATEGORIES = (
    "Good",
    "Moderate",
    "Unhealthy for Sensitive Groups",
    "Unhealthy",
    "Very Unhealthy",
    "Hazardous",
)


def _wrapped(text: str) -> str:
    return text.replace(" for ", "\nfor ").replace("Sensitive Groups", "sens. groups")


def fisher_spectra(evidence: Evidence) -> str | None:
    """Largest eigenvalues of both factors over training, averaged over layers, for arms that recorded them."""
    histories = {
        arm: spectra
        for arm, record in evidence.records.items()
        if (spectra := (record.run.get("grit_report") or {}).get("spectra"))
    }
    if not histories:
        return None
    arm = "pure" if "pure" in histories else next(iter(histories))
    history = histories[arm]
    steps = [row["step"] for row in history]
    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 2.9), layout="constrained", sharex=True)
        for axes, side, name in zip(panels, ("a", "g"), ("S_a (activations)", "S_g (gradients)"), strict=True):
            depth = max((len(row[f"top_{side}"]) for row in history), default=0)
            for rank in range(depth):
                values = [row[f"top_{side}"][rank] if rank < len(row[f"top_{side}"]) else np.nan for row in history]
                positive = [value if value > 0 else np.nan for value in values]
                fade = 1 - 0.75 * rank / max(depth - 1, 1)
                axes.plot(steps, positive, color=colour(arm), alpha=fade, marker="." if len(steps) < 12 else None)
            axes.set(title=name, xlabel="optimizer step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if any(value > 0 for row in history for value in row[f"top_{side}"]):
                axes.set_yscale("log")
                axes.yaxis.set_minor_formatter("")
        panels[0].set_ylabel(f"eigenvalues, mean over layers ({arm})")
        text = svg(figure, "spectra")
        plt.close(figure)
        return text


LINK_COLOURS = {
    "used": "other",
    "arrived": "base",
    "read": "rerun",
    "turned": "hybrid",
    "delivered": "hybrid_late",
    "consumed": "rerun",
    "moved": "baseline",
    "kept": "base",
}


def provenance(evidence: Evidence) -> str | None:
    """Per arm, tensors by steps, coloured by the first link of the chain of custody that broke."""
    from grit_impl.ledger.chain import LINKS
    from grit_impl.ledger.chain.table import custody
    from grit_impl.ledger.findings import facts

    pictures = {arm: custody(facts(record)) for arm, record in evidence.records.items() if record.ledger.is_file()}
    pictures = {arm: picture for arm, picture in pictures.items() if len(picture)}
    if not pictures:
        return None
    broken: set[str] = set()
    with plt.rc_context(_STYLE):
        size = (WIDTH, 0.9 + 0.55 * len(pictures))
        figure, panels = plt.subplots(len(pictures), 1, figsize=size, layout="constrained", sharex=True, squeeze=False)
        for axes, (arm, picture) in zip(panels[:, 0], pictures.items(), strict=True):
            for top, height, spans in picture:
                for first, steps, state in spans:
                    style = FAINT if state == "unmodified" else colour("pure")
                    if state in LINKS:
                        broken.add(state)
                        style = colour(LINK_COLOURS[state])
                    # With edges: where rows are narrower than a pixel, smoothing would let stripes of the page through.
                    axes.broken_barh([(first - 0.5, steps)], (top, height), linewidth=0.6, color=style)
            axes.set(ylim=(sum(height for _, height, _ in picture), 0), yticks=())
            axes.set_ylabel(arm, rotation=0, ha="right", va="center", labelpad=14)
            axes.grid(visible=False)
        panels[-1, 0].set_xlabel("optimizer step")
        panels[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
        handles = [Rectangle((0, 0), 1, 1, color=colour("pure")), Rectangle((0, 0), 1, 1, color=FAINT)]
        handles += [Rectangle((0, 0), 1, 1, color=colour(LINK_COLOURS[link])) for link in sorted(broken)]
        labels = ["every link held", "not modified", *(f"broke: {link}" for link in sorted(broken))]
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
        text = svg(figure, "provenance")
        plt.close(figure)
        return text


def confusion(counts: Mapping[str, Mapping[str, int]]) -> str:
    """The fault zoo's confusion matrix: rows are what was planted, columns what the verdict named."""
    names = sorted({*counts, *(given for row in counts.values() for given in row)})
    planted = sorted(counts)
    with _axes(1.6 + 0.2 * len(planted)) as (figure, axes):
        for y, expected in enumerate(planted):
            total = sum(counts[expected].values())
            for given, n in counts[expected].items():
                x = names.index(given)
                right = given == expected
                shade = colour("pure" if right else "hybrid_late")
                alpha = 0.25 + 0.6 * n / total
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, linewidth=0, color=shade, alpha=alpha))
                axes.text(x, y, str(n), ha="center", va="center", fontsize=7)
        axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(planted) - 0.5, -0.5), xlabel="verdict", ylabel="planted")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(planted)), planted, fontsize=7)
        axes.grid(visible=False)
        return svg(figure, "confusion")


def growth(figure: cost.Figure, name: str) -> dict[str, str]:
    """A growth on logarithmic axes: every round, and the power that was fitted, through the middle of the medians."""
    points = figure.growth
    assert points is not None
    sizes, medians = np.array(points.sizes), np.median(points.values, axis=1)
    middle, power = np.log(medians).mean() - figure.measured.median * np.log(sizes).mean(), figure.measured.median
    fitted = np.exp(middle) * sizes**power
    with _axes(2.6) as (drawing, axes):
        for size, values in zip(points.sizes, points.values, strict=True):
            axes.plot([size] * len(values), values, ".", color=colour("pure"), alpha=0.45, markersize=6)
        axes.plot(sizes, fitted, color=colour("pure"), label=f"exponent {power:.2f}")
        axes.set(xscale="log", yscale="log", xlabel=points.what, ylabel=points.measure)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        low, high = min(map(min, points.values)), max(map(max, points.values))
        # At least a factor of four, so that what is flat looks flat.
        room = max(1.15, 2 / math.sqrt(high / low))
        axes.set_ylim(low / room, high * room)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(EngFormatter(points.unit))
        axes.minorticks_off()
        axes.legend()
        text = svg(drawing, name)
    judged = "told, not judged" if figure.target is None else f"at most {figure.target:g}: {figure.verdict}"
    title = f"{points.measure[0].upper()}{points.measure[1:]}, by {points.what}"
    return {"svg": text, "title": title, "caption": f"Exponent {figure.measured}, {judged}."}


def figures(evidence: Evidence) -> list[dict[str, str]]:
    """All figures that the evidence has data for, each with a title and a caption."""
    drawn: list[tuple[Callable[[Evidence], str | None], str, str]] = [
        (
            loss_curves,
            "Loss",
            "Every step (faint) and its running mean. Curves of the same batches look alike whatever happened to the "
            "gradients: shape is no evidence.",
        ),
        (
            loss_differences,
            "Paired difference of the loss",
            "Each arm minus the baseline at the same step, so that the batch cancels. Arms that lie on zero trained "
            "exactly like the baseline.",
        ),
        (
            provenance,
            "Provenance of the gradients",
            "Each LoRA tensor (a row) in each step: whether a modified gradient went all the way to the weights, and "
            "if not, which link of the chain broke first. The first steps are no fault: while B is zero no gradient "
            "arrives at A, and a warm-up that begins at learning rate zero moves nothing.",
        ),
        (
            aqi_by_category,
            "AQI accuracy by category",
            "Share of items with the right category, with Wilson 95% intervals.",
        ),
        (
            fisher_spectra,
            "Fisher spectra",
            "Largest eigenvalues of the two rank-space factors at each inversion. A flat bundle means a preconditioner "
            "close to a multiple of the identity, which AdamW divides out.",
        ),
    ]
    found = []
    for draw, title, caption in drawn:
        drawing = draw(evidence)
        if drawing is not None:
            found.append({"svg": drawing, "title": title, "caption": caption})
    return found


def legend(models: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Model names with their CSS colours."""
    return [(name, _VARIABLES[colour(name)]) for name in models]
