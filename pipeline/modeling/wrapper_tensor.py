"""Tensors that stand for a weight without having its memory."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch.utils import _pytree as pytree

__all__ = ["IDENTITIES", "WrapperTensor"]

# They return the tensor itself, with other metadata of autograd at most.
IDENTITIES = frozenset({torch.ops.aten.alias.default, torch.ops.aten.detach.default})


class WrapperTensor(torch.Tensor):
    """A tensor with the shape, dtype and device of a weight, and no memory.

    Metadata is torch's own. Operations get what ``plain`` returns in its place.
    """

    # torch's functions run unchanged, down to the operations that __torch_dispatch__ gets.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001

    @classmethod
    def without_memory(
        cls,
        shape: Sequence[int],
        *,
        strides: Sequence[int] | None = None,
        storage_offset: int | None = None,
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool = False,
    ) -> Self:
        """A tensor with this metadata; contiguous without ``strides``."""
        tensor: Self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - torch's own idiom
            cls,
            tuple(shape),
            strides=strides,
            storage_offset=storage_offset,
            dtype=dtype,
            device=device,
            requires_grad=requires_grad,
        )
        return tensor

    def plain(self, func: Any, *, is_written: bool) -> torch.Tensor:
        """What the operation ``func`` computes with in place of this tensor.

        Args:
            func: One that needs more than metadata.
            is_written: Whether it changes this tensor in place.
        """
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute with plain tensors."""
        if func in IDENTITIES:
            return args[0]

        def plain(leaf: Any) -> Any:
            if not isinstance(leaf, cls):
                return leaf
            is_written = func._schema.is_mutable and leaf is args[0]  # noqa: SLF001 - no public way to ask
            return leaf.plain(func, is_written=is_written)

        return func(*pytree.tree_map(plain, args), **pytree.tree_map(plain, kwargs or {}))
