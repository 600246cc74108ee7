"""What fp8, MXFP4 and integer packings share: numbers of 8 or 4 bits, and scales (and zero points) of blocks of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from layerstream.stages.unpack.compiling import compiled
from layerstream.stages.unpack.packing import (
    LIKE,
    byte_array,
    check_rows,
    check_window,
    storage_array,
)
from layerstream.stages.unpack.plain.gguf_blocks import halved_exponents
from layerstream.stages.unpack.products import check_product, multiply_plainly, multiply_tokens

__all__ = [
    "NUMBERS",
    "SCALES",
    "Geometry",
    "NumberFormat",
    "ScaleFormat",
    "ScaledPacking",
    "ScaledRows",
    "scales_of",
]

# Of torch's operations at a time: their intermediate results take some MiB, whatever the matrix.
_PLAIN_NUMBERS = 1 << 16
_BYTE = 8
# Columns that the kernel of products takes at a time; they have one scale, or two.
_CHUNK = 64


class NumberFormat(NamedTuple):
    """How the numbers of a matrix are packed."""

    bits: int
    like: Any
    """An empty array whose type tells a kernel what the bits mean: see ``numbers`` in ``kernels/lanes.py``."""
    floats: Callable[[torch.Tensor], torch.Tensor]
    """Turns ``uint8`` (numbers of 8 bits, or of 4 bits in the lower half) into float32, for processes without kernels."""


class ScaleFormat(NamedTuple):
    """How the scales are stored."""

    like: Any
    """As in ``NumberFormat``: see ``scale_at`` in ``kernels/vectors.py``."""
    floats: Callable[[torch.Tensor], torch.Tensor]
    """Turns stored scales into float32."""


class Geometry(NamedTuple):
    """Which scale belongs to which number. The order is that of the kernels."""

    columns: int
    row_bytes: int
    height: int
    """Rows that share scales."""
    width: int
    """Columns that share a scale; fewer in the last block of a row, if they do not divide the columns."""
    bands: int
    """Rows of scales. More rows than they are for begin anew with the first."""
    groups: int
    """Scales in a row."""
    zero_bits: int
    """0: no zero points; -8: a signed byte beside each scale; 4 or 8: packed into words along the rows of each matrix."""
    matrix_rows: int
    """Rows of one matrix, of several (experts) that lie one behind the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledRows:
    """A packed matrix, ready to be unpacked by a kernel or by torch."""

    encoding: str
    packed: torch.Tensor
    scales: torch.Tensor
    scale: ScaleFormat
    numbers: NumberFormat
    rounding: torch.dtype
    """What products are rounded to, before they are cast to the output's dtype."""
    geometry: Geometry
    zeros: torch.Tensor | None = None

    def unpack(self, first: int, out: torch.Tensor) -> None:
        """Write rows from ``first`` on into ``out``."""
        columns = self.geometry.columns
        check_window(self.encoding, rows=self.rows, columns=columns, first=first, out=out)
        name = "scaled_bytes" if self.numbers.bits == _BYTE else "scaled_nibbles"
        kernel = compiled("scaled_rows", name)
        if kernel is None:
            self._unpack_plainly(first, out)
            return
        # What is rounded to the output's dtype anyway needs no rounding before.
        rounding = torch.float32 if self.rounding == out.dtype else self.rounding
        arguments = (*self._arguments(), LIKE[rounding], tuple(self.geometry), first)
        kernel(out.numel(), len(out), *arguments, storage_array(out))

    def multiply(self, first: int, inputs: torch.Tensor, out: torch.Tensor) -> None:
        """Multiply inputs with rows from ``first`` on."""
        check_product(self.encoding, columns=self.geometry.columns, inputs=inputs, out=out)
        check_rows(self.encoding, rows=self.rows, first=first, count=out.shape[1])
        kernel = compiled("scaled_products", "scaled_product")
        columns, width = self.geometry.columns, self.geometry.width
        if kernel is None or columns % _CHUNK or (width % _CHUNK and width != _CHUNK // 2):
            multiply_plainly(self.unpack, first, inputs, out)
            return
        arguments = (*self._arguments(), tuple(self.geometry), first, out.shape[1])
        multiply_tokens(kernel, arguments, inputs, out)

    @property
    def rows(self) -> int:
        """Rows of all matrices together."""
        return self.packed.nbytes // self.geometry.row_bytes

    def _arguments(self) -> tuple[Any, ...]:
        return (
            byte_array(self.packed),
            byte_array(self.scales),
            _NO_ZEROS if self.zeros is None else byte_array(self.zeros),
            self.numbers.like,
            self.scale.like,
        )

    def _unpack_plainly(self, first: int, out: torch.Tensor) -> None:
        step = max(1, _PLAIN_NUMBERS // self.geometry.columns)
        for start in range(0, len(out), step):
            rows = torch.arange(first + start, first + min(start + step, len(out)))
            values = self._numbers(rows)
            if (zeros := self._zero_points(rows)) is not None:
                values = values - self._spread(zeros)
            scales = self.scales.reshape(-1, self.geometry.groups)[self._bands(rows)]
            products = values * self._spread(self.scale.floats(scales))
            out[start : start + step] = products.to(self.rounding)

    def _bands(self, rows: torch.Tensor) -> torch.Tensor:
        return rows // self.geometry.height % self.geometry.bands

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """Repeat one value for each group as often as the group has columns."""
        spread = values.repeat_interleave(self.geometry.width, dim=1)
        return spread[:, : self.geometry.columns]

    def _numbers(self, rows: torch.Tensor) -> torch.Tensor:
        data = self.packed.reshape(-1).view(torch.uint8).view(-1, self.geometry.row_bytes)[rows]
        if self.numbers.bits == 4:
            data = torch.stack([data & 15, data >> 4], dim=-1).view(len(rows), -1)
        return self.numbers.floats(data[:, : self.geometry.columns])

    def _zero_points(self, rows: torch.Tensor) -> torch.Tensor | None:
        bits, groups = self.geometry.zero_bits, self.geometry.groups
        if self.zeros is None:
            return None
        if bits < 0:
            return self.zeros.reshape(-1, groups)[self._bands(rows)].to(torch.float32)
        words = -(-self.geometry.matrix_rows * bits // 32)
        bit = rows % self.geometry.matrix_rows * bits
        places = rows // self.geometry.matrix_rows * words + bit // 32
        chosen = self.zeros.reshape(-1, groups)[places] >> (bit % 32)[:, None]
        return ((chosen & ((1 << bits) - 1)) - (1 << (bits - 1))).to(torch.float32)


class ScaledPacking(ABC):
    """A packing whose parts are a matrix with scales."""

    __slots__ = ()

    @abstractmethod
    def matrix(self, parts: Sequence[torch.Tensor]) -> ScaledRows:
        """Return the parts as such a matrix, after checking that they fit one another."""

    def unpack(self, parts: Sequence[torch.Tensor], first: int, out: torch.Tensor) -> None:
        """Write rows of the unpacked matrix into ``out``: see ``Packing``."""
        self.matrix(parts).unpack(first, out)

    def multiply(
        self, parts: Sequence[torch.Tensor], first: int, inputs: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Multiply a few inputs with rows of the matrix: see ``Packing``."""
        self.matrix(parts).multiply(first, inputs, out)


_NO_ZEROS = np.empty(0, np.float32)


def _fp4(nibbles: torch.Tensor) -> torch.Tensor:
    table = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
    return torch.tensor(table)[nibbles.int()]


def _signed(zero: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda data: data.to(torch.float32) - zero


def _viewed(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda data: data.view(dtype).to(torch.float32)


NUMBERS: Final[dict[str, NumberFormat]] = {
    "e4m3": NumberFormat(8, np.empty(0, np.uint8), _viewed(torch.float8_e4m3fn)),
    "e5m2": NumberFormat(8, np.empty(0, np.uint16), _viewed(torch.float8_e5m2)),
    "int8": NumberFormat(8, np.empty(0, np.int8), _viewed(torch.int8)),
    "int8 + 128": NumberFormat(8, np.empty(0, np.uint32), _signed(128)),
    "int4 + 8": NumberFormat(4, np.empty(0, np.int16), _signed(8)),
    "e2m1": NumberFormat(4, np.empty(0, np.int32), _fp4),
    # Integers, for half the scale: all products are exact.
    "2 * e2m1": NumberFormat(4, np.empty(0, np.int64), lambda data: _fp4(data) * 2),
}
SCALES: Final[dict[str, ScaleFormat]] = {
    "float32": ScaleFormat(np.empty(0, np.float32), lambda scales: scales),
    "bfloat16": ScaleFormat(np.empty(0, np.uint16), _viewed(torch.bfloat16)),
    "float16": ScaleFormat(np.empty(0, np.int16), _viewed(torch.float16)),
    "uint8": ScaleFormat(np.empty(0, np.uint8), lambda scales: (scales.float() - 127.0).exp2()),
    "float8_e8m0fnu": ScaleFormat(np.empty(0, np.int8), lambda scales: scales.float()),
    "half of uint8": ScaleFormat(np.empty(0, np.uint32), halved_exponents),
}
"""By the name of the stored dtype; ``uint8`` are exponents."""


def scales_of(scales: torch.Tensor) -> ScaleFormat:
    """Return the format of stored scales."""
    found = SCALES.get(str(scales.dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"Scales of {scales.dtype} are not known, only {', '.join(SCALES)}.")
    return found
