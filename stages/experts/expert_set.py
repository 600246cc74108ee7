"""The experts of one layer: where their bytes are in the files, and where they go in a cell. Plain data."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from layerstream.stages.batch import Extent, TensorView
from layerstream.stages.experts.usage import STEP_TOKENS, ExpertUsage
from layerstream.stages.memory import round_up
from layerstream.stages.readers.coalescing import coalesce, requests_of
from layerstream.stages.readers.direct import BLOCK_BYTES

__all__ = ["CellCopy", "ExpertPiece", "ExpertRead", "ExpertSet", "request_bytes"]

# Of one request: each thread has a buffer of this size. Experts of a few MiB then come in several requests at once.
_REQUEST_BYTES = 2 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPiece:
    """A run of bytes that every expert of a layer has in its files, and that lies in one piece in a cell."""

    cell_offset: int
    nbytes: int
    files: tuple[int, ...]
    """For each expert, the index of the file."""
    offsets: tuple[int, ...]
    """For each expert, where in that file the run starts."""


class CellCopy(NamedTuple):
    """A run of bytes in what was read, and its place in the cell."""

    offset: int
    cell_offset: int
    nbytes: int


class ExpertRead(NamedTuple):
    """One aligned read of a part of an expert, and where its bytes go in the cell."""

    extent: Extent
    copies: tuple[CellCopy, ...]


@dataclass(frozen=True, kw_only=True)
class ExpertSet:
    """The routed experts of one layer, all of equal shape. A cell holds one of them.

    It has no ``__slots__``, so that sums are computed once.
    """

    module: str
    """Path of the module that computes with them."""
    layer: str
    """Name of the layer that the module is part of."""
    experts: int
    per_token: int
    """How many experts a token is routed to; 0 if unknown."""
    cells: int
    """This layer's share of the store's cells; layers with experts of equal size use them together."""
    cell_bytes: int
    tensors: tuple[TensorView, ...]
    """The tensors of one expert and their places in a cell, by the names of the module's parameters."""
    pieces: tuple[ExpertPiece, ...]
    usage: ExpertUsage | None = None
    """How tokens choose them, as sweeps have shown; None: evenly, which is assumed."""
    device_cells: int = 0
    """This layer's share of the cells on the GPU that computes; 0 on a CPU."""

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the files."""
        return sum(piece.nbytes for piece in self.pieces)

    def distinct(self, tokens: int) -> float:
        """How many experts ``tokens`` are routed to; if routing is even, E (1 - (1 - k/E)^T)."""
        if self.usage is not None:
            return self.usage.distinct_of(tokens, experts=self.experts)
        if not self.per_token:
            return float(self.experts)
        return self.experts * (1 - (1 - min(self.per_token / self.experts, 1.0)) ** tokens)

    def missed_bytes(self, tokens: int) -> float:
        """Bytes that a pass of ``tokens`` reads from files when all cells hold something."""
        return self._missed(tokens, max(self.cells, self.device_cells)) * self.expert_bytes

    def copied_bytes(self, tokens: int) -> float:
        """Bytes that such a pass copies to a GPU."""
        return self._missed(tokens, self.device_cells) * self.expert_bytes

    def _missed(self, tokens: int, cells: int) -> float:
        """How many experts that such a pass needs ``cells`` do not hold."""
        hit_share = cells / self.experts
        if self.usage is not None and tokens <= STEP_TOKENS:
            hit_share = self.usage.hit_shares[cells]
        return self.distinct(tokens) * (1 - hit_share)

    def reads(
        self, expert: int, *, request_bytes: int, file_bytes: tuple[int, ...]
    ) -> Iterator[ExpertRead]:
        """What to read for ``expert``: its runs, neighbours together, in requests of at most ``request_bytes``.

        Args:
            expert: Its number.
            request_bytes: The size of one request, whole blocks.
            file_bytes: The size of each file: a read ends with the file at the latest.
        """
        runs = [
            (
                Extent(file=piece.files[expert], offset=piece.offsets[expert], nbytes=piece.nbytes),
                piece.cell_offset,
            )
            for piece in self.pieces
        ]
        reads = coalesce([run for run, _ in runs], file_bytes)
        for extent, _ in requests_of(reads, request_bytes):
            stop = extent.offset + extent.nbytes
            copies = tuple(
                CellCopy(first - extent.offset, cell_offset + first - run.offset, last - first)
                for run, cell_offset in runs
                if run.file == extent.file
                and (first := max(run.offset, extent.offset))
                < (last := min(run.offset + run.nbytes, stop))
            )
            yield ExpertRead(extent, copies)


def request_bytes(expert_bytes: Iterable[int], *, most: int) -> int:
    """The size of a request that reads experts of these sizes at once, or a part of ``most`` bytes of them."""
    largest = max(expert_bytes)
    return min(most, _REQUEST_BYTES, round_up(largest, BLOCK_BYTES) + BLOCK_BYTES)
