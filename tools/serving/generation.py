"""One answer: from a prompt's token ids to pieces of text."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import torch

from layerstream.pipeline import StreamedModel
from layerstream.tools.console.text import TokenText
from layerstream.tools.serving.stops import StopStrings

__all__ = ["Choice", "Piece", "generate_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer that a request asks for."""

    index: int
    """Among the answers to a request."""
    prompt: Sequence[int]
    """Token ids."""
    new_tokens: int
    stops: Sequence[str]
    sampling: Mapping[str, Any]
    """Options of ``generate``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The text that a token adds to an answer; the last piece says why the answer ends, and has no token."""

    index: int
    text: str
    tokens: int
    finish_reason: str | None = None
    """"stop" or "length"."""


async def generate_text(
    model: StreamedModel, tokenizer: Any, choice: Choice
) -> AsyncGenerator[Piece]:
    """Generate the answer to ``choice``, piece by piece. Closing the generator ends the generation."""
    text, stops = TokenText(tokenizer), StopStrings(choice.stops)
    settings = model.module.generation_config
    ends = settings.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    pad = settings.pad_token_id
    input_ids = torch.tensor([choice.prompt])
    finish_reason = "length"
    tokens = model.stream(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=choice.new_tokens,
        **choice.sampling,
        # Nothing is padded, but transformers warns if this is not set.
        pad_token_id=next(iter(ends), None) if pad is None else pad,
    )
    async with aclosing(cast("AsyncGenerator[int]", tokens)):
        async for token in tokens:
            piece = stops.add(text.add(token))
            yield Piece(index=choice.index, text=piece, tokens=1)
            if token in ends:
                finish_reason = "stop"
            if stops.found:
                break
    tail = "" if stops.found else stops.add(text.finish()) + stops.finish()
    if stops.found:
        finish_reason = "stop"
    yield Piece(index=choice.index, text=tail, tokens=0, finish_reason=finish_reason)
