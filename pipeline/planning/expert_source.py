"""The experts of a layer as they lie in the files, and their places in cells. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from layerstream.pipeline.checkpoint.packed_form import PackedForm
from layerstream.stages.batch import Extent, Place, TensorView
from layerstream.stages.experts.expert_set import ExpertPiece, ExpertSet
from layerstream.stages.experts.usage import ExpertUsage
from layerstream.stages.memory import round_up

__all__ = ["ExpertSource", "ExpertTensor", "lay_out_experts"]

# What a matrix begins at a multiple of in a cell: a cache line, and all that kernels ask for.
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTensor:
    """One tensor of each expert, all of equal dtype and shape."""

    name: str
    """The parameter's name in its module."""
    dtype: str
    """torch's name, e.g. "bfloat16"."""
    shape: tuple[int, ...]
    """Of one expert."""
    nbytes: int
    """Of one expert."""
    extents: tuple[tuple[Extent, ...], ...]
    """For each expert, what its tensor consists of: as many extents as for any other, of equal sizes."""
    shift: int = 0
    """Its address modulo 64 where transformers computes with it, which decides on kernels."""
    packed: PackedForm | None = None
    """How it is packed, if it is."""


@dataclass(frozen=True, kw_only=True)
class ExpertSource:
    """The routed experts of one module, which can be read one by one.

    It has no ``__slots__``, so that it is laid out once, not for each plan that is considered.
    """

    module: str
    experts: int
    per_token: int
    """How many experts a token is routed to; 0 if unknown."""
    tensors: tuple[ExpertTensor, ...]
    is_multiplied_packed: bool = True
    """Whether fused kernels can multiply with it, if it is packed."""

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return self.experts * self.expert_bytes

    @property
    def cell_bytes(self) -> int:
        """What one expert takes in a cell."""
        return self.without_cells.cell_bytes

    @cached_property
    def without_cells(self) -> ExpertSet:
        """The experts with their places in a cell, before the store has cells for them."""
        views: list[TensorView] = []
        pieces: list[ExpertPiece] = []
        at = 0
        for tensor in self.tensors:
            begin = round_up(at, _ALIGNMENT) + tensor.shift
            at = begin + tensor.nbytes
            views.append(
                TensorView(
                    name=tensor.name,
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    place=Place.HOST,
                    offset=begin,
                    nbytes=tensor.nbytes,
                )
            )
            pieces += _pieces(tensor.extents, begin)
        return ExpertSet(
            module=self.module,
            layer="",
            experts=self.experts,
            per_token=self.per_token,
            cells=0,
            cell_bytes=round_up(at, _ALIGNMENT),
            tensors=tuple(views),
            pieces=tuple(pieces),
        )


def lay_out_experts(
    source: ExpertSource,
    *,
    layer: str,
    cells: int,
    device_cells: int = 0,
    usage: ExpertUsage | None = None,
) -> ExpertSet:
    """The experts of ``source`` with their places in a cell; the layer has ``cells``, and ``device_cells`` on a GPU."""
    return replace(
        source.without_cells, layer=layer, cells=cells, device_cells=device_cells, usage=usage
    )


def _pieces(extents: tuple[tuple[Extent, ...], ...], begin: int) -> Iterable[ExpertPiece]:
    """The extents of all experts, column by column."""
    for column in zip(*extents, strict=True):
        nbytes = column[0].nbytes
        yield ExpertPiece(
            cell_offset=begin,
            nbytes=nbytes,
            files=tuple(extent.file for extent in column),
            offsets=tuple(extent.offset for extent in column),
        )
        begin += nbytes
