"""Response bodies in OpenAI's form, complete and in chunks."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from layerstream.tools.serving.answer_parser import MadeCall
from layerstream.tools.serving.errors import ApiError
from layerstream.tools.serving.generation import Piece
from layerstream.tools.serving.logprobs import TokenLogprob
from layerstream.tools.serving.protocol import ChatRequest, CompletionRequest

__all__ = ["ResponseBuilder"]


class ResponseBuilder:
    """Builds the response to one request from the pieces of its answers."""

    ending = "data: [DONE]\n\n"  # after the last event of a stream

    def __init__(self, request: ChatRequest | CompletionRequest) -> None:
        self._chat = isinstance(request, ChatRequest)
        self._include_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }
        self._pieces: list[list[Piece]] = []
        self._lengths: list[int] = []  # of the texts so far
        self._prompt_tokens = 0

    def start(self, prompts: Sequence[Sequence[int]], *, choices: int) -> list[dict[str, Any]]:
        """Set the prompts, and the number of answers to them; returns the first chunks of a streamed response."""
        self._prompt_tokens = sum(map(len, prompts))
        self._pieces = [[] for _ in range(choices)]
        self._lengths = [0] * choices
        role = {"delta": {"role": "assistant", "content": ""}}
        return [self._choice_chunk(index, role) for index in range(choices)] if self._chat else []

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        """Add ``piece``; returns its chunks for a streamed response."""
        pieces = self._pieces[piece.index]
        offset = self._lengths[piece.index]
        self._lengths[piece.index] += len(piece.text)
        pieces.append(piece)
        choices: list[dict[str, Any]] = []
        if piece.reasoning:
            choices.append({"delta": {"reasoning_content": piece.reasoning}})
        if piece.text or piece.logprobs:
            content = {"delta": {"content": piece.text}} if self._chat else {"text": piece.text}
            choices.append(content | {"logprobs": self._logprobs([piece], offset=offset)})
        before = sum(len(each.calls) for each in pieces[:-1])
        choices += [
            {"delta": {"tool_calls": [{"index": before + number, **_tool_call(call)}]}}
            for number, call in enumerate(piece.calls)
        ]
        if piece.finish_reason is not None:
            choices.append({"delta": {}} if self._chat else {"text": ""})
        chunks = [self._choice_chunk(piece.index, each) for each in choices]
        if piece.finish_reason is not None:
            chunks[-1]["choices"][0]["finish_reason"] = piece.finish_reason
        return chunks

    @staticmethod
    def error(error: ApiError) -> dict[str, Any]:
        """The last event of a stream that fails."""
        return error.body

    def last_chunks(self) -> list[dict[str, Any]]:
        """The last chunks of a streamed response."""
        return [self._chunk([]) | {"usage": self._usage()}] if self._include_usage else []

    def complete(self) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        choices = []
        for index, pieces in enumerate(self._pieces):
            text = "".join(piece.text for piece in pieces)
            choices.append(
                {
                    "index": index,
                    **({"message": _message(text, pieces)} if self._chat else {"text": text}),
                    "logprobs": self._logprobs(pieces),
                    "finish_reason": pieces[-1].finish_reason,
                }
            )
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage()}

    def _logprobs(self, pieces: Sequence[Piece], *, offset: int = 0) -> dict[str, Any] | None:
        """The log probabilities of the tokens in ``pieces``, whose text begins at ``offset``; None without any."""
        if not any(piece.logprobs for piece in pieces):
            return None
        if self._chat:
            content = [_chat_token(each) for piece in pieces for each in piece.logprobs]
            return {"content": content, "refusal": None}
        offsets = []
        for piece in pieces:
            inner = offset
            for each in piece.logprobs:
                offsets.append(inner)
                inner += len(each.text)
            offset += len(piece.text)
        tokens = [each for piece in pieces for each in piece.logprobs]
        return {
            "text_offset": offsets,
            "tokens": [each.text for each in tokens],
            "token_logprobs": [each.logprob for each in tokens],
            "top_logprobs": [
                None if each.logprob is None else {top.text: top.logprob for top in each.top}
                for each in tokens
            ],
        }

    def _choice_chunk(self, index: int, content: dict[str, Any]) -> dict[str, Any]:
        return self._chunk([{"index": index, "logprobs": None, "finish_reason": None} | content])

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        chunk = {**self._head, "object": kind, "choices": choices}
        return chunk | {"usage": None} if self._include_usage else chunk

    def _usage(self) -> dict[str, Any]:
        new_tokens = sum(piece.tokens for pieces in self._pieces for piece in pieces)
        usage: dict[str, Any] = {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": self._prompt_tokens + new_tokens,
        }
        guessed = [pieces[-1].guessed for pieces in self._pieces if pieces]
        if all(each is None for each in guessed):
            return usage
        accepted = sum(each or 0 for each in guessed)
        return usage | {"completion_tokens_details": {"accepted_prediction_tokens": accepted}}


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    def named(each: TokenLogprob) -> dict[str, Any]:
        return {"token": each.text, "logprob": each.logprob, "bytes": each.data}

    return named(token) | {"top_logprobs": [named(each) for each in token.top]}


def _message(text: str, pieces: Sequence[Piece]) -> dict[str, Any]:
    reasoning = "".join(piece.reasoning for piece in pieces)
    calls = [_tool_call(call) for piece in pieces for call in piece.calls]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if calls and not text else text,
        "refusal": None,
    }
    if reasoning:
        message["reasoning_content"] = reasoning
    return message | {"tool_calls": calls} if calls else message


def _tool_call(call: MadeCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
