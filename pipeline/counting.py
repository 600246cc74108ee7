"""Counts the tokens of a generation as they come."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from layerstream.pipeline.requests import Need, takes_criteria

__all__ = ["counted"]


class Tally(Protocol):
    """Whose tokens are counted."""

    tokens: int
    need: Need


def counted(module: Any, named: Mapping[str, Any], tally: Tally) -> dict[str, Any]:
    """The keyword arguments of ``generate`` with one criterion more, which stops nothing and counts.

    A model with a ``generate`` of its own that takes no criteria is called as it is, and its tokens are not
    counted; nor are those of a recipe from elsewhere.
    """
    if not takes_criteria(module) or named.get("custom_generate") is not None:
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

    given = named.get("stopping_criteria") or ()
    return {**named, "stopping_criteria": StoppingCriteriaList([*given, Count()])}
