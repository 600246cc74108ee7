"""The layout of a layer batch: executed on bytes, it gives every tensor as it is in the files."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerstream.pipeline.checkpoint.layers import LayerKind
from layerstream.pipeline.planning.layout import layout_batch
from layerstream.pipeline.planning.planned_layer import PlannedLayer, TensorSource
from layerstream.stages.batch import Extent, Place
from layerstream.stages.memory import Image

BLOCK = 4096
DTYPES = ("uint8", "bfloat16", "float32", "float64", "float8_e4m3fn", "complex64")


def source(name, *extents, dtype="uint8", copied=False):
    nbytes = sum(extent.nbytes for extent in extents)
    shape = (nbytes // getattr(torch, dtype).itemsize,)
    return TensorSource(name=name, dtype=dtype, shape=shape, extents=extents, copied=copied)


def layer(*sources, name="block"):
    return PlannedLayer(name=name, kind=LayerKind.BLOCK, tensors=sources)


def extent(offset, nbytes, file=0):
    return Extent(file=file, offset=offset, nbytes=nbytes)


@st.composite
def checkpoints(draw):
    """Files, and tensors cut out of them: with gaps, at any offset, of any dtype, some from many pieces."""
    file_bytes, extents = [], []
    for file in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from([0, 8, 96, 104, 4096, 5000, 300_001]))
        for _ in range(draw(st.integers(0, 8))):
            at += draw(st.sampled_from([0, 0, 0, 1, 2, 8, 64, 600, 5000, 20_000, 300_000]))
            nbytes = 8 * draw(st.sampled_from([0, 1, 2, 5, 8, 32, 100, 512, 513, 3000]))
            extents.append(Extent(file=file, offset=at, nbytes=nbytes))
            at += nbytes
        file_bytes.append(at + draw(st.sampled_from([0, 0, 1, 4096])))
    extents = draw(st.permutations(extents))
    sources = []
    while extents:
        count = draw(st.sampled_from([1, 1, 1, 2, 3, len(extents)]))
        pieces, extents = extents[:count], extents[count:]
        dtype, copied = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([False] * 4 + [True]))
        sources.append(source(f"t{len(sources)}", *pieces, dtype=dtype, copied=copied))
    if sources and draw(st.booleans()):  # the same bytes under another name, as tied weights are
        again = draw(st.sampled_from(sources))
        sources.append(source("tied", *again.extents, dtype=again.dtype))
    return file_bytes, sources


def contents(file_bytes):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, size, dtype=np.uint8) for size in file_bytes]


def executed(batch, files):
    """The two images after the reads and the segments, executed in the simplest way."""
    host = np.full(batch.host_bytes, 0xA5, np.uint8)
    for read in batch.reads:
        piece = files[read.file][read.file_offset : read.file_offset + read.nbytes]
        assert len(piece) == read.nbytes
        host[read.host_offset : read.host_offset + read.nbytes] = piece
    device = np.full(batch.device_bytes, 0x5A, np.uint8)
    for segment in batch.segments:
        piece = host[segment.host_offset : segment.host_offset + segment.nbytes]
        assert len(piece) == segment.nbytes
        device[segment.device_offset : segment.device_offset + segment.nbytes] = piece
    return {Place.HOST: host, Place.DEVICE: device}


@given(checkpoints(), st.booleans())
def test_every_tensor_is_placed_once_and_bit_exactly(checkpoint, reads_host_images):
    file_bytes, sources = checkpoint
    batch = layout_batch(
        [layer(*sources)],
        index=3,
        file_bytes=file_bytes,
        reads_host_images=reads_host_images,
    )
    files = contents(file_bytes)
    images = executed(batch, files)
    assert [view.name for view in batch.tensors] == [each.name for each in sources]
    for view, each in zip(batch.tensors, sources, strict=True):
        assert (view.dtype, view.shape, view.nbytes) == (each.dtype, each.shape, each.nbytes)
        expected = [files[e.file][e.offset : e.offset + e.nbytes] for e in each.extents]
        image = Image([(0, torch.from_numpy(images[view.place]))])
        tensor = image.tensors([view])[view.name]
        assert tensor.shape == each.shape
        got = tensor.view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
        assert bytes(got) == b"".join(map(bytes, expected)), view


@given(checkpoints(), st.booleans())
def test_reads_lie_on_block_boundaries_on_both_sides_and_stay_in_their_file(checkpoint, on_cpu):
    file_bytes, sources = checkpoint
    batch = layout_batch(
        [layer(*sources)], index=0, file_bytes=file_bytes, reads_host_images=on_cpu
    )
    end = 0
    for read in batch.reads:
        assert read.nbytes > 0
        assert read.file_offset % BLOCK == read.host_offset % BLOCK == 0
        assert read.file_offset + read.nbytes <= file_bytes[read.file]
        if read.nbytes % BLOCK:
            assert read.file_offset + read.nbytes == file_bytes[read.file]
        assert read.host_offset >= end
        end = read.host_offset + -(-read.nbytes // BLOCK) * BLOCK  # the last block is padded
    assert end <= batch.host_bytes
    for one, two in itertools.pairwise(batch.reads):
        in_order = (one.file, one.file_offset + one.nbytes) <= (two.file, two.file_offset)
        assert in_order, "two reads overlap in the file, or are out of order"


@given(checkpoints(), st.booleans())
def test_every_segment_lies_within_one_read_and_within_the_device_image(checkpoint, on_cpu):
    file_bytes, sources = checkpoint
    batch = layout_batch(
        [layer(*sources)], index=0, file_bytes=file_bytes, reads_host_images=on_cpu
    )
    for segment in batch.segments:
        assert segment.nbytes > 0
        assert any(
            read.host_offset <= segment.host_offset
            and segment.host_offset + segment.nbytes <= read.host_offset + read.nbytes
            for read in batch.reads
        )
        assert segment.device_offset >= 0
        assert segment.device_offset + segment.nbytes <= batch.device_bytes
    spans = sorted((s.device_offset, s.device_offset + s.nbytes) for s in batch.segments)
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans))


@given(checkpoints())
def test_on_a_gpu_every_tensor_is_in_the_device_image_and_aligned_for_vector_loads(checkpoint):
    file_bytes, sources = checkpoint
    batch = layout_batch([layer(*sources)], index=0, file_bytes=file_bytes, reads_host_images=False)
    for view in batch.tensors:
        assert view.place is Place.DEVICE
        assert view.offset % max(16, getattr(torch, view.dtype).itemsize) == 0
        assert view.offset + view.nbytes <= batch.device_bytes


@given(checkpoints())
def test_on_the_cpu_tensors_keep_the_alignment_that_they_have_in_the_file(checkpoint):
    file_bytes, sources = checkpoint
    batch = layout_batch([layer(*sources)], index=0, file_bytes=file_bytes, reads_host_images=True)
    for view, each in zip(batch.tensors, sources, strict=True):
        item = getattr(torch, view.dtype).itemsize
        if view.nbytes == 0:
            continue
        first = each.extents[0]
        assert view.offset % item == 0
        if view.place is Place.HOST:
            assert len(each.extents) == 1
            assert not each.copied
            assert view.offset % BLOCK == first.offset % BLOCK
        elif len(each.extents) > 1 or each.copied:
            assert view.offset % 256 == 0
        elif first.offset % item == 0:
            assert view.offset % 64 == first.offset % 64


@given(checkpoints())
def test_on_the_cpu_a_tensor_that_is_usable_where_it_was_read_is_not_copied(checkpoint):
    file_bytes, sources = checkpoint
    in_place = [
        each
        for each in sources
        if len(each.extents) == 1
        and not each.copied
        and each.extents[0].offset % getattr(torch, each.dtype).itemsize == 0
    ]
    batch = layout_batch([layer(*in_place)], index=0, file_bytes=file_bytes, reads_host_images=True)
    if sum(each.nbytes for each in in_place):
        assert batch.segments == ()
        assert batch.device_bytes == 0
        assert batch.uses_host_image


@pytest.mark.parametrize("start", [0, 8, 64, 1000, 4096 + 16])
def test_five_hundred_neighbouring_tensors_are_one_read_and_on_a_gpu_one_segment(start):
    sources = [source(f"t{i}", extent(start + 48 * i, 48), dtype="float32") for i in range(500)]
    batch = layout_batch(
        [layer(*sources)], index=0, file_bytes=[start + 48 * 500], reads_host_images=False
    )
    assert len(batch.reads) == 1
    assert len(batch.segments) == 1


@pytest.mark.parametrize(("width", "segments"), [(512, 1), (960, 2)])
def test_on_a_gpu_a_matrix_is_aligned_as_torch_aligns_its_own_whatever_precedes_it(width, segments):
    norm = source("norm", extent(0, 2 * width), dtype="bfloat16")
    matrix = TensorSource(
        name="matrix",
        dtype="bfloat16",
        shape=(4, width),
        extents=(extent(2 * width, 8 * width),),
    )
    batch = layout_batch(
        [layer(norm, matrix)], index=0, file_bytes=[10 * width], reads_host_images=False
    )
    assert [view.offset % 256 for view in batch.tensors] == [0, 0]
    assert len(batch.segments) == segments


def test_neighbouring_layers_of_one_batch_are_one_read_and_one_segment():
    layers = [layer(source(f"{i}", extent(104 + 4096 * i, 4096)), name=f"{i}") for i in range(6)]
    batch = layout_batch(layers, index=0, file_bytes=[104 + 6 * 4096], reads_host_images=False)
    assert batch.layers == ("0", "1", "2", "3", "4", "5")
    assert len(batch.reads) == len(batch.segments) == 1
    assert batch.read_bytes == 104 + 6 * 4096


def test_a_small_gap_is_read_and_a_large_one_is_skipped():
    near = [source("a", extent(0, 8192)), source("b", extent(8192 + (64 << 10), 8192))]
    far = [source("a", extent(0, 8192)), source("b", extent(8192 + (1 << 20), 8192))]
    for sources, reads in ((near, 1), (far, 2)):
        batch = layout_batch(
            [layer(*sources)], index=0, file_bytes=[4 << 20], reads_host_images=False
        )
        assert len(batch.reads) == reads


def test_a_fused_tensor_is_contiguous_though_its_pieces_lie_in_three_files():
    pieces = [extent(8, 100, file=2), extent(5000, 28, file=0), extent(0, 128, file=1)]
    batch = layout_batch(
        [layer(source("fused", *pieces))],
        index=0,
        file_bytes=[6000, 128, 108],
        reads_host_images=True,
    )
    files = contents([6000, 128, 108])
    (view,) = batch.tensors
    image = executed(batch, files)[Place.DEVICE]
    expected = [bytes(files[e.file][e.offset : e.offset + e.nbytes]) for e in pieces]
    assert bytes(image[view.offset : view.offset + view.nbytes]) == b"".join(expected)


def test_on_the_cpu_a_batch_that_is_mostly_fused_is_copied_whole_so_that_its_host_slot_is_free_soon():
    fused = source("fused", extent(0, 4096), extent(8192, 4096))
    batch = layout_batch(
        [layer(fused, source("norm", extent(4096 + 8, 64)))],
        index=0,
        file_bytes=[12288],
        reads_host_images=True,
    )
    assert not batch.uses_host_image


def test_on_the_cpu_a_float_at_an_odd_offset_is_copied_to_an_even_one():
    odd = source("odd", extent(4099, 64), dtype="float32")
    batch = layout_batch([layer(odd)], index=0, file_bytes=[4163], reads_host_images=True)
    (view,) = batch.tensors
    assert view.place is Place.DEVICE
    assert view.offset % 4 == 0


def test_a_batch_of_empty_tensors_reads_and_copies_nothing():
    empty = source("empty", extent(96, 0), dtype="float32")
    batch = layout_batch([layer(empty)], index=0, file_bytes=[96], reads_host_images=False)
    assert (batch.reads, batch.segments, batch.host_bytes, batch.device_bytes) == ((), (), 0, 0)
    assert Image([]).tensors(batch.tensors)[batch.tensors[0].name].shape == (0,)
