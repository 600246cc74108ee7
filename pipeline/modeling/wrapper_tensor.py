"""Tensors that stand for a weight without having its memory."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch.utils import _pytree as pytree

from layerstream.stages.errors import ModelError

__all__ = ["IDENTITIES", "PartOfWeight", "WrapperTensor"]

# They return the tensor itself, with other metadata of autograd at most.
IDENTITIES = frozenset({torch.ops.aten.alias.default, torch.ops.aten.detach.default})


class WrapperTensor(torch.Tensor):
    """A tensor with the shape, dtype and device of a weight, and no memory.

    Metadata is torch's own. Operations get what ``plain`` returns in its place.
    """

    protects_parts: ClassVar[bool] = False
    """Whether views of what ``plain`` returns refuse to be changed, since nothing would come of it."""

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

        written = _written(func, args, kwargs or {})

        def plain(leaf: Any) -> Any:
            return (
                leaf.plain(func, is_written=id(leaf) in written) if isinstance(leaf, cls) else leaf
            )

        result = func(*pytree.tree_map(plain, args), **pytree.tree_map(plain, kwargs or {}))
        if cls.protects_parts and func.is_view and isinstance(args[0], cls):
            return pytree.tree_map_only(torch.Tensor, PartOfWeight, result)
        return result


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[int]:
    """The ids of the tensors that ``func`` changes in place."""
    schema = func._schema  # noqa: SLF001 - no public way to ask
    if not schema.is_mutable:
        return set()
    given = {**dict(zip((each.name for each in schema.arguments), args, strict=False)), **kwargs}
    changed = [
        given.get(each.name)
        for each in schema.arguments
        if each.alias_info is not None and each.alias_info.is_write
    ]
    return {id(leaf) for leaf in pytree.tree_leaves(changed)}


class PartOfWeight(torch.Tensor):
    """A view of a weight that was read for it, or a view of that: read only, since its file does not change."""

    as_plain: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001

    @staticmethod
    def __new__(cls: type[Self], values: torch.Tensor) -> Self:
        """A tensor with the memory of ``values``."""
        part: Self = torch.Tensor._make_subclass(cls, values)  # noqa: SLF001 - torch's own idiom
        part.as_plain = values
        return part

    def __deepcopy__(self, _: Any) -> torch.Tensor:
        return self.as_plain.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a plain tensor."""
        return self.as_plain.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def numpy(self, **options: Any) -> Any:
        """As torch's."""
        return self.as_plain.numpy(**options)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute with plain tensors."""
        written = _written(func, args, kwargs or {})
        if any(
            isinstance(leaf, cls) and id(leaf) in written
            for leaf in pytree.tree_leaves((args, kwargs))
        ):
            raise ModelError(
                f"a part of a weight that streams cannot be changed ({func}): assign a whole tensor to the weight's data, "
                "which makes it resident, or load the model with transformers' from_pretrained"
            )

        def plain(leaf: Any) -> Any:
            return leaf.as_plain if isinstance(leaf, cls) else leaf

        result = func(*pytree.tree_map(plain, args), **pytree.tree_map(plain, kwargs or {}))
        is_part = (func.is_view or func in IDENTITIES) and isinstance(args[0], cls)
        return pytree.tree_map_only(torch.Tensor, cls, result) if is_part else result
