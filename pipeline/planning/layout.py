"""Layer batches -> coalesced reads and places in their two images. Pure: no I/O."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from layerstream.pipeline.checkpoint.layers import LayerKind
from layerstream.pipeline.planning.planned_layer import PlannedLayer, TensorSource
from layerstream.stages.batch import Extent, LayerBatch, Place, Read, Segment, TensorView
from layerstream.stages.memory import round_up
from layerstream.stages.readers.coalescing import coalesce
from layerstream.stages.readers.direct import BLOCK_BYTES

__all__ = ["Layouts", "layout_batch"]

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


class _Piece(NamedTuple):
    """Where an extent of a tensor is in the host image."""

    host_offset: int
    read: int
    """Index of the read that contains it."""
    nbytes: int


_Placed = tuple[TensorSource, list[_Piece]]


class Layouts:
    """The layer batches of a model: laid out once for each size, whatever else a candidate differs in.

    Args:
        layers: In execution order.
        file_bytes: Size of each file of the checkpoint.
        reads_host_images: As for ``layout_batch``.
    """

    def __init__(
        self, layers: Sequence[PlannedLayer], *, file_bytes: Sequence[int], reads_host_images: bool
    ) -> None:
        self.layers = tuple(layers)
        self._file_bytes = file_bytes
        self._reads_host_images = reads_host_images
        self._of_size: dict[int, tuple[LayerBatch, ...]] = {}

    def of_size(self, size: int) -> tuple[LayerBatch, ...]:
        """All layers in batches of ``size`` blocks; those that must be resident are in batches of their own."""
        if size not in self._of_size:
            self._of_size[size] = tuple(
                layout_batch(
                    group,
                    index=index,
                    file_bytes=self._file_bytes,
                    reads_host_images=self._reads_host_images,
                )
                for index, group in enumerate(self._groups(size))
            )
        return self._of_size[size]

    def _groups(self, size: int) -> list[list[PlannedLayer]]:
        groups: list[list[PlannedLayer]] = []
        for layer in self.layers:
            joins = (
                groups
                and layer.kind is groups[-1][0].kind is LayerKind.BLOCK
                and layer.always_resident == groups[-1][0].always_resident
                and len(groups[-1]) < size
            )
            if joins:
                groups[-1].append(layer)
            else:
                groups.append([layer])
        return groups


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
    copied = sorted(copied, key=lambda place: place[1][0])
    offsets = _device_offsets(copied, congruent=reads_host_images)
    device_bytes = max((offsets[source.name] + source.nbytes for source, _ in copied), default=0)
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
        segments=_segments(copied, offsets),
        tensors=views,
        host_bytes=sum(round_up(read.nbytes, BLOCK_BYTES) for read in reads),
        device_bytes=round_up(device_bytes, _DEVICE_ALIGNMENT),
        scratch_bytes=sum(layer.scratch_bytes for layer in layers)
        + max(layer.tile_bytes for layer in layers),
    )


def _usable_in_place(source: TensorSource) -> bool:
    aligned = source.extents[0].offset % source.item_bytes == 0
    return len(source.extents) == 1 and aligned and not source.copied


def _bytes_of(places: Sequence[_Placed]) -> int:
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


def _device_offsets(places: Sequence[_Placed], *, congruent: bool) -> dict[str, int]:
    """Where each tensor is in the device image, by name: in the order of the host image, so that neighbours stay neighbours.

    With ``congruent``, whole tensors keep their host offset modulo ``_VECTOR_BYTES``, unless their offset in the
    file is not aligned for their dtype.
    """
    offsets: dict[str, int] = {}
    end = 0
    before: tuple[_Piece, int] | None = (
        None  # the piece before, and where it is in the device image
    )
    for source, pieces in places:
        first = pieces[0]
        fused = len(pieces) > 1 or source.copied
        offset = None if fused or before is None else _next_to(*before, first, source, congruent)
        if offset is None:
            keeps = congruent and not fused and first.host_offset % source.item_bytes == 0
            shift = first.host_offset % _DEVICE_ALIGNMENT if keeps else 0
            offset = round_up(end, _DEVICE_ALIGNMENT) + shift
        offsets[source.name] = offset
        for piece in pieces:
            if piece.nbytes:
                before = piece, offset
            offset += piece.nbytes
        end = max(end, offset)
    return offsets


def _next_to(
    before: _Piece, offset: int, piece: _Piece, source: TensorSource, congruent: bool
) -> int | None:
    """The device offset of ``piece``, all of ``source``, if it is copied together with ``before``, which is at ``offset``.

    None if they are too far apart, or if that is no place for the tensor.
    """
    gap = piece.host_offset - (before.host_offset + before.nbytes)
    if piece.read != before.read or not 0 <= gap <= _COPY_GAP_BYTES:
        return None
    vector = len(source.shape) < _MATRIX_DIMENSIONS
    multiple = _LEAST_ALIGNMENT if congruent or vector else _DEVICE_ALIGNMENT
    shift = offset - before.host_offset
    if congruent and shift % _VECTOR_BYTES:
        return None
    offset = piece.host_offset + shift
    return None if offset % max(multiple, source.item_bytes) else offset


def _segments(places: Sequence[_Placed], offsets: Mapping[str, int]) -> tuple[Segment, ...]:
    """The copies that bring tensors to their ``offsets``: one for all that keep their distances."""
    found: list[list[int]] = []  # [host_offset, device_offset, nbytes]
    last_read = -1
    for source, pieces in places:
        offset = offsets[source.name]
        for piece in pieces:
            if not piece.nbytes:
                continue
            host, device = found[-1][:2] if found else (0, 0)
            if piece.read == last_read and piece.host_offset - host == offset - device >= 0:
                found[-1][2] = offset + piece.nbytes - device
            else:
                found.append([piece.host_offset, offset, piece.nbytes])
                last_read = piece.read
            offset += piece.nbytes
    return tuple(Segment(host_offset=h, device_offset=d, nbytes=n) for h, d, n in found)
