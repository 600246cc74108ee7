"""Generates one answer: from the token ids of a prompt to pieces of text."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from layerstream.pipeline import StreamedModel
from layerstream.tools.console.token_text import TokenText
from layerstream.tools.running.speculation import Speculation
from layerstream.tools.serving.answer_parser import AnswerParser, MadeCall, Parsed
from layerstream.tools.serving.logprobs import LogprobRecorder, TokenLogprob, prompt_logprobs
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
    ends: frozenset[int]
    """Tokens that end the text."""
    sampling: Mapping[str, Any]
    """Options of ``generate``."""
    processors: Sequence[LogitsProcessor] = ()
    """What else changes the scores of tokens."""
    logprobs: int | None = None
    """How many likely tokens to name in the place of each one; None for no log probabilities."""
    echo: str | None = None
    """The text of the prompt if it comes first."""
    speculation: Speculation | None = None
    """How tokens are guessed; None for one token in each pass."""
    single_call: bool = False
    """Whether the answer ends with its first call of a tool."""
    adapter: str | None = None
    """The adapter that it is generated with; None for the model as it was opened."""
    new_parser: Callable[[], AnswerParser] | None = None
    """Makes what divides the text into content, reasoning and tool calls; None if all is content."""

    def new_text(self, tokenizer: Any) -> TokenText:
        """Make what turns the answer's tokens into text, in which marks of a parser are special tokens."""
        return TokenText(tokenizer, special=self.new_parser is not None)

    @property
    def model_options(self) -> dict[str, Any]:
        """Options of each call of the model."""
        return {} if self.adapter is None else {"adapter": self.adapter}

    @property
    def is_next_token(self) -> bool:
        """Whether the answer is the one token that the scores of the prompt's last token make the likeliest."""
        plain = not self.processors and self.sampling.get("repetition_penalty", 1.0) == 1.0
        greedy = not self.sampling["do_sample"] and "min_new_tokens" not in self.sampling
        return self.new_tokens == 1 and plain and greedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The text that a token adds to an answer; the last piece has no token, and says why the answer ends."""

    index: int
    text: str
    tokens: int
    finish_reason: str | None = None
    """"stop", "length" or "tool_calls"."""
    logprobs: Sequence[TokenLogprob] = ()
    """Of its token, or of the prompt's tokens."""
    reasoning: str = ""
    """Text that comes before the answer itself."""
    calls: Sequence[MadeCall] = ()
    """Calls of tools that are complete with this piece."""
    stop: str | None = None
    """The stop string that ends the answer, if one does."""
    guessed: int | None = None
    """Tokens of the answer that were guessed, if any are; told by the last piece."""


def generation_arguments(
    model: StreamedModel,
    tokenizer: Any,
    choice: Choice,
    recorder: LogprobRecorder | None = None,
    steps: "_StepCounter | None" = None,
) -> dict[str, Any]:
    """The arguments of ``StreamedModel.stream`` for ``choice``.

    ``recorder`` records log probabilities, ``steps`` counts passes.
    """
    pad = model.module.generation_config.pad_token_id
    input_ids = torch.tensor([choice.prompt])
    criteria: list[StoppingCriteria] = [_EndAtStop(tokenizer, choice)] if choice.stops else []
    if steps is not None:
        criteria.append(steps)
    processors = list(choice.processors)
    if recorder is not None:
        criteria.append(recorder.criterion)
        processors.insert(0, recorder.processor)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": max(choice.new_tokens, 1),
        **choice.sampling,
        **choice.model_options,
        **({} if choice.speculation is None else choice.speculation.options()),
        "eos_token_id": sorted(choice.ends) or None,
        "logits_processor": LogitsProcessorList(processors),
        "stopping_criteria": StoppingCriteriaList(criteria),
        # There is no padding, but transformers warns if this is not set.
        "pad_token_id": next(iter(choice.ends), 0) if pad is None else pad,
    }


async def generate_text(
    model: StreamedModel,
    tokenizer: Any,
    choice: Choice,
    *,
    on_begin: Callable[[], None] | None = None,
) -> AsyncGenerator[Piece]:
    """Generate the answer to ``choice``, piece by piece. Closing the generator ends the generation.

    ``on_begin`` is called when it has its memory and begins.
    """
    text, stops = choice.new_text(tokenizer), StopStrings(choice.stops)
    parser = choice.new_parser() if choice.new_parser is not None else None
    called, finish_reason, tokens, steps = False, "length", 0, _StepCounter()

    def piece_of(raw: str, tokens: int, **more: Any) -> Piece:
        parsed = Parsed(text=raw) if parser is None else parser.add(raw)
        return _piece(choice, parsed, tokens=tokens, **more)

    if choice.echo is None:
        pieces = _new_tokens(model, tokenizer, choice, on_begin, steps)
    else:
        pieces = _prompt_and_new_tokens(model, tokenizer, choice)
    async with aclosing(pieces):
        async for token, logprobs in pieces:
            if token is None:
                yield _piece(choice, Parsed(text=choice.echo or ""), tokens=0, logprobs=logprobs)
                continue
            if stops.found or steps.ended:  # a step may make several tokens
                continue
            ended = token in choice.ends
            # The token that ends the answer is no part of it, even if it has text.
            piece = piece_of("" if ended else stops.add(text.add(token)), 1, logprobs=logprobs)
            called, tokens = called or bool(piece.calls), tokens + 1
            yield piece
            steps.ended = called and choice.single_call
            if ended or steps.ended:
                finish_reason = "stop"
    is_cut = stops.found or steps.ended
    tail = piece_of("" if is_cut else stops.add(text.finish()) + stops.finish(), 0)
    rest = Parsed() if parser is None else parser.finish()
    if stops.found:
        finish_reason = "stop"
    if finish_reason == "stop" and (called or tail.calls or rest.calls):
        finish_reason = "tool_calls"
    parsed = Parsed(
        text=tail.text + rest.text,
        reasoning=tail.reasoning + rest.reasoning,
        calls=[*tail.calls, *rest.calls],
    )
    yield _piece(
        choice,
        parsed,
        tokens=0,
        finish_reason=finish_reason,
        stop=stops.string,
        guessed=None if choice.speculation is None else max(tokens - steps.count, 0),
    )


def _piece(choice: Choice, parsed: Parsed, *, tokens: int, **more: Any) -> Piece:
    return Piece(
        index=choice.index,
        text=parsed.text,
        reasoning=parsed.reasoning,
        calls=parsed.calls,
        tokens=tokens,
        **more,
    )


# A token, or None for the prompt; and its log probabilities, or those of all of the prompt's tokens.
_Scored = tuple[int | None, Sequence[TokenLogprob]]


async def _new_tokens(
    model: StreamedModel,
    tokenizer: Any,
    choice: Choice,
    on_begin: Callable[[], None] | None = None,
    steps: "_StepCounter | None" = None,
) -> AsyncGenerator[_Scored]:
    if choice.new_tokens == 0:
        return
    count = choice.logprobs
    recorder = None if count is None else LogprobRecorder(tokenizer, count)
    arguments = generation_arguments(model, tokenizer, choice, recorder, steps)
    tokens = model.stream(**arguments, on_begin=on_begin)
    async with aclosing(cast("AsyncGenerator[int]", tokens)):
        async for token in tokens:
            yield token, [] if recorder is None else [await recorder.recorded.get()]


async def _prompt_and_new_tokens(
    model: StreamedModel, tokenizer: Any, choice: Choice
) -> AsyncGenerator[_Scored]:
    count = choice.logprobs
    if count is None:
        yield None, []
    else:
        # One pass tells all of the prompt, and the token after it, which is all that evaluations ask for.
        output = await model.forward(
            input_ids=torch.tensor([choice.prompt]), use_cache=False, **choice.model_options
        )
        logits = output.logits[0]
        del output
        tokens = list(choice.prompt)
        if choice.is_next_token:
            tokens.append(int(logits[-1].argmax()))
        logprobs = await asyncio.to_thread(prompt_logprobs, tokenizer, logits, tokens, count)
        del logits
        yield None, logprobs[: len(choice.prompt)]
        if choice.is_next_token:
            yield tokens[-1], logprobs[-1:]
            return
    rest = _new_tokens(model, tokenizer, choice)
    async with aclosing(rest):
        async for each in rest:
            yield each


class _StepCounter(StoppingCriteria):
    """Counts the passes that make tokens, until ``ended`` is set."""

    def __init__(self) -> None:
        self.count = 0
        self.ended = False

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.count += 1
        return torch.full((len(input_ids),), self.ended, device=input_ids.device)


class _EndAtStop(StoppingCriteria):
    """Ends a generation in its own thread as soon as its text has a stop string, so that no further pass begins."""

    def __init__(self, tokenizer: Any, choice: Choice) -> None:
        self._text, self._stops = choice.new_text(tokenizer), StopStrings(choice.stops)
        self._length = len(choice.prompt)

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        new = input_ids[0, self._length :].tolist()
        self._length += len(new)
        for token in new:
            self._stops.add(self._text.add(token))
        return torch.tensor([self._stops.found], device=input_ids.device)
