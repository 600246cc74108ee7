"""Tables: with rich in a terminal, else in plain aligned columns."""

import sys
from collections.abc import Iterable, Sequence

from layerstream.stages.text import format_table

__all__ = ["print_table"]


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print ``rows`` under ``columns``; the first column is left-aligned, the others are right-aligned."""
    lines = list(rows)
    if sys.stdout.isatty():
        try:
            _print_rich(title, columns, lines)
        except ImportError:
            pass
        else:
            return
    print(f"{title}\n{format_table(columns, lines)}")


def _print_rich(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
