"""What changed since an earlier session, with intervals."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from grit_impl.errors import GRITError
from grit_impl.verify.claims import Judgement, Metric
from grit_impl.verify.store.database import Database

BASELINE = "baseline"


@dataclass(frozen=True, slots=True)
class Change:
    """One claim that came out differently.

    Attributes:
        claim: Its id.
        before: Verdict and decisive number then; a dash if it was not judged.
        after: The same now.
        text: What changed.
        worse: Whether a claim that was supported no longer is.
    """

    claim: str
    before: str
    after: str
    text: str
    worse: bool = False


@dataclass(frozen=True, slots=True)
class ItemChange:
    """How a model answered the items that both sessions asked, item by item.

    Attributes:
        model: Its label.
        suite: `aqi` or `knowledge`.
        gained: Items right now and wrong then.
        lost: Items wrong now and right then.
        difference: Accuracy now minus then, in points, with Tango's paired interval.
        p: McNemar's exact two-sided p-value, corrected (Holm) for the number of models and suites compared.
    """

    model: str
    suite: str
    gained: int
    lost: int
    difference: Metric
    p: float

    def __str__(self) -> str:
        counts = f"{self.gained} items gained, {self.lost} lost"
        return f"{self.model}, {self.suite}: {counts}; {self.difference}, McNemar p = {self.p:.2g}"


@dataclass(frozen=True, slots=True)
class Changes:
    """All of them, against the session called `name`; `items` where both sessions kept answers."""

    name: str
    rows: tuple[Change, ...]
    items: tuple[ItemChange, ...] = ()

    @property
    def worse(self) -> bool:
        """Whether any claim lost its support."""
        return any(row.worse for row in self.rows)


def find_session(store: Database, name: str, folder: Path | None = None) -> int:
    """The session that a person means.

    Args:
        store: Where to look.
        name: `baseline` or another label, a session's number, or a git revision: the latest session of that commit.
        folder: Repository in which revisions such as `HEAD~1` are looked up.

    Raises:
        GRITError: there is none; the message lists what there is.
    """
    sessions = store.sessions()
    for row in reversed(sessions):
        if name == row["label"] or name == str(row["id"]):
            return int(row["id"])
    commit = _commit(name, folder)
    for row in reversed(sessions):
        stored = (row["git_commit"] or "").removesuffix("+")
        if stored and commit and (commit.startswith(stored) or stored.startswith(commit)):
            return int(row["id"])
    if name == BASELINE:
        raise GRITError(f"{store.path} has no baseline yet; make one with `grit baseline promote`")
    known = ", ".join(f"{row['id']} ({row['git_commit'] or 'no commit'})" for row in sessions[-5:]) or "none"
    raise GRITError(f"no session {name!r} in {store.path}; the latest are {known}")


def _commit(revision: str, folder: Path | None) -> str | None:
    command = ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        # Without a repository, the beginning of a commit's name still finds it.
        hexadecimal = len(revision) >= 7 and all(c in "0123456789abcdef" for c in revision.lower())
        return revision.lower() if hexadecimal else None


Answers = Mapping[tuple[str, str], Mapping[tuple[str, str], bool]]
"""What `Database.answers` returns."""


def compare_items(before: Answers, after: Answers) -> tuple[ItemChange, ...]:
    """Paired comparison of every model and suite on the items that both sessions asked with the same prompt."""
    pairs = {}
    for key in sorted(before.keys() & after.keys()):
        common = sorted(before[key].keys() & after[key].keys())
        if common:
            pairs[key] = [(after[key][item], before[key][item]) for item in common]
    if not pairs:
        return ()
    from grit_impl.statistics.paired import holm, mcnemar_exact, paired_difference_interval

    counts = {
        key: (sum(now and not then for now, then in rows), sum(then and not now for now, then in rows))
        for key, rows in pairs.items()
    }
    corrected = holm([mcnemar_exact(gained, lost) for gained, lost in counts.values()])
    found = []
    for (key, rows), p in zip(pairs.items(), corrected, strict=True):
        interval = paired_difference_interval([now for now, _ in rows], [then for _, then in rows]).scaled(100)
        ends = (interval.estimate, interval.low, interval.high)
        metric = Metric("accuracy", *ends, "points", interval.n, interval.method, key[0])
        found.append(ItemChange(*key, *counts[key], metric, p))
    return tuple(found)


def compare_sessions(
    name: str,
    before: Mapping[str, Judgement],
    after: Mapping[str, Judgement],
    items: tuple[ItemChange, ...] = (),
) -> Changes:
    """Claims whose verdict changed, or whose decisive number moved by more than its uncertainty.

    The interval of a claim's change treats the two sessions as independent, so it is too wide rather than too narrow
    where they share test items; `items` (from `compare_items`) are paired.
    """
    rows = []
    for claim in [*after, *(claim for claim in before if claim not in after)]:
        then, now = before.get(claim), after.get(claim)
        text = _difference(then, now)
        if text is not None:
            worse = then is not None and then.verdict == "supported" and (now is None or now.verdict == "refuted")
            rows.append(Change(claim, _brief(then), _brief(now), text, worse))
    return Changes(name, tuple(rows), items)


def _brief(judgement: Judgement | None) -> str:
    if judgement is None:
        return "\N{EN DASH}"
    return f"{judgement.verdict}, {judgement.metrics[0]}" if judgement.metrics else judgement.verdict


def _difference(then: Judgement | None, now: Judgement | None) -> str | None:
    if then is None or now is None:
        return "not judged before" if then is None else "no longer judged"
    moved = change(then.metrics[0], now.metrics[0]) if then.metrics and now.metrics else None
    if then.verdict != now.verdict:
        return f"{then.verdict} \N{RIGHTWARDS ARROW} {now.verdict}" + (f", {moved}" if moved else "")
    if moved is None or (moved.low is not None and moved.high is not None and moved.low <= 0 <= moved.high):
        return None
    if moved.low is None and abs(moved.estimate) <= 0.1 * abs(then.metrics[0].estimate):
        return None
    return str(moved)


def change(then: Metric, now: Metric) -> Metric | None:
    """`now` minus `then`, its half-widths added in quadrature; None if they are not the same measurement."""
    if (then.name, then.subject, then.unit) != (now.name, now.subject, now.unit):
        return None
    gap = now.estimate - then.estimate
    if math.isnan(gap):
        return None
    if None in (then.low, then.high, now.low, now.high):
        return Metric(now.name, gap, unit=now.unit, subject=now.subject)
    assert then.low is not None
    assert then.high is not None
    assert now.low is not None
    assert now.high is not None
    low = math.hypot(now.estimate - now.low, then.high - then.estimate)
    high = math.hypot(now.high - now.estimate, then.estimate - then.low)
    return Metric(now.name, gap, gap - low, gap + high, now.unit, now.n, "independent sessions", now.subject)
