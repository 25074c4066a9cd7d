"""The page in a real browser: light and dark, on a desk and on a phone, and accessible to all."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tarfile

import pytest

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
