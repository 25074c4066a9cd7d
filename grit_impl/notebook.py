"""How a result shows itself in a notebook: a heading, a sentence, and a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

COLOURS = {True: "#14683a", False: "#a11a1a", None: "#7a5200"}
"""Of a heading that is good, bad, or neither; readable on light and on dark."""


def card(title: str, text: str, head: Sequence[str], rows: Iterable[Sequence[object]], good: bool | None = None) -> str:
    """HTML without a style sheet of its own, so that a notebook's theme applies; everything is escaped."""
    cells = "".join(f"<th>{escape(each)}</th>" for each in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(each))}</td>" for each in row) + "</tr>" for row in rows)
    mark = f'<span style="color: #fff; background: {COLOURS[good]}; border-radius: 1em; padding: .1em .6em">'
    return (
        f"<div><p><b>{mark}{escape(title)}</span></b> {escape(text)}</p>"
        f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )
