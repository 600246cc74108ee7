"""Banks of experts that are packed: unpacked a few at a time, or multiplied with as they are."""

import itertools
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from layerstream.pipeline.modeling.expert_banks import Bank, Inputs
from layerstream.pipeline.modeling.packed_experts import PackedParameter
from layerstream.pipeline.modeling.packed_tiles import Tiles
from layerstream.stages.batch import TensorView
from layerstream.stages.experts.lease import Lease

__all__ = ["PackedBanks", "group_bytes"]

# What is unpacked at once, unless a single expert is larger: it should still be in a cache when it is multiplied with.
_GROUP_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _FusedBank(Bank):
    """Experts that are multiplied with as they are packed, in float32; ``tensors`` are those that are not packed."""

    parameters: Mapping[str, PackedParameter]
    parts: Mapping[str, torch.Tensor]
    """Packed tensors of all cells."""

    def products(
        self,
        name: str,
        inputs: Inputs,
        *,
        is_transposed: bool,  # noqa: ARG002 - packed rows are what is summed over
    ) -> torch.Tensor:
        """The same, summed in another order; see ``Packing.multiply``."""
        parameter = self.parameters[name]
        sums, parts = inputs.parted(parameter.rows, torch.float32)
        groups = inputs.split(inputs.rows.float())
        for place, rows, out in zip(inputs.places, groups, parts, strict=True):
            for piece in parameter.pieces:
                packed = [self.parts[part][place] for part in piece.parts]
                whole = piece.rows == parameter.rows
                target = out if whole else out.new_empty((len(out), piece.rows))
                piece.packing.multiply(packed, 0, rows, target)
                if not whole:
                    out[:, piece.at : piece.at + piece.rows] = target
        return sums.to(parameter.dtype)


class PackedBanks:
    """Experts that are unpacked from their cells, a few at a time, into memory that all layers share.

    Args:
        views: The tensors of one expert in a cell.
        parameters: Those that are packed; the others are copied.
        tiles: The memory.
        fused_tokens: Passes of up to so many tokens multiply without unpacking.
    """

    def __init__(
        self,
        views: Sequence[TensorView],
        parameters: Sequence[PackedParameter],
        tiles: Tiles,
        *,
        fused_tokens: int = 0,
    ) -> None:
        self._views = {view.name: view for view in views}
        self._parameters = parameters
        self._plain = [view for view in views if ":" not in view.name]
        self._tiles = tiles
        self._size = _group_size(parameters)
        self._fused_tokens = fused_tokens

    def of(self, lease: Lease, *, tokens: int) -> Generator[Bank]:
        """Banks of a few experts each, in the order of the lease; one of all if they are not unpacked."""
        if tokens <= self._fused_tokens:
            yield self._fused(lease)
            return
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

    def _fused(self, lease: Lease) -> Bank:
        strided = {name: lease.region.strided(view) for name, view in self._views.items()}
        return _FusedBank(
            experts=lease.group.experts,
            places=lease.cells,
            tensors={view.name: strided[view.name] for view in self._plain},
            parameters={each.name: each for each in self._parameters},
            parts=strided,
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
