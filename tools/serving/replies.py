"""Answers in the form of OpenAI's service, whole and in chunks."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from layerstream.tools.serving.generation import Piece
from layerstream.tools.serving.protocol import ChatRequest, CompletionRequest

__all__ = ["Reply"]


class Reply:
    """The answer to one request: takes the pieces of its choices, and returns what to send."""

    def __init__(self, asked: ChatRequest | CompletionRequest) -> None:
        self._chat = isinstance(asked, ChatRequest)
        self._usage_wanted = bool(asked.stream_options and asked.stream_options.include_usage)
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
        }
        self._pieces: list[list[Piece]] = []
        self._prompt_tokens = 0

    def expect(self, prompts: Sequence[Sequence[int]], *, choices: int) -> None:
        """Note the prompts that will be answered."""
        self._prompt_tokens = sum(map(len, prompts))
        self._pieces = [[] for _ in range(choices)]

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        """Add ``piece``; returns the chunks that a streamed answer sends for it."""
        pieces = self._pieces[piece.index]
        pieces.append(piece)
        choices: list[dict[str, Any]] = []
        if self._chat and len(pieces) == 1:
            choices.append({"delta": {"role": "assistant", "content": ""}})
        if piece.text:
            choices.append(
                {"delta": {"content": piece.text}} if self._chat else {"text": piece.text}
            )
        if piece.finish_reason is not None:
            choices.append({"delta": {}} if self._chat else {"text": ""})
        chunks = [
            self._chunk([{"index": piece.index, **each, "logprobs": None, "finish_reason": None}])
            for each in choices
        ]
        if piece.finish_reason is not None:
            chunks[-1]["choices"][0]["finish_reason"] = piece.finish_reason
        return chunks

    def last(self) -> list[dict[str, Any]]:
        """The last chunks of a streamed answer."""
        return [self._chunk([]) | {"usage": self._usage()}] if self._usage_wanted else []

    def whole(self) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for index, pieces in enumerate(self._pieces):
            text = "".join(piece.text for piece in pieces)
            message = {"role": "assistant", "content": text, "refusal": None}
            choices.append(
                {
                    "index": index,
                    **({"message": message} if self._chat else {"text": text}),
                    "logprobs": None,
                    "finish_reason": pieces[-1].finish_reason,
                }
            )
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        chunk = {**self._head, "object": kind, "choices": choices}
        return chunk | {"usage": None} if self._usage_wanted else chunk

    def _usage(self) -> dict[str, int]:
        new = sum(piece.tokens for pieces in self._pieces for piece in pieces)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
        }
