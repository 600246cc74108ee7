"""Random matrices of each encoding, to measure kernels with, or to have them compiled before they are needed."""

from collections.abc import Iterable

import torch

from layerstream.stages.unpack.fp8 import Fp8Packing
from layerstream.stages.unpack.gguf import GGUF_BLOCKS, GgufPacking
from layerstream.stages.unpack.integers import IntPacking
from layerstream.stages.unpack.mxfp4 import Mxfp4Packing
from layerstream.stages.unpack.packing import Packing

__all__ = ["COLUMNS", "compile_kernels", "sample"]

COLUMNS = 4096
"""Of a sample."""
_BLOCK = 128
_MXFP4_COLUMNS = 32


def sample(encoding: str, *, rows: int) -> tuple[Packing, list[torch.Tensor]] | None:
    """A matrix of ``rows`` x ``COLUMNS`` in the most common form of ``encoding``; None for one without kernels.

    Any bytes are valid weights, and kernels take equally long for all of them.
    """
    if (block := GGUF_BLOCKS.get(encoding)) is not None:
        gguf = GgufPacking(encoding=encoding, columns=COLUMNS, arithmetic="float32")
        return gguf, [_bytes(rows, COLUMNS // block.columns * block.nbytes)]
    bands = -(-rows // _BLOCK)
    if encoding == "fp8":
        fp8 = Fp8Packing(block=(_BLOCK, _BLOCK))
        weights = _bytes(rows, COLUMNS).view(torch.float8_e4m3fn)
        return fp8, [weights, torch.rand(bands, COLUMNS // _BLOCK)]
    if encoding == "mxfp4":
        groups = COLUMNS // _MXFP4_COLUMNS
        return Mxfp4Packing(), [
            _bytes(rows, groups * 16).view(rows, groups, 16),
            _bytes(rows, groups),
        ]
    if encoding in {"int4", "int8"}:
        scales = torch.rand(rows, COLUMNS // _BLOCK).bfloat16()
        integers = IntPacking(bits=4 if encoding == "int4" else 8, columns=COLUMNS)
        words = _bytes(rows, COLUMNS * integers.bits // 8).view(torch.int32)
        return integers, [words, scales]
    return None


def compile_kernels(encodings: Iterable[str], dtype: torch.dtype, *, products: bool) -> None:
    """Load the compiler, and compile what ``encodings`` need, before memory is measured and the first token waits for it.

    Args:
        encodings: Those of a checkpoint; without a kernel, nothing is done.
        dtype: What is unpacked to.
        products: Also those that multiply without unpacking.
    """
    for encoding in encodings:
        if (made := sample(encoding, rows=1)) is None:
            continue
        packing, parts = made
        packing.unpack(parts, 0, torch.empty(1, COLUMNS, dtype=dtype))
        if products:
            packing.multiply(parts, 0, torch.zeros(1, COLUMNS), torch.empty(1, 1))


def _bytes(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
