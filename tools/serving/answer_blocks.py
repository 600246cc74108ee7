"""An answer as a list of blocks, one after the other: reasoning, text and calls, for APIs that stream it so."""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from layerstream.tools.serving.answer_parser import MadeCall
from layerstream.tools.serving.generation import Piece

__all__ = ["AnswerBlock", "BlockBuilder"]

Chunks = Iterator[dict[str, Any]]


@dataclass(slots=True, kw_only=True)
class AnswerBlock:
    """A part of an answer."""

    kind: Literal["reasoning", "text", "call"]
    index: int
    text: str = ""
    """What it has so far; of a call, its arguments as JSON."""
    name: str = ""
    """The tool that a call is of."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex[:24])
    """What tells it from other blocks."""


class BlockBuilder:
    """Builds the response to one request from the pieces of its only answer. A subclass tells the chunks of its API.

    Attributes:
        blocks: What there is of the answer.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens of the answer so far.
        finish_reason: Why the answer ended, as in ``Piece``; None before.
        stop: The stop string that ended it, if one did.
    """

    ending = ""  # after the last event of a stream

    def __init__(self) -> None:
        self.blocks: list[AnswerBlock] = []
        self.prompt_tokens = 0
        self.new_tokens = 0
        self.finish_reason: str | None = None
        self.stop: str | None = None
        self._open = False  # whether the last block may go on

    def start(self, prompts: Sequence[Sequence[int]], *, choices: int) -> list[dict[str, Any]]:
        """Set the prompt; returns the first chunks of a streamed response."""
        del choices
        self.prompt_tokens = sum(map(len, prompts))
        return list(self.begin())

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        """Add ``piece``; returns its chunks for a streamed response."""
        self.new_tokens += piece.tokens
        chunks = [*self._write("reasoning", piece.reasoning), *self._write("text", piece.text)]
        for call in piece.calls:
            chunks += self._call(call)
        if piece.finish_reason is not None:
            self.finish_reason, self.stop = piece.finish_reason, piece.stop
            chunks += self._close()
        return chunks

    def last_chunks(self) -> list[dict[str, Any]]:
        """The last chunks of a streamed response."""
        return list(self.end())

    # -- the chunks of an API --------------------------------------------------------------------

    def begin(self) -> Chunks:
        """The chunks before the first block."""
        raise NotImplementedError

    def opened(self, block: AnswerBlock) -> Chunks:
        """The chunks of a block that begins, with no text yet."""
        raise NotImplementedError

    def written(self, block: AnswerBlock, text: str) -> Chunks:
        """The chunks of ``text`` that a block has more."""
        raise NotImplementedError

    def closed(self, block: AnswerBlock) -> Chunks:
        """The chunks of a block that is complete."""
        raise NotImplementedError

    def end(self) -> Chunks:
        """The chunks after the last block."""
        raise NotImplementedError

    # -- blocks ----------------------------------------------------------------------------------

    def _write(self, kind: Literal["reasoning", "text"], text: str) -> Chunks:
        if not text:
            return
        if not self._open or self.blocks[-1].kind != kind:
            yield from self._close()
            yield from self._begin(AnswerBlock(kind=kind, index=len(self.blocks)))
        self.blocks[-1].text += text
        yield from self.written(self.blocks[-1], text)

    def _call(self, call: MadeCall) -> Chunks:
        yield from self._close()
        block = AnswerBlock(kind="call", index=len(self.blocks), name=call.name)
        yield from self._begin(block)
        block.text = call.arguments
        yield from self.written(block, call.arguments)
        yield from self._close()

    def _begin(self, block: AnswerBlock) -> Chunks:
        self.blocks.append(block)
        self._open = True
        yield from self.opened(block)

    def _close(self) -> Chunks:
        if self._open:
            self._open = False
            yield from self.closed(self.blocks[-1])
