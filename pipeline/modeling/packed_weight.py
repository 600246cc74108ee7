"""Weights that stay packed, and are unpacked by tiles of rows while a linear layer multiplies with them.

A matrix that is unpacked as a whole takes memory for all of it, and is written to and read from RAM once more. A tile fits
a processor's cache: it is unpacked, multiplied with, and overwritten by the next one. Each element of a product is a sum
over one row of the weight, but in which order a kernel adds up may depend on the number of rows: for few tokens it does not, for
prompts it often does (oneDNN, AMX). ``tile_trials`` tries it; prompts of more tokens get the whole matrix.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from layerstream.pipeline.machine.probe_unpacking import TILE_BYTES
from layerstream.pipeline.modeling.edits import Streams
from layerstream.pipeline.modeling.packed_rows import PackedRows
from layerstream.pipeline.modeling.packed_tiles import Tiles
from layerstream.pipeline.modeling.unpacked_once import KeptUnpacked
from layerstream.pipeline.modeling.wrapper_tensor import WrapperTensor
from layerstream.pipeline.planning.tiles import tile_bytes as matrix_tile_bytes

__all__ = ["PackedWeight", "exact_tile_bytes", "tile_bytes"]

# Two tiles: calling twice takes longer than using what does not fit a cache of 16 MiB (8 % of a step, an Intel Xeon with AMX).
_WHOLE_BYTES = 2 * TILE_BYTES


class PackedWeight(Streams, WrapperTensor, nn.Parameter):
    """A parameter that is there in packed form.

    To torch it has the plain weight's shape, dtype and device. ``torch.nn.functional.linear`` multiplies with it tile by
    tile; any other operation gets the whole weight, unpacked for that operation alone.
    """

    _rows: PackedRows
    _parts: Mapping[str, torch.Tensor]
    _tiles: Tiles | None
    _fused_tokens: int
    _kept: tuple[KeptUnpacked, str] | None

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
        kept: tuple[KeptUnpacked, str] | None = None,
    ) -> Self:
        """A weight of ``shape`` made of ``parts``.

        Without ``tiles``, linear layers unpack it whole as well; with ``fused_tokens``, they multiply up to so many tokens
        with it without unpacking it. ``kept``: What may keep it unpacked, and its name there.
        """
        weight: Self = cls.without_memory(
            shape, dtype=rows.dtype, device=torch.device("cpu"), requires_grad=requires_grad
        )
        weight._rows, weight._parts, weight._tiles = rows, parts, tiles
        weight._fused_tokens, weight._kept = fused_tokens, kept
        return weight

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedWeight({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Multiply by tiles in linear layers; metadata and everything else are torch's own."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - torch's own idiom
            if func is nn.functional.linear and not torch.is_grad_enabled():
                return _linear(*args, **kwargs)
            return func(*args, **kwargs)

    def plain(self, _func: Any, *, is_written: bool) -> torch.Tensor:  # noqa: ARG002 - a copy may be written to
        """Unpack the whole weight for an operation."""
        return self.unpacked()

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
        """Some rows, unpacked into ``memory``; scattered ones in the order in which they are stored."""
        rows, tiles = self._rows, self._tiles
        assert tiles is not None  # noqa: S101
        nbytes = count * rows.columns * rows.dtype.itemsize
        plain = memory[:nbytes].view(rows.dtype).view(count, rows.columns)
        with tiles.unpacking(self._packed_bytes(count)):
            rows.unpack_stored(self._parts, first, plain)
        return plain

    def _whole(self, memory: torch.Tensor) -> torch.Tensor:
        """All rows, in order, unpacked into ``memory``, which has room for scattered ones twice."""
        rows, tiles = self._rows, self._tiles
        if rows.order is None:
            return self._tile(0, rows.rows, memory)
        assert tiles is not None  # noqa: S101
        both = memory[: 2 * rows.nbytes].view(rows.dtype).view(2, rows.rows, rows.columns)
        with tiles.unpacking(self._packed_bytes(rows.rows)):
            rows.unpack(self._parts, 0, both[0], scratch=both[1])
        return both[0]

    def _unpacked_once(self) -> torch.Tensor | None:
        """The whole weight, if it is kept so, or if several passes share it, and there is memory."""
        rows, tiles = self._rows, self._tiles
        assert tiles is not None  # noqa: S101
        form = (rows.rows, rows.columns)

        def unpack(memory: torch.Tensor) -> None:
            plain = memory.view(rows.dtype).view(form)
            if rows.order is not None:
                with tiles.tile() as tile, tiles.unpacking(self._packed_bytes(rows.rows)):
                    scratch = tile[: tile_bytes(rows)].view(rows.dtype)
                    self._unpack_all(plain, scratch.view(-1, rows.columns))
                return
            with tiles.unpacking(self._packed_bytes(rows.rows)):
                rows.unpack(self._parts, 0, plain)

        memory = None
        if self._kept is not None:
            kept, name = self._kept
            memory = kept.get(name, rows.nbytes, unpack)
        if memory is None:
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
        return _product(inputs, plain, bias, weight)
    is_exact = rows.exact_tokens is None or inputs.numel() <= rows.exact_tokens * rows.columns
    # Fused kernels promise no bits.
    by_tiles = is_exact or weight._fused_tokens  # noqa: SLF001
    # Where prompts need all of a matrix anyway, there is memory for it.
    is_small = rows.nbytes <= min(_WHOLE_BYTES, tiles.nbytes) and rows.order is None
    with tiles.tile() as memory:
        if by_tiles and not is_small:
            return _by_tiles(inputs, weight, bias, memory)
        return _product(inputs, weight._whole(memory), bias, weight)  # noqa: SLF001


def _product(
    inputs: torch.Tensor, plain: torch.Tensor, bias: torch.Tensor | None, weight: PackedWeight
) -> torch.Tensor:
    """Torch's product with ``plain``, rows of ``weight``, by the way that it takes for a plain weight.

    With a parameter that requires gradients, though none are computed, it multiplies rows of the last tokens of a prompt as a
    matrix; without, as a batch of matrices, for which it copies the weight.
    """
    with torch.inference_mode(mode=False), torch.no_grad():
        plain = plain.detach().requires_grad_(weight.requires_grad)
    return nn.functional.linear(inputs, plain, bias)


def _by_tiles(
    inputs: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, memory: torch.Tensor
) -> torch.Tensor:
    """The product tile by tile. Scattered rows are multiplied as they are stored, and the results put in order."""
    rows, places = weight._rows, None  # noqa: SLF001
    if rows.order is not None:
        # Its inverse, in a tenth of the time of sorting.
        places = torch.empty_like(rows.order).scatter_(0, rows.order, torch.arange(rows.rows))
        bias = None if bias is None else bias[places]
    result = inputs.new_empty((*inputs.shape[:-1], rows.rows))
    for first in range(0, rows.rows, rows.tile_rows):
        end = min(first + rows.tile_rows, rows.rows)
        plain = weight._tile(first, end - first, memory)  # noqa: SLF001
        part = _product(inputs, plain, None if bias is None else bias[first:end], weight)
        if places is None:
            result[..., first:end] = part
        else:
            result.index_copy_(-1, places[first:end], part)
    return result


def tile_bytes(rows: PackedRows) -> int:
    """What a tile of ``rows`` takes."""
    return matrix_tile_bytes(rows.rows, rows.nbytes)


def exact_tile_bytes(rows: PackedRows) -> int:
    """The same where bits have to be equal for any number of tokens; scattered rows need as much again to put them in order."""
    if rows.exact_tokens is None:
        return tile_bytes(rows)
    return rows.nbytes * (1 if rows.order is None else 2)
