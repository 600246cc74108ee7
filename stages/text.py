"""Text for people: numbers with units, and aligned columns."""

import re
from collections.abc import Collection, Iterable, Sequence

__all__ = [
    "first_names",
    "format_bytes",
    "format_decimal",
    "format_seconds",
    "format_table",
    "parse_bytes",
    "parse_rate",
    "parse_size",
]

_ROUNDS_UP = 999.5  # what would print as 1000
_MINUTE, _HOUR, _DAY = 60, 3600, 86400

_TOO_MANY_BYTES = 1 << 63  # more than any machine can address

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Parse a size such as "4GiB", "900 MB" or "4096"; returns bytes.

    Raises:
        ValueError: It is not a size, or not above zero.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    count = float(match[1]) * unit if match and unit else 0
    if not 1 <= count < _TOO_MANY_BYTES:
        raise ValueError(f"not a size: {text!r}; write it like 4GiB or 900MB")
    return int(count)


def parse_size(text: str, *, of_bytes: int) -> int:
    """Parse a size as ``parse_bytes`` does, or a share of ``of_bytes`` such as "80%"; returns bytes.

    Raises:
        ValueError: It is neither, or a share that is not above 0% and up to 100%.
    """
    number = text.strip().removesuffix("%")
    if number == text.strip():
        return parse_bytes(text)
    try:
        share = float(number) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"not a share: {text!r}; write it like 80%, above 0% and up to 100%")
    return int(share * of_bytes)


def parse_rate(text: str) -> float:
    """Parse a rate such as "7GB/s" or "25 GiB/s"; returns bytes per second.

    Raises:
        ValueError: It is not a rate, or not above zero.
    """
    size = text.strip().removesuffix("/s")
    try:
        return float(parse_bytes(size))
    except ValueError:
        raise ValueError(f"not a rate: {text!r}; write it like 7GB/s") from None


def format_bytes(count: float) -> str:
    """``count`` bytes with three digits and a binary unit, e.g. "1.07 GiB"."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < _ROUNDS_UP:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"


def format_decimal(count: float) -> str:
    """``count`` bytes with four digits and a decimal unit, as usual for bandwidths, e.g. "690.6 GB"."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(value) < _ROUNDS_UP:
            break
        value, unit = value / 1000, larger
    return f"{value:.4g} {unit}"


def format_seconds(seconds: float) -> str:
    """``seconds`` in units that suit their size, e.g. "1.25 ms", "98.99 s", "3 h 31 min"."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 10 * _MINUTE:
        return f"{seconds:.4g} s"
    whole = round(seconds)
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    if whole < 2 * _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR} h"


def format_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[int] = (0,)
) -> str:
    """Format a table as plain text, without a title.

    Args:
        columns: Names of the columns.
        rows: The cells of each row.
        left: Indices of the columns that are aligned left; the others, with numbers, are aligned right.
    """
    lines = [tuple(columns), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def first_names(names: Sequence[str], count: int) -> str:
    """The first ``count`` names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
