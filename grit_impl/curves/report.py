"""A comparison for people: terminal, HTML fragment, SVG plots."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grit_impl.curves.compare import correlation_of
from grit_impl.curves.numbers import show, span
from grit_impl.curves.result import QUESTIONS, CurveComparison
from grit_impl.files import FIXTURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

NULLS = FIXTURES / "curves_calibration.json"
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
"""Okabe and Ito's palette: told apart by colour-blind readers."""
GOOD, BAD = ("yes", "same"), ("no", "different")


def null_lines() -> list[str]:
    """What correlations of known pairs look like (recorded distributions); empty where the fixture is not at hand."""
    try:
        nulls = json.loads(NULLS.read_text())["correlation nulls (minimum, median, maximum)"]
        return [
            f"{relation}: {show(median, '.2f')} ({show(low, '.2f')} to {show(high, '.2f')})"
            for relation, (low, median, high) in ((name, row["cleaned"]) for name, row in nulls.items())
        ]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return []


def number_rows(result: CurveComparison) -> list[tuple[str, str]]:
    """The few numbers worth a line each: (label, value)."""
    rows: list[tuple[str, str]] = []
    for key, d in result.numbers.get("difference", {}).items():
        first, last = d["window"]
        ratio, floor = d["ratio"], result.numbers["floor"][key]
        name = key.split()[0].replace("grad_norm", "log gradient norm")
        size = f"RMS difference {show(d['rms'])} = {show(ratio['estimate'])} x floor {show(floor['rms'], '.2g')}"
        if not floor["measured"]:
            size += " (assumed)"
        rows.append((f"{name}, steps {first}-{last}", f"{size}; {d['verdict']}"))
    early = result.numbers.get("difference", {}).get("loss early")
    if early:
        growth = early["growth"]
        rows.append(("floor", result.numbers["floor"]["loss early"]["source"]))
        onset = f", leaves the noise band at step {early['onset']}" if early["onset"] is not None else ""
        rows.append(("last over first quarter", f"{show(growth['estimate'])}: {early['shape']}{onset}"))
    found = result.numbers.get("correlation")
    if found:
        worth = f"worth {show(found['effective_n'], '.0f')} independent values; not evidence"
        rows.append(("raw correlation", f"{show(found['raw'], '.4f')} ({worth})"))
        rows.append(
            (
                "largest |r| at lag",
                f"{found['peak_lag']}; 97.5% of shifted pairs stay below {show(found['shift_null'], '.2f')}",
            )
        )
        rows.append(
            (
                "extrema at the same step",
                f"{show(found['extrema_together'], '.0%')} (by chance {show(found['extrema_by_chance'], '.0%')})",
            )
        )
    for metric, row in result.numbers.get("metrics", {}).items():
        gap, better = row["difference"], row["probability_of_improvement"]
        rows.append(
            (
                f"{metric}, {result.b} - {result.a}",
                f"{show(gap.estimate, '+.4g')} {span(gap.low, gap.high, '+.4g')}, Holm p {show(row['p_holm'])}; IQM "
                f"{show(row['iqm'][result.a], '.4g')} and {show(row['iqm'][result.b], '.4g')}; P({result.b} lower) "
                f"{show(better.estimate, '.2f')} {span(better.low, better.high, '.2f')}; detectable "
                f"{show(row['minimum_detectable_effect'], '.2g')}",
            )
        )
    return rows


def to_terminal(result: CurveComparison, console: Console) -> None:
    """Print the four answers, the numbers behind them and the notes."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{result.b} against {result.a}"), title_justify="left", expand=False)
    for column in ("", "answer", "why"):
        table.add_column(column, overflow="fold")
    for question, title in QUESTIONS.items():
        verdict = result.verdicts[question]
        style = (
            "green" if verdict in GOOD else "yellow" if verdict in BAD else "dim" if verdict == "not exercised" else ""
        )
        shown = f"[{style}]{escape(verdict)}[/]" if style else escape(verdict)
        table.add_row(title, shown, escape(result.reasons[question] or "the question before was answered no"))
    console.print(table)
    rows = number_rows(result)
    if rows:
        numbers = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        numbers.add_column(style="dim")
        numbers.add_column(overflow="fold")
        for label, value in rows:
            numbers.add_row(escape(label), escape(value))
        console.print(numbers)
    for note in result.notes:
        console.print(f"* {note}", markup=False, highlight=False)
    nulls = null_lines() if "correlation" in result.numbers else []
    if nulls:
        console.print("* Cleaned r at lag 0 of pairs whose relation is known: " + "; ".join(nulls) + ".", markup=False)


def to_html(result: CurveComparison, *, plots: bool = True) -> str:
    """The same as an HTML fragment with inline SVG; no script, no outside resource."""
    e = html.escape
    parts = [f'<section class="comparison"><h3>{e(result.b)} against {e(result.a)}</h3><table>']
    for question, title in QUESTIONS.items():
        cells = (title, result.verdicts[question], result.reasons[question])
        parts.append("<tr><th>{}</th><td><b>{}</b></td><td>{}</td></tr>".format(*map(e, cells)))
    parts.append("</table>")
    if plots:
        parts += [f"<figure>{svg}</figure>" for svg in plot_svgs(result).values()]
    rows = number_rows(result)
    if rows:
        body = "".join(f"<tr><th>{e(label)}</th><td>{e(value)}</td></tr>" for label, value in rows)
        parts.append(f"<table>{body}</table>")
    notes = result.notes + (null_lines() if "correlation" in result.numbers else [])
    parts.append("<ul>" + "".join(f"<li>{e(note)}</li>" for note in notes) + "</ul></section>")
    return "\n".join(parts)


def page(results: Sequence[CurveComparison]) -> str:
    """A self-contained HTML page."""
    style = (
        "body{font:15px/1.45 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;margin:1rem 0}th,td{border:1px solid #ccc;padding:.3rem .6rem;text-align:left;"
        "vertical-align:top}figure{margin:1rem 0}svg{max-width:100%;height:auto}"
        "@media(max-width:40rem){table,tbody,tr,th,td{display:block}tr{margin-bottom:.6rem;border:1px solid #ccc}"
        "th,td{border:0;padding:.1rem .6rem;overflow-wrap:anywhere}}"
    )
    body = "\n".join(to_html(result) for result in results)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>grit compare</title>'
        f"<style>{style}</style></head><body><h1>Training runs compared</h1>\n{body}\n</body></html>\n"
    )


# -- plots


def plot_svgs(result: CurveComparison) -> dict[str, str]:
    """SVG documents (without XML header) by name: "curves", "difference", "correlation"; only those with data."""
    return {name: _svg(result, [name]) for name in _available(result)}


def figure_svg(result: CurveComparison) -> str:
    """All plots of a comparison in one SVG file."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + _svg(result, _available(result))


def _available(result: CurveComparison) -> list[str]:
    if result.curves["a"].shape != result.curves["b"].shape:
        return []
    return ["curves", "difference"] + (["correlation"] if correlation_of(result) else [])


def _svg(result: CurveComparison, names: Sequence[str]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    draw = {"curves": _draw_curves, "difference": _draw_difference, "correlation": _draw_correlation}
    # Clip paths get their ids from the salt: inline SVGs of one page must not share them.
    salt = f"{result.a}|{result.b}|{'+'.join(names)}"
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 9.0}):
        figure = Figure(figsize=(7.5, 2.6 * max(len(names), 1)), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, name in zip(figure.subplots(max(len(names), 1), squeeze=False)[:, 0], names, strict=False):
            draw[name](result, axes)
            axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _draw_curves(result: CurveComparison, axes: Axes) -> None:
    data: dict[str, Any] = result.curves
    for name, key, colour in ((result.a, "a", BLUE), (result.b, "b", ORANGE)):
        runs = data.get(f"{key}_runs")
        if runs is not None:
            axes.fill_between(data["steps"], runs.min(axis=0), runs.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        axes.plot(data["steps"], data[key], color=colour, linewidth=1.2, label=name)
    if data.get("reruns"):
        spread = np.stack([data["a"], *data["reruns"]])
        axes.fill_between(
            data["steps"], spread.min(axis=0), spread.max(axis=0), color=GREY, alpha=0.5, linewidth=0, label="reruns"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.legend(frameon=False)


def _draw_difference(result: CurveComparison, axes: Axes) -> None:
    data = result.curves
    difference = data["b"] - data["a"]
    if "band" in data:
        axes.axhspan(-data["band"], data["band"], color=GREY, alpha=0.35, linewidth=0, label="3 x noise floor")
    if "a_runs" in data:
        rows = data["b_runs"] - data["a_runs"]
        axes.fill_between(data["steps"], rows.min(axis=0), rows.max(axis=0), color=ORANGE, alpha=0.2, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.plot(data["steps"], difference, color=ORANGE, linewidth=1.0, label=f"{result.b} - {result.a}")
    axes.set_xlabel("step")
    axes.set_ylabel("difference of the loss")
    axes.legend(frameon=False)


def _draw_correlation(result: CurveComparison, axes: Axes) -> None:
    found = correlation_of(result)
    if found is None:
        return
    axes.axhspan(-found.band, found.band, color=GREY, alpha=0.35, linewidth=0, label="independent series, 95%")
    axes.vlines(found.lags, 0, found.values, color=BLUE, linewidth=2)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_ylim(-1.05, 1.05)
    axes.set_xlabel(f"lag in steps (positive: {result.b} follows {result.a})")
    axes.set_ylabel("correlation, cleaned")
    axes.legend(frameon=False)
