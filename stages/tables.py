"""Plain aligned columns, for terminals and logs."""

from collections.abc import Collection, Iterable, Sequence

__all__ = ["format_table"]


def format_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[int] = (0,)
) -> str:
    """The table as plain text, without a title.

    Args:
        columns: their names.
        rows: of cells.
        left: numbers of the columns that are flush left; figures are flush right.
    """
    lines = [tuple(columns), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
