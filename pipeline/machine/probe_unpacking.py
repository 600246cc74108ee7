"""Measures how fast packed weights are unpacked, by all threads that compute."""

import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import NamedTuple

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.packed_form import packed_form
from layerstream.pipeline.machine.measurement import Rate
from layerstream.pipeline.machine.probe_cache import user_cache_folder
from layerstream.stages.memory import HostMemory
from layerstream.stages.unpack.compiling import suggest_cache_folder
from layerstream.stages.unpack.packing import Packing
from layerstream.stages.unpack.samples import COLUMNS, sample

__all__ = [
    "FUSED_TOKENS",
    "TILE_BYTES",
    "encodings_of",
    "measure_unpacking",
    "rate_names",
    "unpacking_bytes",
]

TILE_BYTES = 16 << 20
"""What is unpacked at once."""
# More than most processor caches hold, in memory as residents have it: otherwise kernels are up to twice as fast as in a model, or slower.
_PACKED_BYTES = 256 << 20
_SHARE_OF_FREE = 8
_SECONDS = 0.15
# Each of a tile, about a millisecond, so that on a busy machine some are not disturbed.
_MIN_SAMPLES = 12
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


def unpacking_bytes(available_bytes: int) -> int:
    """Host memory that ``measure_unpacking`` takes at most, if there are ``available_bytes``."""
    return _packed_bytes(available_bytes) + 2 * TILE_BYTES


def _packed_bytes(available_bytes: int) -> int:
    return min(_PACKED_BYTES, available_bytes // _SHARE_OF_FREE)


def measure_unpacking(
    encodings: Sequence[str], *, dtype: str, available_bytes: int
) -> dict[str, Rate]:
    """Packed bytes per second for each of ``encodings`` that has a kernel, by ``rate_names``; unpacked to ``dtype``."""
    suggest_cache_folder(user_cache_folder() / "kernels")
    found = {}
    for encoding in encodings:
        probed = sample(encoding, rows=1)
        if probed is None:
            continue
        matrix = _matrix(
            encoding,
            sum(part.nbytes for part in probed[1]),
            packed_bytes=_packed_bytes(available_bytes),
        )
        unpacked, *multiplied = rate_names(encoding)
        found[unpacked] = _unpacking_rate(matrix, dtype)
        for name, tokens in zip(multiplied, FUSED_TOKENS, strict=True):
            found[name] = _product_rate(matrix, tokens)
    return found


class _Matrix(NamedTuple):
    packing: Packing
    parts: list[torch.Tensor]
    rows: int

    @property
    def row_bytes(self) -> float:
        return sum(part.nbytes for part in self.parts) / self.rows


def _matrix(encoding: str, row_bytes: int, *, packed_bytes: int) -> _Matrix:
    rows = max(1, packed_bytes // row_bytes // _BANDS) * _BANDS
    made = sample(encoding, rows=_BANDS)
    assert made is not None  # noqa: S101
    packing, parts = made
    return _Matrix(packing, [_repeated(part, rows // _BANDS) for part in parts], rows)


def _repeated(part: torch.Tensor, times: int) -> torch.Tensor:
    """As many rows of the same numbers, on huge pages."""
    shape = (times * part.shape[0], *part.shape[1:])
    memory = HostMemory(times * part.nbytes).tensor
    whole = memory.view(times, part.nbytes)
    whole.copy_(part.reshape(-1).view(torch.uint8).expand(times, -1))
    return memory.view(part.dtype).view(shape)


def _unpacking_rate(matrix: _Matrix, dtype: str) -> Rate:
    """Tile by tile, as computation does it."""
    item: torch.dtype = getattr(torch, dtype)
    height = _tile_rows(matrix, item)
    tile = HostMemory(height * COLUMNS * item.itemsize).tensor.view(item).view(height, COLUMNS)
    return _rate(matrix, height, lambda first: matrix.packing.unpack(matrix.parts, first, tile))


def _product_rate(matrix: _Matrix, tokens: int) -> Rate:
    height = _tile_rows(matrix, torch.bfloat16)
    inputs = torch.full((tokens, COLUMNS), 0.01)
    result = torch.zeros(tokens, height)
    return _rate(
        matrix,
        height,
        lambda first: matrix.packing.multiply(matrix.parts, first, inputs, result),
    )


def _tile_rows(matrix: _Matrix, dtype: torch.dtype) -> int:
    return min(matrix.rows, max(1, TILE_BYTES // COLUMNS // dtype.itemsize))


def _rate(matrix: _Matrix, height: int, work: Callable[[int], object]) -> Rate:
    """Measure ``work``, which takes the first of ``height`` rows."""
    starts = cycle(range(0, matrix.rows - height + 1, height))
    work(0)  # compiles
    samples: list[float] = []
    deadline = time.perf_counter() + _SECONDS
    while len(samples) < _MIN_SAMPLES or time.perf_counter() < deadline:
        first = next(starts)
        began = time.perf_counter()
        work(first)
        samples.append(matrix.row_bytes * height / (time.perf_counter() - began))
    return Rate.from_samples(samples)
