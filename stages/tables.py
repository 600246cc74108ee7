"""Plain aligned columns, for terminals and logs."""

from collections.abc import Iterable, Sequence

__all__ = ["format_table"]


def format_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table as plain text, without a title."""
    lines = [tuple(columns), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
