"""Files of random bytes, for readers."""

import os
from pathlib import Path

from layerstream.stages.readers.direct import BLOCK_BYTES

__all__ = ["SIZE", "random_files"]

SIZE = 5 * BLOCK_BYTES + 100  # ends inside a block, as files do


def random_files(folder: Path) -> list[Path]:
    """Two files of ``SIZE`` random bytes in ``folder``."""
    paths = [folder / "a.bin", folder / "b.bin"]
    for path in paths:
        path.write_bytes(os.urandom(SIZE))
    return paths
