"""Generates one answer: from the token ids of a prompt to pieces of text."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from layerstream.pipeline import StreamedModel
from layerstream.tools.console.token_text import TokenText
from layerstream.tools.serving.stop_strings import StopStrings

__all__ = ["Choice", "Piece", "generate_text", "generation_arguments"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer that a request asks for."""

    index: int
    """Position among the answers to a request."""
    prompt: Sequence[int]
    """Token ids of the prompt."""
    new_tokens: int
    """Maximum of tokens in the answer."""
    stops: Sequence[str]
    """Strings that end the text."""
    sampling: Mapping[str, Any]
    """Options of ``generate``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The text that a token adds to an answer; the last piece has no token, and says why the answer ends."""

    index: int
    text: str
    tokens: int
    finish_reason: str | None = None
    """"stop" or "length"."""


def generation_arguments(model: StreamedModel, tokenizer: Any, choice: Choice) -> dict[str, Any]:
    """The arguments of ``StreamedModel.stream`` for ``choice``."""
    pad = model.module.generation_config.pad_token_id
    input_ids = torch.tensor([choice.prompt])
    ends = [_EndAtStop(tokenizer, choice)] if choice.stops else []
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": choice.new_tokens,
        **choice.sampling,
        "stopping_criteria": StoppingCriteriaList(ends),
        # There is no padding, but transformers warns if this is not set.
        "pad_token_id": next(iter(_eos_tokens(model)), None) if pad is None else pad,
    }


async def generate_text(
    model: StreamedModel, tokenizer: Any, choice: Choice
) -> AsyncGenerator[Piece]:
    """Generate the answer to ``choice``, piece by piece. Closing the generator ends the generation."""
    text, stops = TokenText(tokenizer), StopStrings(choice.stops)
    eos_tokens = _eos_tokens(model)
    finish_reason = "length"
    tokens = model.stream(**generation_arguments(model, tokenizer, choice))
    async with aclosing(cast("AsyncGenerator[int]", tokens)):
        async for token in tokens:
            if stops.found:  # a step may make several tokens
                continue
            piece = stops.add(text.add(token))
            yield Piece(index=choice.index, text=piece, tokens=1)
            if token in eos_tokens:
                finish_reason = "stop"
    tail = "" if stops.found else stops.add(text.finish()) + stops.finish()
    if stops.found:
        finish_reason = "stop"
    yield Piece(index=choice.index, text=tail, tokens=0, finish_reason=finish_reason)


def _eos_tokens(model: StreamedModel) -> set[int]:
    eos = model.module.generation_config.eos_token_id
    return {eos} if isinstance(eos, int) else set(eos or ())


class _EndAtStop(StoppingCriteria):
    """Ends a generation in its own thread as soon as its text has a stop string, so that no further pass begins."""

    def __init__(self, tokenizer: Any, choice: Choice) -> None:
        self._text, self._stops = TokenText(tokenizer), StopStrings(choice.stops)
        self._length = len(choice.prompt)

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        new = input_ids[0, self._length :].tolist()
        self._length += len(new)
        for token in new:
            self._stops.add(self._text.add(token))
        return torch.tensor([self._stops.found], device=input_ids.device)
