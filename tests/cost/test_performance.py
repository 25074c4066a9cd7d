"""What `make bench` measured, from the benchmarks to the report's section on cost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from grit_impl.cost.bench import exponent
from grit_impl.cost.performance import FILE, Performance, read_performance, write_performance
from grit_impl.errors import GRITError
from grit_impl.verify.claims import Evidence
from grit_impl.verify.report import write_report
from grit_impl.verify.store.database import Session

ROOT = Path(__file__).parents[2]
SESSION = Session(
    "2026-01-01T00:00:00+00:00",
    "2026-01-01T00:10:00+00:00",
    None,
    {"base_model": "tiny", "seed": 1, "steps": 2},
    {},
)


def page(folder: Path) -> str:
    """The report of a session that judged nothing."""
    write_report(folder, SESSION, [], Evidence())
    return (folder / "index.html").read_text()


def cost(folder: Path) -> str:
    """Its section "What it costs"."""
    return page(folder).split('id="cost">What it costs')[1].split("</section>")[0]


def test_what_is_written_is_read(performance: Performance, tmp_path: Path) -> None:
    """Oracle: the same values, and plain JSON with the verdict beside them for other programs."""
    write_performance(tmp_path, performance)
    assert read_performance(tmp_path) == performance
    rows = json.loads((tmp_path / FILE).read_text())["figures"]
    assert [row["verdict"] for row in rows] == ["met", "MISSED", "met", "met"]
    assert rows[3]["growth"]["values"] == [[28840.0]] * 4
    # Equal values have the exponent 0 exactly: a target of 0 must not be missed by a rounding error.
    assert (rows[3]["median"], rows[3]["low"]) == (0.0, 0.0)


def test_the_report_shows_targets_and_growth(performance: Performance, tmp_path: Path) -> None:
    """Oracle: each figure in a row with its target and verdict, escaped; a plot with its exponent per growth."""
    write_performance(tmp_path, performance)
    section = cost(tmp_path)
    rows = re.findall(r"<tr><th scope.*?</tr>", section, re.DOTALL)
    cells = [re.sub(r"(\s|&nbsp;)+", " ", re.sub(r"<[^>]*>", " ", row)).strip() for row in rows]
    assert cells == [
        "step, GRIT over LoRA 1.050 [1.050, 1.050] met at most 1.1 6",
        "step, r=64 &lt;b&gt; 1.234 [1.234, 1.234] missed at most 1.1 6",
        "seconds by rank 1.500 [1.500, 1.500] met at most 3 3",
        "bytes 0.000 [0.000, 0.000] met at most 0 1",
    ]
    assert "A processor, 2 cores; python 3.11.7, torch 2.13.0; commit abc123, 2026-01-02 03:04:05 UTC." in section
    assert section.count("<svg") == 2
    assert "What GRIT adds, by rank" in section
    assert ">exponent 1.50</text>" in section
    assert "Exponent 1.500 [1.500, 1.500], at most 3: met." in section
    assert "Exponent 0.000 [0.000, 0.000], at most 0: met." in section


def test_the_fitted_line_runs_through_the_points(performance: Performance, tmp_path: Path) -> None:
    """Oracle: of an exact power, the medians lie on the line, and in logarithms all steps are equal."""
    write_performance(tmp_path, performance)
    drawn = re.findall(r"<svg.*?</svg>", cost(tmp_path), re.DOTALL)
    for text, rounds in zip(drawn, (3, 1), strict=True):
        line = re.findall(r'<path d="M ([\d. \nL-]+?)" clip-path[^>]*stroke: var\(--arm-pure\)', text)
        (fitted,) = ([[float(x) for x in point.split()] for point in each.split("L")] for each in line)
        dots = [
            (float(x), float(y))
            for x, y in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: var\(--arm', text)
        ]
        assert len(dots) == 4 * rounds
        # Drifts are 1, 1.3 and 0.8: the first is the median.
        for (x, y), dot in zip(fitted, dots[::rounds], strict=True):
            assert (x, y) == pytest.approx(dot, abs=0.01)
        gaps = [b[0] - a[0] for a, b in pairwise(fitted)]
        assert gaps == pytest.approx([gaps[0]] * 3, abs=0.01)


def test_no_benchmarks_no_section(tmp_path: Path) -> None:
    """Oracle: a report as before."""
    assert read_performance(tmp_path) is None
    assert "What it costs" not in page(tmp_path)


DAMAGES = {
    "cut off": (lambda text: text[:400], "Unterminated|Expecting"),
    "empty": (lambda text: "", "Expecting value"),
    "not an object": (lambda text: "[1]", "indices"),
    "another program's": (lambda text: '{"schema": 1}', "no 'figures'"),
    "not a number": (lambda text: text.replace("1.234", "NaN"), "nan is not a finite number"),
    "a size of zero": (lambda text: text.replace("     64", "     0"), "0 is not positive"),
    "a size too few": (lambda text: re.sub(r",\s+64\s", "", text), "do not fit its sizes"),
    "not text": (lambda text: "\udcff", "utf-8"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_line(damage: str, performance: Performance, tmp_path: Path) -> None:
    """Oracle: the page is there and says what is wrong and what to do, and draws nothing."""
    path = write_performance(tmp_path, performance)
    change, reason = DAMAGES[damage]
    path.write_bytes(change(path.read_text()).encode(errors="surrogateescape"))
    section = cost(tmp_path)
    (said,) = re.findall(r"<p>(.*?)</p>", section)
    assert re.search(
        rf"performance\.json cannot be read \(.*({reason}).*\): run make bench again", said.replace("&#39;", "'")
    )
    assert "<table" not in section
    assert "<svg" not in section


def test_a_later_version_is_named(performance: Performance, tmp_path: Path) -> None:
    """Oracle: a file of the future is no damage."""
    path = write_performance(tmp_path, performance)
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(GRITError, match="schema 2; this version reads up to 1: upgrade"):
        read_performance(tmp_path)


@pytest.mark.slow
def test_benchmarks_leave_their_figures(tmp_path: Path) -> None:
    """Oracle: the quickest of the benchmarks, run as make bench runs it; it may miss its target here."""
    command = [sys.executable, "-m", "pytest", "suites/benchmarks", "-q", "-k", "growth and layers"]
    options = ["--reports-dir", str(tmp_path), "-p", "no:cacheprovider"]
    # pytest-benchmark measures nothing in what it takes for a worker of xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    ended = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode in (0, 1), ended.stdout[-2000:]
    found = read_performance(tmp_path)
    assert found is not None, ended.stdout[-2000:]
    (figure,) = found.figures
    assert figure.growth is not None
    assert figure.growth.sizes == (28, 56, 112, 224)
    assert {len(each) for each in figure.growth.values} == {9}
    assert figure.measured == exponent(figure.growth.sizes, figure.growth.values)
    assert "What GRIT adds, by layers" in page(tmp_path)
