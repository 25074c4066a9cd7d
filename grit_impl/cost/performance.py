"""`performance.json`: what `make bench` measured, for the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grit_impl.cost.bench import Figure, Growth, Spread
from grit_impl.errors import GRITError
from grit_impl.record import write_atomic

FILE = "performance.json"
SCHEMA = 1


@dataclass(frozen=True)
class Performance:
    """One session of benchmarks.

    Attributes:
        measured: When, in ISO 8601.
        machine: Processor, cores, threads.
        versions: Of Python and of what can change a figure.
        commit: The source's; None outside a repository.
        figures: In the order in which they were measured.
    """

    measured: str
    machine: str
    versions: Mapping[str, str]
    commit: str | None
    figures: Sequence[Figure]


def write_performance(folder: Path, performance: Performance) -> Path:
    """Write the file into `folder`, replacing an earlier session's.

    Raises:
        GRITError: it cannot be written; the old one stays.
    """
    figures = [
        {
            "name": each.name,
            **asdict(each.measured),
            "target": each.target,
            "verdict": each.verdict,
            "growth": None if each.growth is None else asdict(each.growth),
        }
        for each in performance.figures
    ]
    content = {"schema": SCHEMA, **vars(performance), "figures": figures}
    return write_atomic(folder / FILE, json.dumps(content, indent=1) + "\n")


def read_performance(folder: Path) -> Performance | None:
    """What lies in `folder`; None where nothing does.

    Raises:
        GRITError: the file is damaged, or a later version's.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] > SCHEMA:
            raise GRITError(f"{FILE} has schema {content['schema']}; this version reads up to {SCHEMA}: upgrade")
        figures = [_figure(row) for row in content["figures"]]
        commit = content["commit"]
        return Performance(
            str(content["measured"]),
            str(content["machine"]),
            dict(content["versions"]),
            commit and str(commit),
            figures,
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise GRITError(f"{FILE} cannot be read ({reason}): run make bench again, or remove it") from error


def _figure(row: dict[str, Any]) -> Figure:
    """A line of the table; its verdict follows from the numbers."""
    target = None if row["target"] is None else _finite(row["target"])
    spread = Spread(_finite(row["median"]), _finite(row["low"]), _finite(row["high"]), int(row["n"]))
    return Figure(str(row["name"]), spread, target, None if row["growth"] is None else _growth(row["growth"]))


def _growth(row: dict[str, Any]) -> Growth:
    """Points that can be drawn on logarithmic axes."""
    sizes = tuple(map(_positive, row["sizes"]))
    values = tuple(tuple(map(_positive, each)) for each in row["values"])
    if len(sizes) < 2 or len(values) != len(sizes) or not values[0] or len({len(each) for each in values}) > 1:
        raise ValueError(f"growth with {row['what']}: its values do not fit its sizes")
    return Growth(str(row["what"]), str(row["measure"]), str(row["unit"]), sizes, values)


def _finite(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return value


def _positive(value: Any) -> float:
    if _finite(value) <= 0:
        raise ValueError(f"{value!r} is not positive")
    return float(value)
