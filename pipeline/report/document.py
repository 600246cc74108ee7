"""A report as data, and its rendering: plain text for a terminal, or Markdown."""

import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from layerstream.stages.text import format_table

__all__ = [
    "Bar",
    "Block",
    "Drawing",
    "Facts",
    "Section",
    "Sentences",
    "Table",
    "as_markdown",
    "as_text",
]

_SENTENCE_COLUMNS = 96
_BAR_COLUMNS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """The parts of a whole as a bar, and in words."""

    shares: Mapping[str, float]
    text: str

    def __str__(self) -> str:
        drawn, total = "", 0.0
        for name, share in self.shares.items():
            total += share
            drawn = drawn.ljust(round(_BAR_COLUMNS * total), name[0])
        return f"[{drawn:.<{_BAR_COLUMNS}}] {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Pairs of a label and a value, one per line."""

    pairs: Sequence[tuple[str, str | Bar]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table: the first column names a row, the others are figures, except those that are aligned ``left``."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Collection[int] = (0,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Preformatted lines, whose characters are aligned; or where it can be drawn, cells of several kinds."""

    lines: Sequence[str]
    cells: Sequence[tuple[str, str]] = ()
    """The kind of each cell, and its title."""
    legend: Mapping[str, str] = field(default_factory=dict)
    """What each kind means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentences:
    """Sentences, each a paragraph."""

    lines: Sequence[str]


Block = Facts | Table | Drawing | Sentences


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Blocks under a heading."""

    title: str
    blocks: Sequence[Block]


def as_text(sections: Sequence[Section]) -> str:
    """``sections`` for a terminal of a hundred columns."""
    return "\n\n".join("\n".join(_text(section)) for section in sections)


def _text(section: Section) -> Iterator[str]:
    yield section.title
    for number, block in enumerate(section.blocks):
        if number and not isinstance(block, Sentences):
            yield ""
        match block:
            case Facts(pairs=pairs):
                width = max(len(label) for label, _ in pairs)
                lines = [f"{label:{width}}  {value}" for label, value in pairs]
            case Table(columns=columns, rows=rows, left=left):
                lines = format_table(columns, rows, left=left).splitlines()
            case Drawing(lines=drawn):
                lines = list(drawn)
            case Sentences(lines=sentences):
                lines = [
                    line
                    for sentence in sentences
                    for line in textwrap.wrap(sentence, _SENTENCE_COLUMNS)
                ]
        yield from (f"  {line}".rstrip() for line in lines)


def as_markdown(sections: Sequence[Section]) -> str:
    """``sections`` as GitHub's Markdown."""
    return "\n\n".join("\n\n".join(_markdown(section)) for section in sections)


def _markdown(section: Section) -> Iterator[str]:
    yield f"## {section.title}"
    for block in section.blocks:
        match block:
            case Facts(pairs=pairs):
                yield "\n".join(f"- **{label}**: {_escaped(str(value))}" for label, value in pairs)
            case Table(columns=columns, rows=rows, left=left):
                ruler = [":---" if column in left else "---:" for column in range(len(columns))]
                yield "\n".join(map(_row, (columns, ruler, *rows)))
            case Drawing(lines=lines):
                yield "\n".join(("```", *lines, "```"))
            case Sentences(lines=lines):
                yield "\n".join(f"- {_escaped(line)}" for line in lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    for special in "\\|*_`<":
        text = text.replace(special, f"\\{special}")
    return text
