"""Weights that stay packed, and are unpacked by tiles of rows while a linear layer multiplies with them.

A matrix that is unpacked as a whole takes memory for all of it, and is written to and read from RAM once more. A tile fits
a processor's cache: it is unpacked, multiplied with, and overwritten by the next one. Each element of a product is a sum
over one row of the weight, so tiles give equal bits, as far as the kernels do; ``tiles_are_exact`` tries them.
"""

import functools
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn
from torch.utils import _pytree as pytree

from layerstream.pipeline.modeling.edits import Streams
from layerstream.pipeline.modeling.packed_rows import PackedRows
from layerstream.pipeline.modeling.packed_tiles import Tiles
from layerstream.pipeline.planning.tiles import tile_bytes as matrix_tile_bytes
from layerstream.pipeline.planning.tiles import tile_rows

__all__ = ["PackedWeight", "tile_bytes", "tiles_are_exact"]

_aten = torch.ops.aten


class PackedWeight(Streams, nn.Parameter):
    """A parameter that is there in packed form.

    To torch it has the plain weight's shape, dtype and device. ``torch.nn.functional.linear`` multiplies with it tile by
    tile; any other operation gets the whole weight, unpacked for that operation alone.
    """

    _rows: PackedRows
    _parts: Mapping[str, torch.Tensor]
    _tiles: Tiles | None
    _fused_tokens: int

    @staticmethod
    def __new__(
        cls: type[Self],
        rows: PackedRows,
        parts: Mapping[str, torch.Tensor],
        *,
        shape: tuple[int, ...],
        requires_grad: bool,
        tiles: Tiles | None,
        fused_tokens: int = 0,
    ) -> Self:
        """A weight of ``shape`` made of ``parts``.

        Without ``tiles``, linear layers unpack it whole as well; with ``fused_tokens``, they multiply up to so many tokens
        with it without unpacking it.
        """
        weight: Self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls, shape, dtype=rows.dtype, device=torch.device("cpu"), requires_grad=requires_grad
        )
        weight._rows, weight._parts, weight._tiles = rows, parts, tiles
        weight._fused_tokens = fused_tokens
        return weight

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedWeight({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Multiply by tiles in linear layers; metadata and everything else are torch's own."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - torch's own idiom
            if func is nn.functional.linear and not torch.is_grad_enabled():
                return _linear(*args, **kwargs)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Unpack the whole weight for ``func``."""
        if func in {_aten.detach.default, _aten.alias.default}:
            return args[0]

        def unpack(leaf: Any) -> Any:
            return leaf.unpacked() if isinstance(leaf, cls) else leaf

        return func(*pytree.tree_map(unpack, args), **pytree.tree_map(unpack, kwargs or {}))

    def unpacked(self) -> torch.Tensor:
        """The plain weight, in memory of its own."""
        rows = self._rows
        plain = torch.empty(tuple(self.shape), dtype=rows.dtype)
        scratch = None
        if rows.order is not None:
            scratch = torch.empty((rows.tile_rows, rows.columns), dtype=rows.dtype)
        plain_rows = plain.view(rows.rows, rows.columns)
        if self._tiles is None:
            self._unpack_all(plain_rows, scratch)
        else:
            with self._tiles.unpacking(self._packed_bytes(rows.rows)):
                self._unpack_all(plain_rows, scratch)
        return plain

    def _packed_bytes(self, count: int) -> int:
        """What ``count`` rows take packed, on average."""
        names = {name for matrix in self._rows.matrices for name in matrix.parts}
        stored = sum(matrix.rows for matrix in self._rows.matrices)
        return sum(self._parts[name].nbytes for name in names) * count // stored

    def _unpack_all(self, plain: torch.Tensor, scratch: torch.Tensor | None) -> None:
        """Write all rows into ``plain``; with scattered ones, ``scratch`` has room for a tile."""
        step = self._rows.tile_rows
        for first in range(0, self._rows.rows, step):
            part = plain[first : first + step]
            self._rows.unpack(self._parts, first, part, scratch=scratch)

    def _tile(self, first: int, count: int, memory: torch.Tensor) -> torch.Tensor:
        """Some rows, unpacked into ``memory``."""
        rows, tiles = self._rows, self._tiles
        assert tiles is not None  # noqa: S101
        nbytes = count * rows.columns * rows.dtype.itemsize
        plain = memory[:nbytes].view(rows.dtype).view(count, rows.columns)
        with tiles.unpacking(self._packed_bytes(count)):
            if rows.order is not None:
                scratch = memory[nbytes : 2 * nbytes].view(rows.dtype).view(count, rows.columns)
                rows.unpack(self._parts, first, plain, scratch=scratch)
                return plain
            rows.unpack(self._parts, first, plain)
        return plain

    def _unpacked_once(self) -> torch.Tensor | None:
        """The whole weight, if several passes share it and there is memory."""
        rows, tiles = self._rows, self._tiles
        assert tiles is not None  # noqa: S101
        form = (rows.rows, rows.columns)

        def unpack(memory: torch.Tensor) -> None:
            plain = memory.view(rows.dtype).view(form)
            if rows.order is not None:
                with tiles.tile() as tile, tiles.unpacking(self._packed_bytes(rows.rows)):
                    scratch = tile[: tile_bytes(rows) // 2].view(rows.dtype)
                    self._unpack_all(plain, scratch.view(-1, rows.columns))
                return
            with tiles.unpacking(self._packed_bytes(rows.rows)):
                rows.unpack(self._parts, 0, plain)

        memory = tiles.once.get(id(self), rows.nbytes, unpack)
        return None if memory is None else memory.view(rows.dtype).view(form)

    def _multiplied(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The product without unpacking: summed in float32, and rounded at the end."""
        rows = self._rows
        flat = inputs.reshape(-1, rows.columns).float().contiguous()
        sums = torch.empty((len(flat), rows.rows))
        rows.multiply(self._parts, 0, flat, sums)
        if rows.order is not None:
            sums = sums[:, rows.order]
        if bias is not None:
            sums += bias.float()
        return sums.to(inputs.dtype).view(*inputs.shape[:-1], rows.rows)


def _linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    if not isinstance(weight, PackedWeight) or weight._tiles is None:  # noqa: SLF001
        return nn.functional.linear(inputs, weight, bias)
    rows, tiles = weight._rows, weight._tiles  # noqa: SLF001
    fits = inputs.shape[-1:] == (rows.columns,) and inputs.dtype == rows.dtype
    if fits and inputs.numel() <= weight._fused_tokens * rows.columns:  # noqa: SLF001
        return weight._multiplied(inputs, bias)  # noqa: SLF001
    if (plain := weight._unpacked_once()) is not None:  # noqa: SLF001
        return nn.functional.linear(inputs, plain, bias)
    step = rows.tile_rows
    if step == rows.rows:
        with tiles.tile() as memory:
            return nn.functional.linear(inputs, weight._tile(0, step, memory), bias)  # noqa: SLF001
    result = inputs.new_empty((*inputs.shape[:-1], rows.rows))
    with tiles.tile() as memory:
        for first in range(0, rows.rows, step):
            end = min(first + step, rows.rows)
            plain = weight._tile(first, end - first, memory)  # noqa: SLF001
            part = nn.functional.linear(inputs, plain, None if bias is None else bias[first:end])
            result[..., first:end] = part
    return result


def tile_bytes(rows: PackedRows) -> int:
    """What a tile of ``rows`` takes: scattered ones need as much again to put them in order."""
    return matrix_tile_bytes(rows.rows, rows.nbytes) * (1 if rows.order is None else 2)


@functools.cache
def tiles_are_exact(
    rows: int, columns: int, dtype: torch.dtype, *, tokens: tuple[int, ...] = (1, 5, 33)
) -> bool:
    """Whether products by tiles have the bits of the whole product here, for a matrix of this form."""
    step = tile_rows(rows, columns, dtype.itemsize)
    if step == rows:
        return True
    # Two tiles and a ragged one have all the seams that more would have.
    height = min(rows, 2 * step + rows % step)
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand((height, columns), generator=generator).sub_(0.5).to(dtype)
    for count in tokens:
        inputs = torch.rand((1, count, columns), generator=generator).sub_(0.5).to(dtype)
        whole = nn.functional.linear(inputs, weight)
        tiled = torch.cat(
            [nn.functional.linear(inputs, part) for part in torch.split(weight, step)], dim=-1
        )
        if not torch.equal(whole, tiled):
            return False
    return True
