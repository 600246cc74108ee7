"""Experts of random bytes in files, and stores for them."""

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from layerstream.pipeline.planning.expert_source import ExpertSource, ExpertTensor, lay_out_experts
from layerstream.stages.batch import Extent
from layerstream.stages.experts.cells import CellRegion
from layerstream.stages.experts.expert_reads import ExpertReads
from layerstream.stages.experts.expert_set import ExpertSet, request_bytes
from layerstream.stages.experts.lease import Lease
from layerstream.stages.experts.store import ExpertStore
from layerstream.stages.memory import HostMemory
from layerstream.stages.readers.direct import DirectReader
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.readers.protocol import Reader

__all__ = ["FailingReader", "RandomExperts", "host_cells", "idle_cells"]


def host_cells(nbytes: int) -> torch.Tensor:
    """Memory for the cells of a store, freed with its last view."""
    return HostMemory(nbytes).tensor


class RandomExperts:
    """Experts of ``layers`` layers in two files, at odd places: a matrix in one piece, and one in two.

    Args:
        folder: Gets the files.
        layers: How many sets.
        experts: Of each.
        sizes: Bytes of the one piece and of each of the two.
    """

    def __init__(
        self,
        folder: Path,
        *,
        layers: int = 2,
        experts: int = 6,
        sizes: tuple[int, int] = (5000, 3000),
    ) -> None:
        random_numbers = random.Random(1)
        self.paths = [folder / "a.bin", folder / "b.bin"]
        ends = [0, 0]

        def extent(file: int, nbytes: int) -> Extent:
            begin = ends[file] + random_numbers.randrange(4096, 12000)  # no block holds two
            ends[file] = begin + nbytes
            return Extent(file=file, offset=begin, nbytes=nbytes)

        one, half = sizes
        self.sources = [
            ExpertSource(
                module=f"layers.{layer}.experts",
                experts=experts,
                per_token=2,
                tensors=(
                    ExpertTensor(
                        name="down",
                        dtype="uint8",
                        shape=(one,),
                        nbytes=one,
                        extents=tuple((extent(layer % 2, one),) for _ in range(experts)),
                        shift=8,
                    ),
                    ExpertTensor(
                        name="up",
                        dtype="uint8",
                        shape=(2, half),
                        nbytes=2 * half,
                        extents=tuple(
                            (extent(layer % 2, half), extent(1, half)) for _ in range(experts)
                        ),
                    ),
                ),
            )
            for layer in range(layers)
        ]
        for path, size in zip(self.paths, ends, strict=True):
            path.write_bytes(os.urandom(size))
        self._contents = [path.read_bytes() for path in self.paths]

    def sets(self, cells: int) -> list[ExpertSet]:
        """The sets, with so many cells each."""
        return [lay_out_experts(source, layer="", cells=cells) for source in self.sources]

    @contextmanager
    def store(
        self,
        *,
        cells: int = 3,
        shared: int = 2,
        reader: Reader | None = None,
        most: int = 4096,
        threads: int = 2,
    ) -> Iterator[ExpertStore]:
        """A store with ``cells`` for each layer, ``shared`` for all, and requests of at most ``most`` bytes."""
        reader = reader or DirectReader(self.paths)
        store = ExpertStore(
            self.sets(cells),
            passing_cells=shared,
            allocate=host_cells,
            loader=ExpertReads(
                reader,
                guard=ReadGuard(),
                file_bytes=[len(each) for each in self._contents],
                threads=threads,
                request_bytes=request_bytes(
                    (source.expert_bytes for source in self.sources), most=most
                ),
            ),
        )
        try:
            yield store
        finally:
            store.close()
            reader.close()

    def check(self, lease: Lease) -> None:
        """Fail unless the cells of ``lease`` hold its experts."""
        source = self.sources[lease.group.set_index]
        views = self.sets(1)[lease.group.set_index].tensors
        for tensor, view in zip(source.tensors, views, strict=True):
            rows = lease.region.strided(view)
            for expert, cell in zip(lease.group.experts, lease.cells, strict=True):
                expected = b"".join(
                    self._contents[part.file][part.offset : part.offset + part.nbytes]
                    for part in tensor.extents[expert]
                )
                found = bytes(rows[cell].contiguous().view(-1).numpy())
                assert found == expected, (lease.group, expert, tensor.name)

    def fetch(self, store: ExpertStore, layer: int, experts: Sequence[int]) -> list[bool]:
        """Take ``experts`` group by group, check their bytes, and give them back; for each group, if it was streamed."""
        groups = store.groups(layer, experts)
        for group in groups:
            lease = store.lease(group)
            assert store.take(lease)
            lease.wait()
            self.check(lease)
            lease.release()
        return [group.passing for group in groups]


class FailingReader:
    """A reader that fails, or waits, where it is told to.

    Attributes:
        fail_at: Offsets of reads that fail, with the error.
        before: Called before each read.
    """

    falls_back = False

    def __init__(self, paths: Sequence[Path]) -> None:
        self._reader = DirectReader(paths)
        self.fail_at: dict[tuple[int, int], Exception] = {}
        self.before = lambda _: None

    def read(self, extent: Extent, into: memoryview) -> None:
        self.before(extent)
        if error := self.fail_at.get((extent.file, extent.offset)):
            raise error
        self._reader.read(extent, into)

    def interrupt(self) -> None:
        self._reader.interrupt()

    def close(self) -> None:
        self._reader.close()


def idle_cells(region: CellRegion) -> int:
    """How many cells of ``region`` nobody holds."""
    free, cells = region._free, region._cells
    return len(free) + sum(not cell.users for cell in cells.values())
