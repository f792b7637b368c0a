"""Format tables as text: Markdown for reports, aligned columns for the terminal."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

MAX_NAMED = 20


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; no content of a cell can end the cell."""
    lines = [[markdown(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return [f"| {' | '.join(line)} |" for line in lines]


def aligned_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned text, two blanks between columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def markdown(text: str) -> str:
    """Escape text so that Markdown shows it as it is, in one line."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", escaped)


def named(ids: Sequence[str]) -> str:
    """Return the first ids, and how many more there are."""
    rest = len(ids) - MAX_NAMED
    return ", ".join(ids[:MAX_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


def value(number: float | None) -> str:
    """Return a value of a measure with four decimals, or nothing."""
    return "" if number is None else f"{number:.4f}"


def signed(number: float) -> str:
    """Return a difference with its sign; the minus is the typographic one."""
    return f"{number:+.4f}".replace("-", "−")


def p_value(number: float | None) -> str:
    """Return a p-value with four decimals, as `< 0.0001` below that."""
    if number is None:
        return "no test"
    return "< 0.0001" if number < 0.0001 else f"{number:.4f}"


def difference_cells(each: Mapping[str, Any]) -> list[str]:
    """Return the cells of a comparison's difference and its interval."""
    interval = each["interval"]
    return [
        signed(each["difference"]),
        f"{signed(interval[0])} to {signed(interval[1])}" if interval else each["note"],
    ]
