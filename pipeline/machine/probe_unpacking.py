"""Measures how fast packed weights are unpacked, by all threads that compute."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.packed_form import packed_form
from layerstream.pipeline.machine.measurement import Rate
from layerstream.pipeline.machine.probe_cache import user_cache_folder
from layerstream.stages.unpack.compiling import suggest_cache_folder
from layerstream.stages.unpack.packing import Packing
from layerstream.stages.unpack.samples import COLUMNS, sample

__all__ = [
    "FUSED_TOKENS",
    "TILE_BYTES",
    "UNPACKING_BYTES",
    "encodings_of",
    "measure_unpacking",
    "rate_names",
]

TILE_BYTES = 16 << 20
"""What is unpacked at once."""
# More than most processor caches hold.
_PACKED_BYTES = 64 << 20
UNPACKING_BYTES = _PACKED_BYTES + 2 * TILE_BYTES
"""Host memory that measuring takes at most."""
_SECONDS = 0.15
_MIN_SAMPLES = 3
FUSED_TOKENS = (1, 4)
"""How many inputs weights are multiplied with without being unpacked, when that is measured."""
# Rows of a block of scales.
_BANDS = 128


def encodings_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The encodings of a checkpoint's packed weights, by name."""
    forms = (packed_form(checkpoint, info) for info in checkpoint.tensors.values())
    return tuple(sorted({form.encoding for form in forms if form is not None and form.plain_bytes}))


def rate_names(encoding: str) -> list[str]:
    """The rates that are measured of an encoding: unpacking, and products with each of ``FUSED_TOKENS``."""
    return [encoding, *(f"{encoding} x {tokens}" for tokens in FUSED_TOKENS)]


def measure_unpacking(encodings: Sequence[str], *, dtype: str) -> dict[str, Rate]:
    """Packed bytes per second for each of ``encodings`` that has a kernel, by ``rate_names``; unpacked to ``dtype``."""
    suggest_cache_folder(user_cache_folder() / "kernels")
    found = {}
    for encoding in encodings:
        probed = sample(encoding, rows=1)
        if probed is None:
            continue
        row_bytes = sum(part.nbytes for part in probed[1])
        rows = max(1, _PACKED_BYTES // row_bytes // _BANDS) * _BANDS
        made = sample(encoding, rows=rows)
        assert made is not None  # noqa: S101
        matrix = _Matrix(*made, rows=rows)
        unpacked, *multiplied = rate_names(encoding)
        found[unpacked] = _unpacking_rate(matrix, dtype)
        for name, tokens in zip(multiplied, FUSED_TOKENS, strict=True):
            found[name] = _product_rate(matrix, tokens)
    return found


class _Matrix(NamedTuple):
    packing: Packing
    parts: list[torch.Tensor]
    rows: int


def _unpacking_rate(matrix: _Matrix, dtype: str) -> Rate:
    """Tile by tile, as computation does it."""
    item: torch.dtype = getattr(torch, dtype)
    height = max(1, TILE_BYTES // COLUMNS // item.itemsize)
    tile = torch.zeros(height, COLUMNS, dtype=item)

    def work() -> None:
        for first in range(0, matrix.rows, height):
            matrix.packing.unpack(matrix.parts, first, tile[: matrix.rows - first])

    return _rate(matrix, work)


def _product_rate(matrix: _Matrix, tokens: int) -> Rate:
    inputs = torch.full((tokens, COLUMNS), 0.01)
    result = torch.zeros(tokens, matrix.rows)
    return _rate(matrix, lambda: matrix.packing.multiply(matrix.parts, 0, inputs, result))


def _rate(matrix: _Matrix, work: Callable[[], object]) -> Rate:
    work()  # compiles
    samples: list[float] = []
    nbytes = sum(part.nbytes for part in matrix.parts)
    deadline = time.perf_counter() + _SECONDS
    while len(samples) < _MIN_SAMPLES or time.perf_counter() < deadline:
        began = time.perf_counter()
        work()
        samples.append(nbytes / (time.perf_counter() - began))
    return Rate.from_samples(samples)
