"""Measures how fast packed weights are unpacked, by all threads that compute."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.packed_form import packed_form
from layerstream.pipeline.machine.measurement import Rate
from layerstream.pipeline.machine.probe_cache import user_cache_folder
from layerstream.stages.unpack.compiling import suggest_cache_folder
from layerstream.stages.unpack.packing import Packing
from layerstream.stages.unpack.samples import COLUMNS, sample

__all__ = ["encodings_of", "measure_unpacking"]

# More than processor caches hold; a thread's tile stays in its own cache, as in computation.
_PACKED_BYTES = 48 << 20
_TILE_BYTES = 4 << 20
_SECONDS = 0.15
_MIN_SAMPLES = 3
# Rows of a block of scales.
_BANDS = 128


def encodings_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The encodings of a checkpoint's packed weights, by name."""
    forms = (packed_form(checkpoint, info) for info in checkpoint.tensors.values())
    return tuple(sorted({form.encoding for form in forms if form is not None and form.plain_bytes}))


def measure_unpacking(encodings: Sequence[str], *, dtype: str) -> dict[str, Rate]:
    """Packed bytes per second for each of ``encodings`` that has a kernel, unpacked to ``dtype``."""
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
            found[encoding] = _rate(executor, *made, rows=rows, threads=threads, dtype=dtype)
    return found


def _rate(
    executor: ThreadPoolExecutor,
    packing: Packing,
    parts: list[torch.Tensor],
    *,
    rows: int,
    threads: int,
    dtype: str,
) -> Rate:
    item: torch.dtype = getattr(torch, dtype)
    height = max(1, _TILE_BYTES // COLUMNS // item.itemsize)
    tiles = [torch.zeros(height, COLUMNS, dtype=item) for _ in range(threads)]
    cuts = [rows * part // threads for part in range(threads + 1)]

    def work(number: int) -> None:
        for first in range(cuts[number], cuts[number + 1], height):
            count = min(height, cuts[number + 1] - first)
            packing.unpack(parts, first, tiles[number][:count])

    packing.unpack(parts, 0, tiles[0][:1])  # compiles
    samples: list[float] = []
    nbytes = sum(part.nbytes for part in parts)
    deadline = time.perf_counter() + _SECONDS
    while len(samples) < _MIN_SAMPLES or time.perf_counter() < deadline:
        began = time.perf_counter()
        list(executor.map(work, range(threads)))
        samples.append(nbytes / (time.perf_counter() - began))
    return Rate.from_samples(samples)
