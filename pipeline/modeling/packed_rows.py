"""Parameters whose rows are rows of packed matrices, so that a few rows can be unpacked without the others.

Loading unpacks matrices (see unpacking.py) and then arranges their rows: it stacks experts, concatenates gates and
projections, permutes rows for rotary positions, casts. As long as no operation touches the last dimension, each row of the
parameter is one row of one matrix. Which one is found by running the recorded operations on the numbers of the rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from layerstream.pipeline.modeling.recipes import Recipe
from layerstream.pipeline.modeling.row_numbers import COPIES, row_numbers
from layerstream.pipeline.modeling.tracer_tensor import Node, Operation, Output
from layerstream.pipeline.modeling.unpacking import Unpack
from layerstream.pipeline.planning.tiles import tile_rows
from layerstream.stages.unpack.packing import Packing

__all__ = ["PackedMatrix", "PackedRows", "RowPiece", "RowRun", "packed_parameters", "packed_rows"]

_aten = torch.ops.aten

# A scattered parameter, such as queries permuted for rotary positions, keeps one number per row.
_MOST_RUNS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMatrix:
    """A matrix as it is stored."""

    packing: Packing
    parts: tuple[str, ...]
    """The checkpoint tensors that it consists of."""
    rows: int
    columns: int


class RowRun(NamedTuple):
    """Consecutive rows of a packed matrix."""

    matrix: int
    """Index into ``PackedRows.matrices``."""
    first: int
    rows: int


class RowPiece(NamedTuple):
    """Some rows of a parameter, and where they are."""

    matrix: int
    """Index into ``PackedRows.matrices``."""
    at: int
    """Which of the rows asked for is the first."""
    first: int
    """Its number in the matrix."""
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """A parameter, seen as ``[rows, columns]`` whatever its shape, whose rows are those of packed matrices."""

    matrices: tuple[PackedMatrix, ...]
    dtype: torch.dtype
    rows: int
    columns: int
    runs: tuple[RowRun, ...]
    """The rows of the parameter, in order; empty if they are scattered."""
    transposed: bool
    """The last two dimensions of the parameter are exchanged at the end: these are its rows before that."""
    order: torch.Tensor | None = field(repr=False, compare=False)
    """int64 ``[rows]``: for each row of the parameter, which row of the only matrix it is, all of them; None unless scattered."""
    exact_tokens: int | None = None
    """Up to how many tokens products by tiles have the bits of the whole product; None: always."""

    @property
    def nbytes(self) -> int:
        """Of the unpacked parameter."""
        return self.rows * self.columns * self.dtype.itemsize

    @property
    def tile_rows(self) -> int:
        """How many rows are unpacked at once."""
        return tile_rows(self.rows, self.columns, self.dtype.itemsize)

    @property
    def is_table(self) -> bool:
        """Whether rows are whole in the files: those of one matrix after another, each in one checkpoint tensor."""
        whole = tuple(RowRun(number, 0, each.rows) for number, each in enumerate(self.matrices))
        single = all(len(matrix.parts) == 1 for matrix in self.matrices)
        alike = len({matrix.packing for matrix in self.matrices}) == 1
        return single and alike and not self.transposed and self.runs == whole

    def unpack(
        self,
        parts: Mapping[str, torch.Tensor],
        first: int,
        out: torch.Tensor,
        *,
        scratch: torch.Tensor | None = None,
    ) -> None:
        """Write rows ``first`` .. ``first + len(out)`` of the parameter into ``out``.

        Args:
            parts: The checkpoint tensors, by name, on the CPU.
            first: The first row.
            out: Contiguous ``[count, columns]`` of the parameter's dtype.
            scratch: For scattered rows, of the same form as ``out``, for as many rows or more.
        """
        if self.order is not None:
            self._unpack_scattered(parts, first, out, scratch)
            return
        for number, at, begin, count in self.pieces(first, first + len(out)):
            matrix = self.matrices[number]
            matrix.packing.unpack(
                [parts[name] for name in matrix.parts], begin, out[at : at + count]
            )

    def unpack_stored(
        self, parts: Mapping[str, torch.Tensor], first: int, out: torch.Tensor
    ) -> None:
        """As ``unpack``, but rows of the only matrix, in its own order, where those of the parameter are scattered."""
        if self.order is None:
            self.unpack(parts, first, out)
            return
        (matrix,) = self.matrices
        matrix.packing.unpack([parts[name] for name in matrix.parts], first, out)

    def multiply(
        self,
        parts: Mapping[str, torch.Tensor],
        first: int,
        inputs: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Multiply with rows ``first`` .. ``first + out.shape[1]``, of the only matrix if they are scattered.

        Args:
            parts: As for ``unpack``.
            first: The first row.
            inputs: Contiguous float32 ``[tokens, columns]``.
            out: Contiguous float32 ``[tokens, rows]``.
        """
        whole = [RowPiece(0, 0, first, out.shape[1])]
        for number, at, begin, count in (
            whole if self.order is not None else self.pieces(first, first + out.shape[1])
        ):
            matrix = self.matrices[number]
            tensors = [parts[name] for name in matrix.parts]
            is_all = count == out.shape[1]
            part = out if is_all else torch.empty((len(inputs), count))
            matrix.packing.multiply(tensors, begin, inputs, part)
            if not is_all:
                out[:, at : at + count] = part

    def pieces(self, begin: int, end: int) -> Iterator[RowPiece]:
        """What rows ``begin`` to ``end`` consist of, in order; none if they are scattered."""
        at = 0
        for run in self.runs:
            lo, hi = max(begin, at), min(end, at + run.rows)
            if lo < hi:
                yield RowPiece(run.matrix, lo - begin, run.first + lo - at, hi - lo)
            at += run.rows

    def _unpack_scattered(
        self,
        parts: Mapping[str, torch.Tensor],
        first: int,
        out: torch.Tensor,
        scratch: torch.Tensor | None,
    ) -> None:
        assert self.order is not None  # noqa: S101
        rows = self.order[first : first + len(out)]
        low, high = int(rows.min()), int(rows.max()) + 1
        packing, names = self.matrices[0].packing, self.matrices[0].parts
        tensors = [parts[name] for name in names]
        if scratch is None or high - low > len(scratch):
            for at, row in enumerate(rows.tolist()):
                packing.unpack(tensors, row, out[at : at + 1])
            return
        # Permutations stay within a head, so these are the same rows in another order, or few more.
        packing.unpack(tensors, low, scratch[: high - low])
        torch.index_select(scratch[: high - low], 0, rows - low, out=out)


def packed_parameters(recipes: Mapping[str, Recipe]) -> dict[str, PackedRows]:
    """The parameters whose rows are packed, by the names of their recipes."""
    made = ((name, each) for name, each in recipes.items() if each.pieces is None)
    return {name: rows for name, each in made if (rows := packed_rows(each)) is not None}


def packed_rows(recipe: Recipe) -> PackedRows | None:
    """How the rows of ``recipe``'s parameter are packed; None if they are not, or if loading does more than arrange them."""
    unpacks = [op for op in recipe.operations if isinstance(op.function, Unpack)]
    if not unpacks or len(recipe.shape) < 2:  # noqa: PLR2004 - no matrix
        return None
    final: torch.dtype = getattr(torch, recipe.dtype)
    operations, value, shape = recipe.operations, recipe.value, recipe.shape
    transposed = _transposed_at_the_end(operations, value)
    if transposed is not None:
        operations, value = operations[:-2], transposed
        shape = (*shape[:-2], shape[-1], shape[-2])
    matrices = [_matrix(operation) for operation in unpacks]
    numbers = None
    if {matrix.columns for matrix in matrices} == {shape[-1]} and _rounds_once(operations, final):
        numbers = row_numbers(operations, value, unpacks)
    if numbers is None or numbers.shape != (*shape[:-1], 1):
        return None
    flat = numbers.reshape(-1)
    runs = _runs(flat, matrices)
    if runs is None and not _is_permutation(flat, matrices):
        return None
    return PackedRows(
        matrices=tuple(matrices),
        dtype=final,
        rows=len(flat),
        columns=shape[-1],
        runs=runs or (),
        transposed=transposed is not None,
        order=flat.clone() if runs is None else None,
    )


def _matrix(operation: Operation) -> PackedMatrix:
    unpack = operation.function
    return PackedMatrix(
        packing=unpack.packing,
        parts=tuple(part.name for part in operation.arguments[0]),
        rows=torch.Size(unpack.shape[:-1]).numel(),
        columns=unpack.shape[-1],
    )


def _transposed_at_the_end(operations: Sequence[Operation], value: Node) -> Node | None:
    """What the last two operations exchange two dimensions of; None if they do something else."""
    if len(operations) < 3 or not isinstance(value, Output):  # noqa: PLR2004
        return None
    transpose, copy = operations[-2:]
    if copy.function not in COPIES or transpose.function is not _aten.transpose.int:
        return None
    tensor, *dims = transpose.arguments[0]
    joined = value.operation is copy and copy.arguments[0][0].operation is transpose
    rank = 3
    found: Node = tensor
    return found if joined and {dim % rank for dim in dims} == {1, 2} else None


def _rounds_once(operations: Sequence[Operation], final: torch.dtype) -> bool:
    """Whether unpacking straight to ``final`` gives what the operations give."""
    casts = {
        op.arguments[1].get("dtype", final)
        for op in operations
        if op.function is _aten._to_copy.default  # noqa: SLF001
    }
    unpacks = [op.function for op in operations if isinstance(op.function, Unpack)]
    return casts <= {final} and all(
        unpack.rounds or unpack.dtype in {torch.float32, final} for unpack in unpacks
    )


def _is_permutation(numbers: torch.Tensor, matrices: Sequence[PackedMatrix]) -> bool:
    """Whether these are all rows of one matrix."""
    return len(matrices) == 1 and torch.equal(
        numbers.sort().values, torch.arange(matrices[0].rows, dtype=numbers.dtype)
    )


def _runs(numbers: torch.Tensor, matrices: Sequence[PackedMatrix]) -> tuple[RowRun, ...] | None:
    """Consecutive numbers as runs within matrices; None if they are scattered."""
    starts = torch.tensor([matrix.rows for matrix in matrices]).cumsum(0)
    matrix_of = torch.searchsorted(starts, numbers, right=True)
    breaks = (numbers[1:] != numbers[:-1] + 1) | (matrix_of[1:] != matrix_of[:-1])
    begins = [0, *(torch.nonzero(breaks).flatten() + 1).tolist()]
    if len(begins) > max(_MOST_RUNS, 4 * len(matrices)) or (
        len(begins) > len(numbers) // 16 and len(matrices) == 1 and len(begins) > 1
    ):
        return None
    ends = [*begins[1:], len(numbers)]
    runs = []
    for begin, end in zip(begins, ends, strict=True):
        matrix = int(matrix_of[begin])
        offset = int(starts[matrix - 1]) if matrix else 0
        runs.append(RowRun(matrix, int(numbers[begin]) - offset, end - begin))
    return tuple(runs)
