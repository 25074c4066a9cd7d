"""The report: self-contained and complete."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from grit_impl.errors import GRITError
from grit_impl.verify.claims import Claim, Evidence, Judgement, Metric
from grit_impl.verify.options import MODELS
from grit_impl.verify.report import write_report
from grit_impl.verify.report.answer import arms, models, sentence, stored_answers
from grit_impl.verify.report.content import DASH, cell, headline, metrics_table
from grit_impl.verify.store.database import JudgedClaim, Session

PLAN_ROWS = [
    "Training time (s)",
    "Peak memory (GiB)",
    "Final loss",
    "Fisher inversions",
    "Preconditioning coverage (%)",
    "Loss-curve divergence (RMS)",
    "AQI accuracy (%)",
    "delta_AQI (points)",
    "Speed (tokens/s)",
    "delta_speed (%)",
]


class Page(HTMLParser):
    """What a page consists of."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [values["id"]] if values.get("id") else []
        self.references += [values[name] for name in ("src", "href", "xlink:href", "action") if values.get(name)]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data):
        self.text += data


def test_page_is_self_contained_and_well_formed(written):
    """Oracle: tags close, ids are unique, and everything that is referred to lies in the page."""
    folder, _ = written
    text = (folder / "index.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    inside = {f"#{name}" for name in page.ids}
    assert [r for r in page.references if r not in inside and not r.startswith("data:")] == []
    assert re.findall(r"url\((?!#)", text) == []
    assert not re.search(r"<script[^>]* src=|fetch\(|XMLHttpRequest|import\(", text)
    assert "@import" not in text
    assert text.count("<script") == 2, "the page's own, and the answers"
    assert not re.search(r"var\(--(?!ink|grid|arm-|page|card|soft|line|good|bad|open)", text)
    assert not re.search(r"#0[123]0[123]0[1-8]\b", text)  # stand-in colours


def test_page_says_everything(written):
    """Oracle: every claim with its verdict and finding, the plan's rows, the figures, the changes."""
    folder, judged = written
    text = Page((folder / "index.html").read_text()).text
    for each in judged:
        assert each.claim.statement in text
        assert each.judgement.summary in text
        assert each.claim.rationale in text
    for row in PLAN_ROWS:
        assert row in text
    for figure in (
        "Loss",
        "Paired difference",
        "Provenance",
        "AQI accuracy by category",
        "Fisher spectra",
        "Fault zoo",
    ):
        assert figure in text
    assert "17 of 18 runs with a fault were named" in text
    assert "Against baseline (session 1)" in text
    assert "4.50 points [0.90, 8.10] (n = 200)" in text
    ids = Page((folder / "index.html").read_text()).ids
    order = ["answer", "claims", "models", "groups", "figures", "answers", "cost", "runs"]
    assert [name for name in ids if name in order] == order


def test_numbers_of_the_table(written):
    """Oracle: the hand-written evidence: 25% and 61% right, 4 inversions, coverage 97.5%, an hour's memory of 1 GiB."""
    folder, _ = written
    lines = {
        line.split("|")[1].strip(): line
        for line in (folder / "grit_evaluation.md").read_text().splitlines()
        if line.startswith("| ")
    }
    assert lines["AQI exact index (%)"].split("|")[2].startswith(" 25.0")
    assert lines["Unparsable answers"].split("|")[2:7] == [" 0 "] * 5
    assert "AQI accuracy is the right category." in (folder / "grit_evaluation.md").read_text()
    page = (folder / "index.html").read_text()
    assert "By pollutant" in page
    assert re.search(r"Hazardous</th>.*?n = 50", page, re.DOTALL), "200 items in four categories"
    assert [c.split("<")[0].strip() for c in lines["AQI accuracy (%)"].split("|")[2:7]] == [
        "25.0",
        "60.0",
        "62.0",
        "61.0",
        "64.0",
    ]
    assert [c.split("<")[0].strip() for c in lines["delta_AQI (points)"].split("|")[2:7]] == [
        DASH,
        "+35.0",
        "+37.0",
        "+36.0",
        "+39.0",
    ]
    assert [c.strip() for c in lines["Fisher inversions"].split("|")[2:7]] == [DASH, DASH, "4", "4", "4"]
    assert [c.strip() for c in lines["Preconditioning coverage (%)"].split("|")[2:7]] == [
        DASH,
        DASH,
        "97.5",
        "97.5",
        "97.5",
    ]
    assert [c.strip() for c in lines["Peak memory (GiB)"].split("|")[2:7]] == [DASH, "1.00", "1.00", "1.00", "1.00"]


def test_the_median_of_an_even_number_of_steps(make_evidence):
    """Oracle: half-way between the two in the middle, by hand: 1, 2, 4 and 9 s."""
    evidence = make_evidence()
    record = evidence.records["pure"]
    rows = [{**step, "seconds": seconds} for step, seconds in zip(record.steps, (9.0, 1.0, 4.0, 2.0), strict=False)]
    (record.path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = dict(metrics_table(evidence)[1])
    assert table["Time per step, median (s)"][MODELS.index("pure")].value == "3.000"


def test_markdown_tables_are_tables(written):
    """Oracle: every row of a table has as many columns as its head, whatever stands in a summary."""
    folder, judged = written
    nasty = JudgedClaim(judged[0].claim, Judgement("refuted", "a | b\nc <script>alert(1)</script>"))
    session = Session(
        "2026-01-01T00:00:00+00:00",
        "2026-01-01T00:10:00+00:00",
        None,
        {"base_model": "tiny", "seed": 1, "steps": 2},
        {},
    )
    write_report(folder, session, [nasty], Evidence())
    rows = [line for line in (folder / "grit_evaluation.md").read_text().splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}
    assert "<script>alert" not in (folder / "index.html").read_text()


def test_report_without_evidence(tmp_path):
    """Oracle: a claim judged by another project: no runs, no evaluation, a page nevertheless."""
    claim = Claim("own.it", "It holds.", ("verdict:trainer",), "Because.", lambda _: Judgement("supported", ""))
    session = Session(
        "2026-01-01T00:00:00+00:00",
        "2026-01-01T00:10:00+00:00",
        None,
        {"base_model": "tiny", "seed": 1, "steps": 2},
        {},
    )
    write_report(tmp_path, session, [JudgedClaim(claim, Judgement("supported", "yes"))], Evidence())
    text = Page((tmp_path / "index.html").read_text()).text
    assert "It holds." in text
    assert "Models" not in text


def test_failed_write_keeps_the_old_page(written, monkeypatch):
    """Oracle: the old bytes, when the disk is full."""
    folder, judged = written
    before = (folder / "index.html").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    session = Session(
        "2026-01-01T00:00:00+00:00",
        "2026-01-01T00:10:00+00:00",
        None,
        {"base_model": "tiny", "seed": 1, "steps": 2},
        {},
    )
    with pytest.raises(GRITError, match="No space left on device"):
        write_report(folder, session, judged, Evidence())
    assert (folder / "index.html").read_bytes() == before
    left = {"index.html", "grit_evaluation.md", "fault_matrix.json", "performance.json", "runs"}
    assert {path.name for path in folder.iterdir()} == left


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["supported", "supported"], "All 2 gating claims supported"),
        (["supported", "refuted"], "1 of 2 gating claims refuted: own.1"),
        (["supported", "inconclusive"], "No gating claim refuted; 1 of 2 undecided"),
        ([], "No gating claim was judged"),
    ],
)
def test_headline(verdicts, expected):
    """Oracle: by hand; an open claim must not read as a pass."""
    judged = [
        JudgedClaim(Claim(f"own.{i}", "S.", ("record:x",), "R.", lambda e: e), Judgement(verdict, "s"))
        for i, verdict in enumerate(verdicts)
    ]
    assert headline(judged) == expected


def test_rounded_zero_has_no_sign(make_evidence):
    """Oracle: -0.03% is shown as 0.0."""
    assert cell(Metric("delta_speed", -0.03, -0.04, 0.06), sign=True).value == "0.0"
    assert cell(Metric("delta_speed", -0.03, -0.04, 0.06), sign=True).interval == "[0.0, +0.1]"


@pytest.mark.parametrize(
    ("right", "effective", "expected"),
    [
        (0.70, True, "The K-FAC rule mattered and helped."),
        (0.61, True, "The K-FAC rule mattered; whether it helped is open."),
        (0.50, True, "The K-FAC rule mattered, but did not help."),
        (0.50, False, "The K-FAC rule did not matter and did not help."),
        (0.70, False, "The K-FAC rule did not matter, but helped."),
        (0.61, None, "The K-FAC rule may have mattered; whether it helped is open."),
    ],
)
def test_first_sentence(make_evidence, claims, right, effective, expected):
    """Oracle: by hand; 60% of LoRA's answers are right, and an interval decides."""
    evidence = make_evidence(right={"pure": (right, 0.86)})
    evidence.verdicts["pure"] = replace(evidence.verdicts["pure"], effective=effective)
    judged = [JudgedClaim(claim, claim.judge(evidence)) for claim in claims]
    found = arms(evidence, judged)
    assert sentence(found).startswith(expected)
    assert [each.question for each in found[0].answers][:2] == ["mattered", "helped"]


def test_the_first_screen_has_the_interval_and_the_reason(written):
    """Oracle: 122 and 120 of 200 right, the first ones: a difference of one point, and the settings of the records."""
    folder, _ = written
    text = Page((folder / "index.html").read_text()).text
    first = " ".join(text[: text.index("Claims\n")].split())
    assert "+1.0 points of accuracy against plain LoRA [" in first
    assert "4.0 points more than plain LoRA [" in first
    assert "one seed, 200 questions: these models, not the method" in first
    assert first.index("It mattered") < first.index("It helped")


def test_what_the_server_changed_stands_beside_the_accuracy(make_evidence):
    """Oracle: one of twenty answers of pure was another one the second time; nobody else was asked again."""
    evidence = make_evidence()
    rows = list(evidence.evaluation.rows("pure").values())[:20]
    evidence.evaluation.again = [
        {**row, "beside": "", "answer": f"{row['answer']}{'!' * (not n)}"} for n, row in enumerate(rows)
    ]
    columns, table = metrics_table(evidence)
    cells = dict(zip(columns, dict(table)["Answers that change when asked again (%)"], strict=True))
    assert (cells["pure"].value, cells["pure"].interval) == ("5.0", "1 of 20 answers changed")
    assert cells["base"].value == DASH
    first = {name: cells[0].interval for name, _, cells in models(evidence, [])}
    assert first["pure"].endswith("; 1 of 20 answers changed")
    assert "changed" not in first["base"]


def test_nothing_that_an_answer_says_ends_the_page(make_evidence):
    """Oracle: a model that answers with markup."""
    evidence = make_evidence()
    evidence.evaluation.answers[0]["answer"] = "</script><script>alert(1)</script>"
    text = stored_answers(evidence)
    assert "<" not in text
    assert json.loads(text)["items"][0]["a"][0][0] == "</script><script>alert(1)</script>"
