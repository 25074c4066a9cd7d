"""The report: self-contained, complete, and readable in a real browser, light and dark, on a desk and on a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tarfile
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from grit_impl.cost.performance import write_performance
from grit_impl.errors import GRITError
from grit_impl.verify.claims import Claim, Evidence, Judgement, Metric
from grit_impl.verify.options import MODELS
from grit_impl.verify.report import write_report
from grit_impl.verify.report.answer import arms, sentence, stored_answers
from grit_impl.verify.report.content import DASH, cell, headline, metrics_table
from grit_impl.verify.results import Results
from grit_impl.verify.store.database import JudgedClaim, Session
from grit_impl.verify.store.history import Change, Changes, ItemChange

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
FAULTS = {
    "summary": {
        "confusion": {"starved": {"starved": 9, "not-ready": 1}, "overwritten": {"overwritten": 8}},
        "named": 17,
        "fault_runs": 18,
        "flagged": 0,
        "sound_runs": 7,
    }
}


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


@pytest.fixture
def written(make_evidence, claims, performance, tmp_path):
    """A full report of sound evidence, with changes, the fault zoo's matrix and what benchmarks left."""
    evidence = make_evidence()
    folder = tmp_path / "reports"
    (folder / "fault_matrix.json").write_text(json.dumps(FAULTS))
    write_performance(folder, performance)
    session = Session(
        "2026-01-01T00:00:00+00:00",
        "2026-01-01T00:10:00+00:00",
        "abc1234",
        Results(evidence.options).options.to_dict(),
        {},
    )
    judged = [JudgedClaim(claim, claim.judge(evidence), f"t.py::{claim.id}") for claim in claims]
    row = Change("evaluation.pure-delta-aqi", "supported, 30 points", "supported, 36 points", "6 points [1, 11]")
    item = ItemChange("pure", "aqi", 12, 3, Metric("accuracy", 4.5, 0.9, 8.1, "points", 200), 0.035)
    write_report(folder, session, judged, evidence, Changes("baseline (session 1)", (row,), (item,)))
    return folder, judged


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


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
# Asks the laid-out page: does it scroll sideways, which colours has it, did every figure get a size?
PROBE = """<script>addEventListener('load', () => {
  document.querySelectorAll('details').forEach(each => { each.open = true; });
  const style = getComputedStyle(document.body);
  const svgs = [...document.querySelectorAll('figure svg')].map(each => each.getBoundingClientRect());
  document.title = JSON.stringify({
    sideways: document.documentElement.scrollWidth - innerWidth,
    background: style.backgroundColor, ink: style.color,
    hidden: [...document.querySelectorAll('.scroll')].filter(each => each.scrollWidth > each.clientWidth).length,
    answers: [...document.querySelectorAll('#found > li')].length,
    buttons: document.querySelectorAll('th .sort').length,
    figures: svgs.map(box => [Math.round(box.width), Math.round(box.height)]),
    text: [...document.querySelectorAll('figure svg text')].map(each => getComputedStyle(each).fill)[0],
    small: Math.min(...[...document.querySelectorAll('p, td, summary span')]
      .map(each => parseFloat(getComputedStyle(each).fontSize))),
  });
});</script>"""


# Gives the laid-out page to axe-core, every claim open, and keeps what it finds.
AXE = """<script>addEventListener('load', () => {
  document.querySelectorAll('details').forEach(each => { each.open = true; });
  axe.run().then(found => { document.title = JSON.stringify({
    passes: found.passes.length,
    violations: found.violations.map(each => `${each.id}: ${each.nodes[0].target} (${each.nodes.length})`),
  }); });
});</script>"""


def look(folder, profile, page, width, scheme, milliseconds=4000):
    """What a page of this width writes into its title, as Chromium lays it out."""
    # Chromium's window is at least 500 pixels wide; a frame of the wanted width is not.
    (folder / "probe.html").write_text(page)
    frame = f"""<iframe src="probe.html" style="width:{width}px;height:900px;border:0"></iframe><script>
      const look = setInterval(() => {{ const t = document.querySelector('iframe').contentDocument.title;
      if (t.startsWith('{{')) {{ document.body.dataset.found = t; clearInterval(look); }} }}, 20);</script>"""
    (folder / "frame.html").write_text(f"<!doctype html><body>{frame}</body>")
    command = [
        CHROMIUM,
        *QUIET,
        "--allow-file-access-from-files",
        f"--user-data-dir={profile}",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        f"--virtual-time-budget={milliseconds}",
        "--window-size=1400,1000",
        "--dump-dom",
        (folder / "frame.html").as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=240).stdout
    match = re.search(r'data-found="([^"]*)"', dom)
    assert match, dom[-500:]
    return json.loads(html.unescape(match[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, found none")
@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(written, tmp_path, width, scheme):
    """Oracle: Chromium's own layout: nothing scrolls sideways, figures have a size, colours follow the scheme."""
    folder, _ = written
    page = (folder / "index.html").read_text().replace("</body>", PROBE + "</body>")
    found = look(folder, tmp_path / "profile", page, width, scheme)
    assert found["sideways"] <= 0
    assert width == 1400 or found["hidden"] == 0, "no table hides columns on a phone"
    assert found["answers"] == 25
    assert found["buttons"] > 20
    assert len(found["figures"]) == 1 + 6 + 2
    assert all(200 < w <= width and h > 100 for w, h in found["figures"])
    assert found["small"] >= 12
    brightness = {name: sum(map(int, re.findall(r"\d+", found[name])[:3])) for name in ("background", "ink", "text")}
    light = scheme == "light"
    assert (brightness["background"] > 600) == light
    assert (brightness["ink"] < 200) == light
    assert brightness["text"] == brightness["ink"]


@pytest.fixture(scope="session")
def axe(tmp_path_factory):
    """axe-core's script, from its npm package."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm, found none")
    folder = tmp_path_factory.mktemp("axe")
    done = subprocess.run(["npm", "pack", "axe-core@4.14.1"], cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"npm cannot fetch axe-core: {done.stderr.strip().splitlines()[-1:]}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, found none")
@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible(written, axe, tmp_path, width, scheme):
    """Oracle: axe-core, all of its rules; and it does find something where there is something."""
    folder, _ = written
    page = (folder / "index.html").read_text().replace("</body>", f"<script>{axe}</script>{AXE}</body>")
    found = look(folder, tmp_path / "profile", page, width, scheme, 30_000)
    assert found["violations"] == []
    assert found["passes"] > 20
    if (width, scheme) == (400, "light"):
        broken = page.replace('<html lang="en">', "<html>").replace("--soft: #5b636d", "--soft: #b0b6bd")
        names = {
            each.partition(":")[0]
            for each in look(folder, tmp_path / "profile", broken, width, scheme, 30_000)["violations"]
        }
        assert {"html-has-lang", "color-contrast"} <= names


# Chooses a filter, sorts a column, and says what the page then shows.
USE = """<script>addEventListener('load', () => setTimeout(() => {
  const form = document.getElementById('filter'), count = () => document.getElementById('count').textContent;
  const choose = values => { for (const [name, value] of Object.entries(values)) form.elements[name].value = value;
    form.dispatchEvent(new Event('input', { bubbles: true })); return count(); };
  const lost = choose({ suite: 'aqi', from: 'recommended', to: 'base', change: 'lost' });
  const gained = choose({ change: 'gained' });
  const text = choose({ suite: '', change: '', text: 'question 199' });
  const first = document.querySelector('#found li').textContent.replace(/\\s+/g, ' ');
  const head = [...document.querySelectorAll('table.models th')].find(each => each.textContent.includes('pure'));
  const values = () => [...head.closest('table').tBodies[0].rows].map(row => row.cells[head.cellIndex].firstChild)
    .map(node => node ? parseFloat(node.textContent) : NaN).filter(value => !isNaN(value));
  head.querySelector('button').click();
  const down = values();
  head.querySelector('button').click();
  const sort = head.getAttribute('aria-sort');
  document.title = JSON.stringify({ lost, gained, text, first, down, up: values(), sort });
}, 50));</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, found none")
@pytest.mark.slow
def test_answers_are_filtered_and_columns_sorted(written, tmp_path):
    """Oracle: the hand-written answers: of 200, recommended has 128 right and the base the first 50 of these."""
    folder, _ = written
    page = (folder / "index.html").read_text().replace("</body>", USE + "</body>")
    found = look(folder, tmp_path / "profile", page, 1400, "light")
    assert found["lost"] == "78 of 400 questions"
    assert found["gained"] == "0 of 400 questions"
    assert found["text"] == "2 of 400 questions"
    assert "question 199" in found["first"]
    assert found["down"] == sorted(found["down"], reverse=True)
    assert found["up"] == sorted(found["up"])
    assert found["sort"] == "ascending"


@pytest.mark.parametrize(
    ("right", "effective", "expected"),
    [
        (0.70, True, "The published rule mattered and helped."),
        (0.61, True, "The published rule mattered; whether it helped is open."),
        (0.50, True, "The published rule mattered, but did not help."),
        (0.50, False, "The published rule did not matter and did not help."),
        (0.70, False, "The published rule did not matter, but helped."),
        (0.61, None, "The published rule may have mattered; whether it helped is open."),
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


def test_nothing_that_an_answer_says_ends_the_page(make_evidence):
    """Oracle: a model that answers with markup."""
    evidence = make_evidence()
    evidence.evaluation.answers[0]["answer"] = "</script><script>alert(1)</script>"
    text = stored_answers(evidence)
    assert "<" not in text
    assert json.loads(text)["items"][0]["a"][0][0] == "</script><script>alert(1)</script>"
