"""Banks: what a module computes with in place of its experts, while it holds their cells."""

import itertools
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn

from layerstream.pipeline.modeling.packed_experts import PackedParameter
from layerstream.pipeline.modeling.packed_tiles import Tiles
from layerstream.stages.batch import TensorView
from layerstream.stages.experts.cells import CellRegion
from layerstream.stages.experts.lease import Lease
from layerstream.stages.unpack.bfloat_rows import BfloatMatrices, summed_columns

__all__ = [
    "Bank",
    "Banks",
    "Inputs",
    "PackedBanks",
    "StoredBanks",
    "group_bytes",
    "summed_in_place",
]

# What is unpacked at once, unless a single expert is larger: it should still be in a cache when it is multiplied with.
_GROUP_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Rows that are multiplied with matrices of a bank, those of one matrix one behind the other."""

    places: Sequence[int]
    """Of the matrices, each once."""
    counts: Sequence[int]
    """How many rows are multiplied with each."""
    rows: torch.Tensor

    def with_rows(self, rows: torch.Tensor) -> "Inputs":
        """The same of other rows."""
        return Inputs(places=self.places, counts=self.counts, rows=rows)

    def place_of_each(self) -> list[int]:
        """The matrix of each row."""
        both = zip(self.places, self.counts, strict=True)
        return [place for place, count in both for _ in range(count)]

    def split(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        """Those of each matrix."""
        return torch.split(rows, list(self.counts))

    def parted(
        self, columns: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Memory for products, and the part of it for each matrix."""
        result = torch.empty((len(self.rows), columns), dtype=dtype)
        return result, self.split(result)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    """Some experts, as an expert module of transformers has them."""

    experts: Sequence[int]
    places: Sequence[int]
    """For each of them, its index in the first dimension of ``tensors``."""
    tensors: Mapping[str, torch.Tensor]
    """By the names of the module's parameters."""

    matrices: Mapping[str, BfloatMatrices] = field(default_factory=dict)
    """Those of ``tensors`` that a few rows are multiplied with in a faster way."""

    def products(self, name: str, inputs: Inputs, *, is_transposed: bool) -> torch.Tensor:
        """What torch's grouped product computes on a CPU.

        That one spends time on each expert without tokens, and most cells are those of other layers.

        Args:
            name: Of a parameter, matrices of experts.
            inputs: What is multiplied.
            is_transposed: The rows' elements are along the matrices' first dimension, not the second.
        """
        matrices = self.tensors[name]
        rows = inputs.rows.to(matrices.dtype)
        fast = self.matrices.get(name)
        if fast is not None and fast.fit(inputs.counts):
            return fast.products(inputs.places, inputs.counts, rows)
        if not is_transposed:
            matrices = matrices.transpose(-2, -1)
        result, parts = inputs.parted(matrices.shape[-1], matrices.dtype)
        for place, group, out in zip(inputs.places, inputs.split(rows), parts, strict=True):
            torch.mm(group, matrices[place], out=out)
        return result


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


class Banks(Protocol):
    """Makes banks of what is in cells."""

    def of(self, lease: Lease, *, tokens: int) -> Generator[Bank]:
        """Banks for all experts of ``lease``, whose bytes have arrived; each is valid until the next one is asked for.

        Args:
            lease: Held meanwhile.
            tokens: Of the pass that computes with them.
        """

    def of_expert(self, lease: Lease, expert: int) -> Generator[Bank]:
        """The same for one expert."""


class StoredBanks:
    """The cells themselves, addressed through strides.

    Args:
        views: The tensors of one expert in a cell.
        is_transposed: See ``Bank.products``.
    """

    def __init__(self, views: Sequence[TensorView], *, is_transposed: bool) -> None:
        self._views = views
        self._is_transposed = is_transposed
        # Weak: a module that outlives its model must not keep the cells.
        self._made: WeakKeyDictionary[
            CellRegion, tuple[dict[str, nn.Parameter], dict[str, BfloatMatrices]]
        ] = WeakKeyDictionary()

    def of(self, lease: Lease, *, tokens: int = 0) -> Generator[Bank]:  # noqa: ARG002 - for any number
        """One bank over all cells of the region."""
        made = self._made.get(lease.region)
        if made is None:
            made = self._made[lease.region] = self._over(lease.region)
        yield Bank(
            experts=lease.group.experts, places=lease.cells, tensors=made[0], matrices=made[1]
        )

    def _over(
        self, region: CellRegion
    ) -> tuple[dict[str, nn.Parameter], dict[str, BfloatMatrices]]:
        with torch.inference_mode(mode=False):
            tensors = {
                view.name: nn.Parameter(region.strided(view), requires_grad=False)
                for view in self._views
            }
        matrices = {
            name: BfloatMatrices(each.data, summed)
            for name, each in tensors.items()
            if not self._is_transposed and (summed := summed_in_place(each.dtype, each.shape[1:]))
        }
        return tensors, matrices

    def of_expert(self, lease: Lease, expert: int) -> Generator[Bank]:  # noqa: ARG002 - it is in there
        """The same bank."""
        return self.of(lease)


def summed_in_place(dtype: torch.dtype, shape: Sequence[int]) -> tuple[int, ...]:
    """``summed_columns`` of matrices of ``shape``; empty for others than bfloat16, and for vectors."""
    if dtype != torch.bfloat16 or len(shape) != 2:  # noqa: PLR2004
        return ()
    return summed_columns(*shape)


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
