"""Banks: what a module computes with in place of its experts, while it holds their cells."""

import itertools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn

from layerstream.pipeline.planning.expert_cells import COPIED_BYTES
from layerstream.stages.batch import TensorView
from layerstream.stages.experts.cells import CellRegion
from layerstream.stages.experts.lease import Lease
from layerstream.stages.unpack.bfloat_rows import BfloatMatrices, summed_columns

__all__ = [
    "Bank",
    "Banks",
    "Inputs",
    "StoredBanks",
    "grouped_products",
    "summed_in_place",
]


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
        result = torch.empty((len(self.rows), columns), dtype=dtype, device=self.rows.device)
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
        """What torch's grouped product computes.

        That one spends time on each expert without tokens, and most cells are those of other layers. On a CPU it multiplies
        with one after the other; on a GPU it gets those that are used.

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
        if rows.device.type != "cpu":
            return grouped_products(matrices, inputs.with_rows(rows), is_transposed=is_transposed)
        if not is_transposed:
            matrices = matrices.transpose(-2, -1)
        result, parts = inputs.parted(matrices.shape[-1], matrices.dtype)
        for place, group, out in zip(inputs.places, inputs.split(rows), parts, strict=True):
            torch.mm(group, matrices[place], out=out)
        return result


def grouped_products(
    matrices: torch.Tensor, inputs: Inputs, *, is_transposed: bool, copied_bytes: int = COPIED_BYTES
) -> torch.Tensor:
    """Transformers' grouped product with copies of the matrices that are used, of ``copied_bytes`` at once or one.

    Its kernels take at most 1024 matrices, and there may be more cells.
    """
    from transformers.integrations.moe import _grouped_mm

    nbytes = matrices[0].numel() * matrices.itemsize
    size = max(copied_bytes // nbytes, 1)
    columns = matrices.shape[-1 if is_transposed else -2]
    result, begin = inputs.rows.new_empty((len(inputs.rows), columns)), 0
    for at in range(0, len(inputs.places), size):
        ends = list(itertools.accumulate(inputs.counts[at : at + size]))
        copied = matrices[list(inputs.places[at : at + size])]
        result[begin : begin + ends[-1]] = _grouped_mm(
            inputs.rows[begin : begin + ends[-1]],
            copied if is_transposed else copied.transpose(-2, -1),
            torch.tensor(ends, dtype=torch.int32, device=matrices.device),
        )
        begin += ends[-1]
        del copied  # before the next ones are made
    return result


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
            if region.memory.device.type == "cpu"
            and not self._is_transposed
            and (summed := summed_in_place(each.dtype, each.shape[1:]))
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
