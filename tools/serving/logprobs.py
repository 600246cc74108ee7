"""Log probabilities of tokens, by the model's own scores: before temperature, biases and the like change them."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

__all__ = ["LogprobRecorder", "TokenLogprob", "prompt_logprobs"]

# Rows that are converted to float32 at the same time: all rows of a long prompt would take gigabytes.
_ROWS = 16
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token, and how likely it was; or one that was likely in its place."""

    text: str
    data: Sequence[int] | None
    """The bytes of its text; None if the tokenizer does not tell."""
    logprob: float | None
    """None for the first token of a prompt."""
    top: Sequence["TokenLogprob"] = ()
    """The likeliest tokens in its place, in descending order."""


def _named(
    tokenizer: Any, token: int, logprob: float | None, top: Sequence[TokenLogprob] = ()
) -> TokenLogprob:
    byte = _BYTE_TOKEN.fullmatch(str(tokenizer.convert_ids_to_tokens(token)))
    text = str(tokenizer.decode([token]))
    data = list(text.encode()) if "\ufffd" not in text else None
    if byte is not None:
        data = [int(byte[1], 16)]
    return TokenLogprob(text=text, data=data, logprob=logprob, top=top)


def _of_row(tokenizer: Any, row: torch.Tensor, token: int, count: int) -> TokenLogprob:
    """What ``row``, the log probabilities of all tokens, says of ``token``, and the ``count`` likeliest ones."""
    values, ids = row.topk(min(count, len(row)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    top = [_named(tokenizer, each, logprob) for each, logprob in pairs]
    return _named(tokenizer, token, float(row[token]), top)


def prompt_logprobs(
    tokenizer: Any, logits: torch.Tensor, tokens: Sequence[int], count: int
) -> list[TokenLogprob]:
    """The log probabilities of ``tokens`` from the second on.

    Args:
        tokenizer: The model's tokenizer.
        logits: The model's, one row for each token: that of the tokens after it.
        tokens: Token ids; may be one more than there are rows.
        count: How many likely tokens to name in the place of each.
    """
    made = [_named(tokenizer, tokens[0], None)]
    following = tokens[1:]
    for start in range(0, len(following), _ROWS):
        chosen = following[start : start + _ROWS]
        rows = logits[start : start + len(chosen)].float().log_softmax(-1)
        made += [
            _of_row(tokenizer, row, token, count) for row, token in zip(rows, chosen, strict=True)
        ]
    return made


class LogprobRecorder:
    """Records the log probabilities of one generation's new tokens.

    ``processor`` has to come first of the logits processors, ``criterion`` to be one of the stopping criteria.

    Args:
        tokenizer: The model's tokenizer.
        count: How many likely tokens to name in the place of each.

    Attributes:
        recorded: A queue of the running event loop with one entry for each new token.
    """

    def __init__(self, tokenizer: Any, count: int) -> None:
        self.recorded: asyncio.Queue[TokenLogprob] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        recorder = self

        class Processor(LogitsProcessor):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                del input_ids
                recorder._row = scores[0].float().log_softmax(-1)
                return scores

        class Criterion(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
                each = _of_row(tokenizer, recorder._row, int(input_ids[0, -1]), count)
                loop.call_soon_threadsafe(recorder.recorded.put_nowait, each)
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        self._row = torch.empty(0)
        self.processor, self.criterion = Processor(), Criterion()
