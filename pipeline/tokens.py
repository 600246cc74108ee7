"""The tokens of a generation as they come: counted, and handed to the event loop."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from layerstream.pipeline.calls import by_name, takes_criteria
from layerstream.pipeline.requests import Need
from layerstream.stages.errors import ModelError

__all__ = ["counted", "token_streamer"]


# A protocol, since its one implementation, the engine's ``Request``, imports this module.
class Tally(Protocol):
    """Whose tokens are counted."""

    tokens: int
    need: Need


def counted(
    module: Any, inputs: Sequence[Any], named: Mapping[str, Any], tally: Tally
) -> dict[str, Any]:
    """The keyword arguments of ``generate`` with one criterion more, which stops nothing and counts.

    A model with a ``generate`` of its own that takes no criteria is called as it is, and its tokens are not
    counted; nor are those of a recipe from elsewhere.
    """
    given = by_name(getattr(module, "generate", None), inputs, named)
    by_place = "stopping_criteria" in given.keys() - named.keys()
    if not takes_criteria(module) or by_place or given.get("custom_generate") is not None:
        return dict(named)
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Count(StoppingCriteria):
        """Stops nothing. It is asked after each step, with all tokens so far in each row."""

        length = tally.need.prompt_tokens

        def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            rows, length = input_ids.shape
            # Shorter than before: models that generate piece by piece begin another one.
            tally.tokens += tally.need.sequences * max(length - self.length, 1)
            self.length = length
            return torch.zeros(rows, dtype=torch.bool, device=input_ids.device)

    criteria = StoppingCriteriaList([*(given.get("stopping_criteria") or ()), Count()])
    return {**named, "stopping_criteria": criteria}


def token_streamer(loop: asyncio.AbstractEventLoop, tokens: asyncio.Queue[int | None]) -> Any:
    """A streamer that puts the id of each new token of one sequence into ``tokens``, a queue of ``loop``."""
    from transformers.generation.streamers import BaseStreamer

    class TokenStreamer(BaseStreamer):
        """Hands each new token to the event loop; the first call brings the prompt."""

        prompt_seen = False

        def put(self, value: torch.Tensor) -> None:
            if not self.prompt_seen:
                self.prompt_seen = True
                if value.dim() > 1 and value.shape[0] > 1:
                    raise ModelError(
                        f"stream() yields the tokens of one sequence, but {value.shape[0]} were given; use generate()"
                    )
                return
            for token in value.flatten().tolist():
                loop.call_soon_threadsafe(tokens.put_nowait, token)

        def end(self) -> None:
            """Nothing to do: the generation's task tells when it is done."""

    return TokenStreamer()
