"""Format tables as text: Markdown for reports, aligned columns for the terminal."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

MAX_NAMED = 20


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, without line ends: header, rule, rows. Cells are escaped here."""
    lines = [[markdown(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return [f"| {' | '.join(line)} |" for line in lines]


def aligned_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines of text with aligned columns, two spaces apart.

    All rows must have equally many cells. No rows give an empty text.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def markdown(text: str) -> str:
    """Escape text so that Markdown shows it unchanged, in one line; each run of whitespace becomes one space."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", escaped)


def named(ids: Sequence[str]) -> str:
    """Join the first 20 ids with commas; if there are more, end with their number: `q1, q2 and 3 more`."""
    rest = len(ids) - MAX_NAMED
    return ", ".join(ids[:MAX_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


def value(number: float | None) -> str:
    """Format a value of a measure with four decimals: `0.1269`. None becomes an empty text."""
    return "" if number is None else f"{number:.4f}"


def signed(number: float) -> str:
    """Format a difference with its sign and four decimals: `+0.0027`. The minus is the typographic one (−)."""
    return f"{number:+.4f}".replace("-", "−")


def p_value(number: float | None) -> str:
    """Format a p-value with four decimals, or as `< 0.0001`; None becomes `no test`."""
    if number is None:
        return "no test"
    return "< 0.0001" if number < 0.0001 else f"{number:.4f}"


def difference_cells(each: Mapping[str, Any]) -> list[str]:
    """Return two table cells of a comparison: its difference, and its interval or the note why there is none.

    Args:
        each: a `Comparison` as a dict.
    """
    interval = each["interval"]
    return [
        signed(each["difference"]),
        f"{signed(interval[0])} to {signed(interval[1])}" if interval else each["note"],
    ]
