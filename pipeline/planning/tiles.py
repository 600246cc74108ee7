"""Memory that packed matrices are unpacked into: tiles, and a layer for all passes of a sweep. Pure."""

from collections.abc import Iterable

__all__ = ["TILES", "tile_bytes", "tile_rows", "unpacked_once_bytes"]

TILES = 3
"""How many there are: as many forward passes as compute at once."""

# Measured on two cores with caches of 2 MiB each: 8 MiB were fastest, 1 MiB took twice as long, 16 MiB up to 1.5 times.
_TILE_BYTES = 8 << 20
_SHARING_REQUESTS = 2
_SHARE = 1 / 8
# Kernels of matrix products divide rows into blocks; tiles are a multiple of any of them.
_ROW_MULTIPLE = 512


def tile_rows(rows: int, columns: int, item_bytes: int) -> int:
    """How many rows of a packed matrix are unpacked at once.

    ``item_bytes``: Of an unpacked element.
    """
    wanted = _TILE_BYTES // max(1, columns * item_bytes)
    return min(rows, max(_ROW_MULTIPLE, wanted // _ROW_MULTIPLE * _ROW_MULTIPLE))


def unpacked_once_bytes(layers: Iterable[int], *, sequences: int, budget_bytes: int) -> int:
    """Memory for the packed weights of a layer, unpacked once for all passes of a sweep; 0 if it is not worth it.

    It takes memory from residents, so it is taken if several requests are expected, and if it is a small share of the budget.

    Args:
        layers: For each layer, what its packed weights take unpacked.
        sequences: How many requests are expected at the same time.
        budget_bytes: Of the host.
    """
    sizes = sorted(layers)
    if sequences < _SHARING_REQUESTS or not sizes:
        return 0
    typical = sizes[len(sizes) // 2]  # a head may be as large as many blocks
    return typical if typical <= _SHARE * budget_bytes else 0


def tile_bytes(rows: int, nbytes: int) -> int:
    """Bytes of a tile of a matrix of ``rows``, which takes ``nbytes`` unpacked."""
    return nbytes // rows * tile_rows(rows, nbytes // rows, 1) if rows else 0
