"""Measures how fast packed weights are unpacked, by all threads that compute."""

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.packed_form import packed_form
from layerstream.pipeline.machine.measurement import Rate
from layerstream.pipeline.machine.probe_cache import user_cache_folder
from layerstream.stages.unpack.compiling import suggest_cache_folder
from layerstream.stages.unpack.packing import Packing
from layerstream.stages.unpack.samples import COLUMNS, sample

__all__ = ["FUSED_TOKENS", "TILE_BYTES", "encodings_of", "measure_unpacking", "rate_names"]

TILE_BYTES = 16 << 20
"""What is unpacked at once."""
# More than most processor caches hold.
_PACKED_BYTES = 64 << 20
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
    """Tile by tile, each by all threads together: as computation does it, with the time that waking threads takes."""
    item: torch.dtype = getattr(torch, dtype)
    height = max(threads, TILE_BYTES // COLUMNS // item.itemsize)
    tile = torch.zeros(height, COLUMNS, dtype=item)

    def work(_: int) -> None:
        for first in range(0, matrix.rows, height):
            count = min(height, matrix.rows - first)
            cuts = [count * part // threads for part in range(threads + 1)]

            def unpack(begin: int, end: int, first: int = first) -> None:
                matrix.packing.unpack(matrix.parts, first + begin, tile[begin:end])

            others = [executor.submit(unpack, *each) for each in itertools.pairwise(cuts[1:])]
            unpack(cuts[0], cuts[1])
            wait(others)

    return _rate(matrix, work)


def _product_rate(executor: ThreadPoolExecutor, matrix: _Matrix, threads: int, tokens: int) -> Rate:
    cuts = matrix.cuts(threads)
    inputs = torch.full((tokens, COLUMNS), 0.01)
    results = [torch.zeros(tokens, end - begin) for begin, end in itertools.pairwise(cuts)]

    def work(number: int) -> None:
        matrix.packing.multiply(matrix.parts, cuts[number], inputs, results[number])

    return _rate(matrix, lambda _: list(executor.map(work, range(threads))))


def _rate(matrix: _Matrix, work: Callable[[int], object]) -> Rate:
    work(0)  # compiles
    samples: list[float] = []
    nbytes = sum(part.nbytes for part in matrix.parts)
    deadline = time.perf_counter() + _SECONDS
    while len(samples) < _MIN_SAMPLES or time.perf_counter() < deadline:
        began = time.perf_counter()
        work(0)
        samples.append(nbytes / (time.perf_counter() - began))
    return Rate.from_samples(samples)
