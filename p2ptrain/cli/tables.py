"""Tables for people, which fit where they are shown: where there is not room for all columns, the least needed go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from p2ptrain.cli.output import printable

GAP = 2
"""Spaces between two columns."""
SHORTEST = 6
"""No column of text is cut to fewer characters."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    Args:
        title: its heading.
        need: columns of lower need go first.
        right: whether it holds numbers.
        cut: whether a long text may lose its end.
    """

    title: str
    need: int = 5
    right: bool = False
    cut: bool = False


def table(columns: Sequence[Column], rows: Sequence[Sequence[Any]], width: int) -> Table:
    """Return a table of at most `width` characters, with no heading broken."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max([len(column.title), *(len(row[n]) for row in cells)]) for n, column in enumerate(columns)]
    shown = list(range(len(columns)))

    def total() -> int:
        return sum(widths[n] for n in shown) + GAP * (len(shown) - 1)

    while total() > width and len(shown) > 2:
        cuttable = [n for n in shown if columns[n].cut and widths[n] > max(SHORTEST, len(columns[n].title), 16)]
        if cuttable:
            longest = max(cuttable, key=lambda n: widths[n])
            least = max(SHORTEST, len(columns[longest].title), 16)
            widths[longest] = max(least, widths[longest] - (total() - width))
            continue
        # Of columns that are needed alike the last goes.
        shown.remove(min(reversed(shown), key=lambda n: columns[n].need))
    made = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_edge=False)
    for n in shown:
        made.add_column(
            columns[n].title,
            justify="right" if columns[n].right else "left",
            no_wrap=True,
            width=widths[n],
            overflow="ellipsis",
        )
    for row in cells:
        made.add_row(*(Text(row[n], no_wrap=True, overflow="ellipsis") for n in shown))
    return made


def show(console: Console, columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table as wide as the console."""
    console.print(table(columns, rows, console.width))


def line(console: Console, text: str, style: str = "") -> None:
    """Print one line of text, parts of which may come from strangers."""
    console.print(Text(printable(text), style=style), soft_wrap=True)


def seconds_text(seconds: float | None) -> str:
    """Return a span of time in one or two units."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 120:
        return f"{minutes:.0f} min"
    hours, rest = divmod(int(minutes), 60)
    return f"{hours} h {rest:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"


def bytes_text(count: float) -> str:
    """Return an amount of bytes in the unit that suits it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f} B"


def count_text(count: float) -> str:
    """Return a large number with three digits or so."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 10 * size or (count >= size and unit != "k"):
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f}"
