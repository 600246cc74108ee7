"""Tiles: the pieces in which packed matrices are unpacked. Pure."""

__all__ = ["TILES", "tile_rows"]

TILES = 3
"""How many there are: as many forward passes as compute at once."""

# Measured on two cores with caches of 2 MiB each: 8 MiB were fastest, 1 MiB took twice as long, 16 MiB up to 1.5 times.
_TILE_BYTES = 8 << 20
# Kernels of matrix products divide rows into blocks; tiles are a multiple of any of them.
_ROW_MULTIPLE = 512


def tile_rows(rows: int, columns: int, item_bytes: int) -> int:
    """How many rows of a packed matrix are unpacked at once.

    ``item_bytes``: Of an unpacked element.
    """
    wanted = _TILE_BYTES // max(1, columns * item_bytes)
    return min(rows, max(_ROW_MULTIPLE, wanted // _ROW_MULTIPLE * _ROW_MULTIPLE))
