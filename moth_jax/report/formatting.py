"""How the report writes numbers, and the pieces of HTML that several sections share."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeGuard

from moth_jax.errors import printable

MISSING = "–"
_SPACE = "\u00a0"  # keeps a number and its unit on one line


def escape(text: str) -> str:
    """A text as HTML, in one line and with what a console obeys written as an escape.

    >>> escape("a<b\\n")
    'a&lt;b\\\\n'
    """
    return html.escape(printable(text))


def is_number(value) -> TypeGuard[float]:
    """Whether `value` is a finite number (of Python; not a bool)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def percent(share, digits: int = 1, *, sign: bool = False) -> str:
    """A share of 1 in percent.

    >>> percent(0.9034), percent(1.0862, sign=True), percent(None)
    ('90.3\\xa0%', '+108.6\\xa0%', '–')
    """
    if not is_number(share):
        return MISSING
    return f"{100 * share:{'+' if sign else ''}.{digits}f}{_SPACE}%".replace("-", "−")


def size(value) -> str:
    """A trigger size; infinite is none found.

    >>> size(54.123), size(1234.5), size(float("inf")), size(float("nan"))
    ('54.1', '1,234.5', 'none found', '–')
    """
    if isinstance(value, int | float) and math.isinf(value):
        return "none found"
    return f"{value:,.1f}" if is_number(value) else MISSING


def duration(seconds) -> str:
    """A time as a reader says it.

    >>> duration(12.34), duration(1780), duration(8000), duration(None)
    ('12.3 s', '29 min 40 s', '2 h 13 min', '–')
    """
    if not is_number(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plain(value) -> str:
    """Any value of a summary as text: dicts and lists in a row, floats with six digits.

    >>> plain({"jax": "0.10.2", "numpy": "2.4.6"}), plain([0, 1, 2]), plain(0.123456789)
    ('jax 0.10.2, numpy 2.4.6', '0, 1, 2', '0.123457')
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) or MISSING
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or MISSING
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else MISSING
    return MISSING if value is None else str(value)


def arrow(before: str, after: str | None = None) -> str:
    """`before → after` in HTML, or `before` alone."""
    if after is None:
        return escape(before)
    to = '<span class="arrow" role="img" aria-label="to">→</span>'
    return f"{escape(before)} {to} {escape(after)}"


def section(heading: str, *content: str | None) -> str:
    """A section of the page; parts of its content that are None or empty are left out."""
    parts = [part for part in content if part]
    return f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(parts) + "\n</section>"


def row(heading: str, cells: Iterable[str]) -> str:
    """A row of a table, of HTML."""
    body = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{heading}</th>{body}</tr>'


def table(caption: str, headers: Sequence[str], rows: Iterable[str], *, css: str = "") -> str:
    """A table of `rows` (HTML, each a `<tr>`) under `headers` (HTML; may be none)."""
    cells = "".join(f'<th scope="col">{header}</th>' for header in headers)
    head = f"<thead><tr>{cells}</tr></thead>" if headers else ""
    return (
        f'<div class="scroll"><table class="{css}"><caption>{escape(caption)}</caption>'
        f"{head}<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )
