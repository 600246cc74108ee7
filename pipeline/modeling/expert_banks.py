"""Banks: what a module computes with in place of its experts, while it holds their cells."""

import itertools
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn

from layerstream.pipeline.modeling.packed_experts import PackedParameter
from layerstream.pipeline.modeling.packed_tiles import Tiles
from layerstream.stages.batch import TensorView
from layerstream.stages.experts.cells import CellRegion
from layerstream.stages.experts.lease import Lease

__all__ = ["Bank", "Banks", "PackedBanks", "StoredBanks", "group_bytes"]

# What is unpacked at once, unless a single expert is larger: it should still be in a cache when it is multiplied with.
_GROUP_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    """Some experts, as an expert module of transformers has them."""

    experts: Sequence[int]
    places: Sequence[int]
    """For each of them, its index in the first dimension of ``tensors``."""
    tensors: Mapping[str, torch.Tensor]
    """By the names of the module's parameters."""


class Banks(Protocol):
    """Makes banks of what is in cells."""

    def of(self, lease: Lease) -> Generator[Bank]:
        """Banks for all experts of ``lease``, whose bytes have arrived; each is valid until the next one is asked for."""

    def of_expert(self, lease: Lease, expert: int) -> Generator[Bank]:
        """The same for one expert."""


class StoredBanks:
    """The cells themselves, addressed through strides.

    Args:
        views: The tensors of one expert in a cell.
    """

    def __init__(self, views: Sequence[TensorView]) -> None:
        self._views = views
        # Weak: a module that outlives its model must not keep the cells.
        self._parameters: WeakKeyDictionary[CellRegion, dict[str, nn.Parameter]] = (
            WeakKeyDictionary()
        )

    def of(self, lease: Lease) -> Generator[Bank]:
        """One bank over all cells of the region."""
        tensors = self._parameters.get(lease.region)
        if tensors is None:
            with torch.inference_mode(mode=False):
                tensors = self._parameters[lease.region] = {
                    view.name: nn.Parameter(lease.region.strided(view), requires_grad=False)
                    for view in self._views
                }
        yield Bank(
            experts=lease.group.experts,
            places=lease.cells,
            tensors=tensors,
        )

    def of_expert(self, lease: Lease, expert: int) -> Generator[Bank]:  # noqa: ARG002 - it is in there
        """The same bank."""
        return self.of(lease)


class PackedBanks:
    """Experts that are unpacked from their cells, a few at a time, into memory that all layers share.

    Args:
        views: The tensors of one expert in a cell.
        parameters: Those that are packed; the others are copied.
        tiles: The memory.
    """

    def __init__(
        self, views: Sequence[TensorView], parameters: Sequence[PackedParameter], tiles: Tiles
    ) -> None:
        self._views = {view.name: view for view in views}
        self._parameters = parameters
        self._plain = [view for view in views if ":" not in view.name]
        self._tiles = tiles
        self._size = _group_size(parameters)

    def of(self, lease: Lease) -> Generator[Bank]:
        """Banks of a few experts each, in the order of the lease."""
        members = list(zip(lease.group.experts, lease.cells, strict=True))
        for at in range(0, len(members), self._size):
            with closing(self._bank(lease, members[at : at + self._size])) as banks:
                yield from banks

    def of_expert(self, lease: Lease, expert: int) -> Generator[Bank]:
        """A bank of one expert."""
        cell = lease.cells[lease.group.experts.index(expert)]
        return self._bank(lease, [(expert, cell)])

    def _bank(self, lease: Lease, members: Sequence[tuple[int, int]]) -> Generator[Bank]:
        cells = [cell for _, cell in members]
        with self._tiles.tile() as memory, torch.inference_mode(mode=False):
            tensors = {view.name: lease.region.strided(view)[cells] for view in self._plain}
            at = 0
            for parameter in self._parameters:
                nbytes = parameter.nbytes * len(cells)
                out = memory[at : at + nbytes].view(parameter.dtype)
                tensors[parameter.name] = out = out.view(len(cells), *parameter.shape)
                scratch = memory[at + nbytes : at + len(cells) * parameter.scratch_bytes]
                self._unpack(lease, parameter, cells, out, scratch)
                at += len(cells) * parameter.scratch_bytes
            yield Bank(
                experts=[expert for expert, _ in members],
                places=range(len(members)),
                tensors=tensors,
            )

    def _unpack(
        self,
        lease: Lease,
        parameter: PackedParameter,
        cells: Sequence[int],
        out: torch.Tensor,
        scratch: torch.Tensor,
    ) -> None:
        """Unpack ``parameter`` of the experts in ``cells`` into ``out``."""
        target = scratch.view(parameter.dtype) if parameter.transposed else out
        rows = target.view(len(cells), parameter.rows, -1)
        parts = {
            name: lease.region.strided(self._views[name])
            for piece in parameter.pieces
            for name in piece.parts
        }
        nbytes = sum(each.nbytes for each in parts.values()) // lease.region.count * len(cells)
        with self._tiles.unpacking(nbytes):
            for (number, cell), piece in itertools.product(enumerate(cells), parameter.pieces):
                piece.packing.unpack(
                    [parts[name][cell] for name in piece.parts],
                    0,
                    rows[number, piece.at : piece.at + piece.rows],
                )
        if parameter.transposed:
            out.copy_(rows.transpose(1, 2))


def _group_size(parameters: Sequence[PackedParameter]) -> int:
    return max(1, _GROUP_BYTES // max(1, sum(each.nbytes for each in parameters)))


def group_bytes(parameters: Sequence[PackedParameter]) -> int:
    """What ``PackedBanks`` needs of each tile."""
    return _group_size(parameters) * sum(each.scratch_bytes for each in parameters)
