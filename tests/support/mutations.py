"""Files that are almost right: bytes changed, moved and cut, and numbers in them replaced by extreme ones."""

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from layerstream.stages.errors import CheckpointError

__all__ = ["assert_refused_or_read", "mutated"]

_EXTREMES = [
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    31,
    32,
    255,
    256,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**64 - 1,
]
_MAX_SECONDS = 1.0
# Beyond the size of the file: Python's own objects for small files.
_MAX_BYTES = 4 << 20


def mutated(content: bytes, source: random.Random, *, header_bytes: int) -> bytes:
    """``content`` after one to four changes, most of them in its first ``header_bytes``."""
    changed = bytearray(content)
    for _ in range(source.choice([1, 1, 1, 2, 4])):
        limit = header_bytes if source.random() < 0.9 else len(changed)
        at = source.randrange(max(1, min(limit, len(changed))))
        match source.randrange(7):
            case 0:
                changed[at : at + 1] = bytes([source.randrange(256)])
            case 1:
                changed[at : at + 1] = (
                    bytes([changed[at] ^ 1 << source.randrange(8)]) if changed else b""
                )
            case 2:
                code, size = source.choice([("<Q", 64), ("<I", 32), ("<H", 16)])
                number = source.choice(_EXTREMES) + source.choice([0, 0, 1, -1])
                changed[at : at + size // 8] = struct.pack(code, number % 2**size)
            case 3:
                del changed[at : at + source.choice([1, 4, 8, 33])]
            case 4:
                changed[at:at] = changed[at : at + source.choice([1, 8, 40])]
            case 5:
                other = source.randrange(max(1, min(limit, len(changed))))
                changed[at : at + 8], changed[other : other + 8] = (
                    changed[other : other + 8],
                    changed[at : at + 8],
                )
            case 6:
                if source.random() < 0.3:
                    del changed[at:]
    return bytes(changed)


def assert_refused_or_read(
    path: Path, read: Callable[[Path], object], check: Callable[[Path, object], object]
) -> bool:
    """That ``read`` refuses a file in one sentence, or that ``check`` finds what it read right; soon, in little memory."""
    tracemalloc.start()
    began = time.process_time()
    try:
        found = read(path)
    except CheckpointError as error:
        message = str(error)
        assert "\n" not in message
        assert message.endswith(".")
        assert str(path) in message
        return False
    else:
        check(path, found)
        return True
    finally:
        seconds = time.process_time() - began
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert seconds < _MAX_SECONDS
        assert peak < path.stat().st_size + _MAX_BYTES
