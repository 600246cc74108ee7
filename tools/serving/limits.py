"""How many tokens a request may have: by the model's context, and by the memory for requests."""

from collections.abc import Callable
from functools import cached_property

import torch

from layerstream.pipeline import AdmissionError, StreamedModel
from layerstream.tools.running.context import context_in
from layerstream.tools.serving.errors import ApiError

__all__ = ["Limits"]

# Pieces of a prompt have at least 32 tokens, so this is the longest prompt that is never divided.
_IN_ONE_PIECE = 62
# Longer contexts than this are not looked for where a model does not tell its own.
_LONGEST = 1 << 20


class Limits:
    """The limits of one model's requests.

    Args:
        model: The model, open.
        requests: The number of requests whose memory is reserved.
        new_tokens: The tokens of an answer whose memory is reserved for each of them.
    """

    def __init__(self, model: StreamedModel, *, requests: int, new_tokens: int) -> None:
        self._model = model
        self._requests = requests
        self._new_tokens = new_tokens
        self._longest = context_in(model.module.config.get_text_config().to_dict()) or _LONGEST

    @cached_property
    def context(self) -> int:
        """The maximum number of tokens of prompt and answer together, by the model's config and by memory."""

        def fits(tokens: int) -> bool:
            # What takes most: a prompt of all tokens but one, or one that is just too short to be processed in pieces.
            prompts = {max(tokens - 1, 1), min(max(tokens - 1, 1), _IN_ONE_PIECE)}
            return all(self._memory_of(each, max(tokens - each, 1)) is not None for each in prompts)

        return max(_largest(self._longest, fits), 1)

    def new_tokens(self, prompt_tokens: int, *, asked: int | None, param: str) -> int:
        """The maximum number of tokens after a prompt.

        If the request sets none, it is the rest of the context, but not more than one of the requests for which memory
        is reserved could have, so that others need not wait for its end.

        Raises:
            ApiError: The request exceeds the context.
        """
        room = self.context - prompt_tokens
        count = 1 if asked is None else asked
        if count > room:
            raise ApiError(
                400,
                f"This model's maximum context length is {self.context} tokens. However, you requested "
                f"{prompt_tokens + count} tokens ({prompt_tokens} in the {param}, {count} in the completion). "
                "Please reduce them.",
                param=param,
                code="context_length_exceeded",
            )
        if asked is not None:
            return asked
        share = self._model.stats().reservable_bytes // self._requests

        def within(limit_bytes: int) -> Callable[[int], bool]:
            def fits(new_tokens: int) -> bool:
                nbytes = self._memory_of(prompt_tokens, new_tokens)
                return nbytes is not None and nbytes <= limit_bytes

            return fits

        if (found := _largest(room, within(share))) >= min(self._new_tokens, room):
            return found
        least = min(self._new_tokens, room)
        return max(1, _largest(least, within(self._model.stats().reservable_bytes)))

    def _memory_of(self, prompt_tokens: int, new_tokens: int) -> int | None:
        """The bytes that such a request reserves; None if there are not so many."""
        ids = torch.zeros((1, prompt_tokens), dtype=torch.long)
        try:
            return self._model.check(input_ids=ids, max_new_tokens=new_tokens, num_beams=1)
        except AdmissionError:
            return None


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``most`` that fits, if all smaller ones do; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
