"""One layer batch -> coalesced reads and places in its two images. Pure: no I/O."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from layerstream.pipeline.checkpoint.layers import LayerKind
from layerstream.pipeline.checkpoint.packed_form import PackedForm
from layerstream.pipeline.planning.expert_source import ExpertSource
from layerstream.stages.batch import Extent, LayerBatch, Place, Read, Segment, TensorView
from layerstream.stages.readers.coalescing import coalesce
from layerstream.stages.readers.direct import BLOCK_BYTES

__all__ = ["PlannedLayer", "TensorSource", "layout_batch"]

# A copy has a cost too: some microseconds of the copy engine and of the thread that starts it.
_COPY_GAP_BYTES = 16 << 10

_MATRIX_DIMENSIONS = 2

# Matrices begin at multiples of this in a GPU's images: cuBLASLt chooses kernels by the alignment of its operands, up
# to this, and transformers' own tensors have at least as much. Another kernel may round otherwise.
_DEVICE_ALIGNMENT = 256
# Sufficient for every vector load: in one copy, vectors, and on a CPU all tensors, may follow one another like this.
_LEAST_ALIGNMENT = 16
# The widest vectors of today's processors: kernels treat what precedes such a boundary separately.
_VECTOR_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """A tensor as computation needs it, and the extents of files that it consists of, in order.

    It has no ``__slots__``, so that its bytes are counted once, not for each plan that is considered.
    """

    name: str
    dtype: str
    """torch's name, e.g. "bfloat16"."""
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    """One, unless the tensor is fused from several."""
    copied: bool = False
    """Whether transformers computes with a copy of it, which needs an aligned place of its own."""
    packed: PackedForm | None = None
    """How it is packed, if it is."""

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return sum(extent.nbytes for extent in self.extents)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """A layer with everything that is needed to place it. It has no ``__slots__`` for the same reason."""

    name: str
    kind: LayerKind
    tensors: tuple[TensorSource, ...]
    scratch_bytes: int = 0
    """Tensors that computation makes from them before use."""
    tile_bytes: int = 0
    """What packed weights are unpacked into piece by piece, or what unpacking takes besides ``scratch_bytes``."""
    once_bytes: int = 0
    """What its packed weights take unpacked."""
    always_resident: bool = False
    """Whether it must be resident: computation uses it more than once, or at an unknown time."""
    experts: tuple[ExpertSource, ...] = ()
    """Experts that are read on demand; not among ``tensors``."""

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


class _Piece(NamedTuple):
    """Where an extent of a tensor is in the host image."""

    host_offset: int
    read: int
    """Index of the read that contains it."""
    nbytes: int


def layout_batch(
    layers: Sequence[PlannedLayer],
    *,
    index: int,
    file_bytes: Sequence[int],
    reads_host_images: bool,
) -> LayerBatch:
    """Lay out the batch made of ``layers``.

    Args:
        layers: Those of the batch, in execution order.
        index: The batch's place in execution order.
        file_bytes: Size of each file of the checkpoint.
        reads_host_images: Whether computation runs on the CPU. A tensor that has the right form in the file is then
            used where it was read, at its offset in the file modulo the page size. (transformers maps the files; at
            another alignment, some float32 kernels give other bits.)
    """
    sources = list({tensor.name: tensor for layer in layers for tensor in layer.tensors}.values())
    reads = coalesce([extent for source in sources for extent in source.extents], file_bytes)
    host_image = _HostImage(reads)
    places = [(source, [host_image.find(each) for each in source.extents]) for source in sources]
    copied = [
        (source, pieces)
        for source, pieces in places
        if not (reads_host_images and _usable_in_place(source))
    ]
    if reads_host_images and 2 * _bytes_of(copied) >= _bytes_of(places):
        # Most has to be copied for fusing, so copy the rest too: then the host slot is free after the copy.
        copied = places
    segments, offsets, device_bytes = _device_image(copied, congruent=reads_host_images)
    views = tuple(
        TensorView(
            name=source.name,
            dtype=source.dtype,
            shape=source.shape,
            place=Place.DEVICE if source.name in offsets else Place.HOST,
            offset=offsets.get(source.name, pieces[0].host_offset),
            nbytes=source.nbytes,
        )
        for source, pieces in places
    )
    return LayerBatch(
        index=index,
        layers=tuple(layer.name for layer in layers),
        reads=reads,
        segments=segments,
        tensors=views,
        host_bytes=sum(_round_up(read.nbytes, BLOCK_BYTES) for read in reads),
        device_bytes=device_bytes,
        scratch_bytes=sum(layer.scratch_bytes for layer in layers)
        + max(layer.tile_bytes for layer in layers),
    )


def _usable_in_place(source: TensorSource) -> bool:
    aligned = source.extents[0].offset % source.item_bytes == 0
    return len(source.extents) == 1 and aligned and not source.copied


def _bytes_of(places: Sequence[tuple[TensorSource, list[_Piece]]]) -> int:
    return sum(source.nbytes for source, _ in places)


class _HostImage:
    """The host image that ``reads`` fill."""

    def __init__(self, reads: Sequence[Read]) -> None:
        self._reads = reads
        self._starts = [(read.file, read.file_offset) for read in reads]

    def find(self, extent: Extent) -> _Piece:
        if not extent.nbytes:
            return _Piece(0, 0, 0)
        index = bisect_right(self._starts, (extent.file, extent.offset)) - 1
        read = self._reads[index]
        return _Piece(read.host_offset + extent.offset - read.file_offset, index, extent.nbytes)


def _device_image(
    places: Sequence[tuple[TensorSource, list[_Piece]]], *, congruent: bool
) -> tuple[tuple[Segment, ...], Mapping[str, int], int]:
    """Places in the device image: segments, the offset of each tensor by name, and the image's size.

    Tensors have the order of the host image, so that neighbours stay neighbours and one segment copies them all.
    With ``congruent``, whole tensors keep their host offset modulo ``_VECTOR_BYTES``, unless their offset in the
    file is not aligned for their dtype.
    """
    segments: list[list[int]] = []  # [host_offset, device_offset, nbytes]
    last_read = -1
    offsets: dict[str, int] = {}
    end = 0
    for source, pieces in sorted(places, key=lambda place: place[1][0]):
        first = pieces[0]
        fused = len(pieces) > 1 or source.copied
        offset = None
        if segments and not fused and first.read == last_read:
            vector = len(source.shape) < _MATRIX_DIMENSIONS
            multiple = _LEAST_ALIGNMENT if congruent or vector else _DEVICE_ALIGNMENT
            multiple = max(multiple, source.item_bytes)
            offset = _extended_offset(segments[-1], first.host_offset, multiple)
            if offset and congruent and (offset - first.host_offset) % _VECTOR_BYTES:
                offset = None
        if offset is None:
            keeps = congruent and not fused and first.host_offset % source.item_bytes == 0
            shift = first.host_offset % _DEVICE_ALIGNMENT if keeps else 0
            offset = _round_up(end, _DEVICE_ALIGNMENT) + shift
        offsets[source.name] = offset
        for piece in pieces:
            if not piece.nbytes:
                continue
            last = segments[-1] if segments and piece.read == last_read else None
            if last and piece.host_offset - last[0] == offset - last[1] >= 0:
                last[2] = max(last[2], offset + piece.nbytes - last[1])
            else:
                segments.append([piece.host_offset, offset, piece.nbytes])
                last_read = piece.read
            offset += piece.nbytes
            end = max(end, offset)
    return (
        tuple(Segment(host_offset=h, device_offset=d, nbytes=n) for h, d, n in segments),
        offsets,
        _round_up(end, _DEVICE_ALIGNMENT),
    )


def _extended_offset(segment: Sequence[int], host_offset: int, multiple: int) -> int | None:
    """The device offset of the tensor at ``host_offset`` if ``segment`` is extended to it.

    None if the gap is too large, or the offset not a multiple of ``multiple``.
    """
    host, device, nbytes = segment
    gap = host_offset - (host + nbytes)
    offset = device + host_offset - host
    return offset if 0 <= gap <= _COPY_GAP_BYTES and offset % multiple == 0 else None


def _round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple
