"""The table and the plot of ``layerstream bench``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerstream.stages.text import format_bytes
from layerstream.tools.compare.results import Row, Spread
from layerstream.tools.console.plot import write_bar_chart
from layerstream.tools.console.tables import print_table

__all__ = ["print_report", "write_chart"]

_COLUMNS = (
    "",
    "cold, s",
    "warm, s",
    "cold / ours",
    "warm / ours",
    "read, cold",
    "read, warm",
    "memory",
    "logits",
)


def print_report(result: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Print ``result`` as a table with explanations."""
    print_table(_title(result), _COLUMNS, map(_cells, rows))
    print()
    print(
        "Seconds of a forward pass, and how many times ours: median (least-most). Cold: the first pass after the "
        "weights were dropped from the page cache; warm: the passes right after. Read: from disk, in a pass. Memory: "
        "the most beside page cache."
    )
    not_dropped = [row.name for row in rows if not all(turn.all_was_dropped for turn in row.turns)]
    if not_dropped:
        print(
            f"Not quite cold, since only root may drop what they have mapped: {', '.join(not_dropped)}"
        )
    for row in rows:
        if "plan" in row.turns[-1].notes:
            print(f"\n{row.name}: {row.turns[-1].notes['plan']}")
    print()
    for kind in ("failed", "left_out"):
        for each in result[kind]:
            print(f"{kind.replace('_', ' ').capitalize()}: {each['name']}: {each['why']}")
    machine = result["machine"]
    print(
        f"Machine: {machine['processor']}, {machine['cores']} cores, "
        f"{format_bytes(machine['memory_bytes'])} of memory, {machine['filesystem']}, {machine['system']}"
    )
    for row in rows:
        versions = row.turns[-1].versions
        if versions:
            print(
                f"{row.name}: "
                + ", ".join(f"{name} {version}" for name, version in versions.items())
            )


def write_chart(result: Mapping[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Draw the seconds of cold and warm passes as bars with their spread."""
    series = {
        kind: [
            (row.name, seconds.median, seconds.least, seconds.most)
            for row in rows
            if (seconds := row.seconds(kind)) is not None
        ]
        for kind in ("cold", "warm")
    }
    drawn = {kind: bars for kind, bars in series.items() if bars}
    labels = [row.name for row in rows]
    write_bar_chart(
        drawn, path, labels=labels, title=_title(result), unit="seconds of a forward pass"
    )


def _title(result: Mapping[str, Any]) -> str:
    limit = result["memory_limit_bytes"]
    limited = f", each in {format_bytes(limit)}" if limit else ""
    return (
        f"{Path(result['model']).name}, {format_bytes(result['model_bytes'])}, "
        f"{result['prompt_tokens']} tokens, rounds: {result['rounds']}{limited}, {result['date']}"
    )


def _cells(row: Row) -> tuple[str, ...]:
    def text(spread: Spread | None) -> str:
        return "-" if spread is None else spread.text()

    def read(nbytes: float | None) -> str:
        return "-" if nbytes is None else format_bytes(nbytes)

    return (
        row.name,
        text(row.seconds("cold")),
        text(row.seconds("warm")),
        text(row.ratio("cold")),
        text(row.ratio("warm")),
        read(row.read_bytes("cold")),
        read(row.read_bytes("warm")),
        format_bytes(row.peak_anonymous_bytes),
        "-" if row.agreement is None else row.agreement.text(),
    )
