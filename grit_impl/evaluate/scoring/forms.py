"""One form for what is written in several: dates, durations, times of day."""

from __future__ import annotations

import calendar
import re

_ISO_DATE = re.compile(r"\b(\d{4})-(0[1-9]|1[0-2])-([0-3]\d)\b")
_DURATION = re.compile(
    r"\b(\d{1,3}) ?(?:h|hrs?|hours?)\b,? ?(?:and )?(\d{1,2}) ?(?:m|mins?|minutes?)\b|\b(\d{1,3})h ?(\d{1,2}) ?min\b",
    re.IGNORECASE,
)
_CLOCK = re.compile(r"\b(1[0-2]|0?[1-9]):([0-5]\d) ?([ap])\.?m\b\.?", re.IGNORECASE)


def _minutes(match: re.Match[str]) -> str:
    hours, minutes = (part for part in match.groups() if part is not None)
    return f"{60 * int(hours) + int(minutes)} minutes"


def canonical(text: str) -> str:
    """A text with dates as "20 July 1969", durations as "105 minutes" and times of day as "18:45"."""
    text = _ISO_DATE.sub(lambda m: f"{int(m[3])} {calendar.month_name[int(m[2])]} {m[1]}", text)
    text = _CLOCK.sub(lambda m: f"{int(m[1]) % 12 + 12 * (m[3] in 'pP')}:{m[2]}", text)
    return _DURATION.sub(_minutes, text)
