"""Measures how fast packed weights are unpacked, by all threads that compute."""

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.packed_form import packed_form
from layerstream.pipeline.machine.measurement import Rate
from layerstream.pipeline.machine.probe_cache import user_cache_folder
from layerstream.stages.unpack.compiling import suggest_cache_folder
from layerstream.stages.unpack.packing import Packing
from layerstream.stages.unpack.samples import COLUMNS, sample

__all__ = ["FUSED_TOKENS", "encodings_of", "measure_unpacking", "rate_names"]

# More than processor caches hold; a thread's tile stays in its own cache, as in computation.
_PACKED_BYTES = 48 << 20
_TILE_BYTES = 4 << 20
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
    threads = torch.get_num_threads()
    found = {}
    with ThreadPoolExecutor(threads) as executor:
        for encoding in encodings:
            probed = sample(encoding, rows=1)
            if probed is None:
                continue
            row_bytes = sum(part.nbytes for part in probed[1])
            rows = max(threads, _PACKED_BYTES // row_bytes // _BANDS * _BANDS)
            made = sample(encoding, rows=rows)
            assert made is not None  # noqa: S101
            matrix = _Matrix(*made, rows=rows)
            unpacked, *multiplied = rate_names(encoding)
            found[unpacked] = _unpacking_rate(executor, matrix, threads, dtype)
            for name, tokens in zip(multiplied, FUSED_TOKENS, strict=True):
                found[name] = _product_rate(executor, matrix, threads, tokens)
    return found


class _Matrix(NamedTuple):
    packing: Packing
    parts: list[torch.Tensor]
    rows: int

    def cuts(self, threads: int) -> list[int]:
        """Where each thread's rows begin, and the end."""
        return [self.rows * part // threads for part in range(threads + 1)]


def _unpacking_rate(
    executor: ThreadPoolExecutor, matrix: _Matrix, threads: int, dtype: str
) -> Rate:
    item: torch.dtype = getattr(torch, dtype)
    height = max(1, _TILE_BYTES // COLUMNS // item.itemsize)
    tiles = [torch.zeros(height, COLUMNS, dtype=item) for _ in range(threads)]
    cuts = matrix.cuts(threads)

    def work(number: int) -> None:
        for first in range(cuts[number], cuts[number + 1], height):
            count = min(height, cuts[number + 1] - first)
            matrix.packing.unpack(matrix.parts, first, tiles[number][:count])

    return _rate(executor, matrix, threads, work)


def _product_rate(executor: ThreadPoolExecutor, matrix: _Matrix, threads: int, tokens: int) -> Rate:
    cuts = matrix.cuts(threads)
    inputs = torch.full((tokens, COLUMNS), 0.01)
    results = [torch.zeros(tokens, end - begin) for begin, end in itertools.pairwise(cuts)]

    def work(number: int) -> None:
        matrix.packing.multiply(matrix.parts, cuts[number], inputs, results[number])

    return _rate(executor, matrix, threads, work)


def _rate(
    executor: ThreadPoolExecutor, matrix: _Matrix, threads: int, work: Callable[[int], None]
) -> Rate:
    work(0)  # compiles
    samples: list[float] = []
    nbytes = sum(part.nbytes for part in matrix.parts)
    deadline = time.perf_counter() + _SECONDS
    while len(samples) < _MIN_SAMPLES or time.perf_counter() < deadline:
        began = time.perf_counter()
        list(executor.map(work, range(threads)))
        samples.append(nbytes / (time.perf_counter() - began))
    return Rate.from_samples(samples)
