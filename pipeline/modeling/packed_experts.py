"""Experts whose parameters are packed: how one is unpacked, and what is read for it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.packed_form import PackedForm
from layerstream.pipeline.modeling.packed_rows import PackedMatrix, PackedRows, RowPiece
from layerstream.pipeline.planning.expert_source import ExpertTensor
from layerstream.stages.batch import Extent, TensorView
from layerstream.stages.unpack.packing import Packing

__all__ = ["EAGER", "PackedParameter", "PackedPiece", "are_multiplied_packed", "packed_parameter"]

EAGER = {None, "eager"}
"""Implementations that compute with one expert after the other."""


class PackedPiece(NamedTuple):
    """Some rows of one expert, in one packed matrix."""

    packing: Packing
    parts: tuple[str, ...]
    """Names of the packed tensors in a cell."""
    at: int
    """The first of the expert's rows that it holds."""
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedParameter:
    """One parameter of an expert module, for one expert, and what it is unpacked from."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of one expert, as the module has it."""
    transposed: bool
    """The packed rows are its columns."""
    pieces: tuple[PackedPiece, ...]

    @property
    def nbytes(self) -> int:
        """Of one expert, unpacked."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def scratch_bytes(self) -> int:
        """What one expert takes while it is unpacked, the result included."""
        return self.nbytes * (2 if self.transposed else 1)

    @property
    def rows(self) -> int:
        """Packed rows of one expert."""
        return self.shape[-1] if self.transposed else torch.Size(self.shape[:-1]).numel()


def are_multiplied_packed(
    module: Any, parameters: Sequence[PackedParameter], tensors: Iterable[ExpertTensor | TensorView]
) -> bool:
    """Whether fused kernels can multiply with the experts of ``module``.

    Args:
        module: Of transformers.
        parameters: Its packed ones.
        tensors: All tensors of one expert; the names of packed ones have a colon.
    """
    plain = any(":" not in each.name and len(each.shape) > 1 for each in tensors)
    is_eager = getattr(module.config, "_experts_implementation", None) in EAGER
    fit = all(each.transposed == module.is_transposed for each in parameters)
    return bool(parameters) and fit and not plain and not is_eager


def packed_parameter(
    name: str, shape: Sequence[int], rows: PackedRows, checkpoint: Checkpoint
) -> tuple[PackedParameter, tuple[ExpertTensor, ...]] | None:
    """How a parameter ``[experts, ...]`` is unpacked expert by expert, and the tensors that are read for that.

    None if its experts cannot be read one by one, or differ in form.
    """
    experts = shape[0]
    if not rows.runs or rows.rows % experts:
        return None
    height = rows.rows // experts
    pieces = [
        list(rows.pieces(expert * height, (expert + 1) * height)) for expert in range(experts)
    ]
    forms = [[(p.at, p.rows, rows.matrices[p.matrix].packing) for p in each] for each in pieces]
    if any(form != forms[0] for form in forms):
        return None
    matrix = rows.matrices
    names = [
        tuple(f"{name}:{number}.{part}" for part in range(len(matrix[piece.matrix].parts)))
        for number, piece in enumerate(pieces[0])
    ]
    tensors = []
    width = rows.columns * rows.dtype.itemsize
    for number, (_, count, packing) in enumerate(forms[0]):
        for part, part_name in enumerate(names[number]):
            slices = [_slice(each[number], part, matrix, checkpoint) for each in pieces]
            form = PackedForm(packing.encoding, 0 if part else count * width)
            tensor = _tensor(part_name, slices, form)
            if tensor is None:
                return None
            tensors.append(tensor)
    parameter = PackedParameter(
        name=name,
        dtype=rows.dtype,
        shape=tuple(shape[1:]),
        transposed=rows.transposed,
        pieces=tuple(
            PackedPiece(packing=packing, parts=parts, at=at, rows=count)
            for (at, count, packing), parts in zip(forms[0], names, strict=True)
        ),
    )
    return parameter, tuple(tensors)


class _Slice(NamedTuple):
    """What belongs to one expert of a packed tensor."""

    extent: Extent
    dtype: str
    shape: tuple[int, ...]


def _tensor(name: str, slices: Sequence[_Slice | None], form: PackedForm) -> ExpertTensor | None:
    found = [each for each in slices if each is not None]
    if len(found) < len(slices) or len({(s.dtype, s.shape, s.extent.nbytes) for s in found}) > 1:
        return None
    return ExpertTensor(
        name=name,
        dtype=found[0].dtype,
        shape=found[0].shape,
        nbytes=found[0].extent.nbytes,
        extents=tuple((each.extent,) for each in found),
        packed=form,
    )


def _slice(
    piece: RowPiece, part: int, matrices: Sequence[PackedMatrix], checkpoint: Checkpoint
) -> _Slice | None:
    """What of a part of its matrix belongs to ``piece``; None if that is no slice."""
    rows = matrices[piece.matrix].rows
    info = checkpoint.tensors[matrices[piece.matrix].parts[part]]
    if (piece.first, piece.rows) == (0, rows):
        whole = Extent(file=info.file, offset=info.offset, nbytes=info.nbytes)
        return _Slice(whole, info.dtype, info.shape)
    # Its leading dimensions count rows, or groups of rows.
    for dims in range(1, len(info.shape)):
        groups = torch.Size(info.shape[:dims]).numel()
        begin, end = piece.first * groups, (piece.first + piece.rows) * groups
        if groups and rows % groups == 0 and begin % rows == 0 and end % rows == 0:
            break
    else:
        return None
    nbytes = info.nbytes // groups
    extent = Extent(
        file=info.file,
        offset=info.offset + begin // rows * nbytes,
        nbytes=(end - begin) // rows * nbytes,
    )
    return _Slice(extent, info.dtype, ((end - begin) // rows, *info.shape[dims:]))
