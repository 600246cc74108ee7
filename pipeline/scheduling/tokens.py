"""The tokens of a generation as they are made: counted, and passed to the event loop."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from typing import Any

import torch

from layerstream.pipeline.modeling.call_arguments import by_name, takes_criteria
from layerstream.pipeline.scheduling.request import Request
from layerstream.stages.errors import ModelError

__all__ = ["stream_tokens", "with_token_counter"]


def with_token_counter(
    module: Any, inputs: Sequence[Any], named: Mapping[str, Any], request: Request
) -> dict[str, Any]:
    """The keyword arguments of ``generate`` with one more stopping criterion, which counts ``request``'s tokens.

    Tokens are not counted where criteria cannot be added by name: if the model has a ``generate`` of its own that
    takes none, if the caller passes them by position, or with ``custom_generate``.
    """
    arguments = by_name(getattr(module, "generate", None), inputs, named)
    if arguments.get("cache_implementation") == "paged":
        raise ModelError(
            f'cache_implementation="paged" does not work on a streamed {type(module).__name__}: it would take memory that is '
            "not reserved; call generate without it, from several threads, which share sweeps"
        )
    by_position = "stopping_criteria" in arguments.keys() - named.keys()
    if not takes_criteria(module) or by_position or arguments.get("custom_generate") is not None:
        return dict(named)
    from transformers import StoppingCriteria, StoppingCriteriaList

    class TokenCounter(StoppingCriteria):
        """Stops nothing. Called after each step with all tokens so far in each row."""

        length = request.cost.prompt_tokens

        def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            rows, length = input_ids.shape
            # Shorter than before: models that generate in pieces begin another one.
            request.tokens += request.cost.sequences * max(length - self.length, 1)
            self.length = length
            return torch.zeros(rows, dtype=torch.bool, device=input_ids.device)

    criteria = StoppingCriteriaList([*(arguments.get("stopping_criteria") or ()), TokenCounter()])
    return {**named, "stopping_criteria": criteria}


async def stream_tokens(
    generate: Callable[..., Coroutine[Any, Any, Any]], on_begin: Callable[[], None] | None
) -> AsyncGenerator[int]:
    """The tokens of one sequence, as ``generate(streamer=...)`` makes them; closing this ends the generation."""
    tokens: asyncio.Queue[int | None] = asyncio.Queue()
    streamer = _token_streamer(asyncio.get_running_loop(), tokens, on_begin)
    generating = asyncio.create_task(generate(streamer=streamer))
    generating.add_done_callback(lambda _: tokens.put_nowait(None))
    try:
        while (token := await tokens.get()) is not None:
            yield token
        await generating
    finally:
        generating.cancel()
        await asyncio.wait([generating])
        # Mark an error as retrieved: a caller that leaves early does not use it.
        generating.cancelled() or generating.exception()


def _token_streamer(
    loop: asyncio.AbstractEventLoop,
    tokens: asyncio.Queue[int | None],
    on_begin: Callable[[], None] | None,
) -> Any:
    """A streamer that puts the id of each new token of one sequence into ``tokens``, a queue of ``loop``.

    ``on_begin`` is called on the loop when the generation begins.
    """
    from transformers.generation.streamers import BaseStreamer

    class TokenStreamer(BaseStreamer):
        """Passes each new token to the event loop; the first call has the prompt."""

        prompt_seen = False

        def put(self, value: torch.Tensor) -> None:
            if not self.prompt_seen:
                self.prompt_seen = True
                if value.dim() > 1 and value.shape[0] > 1:
                    raise ModelError(
                        f"stream() yields the tokens of one sequence, but {value.shape[0]} were given; use generate()"
                    )
                if on_begin is not None:
                    loop.call_soon_threadsafe(on_begin)
                return
            for token in value.flatten().tolist():
                loop.call_soon_threadsafe(tokens.put_nowait, token)

        def end(self) -> None:
            """Nothing to do: the end is known from the generation's task."""

    return TokenStreamer()
