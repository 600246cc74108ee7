"""Weights in GGUF's blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import torch

from layerstream.stages.unpack.compiling import compiled
from layerstream.stages.unpack.packing import (
    LIKE,
    byte_array,
    check_rows,
    check_window,
    storage_array,
)
from layerstream.stages.unpack.plain.gguf_blocks import BLOCK_VALUES
from layerstream.stages.unpack.products import (
    check_product,
    multiply_plainly,
    multiply_tokens,
)

__all__ = ["GGUF_BLOCKS", "GgufBlock", "GgufPacking"]


class GgufBlock(NamedTuple):
    """The size of an encoding's block, and the kernel that unpacks it."""

    columns: int
    nbytes: int
    module: str
    kernel: str


_SMALL, _LARGE = "gguf_blocks", "gguf_k_blocks"
GGUF_BLOCKS: Final[dict[str, GgufBlock]] = {
    "Q4_0": GgufBlock(32, 18, _SMALL, "q4_0"),
    "Q4_1": GgufBlock(32, 20, _SMALL, "q4_1"),
    "Q5_0": GgufBlock(32, 22, _SMALL, "q5_0"),
    "Q5_1": GgufBlock(32, 24, _SMALL, "q5_1"),
    "Q8_0": GgufBlock(32, 34, _SMALL, "q8_0"),
    "Q2_K": GgufBlock(256, 84, _LARGE, "q2_k"),
    "Q3_K": GgufBlock(256, 110, _LARGE, "q3_k"),
    "Q4_K": GgufBlock(256, 144, _LARGE, "q4_k"),
    "Q5_K": GgufBlock(256, 176, _LARGE, "q5_k"),
    "Q6_K": GgufBlock(256, 210, _LARGE, "q6_k"),
    "IQ4_NL": GgufBlock(32, 18, _SMALL, "iq4_nl"),
    "IQ4_XS": GgufBlock(256, 136, _SMALL, "iq4_xs"),
    "MXFP4": GgufBlock(32, 17, _SMALL, "mxfp4"),
}
# transformers' own functions do not know these; a file that has them cannot be loaded that way at all.
_FLOAT32_ONLY = ("Q5_0", "Q5_1", "MXFP4")
# Of torch's operations at a time: their intermediate results take some MiB, whatever the matrix.
_PLAIN_COLUMNS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufPacking:
    """A matrix of GGUF blocks. Its one part is ``uint8`` (rows, bytes of a row).

    transformers 5.24 unpacks GGUF in two ways, whose roundings differ. Architectures of its own loader (``GGUF_ARCHS`` in
    ``integrations/gguf/gguf_conversion_mapping.py``: qwen35, qwen35moe, lfm2) go through ``integrations/gguf/dequant.py``,
    which is told the model's dtype and computes in it: ``target``. All others go through ``load_gguf_checkpoint``, where the
    gguf package computes in float32, and what comes out is cast to the model's dtype: ``float32``. For a float32 output both
    are equal. (With the first loader, and where the ``kernels`` package offers a matmul for the device, weights stay packed,
    unless ``GgufConfig(dequantize=True)``; that is another product, not another unpacking.)
    """

    encoding: str
    """ggml's name of the type."""
    columns: int
    """Numbers in a row."""
    arithmetic: Literal["float32", "target"]
    """What intermediate results are rounded to: float32, or the output's dtype."""

    def __post_init__(self) -> None:
        """Refuse what there is no kernel for."""
        block = GGUF_BLOCKS.get(self.encoding)
        if block is None:
            raise ValueError(
                f"There is no kernel for GGUF tensors of type {self.encoding}, only for {', '.join(GGUF_BLOCKS)}."
            )
        if self.columns <= 0 or self.columns % block.columns:
            raise ValueError(
                f"Rows of {self.columns} numbers do not consist of {self.encoding} blocks, which have {block.columns}."
            )
        if self.arithmetic not in {"float32", "target"}:
            raise ValueError(f"The arithmetic is float32 or target, not {self.arithmetic!r}.")
        if self.arithmetic == "target" and self.encoding in _FLOAT32_ONLY:
            raise ValueError(
                f"transformers' own GGUF loader does not read {self.encoding}: its arithmetic is float32."
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of a packed row."""
        block = GGUF_BLOCKS[self.encoding]
        return self.columns // block.columns * block.nbytes

    def unpack(self, parts: Sequence[torch.Tensor], first: int, out: torch.Tensor) -> None:
        """Write rows of the unpacked matrix into ``out``: see ``Packing``."""
        packed, rows = self._checked(parts)
        check_window(self.encoding, rows=rows, columns=self.columns, first=first, out=out)
        block = GGUF_BLOCKS[self.encoding]
        like = torch.float32 if self.arithmetic == "float32" else out.dtype
        blocks = self.columns // block.columns
        if (kernel := compiled(block.module, block.kernel)) is not None:
            arguments = byte_array(packed), first, blocks, storage_array(out), LIKE[like]
            kernel(out.numel(), len(out), *arguments)
            return
        values = BLOCK_VALUES[self.encoding]
        source = packed.reshape(-1, block.nbytes)[first * blocks : (first + len(out)) * blocks]
        target = out.view(-1, block.columns)
        step = _PLAIN_COLUMNS // block.columns
        for start in range(0, len(target), step):
            target[start : start + step] = values(source[start : start + step], like)

    def multiply(
        self, parts: Sequence[torch.Tensor], first: int, inputs: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Multiply a few inputs with rows of the matrix: see ``Packing``."""
        packed, rows = self._checked(parts)
        check_product(self.encoding, columns=self.columns, inputs=inputs, out=out)
        check_rows(self.encoding, rows=rows, first=first, count=out.shape[1])
        block = GGUF_BLOCKS[self.encoding]
        if (kernel := compiled("products", block.kernel)) is None:
            multiply_plainly(lambda row, tile: self.unpack(parts, row, tile), first, inputs, out)
            return
        blocks = self.columns // block.columns
        arguments = (byte_array(packed), first, out.shape[1], blocks, self.columns)
        multiply_tokens(kernel, arguments, inputs, out)

    def _checked(self, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Return the packed tensor and its number of rows."""
        (packed,) = parts
        if packed.dtype != torch.uint8 or packed.shape[-1] != self.row_bytes:
            raise ValueError(
                f"{self.encoding} rows of {self.columns} numbers are {self.row_bytes} bytes, "
                f"but the tensor is {packed.dtype} {tuple(packed.shape)}."
            )
        return packed, packed.numel() // self.row_bytes
