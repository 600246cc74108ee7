"""A report as one HTML page that needs nothing else: no script, no file, no host. Pure."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from html import escape

from layerstream.pipeline.report.document import (
    Bar,
    Block,
    Drawing,
    Facts,
    Section,
    Sentences,
    Table,
)

__all__ = ["as_html"]

# The page is opened from anywhere, and its contents are names from a checkpoint.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_LAYOUT = """
body { max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; } h2 { margin-top: 2rem; }
dl { grid-template-columns: minmax(8.5rem, auto) 1fr; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .35rem; } }
pre, .wide { overflow-x: auto; }
"""


def as_html(sections: Sequence[Section], *, title: str, style: str) -> str:
    """``sections`` as a page.

    Args:
        sections: The report; the first title is the page's heading.
        title: For the window.
        style: CSS with the colours, the map's, bars' and tables' look.
    """
    first, *others = sections
    body = [f"<h1>{escape(first.title)}</h1>", *_blocks(first)]
    for section in others:
        body += [f"<h2>{escape(section.title)}</h2>", *_blocks(section)]
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>\n{style}{_LAYOUT}</style>\n</head>\n<body>\n<main>",
            *body,
            "</main>\n</body>\n</html>\n",
        )
    )


def _blocks(section: Section) -> Iterator[str]:
    for block in section.blocks:
        yield from _block(block)


def _block(block: Block) -> Iterator[str]:
    match block:
        case Facts(pairs=pairs):
            yield "<dl>"
            for label, value in pairs:
                shown = _bar(value) if isinstance(value, Bar) else escape(value)
                yield f"<dt>{escape(label)}</dt><dd>{shown}</dd>"
            yield "</dl>"
        case Table(columns=columns, rows=rows, left=left):
            yield '<div class="wide" tabindex="0" role="group" aria-label="Table"><table><thead>'
            yield _row("th", columns, left) + "</thead><tbody>"
            yield from (_row("td", row, left) for row in rows)
            yield "</tbody></table></div>"
        case Drawing(cells=cells, legend=legend) if cells:
            yield from _map(cells, legend)
        case Drawing(lines=lines):
            yield f"<pre>{escape(chr(10).join(lines))}</pre>"
        case Sentences(lines=lines):
            yield from (f"<p>{escape(line)}</p>" for line in lines)


def _row(cell: str, texts: Sequence[str], left: Collection[int]) -> str:
    cells = (
        f"<{cell}{' class=left' if column in left else ''}>{escape(text)}</{cell}>"
        for column, text in enumerate(texts)
    )
    return f"<tr>{''.join(cells)}</tr>"


def _map(cells: Sequence[tuple[str, str]], legend: Mapping[str, str]) -> Iterator[str]:
    kinds = [kind for kind, _ in cells]
    counts = [(kind, f"{kinds.count(kind)} x {legend[kind]}") for kind in legend if kind in kinds]
    label = escape(", ".join(text for _, text in counts))
    yield f'<div class="map" role="img" aria-label="{label}">'
    yield "".join(f'<i class="{kind}" title="{escape(title)}"></i>' for kind, title in cells)
    keys = " ".join(
        f'<span class="entry"><span class="key {kind}"></span>{escape(text)}</span>'
        for kind, text in counts
    )
    yield f'</div>\n<p class="legend">One box for each layer batch: {keys}</p>'


def _bar(bar: Bar) -> str:
    parts = "".join(
        f'<span class="{escape(name)}" style="width:{100 * share:.2f}%" title="{escape(name)}"></span>'
        for name, share in bar.shares.items()
    )
    return f'<div class="bar" aria-hidden="true">{parts}</div>{escape(bar.text)}'
