"""Which experts tokens are routed to, and computing with some of them at a time, as transformers' grouped implementation does."""

from collections import Counter
from itertools import accumulate
from typing import Any

import torch

from layerstream.pipeline.modeling.expert_banks import Bank, Inputs
from layerstream.pipeline.modeling.row_activation import activate_rows

__all__ = ["ExpertChoices"]


class ExpertChoices:
    """The choices of all tokens, and what the chosen experts have made of them so far.

    Args:
        index: The experts of each token, ``[tokens, choices]``.

    Attributes:
        experts: Those that were chosen, ascending.
    """

    def __init__(self, index: torch.Tensor) -> None:
        self._index = index
        self._chosen = index.reshape(-1)
        # Of a few choices, in a tenth of the time of torch's operations; of thousands, in as much.
        self._counts = Counter(self._chosen.tolist())
        self.experts = sorted(self._counts)
        ends = accumulate(self._counts[expert] for expert in self.experts)
        self._ends = dict(zip(self.experts, ends, strict=True))
        self._order: torch.Tensor | None = None
        self._results: torch.Tensor | None = None

    def compute(self, module: Any, bank: Bank, hidden: torch.Tensor) -> None:
        """Compute the choices that fall on the experts of ``bank``, all of which were chosen.

        Args:
            module: The experts' module.
            bank: Has experts in ascending order.
            hidden: The inputs of all tokens.
        """
        if self._order is None:
            # The order of rows within an expert decides on bits, and torch's sort is not stable: the same call, on all of them.
            self._order = torch.sort(self._chosen)[1]
        counts = [self._counts[expert] for expert in bank.experts]
        # Where the rows of this bank are in that order, expert by expert.
        if sum(counts) == len(self._chosen):
            rows = torch.arange(len(self._chosen), device=hidden.device)
        else:
            ends = [self._ends[expert] for expert in bank.experts]
            spans = [range(end - n, end) for end, n in zip(ends, counts, strict=True)]
            rows = torch.tensor([row for span in spans for row in span], device=hidden.device)
        chosen = self._order[rows]
        inputs = Inputs(
            places=bank.places, counts=counts, rows=hidden[chosen // self._index.shape[1]]
        )
        part = _products(module, bank, inputs, rows, total=len(self._chosen))
        if self._results is None:
            self._results = part.new_empty((len(self._chosen), part.shape[-1]))
        self._results[chosen] = part

    def summed(self, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The results of each token, weighted and summed as in one computation with all experts."""
        assert self._results is not None  # noqa: S101
        weighted = self._results * weights.reshape(-1, 1)
        return weighted.view(*self._index.shape, -1).sum(dim=1).to(dtype)


def _products(
    module: Any, bank: Bank, inputs: Inputs, rows: torch.Tensor, *, total: int
) -> torch.Tensor:
    """The product of each input with its expert, as in transformers' grouped implementation.

    Args:
        module: The experts' module.
        bank: Has the experts.
        inputs: Tokens.
        rows: Which of the rows of a computation with all experts these are.
        total: How many rows that has.
    """

    def linear(values: torch.Tensor, name: str) -> torch.Tensor:
        given = inputs.with_rows(values)
        result = bank.products(name, given, is_transposed=module.is_transposed)
        if module.has_bias:
            result.add_(bank.tensors[f"{name}_bias"][given.place_of_each()])
        return result

    inner = (
        activate_rows(module._apply_gate, linear(inputs.rows, "gate_up_proj"), rows, total)  # noqa: SLF001
        if module.has_gate
        else activate_rows(module.act_fn, linear(inputs.rows, "up_proj"), rows, total)
    )
    outer = linear(inner, "down_proj")
    if getattr(module, "has_post_expert_norm", False):
        outer = module.post_expert_norm(outer)
    return outer
