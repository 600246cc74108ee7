"""Reads a checkpoint outside of sweeps: to write its tensors to other files, or to verify it."""

from functools import partial

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint, TensorInfo
from layerstream.stages.batch import Extent
from layerstream.stages.readers.files import WeightFiles
from layerstream.stages.readers.guard import ReadGuard

__all__ = ["SourceReader"]


class SourceReader:
    """Reads the tensors of a checkpoint, some bytes at a time. Close it.

    Args:
        checkpoint: The files.
        guard: Watches over the reads, and has the patience to repeat them; closed, the reader leaves it as it is. By default
            one of its own, without patience.
    """

    def __init__(self, checkpoint: Checkpoint, *, guard: ReadGuard | None = None) -> None:
        self.checkpoint = checkpoint
        self._guard = ReadGuard() if guard is None else guard.part()
        self._files = WeightFiles(
            [file.path for file in checkpoint.files],
            self._guard,
            expected=[file.version for file in checkpoint.files if file.version is not None],
        )

    def read(self, info: TensorInfo, first: int, count: int) -> torch.Tensor:
        """Bytes ``first`` to ``first + count`` of a tensor.

        Raises:
            ReadError: The disk reports an error, or the file was changed.
        """
        memory = torch.empty(count, dtype=torch.uint8)
        self.read_into(info, first, memory)
        return memory

    def read_into(self, info: TensorInfo, first: int, memory: torch.Tensor) -> None:
        """Fill ``memory``, of type uint8, with the bytes of a tensor from ``first`` on; raises as ``read``."""
        extent = Extent(file=info.file, offset=info.offset + first, nbytes=memory.numel())
        self._guard.patiently(partial(self.read_extent, extent, memory.numpy().data))

    def read_extent(self, extent: Extent, into: memoryview) -> None:
        """Fill the first ``extent.nbytes`` of ``into``, without patience; raises as ``read``."""
        self._files.read(extent.file, extent.offset, into[: extent.nbytes])
        self._files.refuse_change(extent.file)

    def close(self) -> None:
        """Close the files."""
        self._files.close()
        self._guard.close()
