"""Readers of files, each made with defaults, and errors of disks that pass."""

import errno
import os

from layerstream.stages.readers.direct import DirectReader
from layerstream.stages.readers.throttled import Throttle, ThrottledReader

__all__ = ["PASSING", "buffered", "throttled"]

PASSING = [errno.EIO, errno.ETIMEDOUT, errno.ENXIO, errno.EAGAIN]


def buffered(paths):
    """A reader as it is where a filesystem refuses direct reads."""
    reader = DirectReader(paths)
    for file in range(len(paths)):
        reader.fall_back(file, OSError(errno.EINVAL, os.strerror(errno.EINVAL)))
    return reader


def throttled(paths):
    """A reader that is held back by a rate which it does not reach."""
    return ThrottledReader(paths, Throttle(1e12))
