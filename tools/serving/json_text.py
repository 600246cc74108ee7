"""JSON of answers that may have megabytes, made in a thread."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

__all__ = ["json_in_thread", "json_text"]

# Python's encoder holds the interpreter while it works, so that the event loop waits for it in whichever thread it runs.
# It is called for so many items of a list at a time, which take less than a millisecond.
_AT_ONCE = 256
# Lists of what is deeper in an answer are short: of the likeliest tokens, of the bytes of one.
_MAX_DEPTH = 5


def json_text(content: Any) -> str:
    """The JSON of something small."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


async def json_in_thread(content: Any) -> str:
    """The JSON of ``content``, which may be large, without holding the event loop."""
    return await asyncio.to_thread(lambda: "".join(_pieces(content, 0)))


def _pieces(content: Any, depth: int) -> Iterator[str]:
    if depth == _MAX_DEPTH or not isinstance(content, dict | list) or not content:
        yield json_text(content)
    elif isinstance(content, dict):
        for number, (name, value) in enumerate(content.items()):
            yield f"{',' if number else '{'}{json_text(name)}:"
            yield from _pieces(value, depth + 1)
        yield "}"
    elif isinstance(content[0], dict | list):
        for number, value in enumerate(content):
            yield "," if number else "["
            yield from _pieces(value, depth + 1)
        yield "]"
    else:
        for start in range(0, len(content), _AT_ONCE):
            yield "," if start else "["
            yield json_text(content[start : start + _AT_ONCE])[1:-1]
        yield "]"
