"""Progress while arms train and models answer: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

BAR = 24
LOG_SECONDS = 20.0


class ProgressLine:
    """Told a label, what is done and the total; writes to stderr.

    Args:
        stream: Where to; None: standard error at the time of writing.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._started: dict[str, float] = {}
        self._seen: dict[str, int] = {}
        self._since: dict[str, tuple[float, int]] = {}
        self._finished: set[str] = set()
        self._running: dict[str, str] = {}
        self._shown: dict[str, int] = {}
        self._last: float | None = None

    def __call__(self, label: str, done: int, total: int) -> None:
        """Show that `done` of `total` of the work called `label` is done."""
        if label in self._finished:
            return
        now = time.monotonic()
        seconds = now - self._started.setdefault(label, now)
        stream = self._stream or sys.stderr
        if done >= total:
            self._finished.add(label)
            self._running.pop(label, None)
            # What was there already needs no line.
            if seconds > 0.5:
                self._write(stream, f"{label}: {total} in {_duration(seconds)}", last=True)
            return
        left = self._left(label, done, total, now)
        if stream.isatty() and "PYTEST_XDIST_WORKER" not in os.environ:
            filled = BAR * done // max(total, 1)
            self._running[label] = f"{label} {'━' * filled}{'╌' * (BAR - filled)} {done}/{total}{left}"
            self._write(stream, "  ".join(self._running.values()), last=False)
        elif (self._last is None or time.monotonic() - self._last >= LOG_SECONDS) and self._shown.get(label) != done:
            self._shown[label] = done
            self._write(stream, f"{label}: {done}/{total}{left}", last=True)

    def note(self, text: str) -> None:
        """Show a line."""
        self._write(self._stream or sys.stderr, text, last=True)

    def _left(self, label: str, done: int, total: int, now: float) -> str:
        # The pace is taken from the first change on: before it a model was loaded, and what was done then is an earlier
        # call's. A run that falls back to its checkpoint begins anew.
        seen = self._seen.get(label, done)
        self._seen[label] = done
        if done < seen:
            self._since.pop(label, None)
        elif done > seen:
            self._since.setdefault(label, (now, done))
        since, first = self._since.get(label, (now, done))
        return f", {_duration((now - since) / (done - first) * (total - done))} left" if done > first else ""

    def _write(self, stream: TextIO, text: str, *, last: bool) -> None:
        if self._last is None:
            stream.write("\n")  # pytest is in the middle of a line
        self._last = time.monotonic()
        if stream.isatty():
            stream.write("\r\x1b[2K" + text + ("\n" if last else ""))
        else:
            stream.write(text + "\n")
        stream.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
