"""Memory that packed matrices are unpacked into: tiles, and a layer for all passes of a sweep. Pure."""

from collections.abc import Iterable
from typing import NamedTuple

from layerstream.pipeline.machine.probe_unpacking import TILE_BYTES

__all__ = ["SharedLayers", "tile_bytes", "tile_count", "tile_rows", "unpacked_once"]

# As many forward passes compute at once.
_MOST_TILES = 3

# Measured on two cores with caches of 2 MiB each, one token, fp8 and Q8_0, milliseconds for a matrix of 29 MiB: 6.8 and 5.8 with
# 2 MiB, 3.6 and 3.0 with 8 MiB, 3.1 and 2.7 with 16 MiB, no less with all of it. Waking a second thread for each tile costs
# more than a tile that fits a cache saves.
_TILE_BYTES = TILE_BYTES
_SHARING_REQUESTS = 2
_SHARE = 1 / 8
# Batches of more layers save no more hand-offs than are worth the memory.
_MOST_LAYERS = 4
# Kernels of matrix products divide rows into blocks; tiles are a multiple of any of them.
_ROW_MULTIPLE = 512


def tile_count(sequences: int) -> int:
    """How many tiles there are for so many requests at the same time; further ones wait for one another."""
    return min(max(sequences, 1), _MOST_TILES)


def tile_rows(rows: int, columns: int, item_bytes: int) -> int:
    """How many rows of a packed matrix are unpacked at once.

    ``item_bytes``: Of an unpacked element.
    """
    wanted = _TILE_BYTES // max(1, columns * item_bytes)
    return min(rows, max(_ROW_MULTIPLE, wanted // _ROW_MULTIPLE * _ROW_MULTIPLE))


class SharedLayers(NamedTuple):
    """How much of a layer batch is unpacked once for all passes of a sweep."""

    layers: int
    """The most layers of a batch; 0: each pass unpacks for itself."""
    nbytes: int
    """Memory for that."""


def unpacked_once(layers: Iterable[int], *, sequences: int, budget_bytes: int) -> SharedLayers:
    """What is unpacked once: nothing if few requests are expected, or if it takes more than a small share of the budget.

    It takes memory from residents. Passes go through a batch one after another, so all of a batch has to fit.

    Args:
        layers: For each layer, what its packed weights take unpacked.
        sequences: How many requests are expected at the same time.
        budget_bytes: Of the host.
    """
    sizes = sorted(layers)
    if sequences < _SHARING_REQUESTS or not sizes:
        return SharedLayers(0, 0)
    typical, share = sizes[len(sizes) // 2], int(_SHARE * budget_bytes)
    count = min(_MOST_LAYERS, share // typical)
    if not count:
        return SharedLayers(0, 0)
    # A head may be as large as many blocks.
    largest = max(size for size in sizes if size <= share)
    return SharedLayers(count, max(count * typical, largest))


def tile_bytes(rows: int, nbytes: int) -> int:
    """Bytes of a tile of a matrix of ``rows``, which takes ``nbytes`` unpacked."""
    return nbytes // rows * tile_rows(rows, nbytes // rows, 1) if rows else 0
