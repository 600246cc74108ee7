"""Attention in passes on the meta device, in the memory that a fused kernel takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["FusedAttention"]

# The member of torch.nn.attention.SDPBackend that computes the scores of all queries and keys.
_MATH_BACKEND = 0


class FusedAttention(TorchFunctionMode):
    """Makes attention on the meta device take the memory of the kernel that the real device would choose.

    torch's own attention on the meta device always computes all scores.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the tensors that a fused kernel makes, if the device would use one."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            result = self._fused(*args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)

    def _fused(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **options: Any
    ) -> torch.Tensor | None:
        """The result of attention; None if scores would be computed."""
        stand_ins = [
            each if each is None else self._stand_in(each)
            for each in (query, key, value, attn_mask)
        ]
        choose_backend: Callable[..., int] = torch._fused_sdp_choice  # noqa: SLF001 - no public way to ask
        if choose_backend(*stand_ins, *rest, **options) == _MATH_BACKEND:
            return None
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            # torch makes a mask of numbers from the negation of a boolean one.
            float_mask = torch.empty(attn_mask.shape, dtype=query.dtype)
            attn_mask.logical_not()
            attn_mask = float_mask
        *batch, heads, queries, _ = query.shape
        output = torch.empty((*batch, queries, heads, value.shape[-1]), dtype=query.dtype)
        # The sums of softmax, while the kernel runs.
        torch.empty((*batch, queries, heads), dtype=torch.float32)
        return output.transpose(-2, -3)

    def _stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the shape of ``tensor`` on the real device, in almost no memory."""
        row = torch.empty(tensor.shape[-1:], dtype=tensor.dtype, device=self._device)
        return row.expand(tensor.shape)
