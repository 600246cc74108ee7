"""What the reader of mapped files guarantees beyond the conformance suite of all readers."""

import ctypes
import errno
import mmap
import os

import pytest
from support.leaks import mappings_of, nothing_left_behind
from support.page_cache import cached_pages, drop_from_cache
from support.random_files import SIZE, random_files

from layerstream.stages.batch import Extent, LayerBatch, Read
from layerstream.stages.errors import ReadError
from layerstream.stages.readers.direct import BLOCK_BYTES
from layerstream.stages.readers.mapped import MmapReader


@pytest.fixture
def files(tmp_path):
    """Two files of random bytes, on the disk."""
    return random_files(tmp_path)


def test_a_file_that_cannot_be_mapped_is_named_and_the_others_are_closed_again(files):
    empty = files[0].with_name("empty.bin")
    empty.touch()
    with nothing_left_behind(), pytest.raises(ReadError, match=r"empty\.bin.*cannot be mapped"):
        MmapReader([*files, empty])


def batch_of(*reads):
    return LayerBatch(
        index=0, layers=("a",), reads=reads, segments=(), tensors=(), host_bytes=0, device_bytes=0
    )


def test_a_mapped_batch_shows_the_bytes_of_each_read_at_its_place_in_the_host_image(files):
    reader = MmapReader(files)
    image = reader.image(
        batch_of(
            Read(file=0, file_offset=BLOCK_BYTES, host_offset=0, nbytes=2 * BLOCK_BYTES),
            Read(file=1, file_offset=4 * BLOCK_BYTES, host_offset=8192, nbytes=BLOCK_BYTES + 100),
        )
    )
    assert bytes(image.bytes(10, 50).numpy()) == files[0].read_bytes()[4106:4156]
    assert bytes(image.bytes(8192 + 4096, 100).numpy()) == files[1].read_bytes()[-100:]
    reader.close()


def test_faulting_in_brings_an_extent_into_memory(files):
    drop_from_cache(files[0])
    reader = MmapReader(files)
    reader.fault_in(Extent(file=0, offset=0, nbytes=SIZE))
    assert cached_pages(files[0]) == 6
    reader.close()


def test_a_mapping_that_shrank_is_an_error_before_any_byte_is_accessed(files):
    reader = MmapReader(files)
    os.truncate(files[0], BLOCK_BYTES)
    with pytest.raises(ReadError, match=r"a\.bin: holds 4096 bytes now, but 8192"):
        reader.fault_in(Extent(file=0, offset=BLOCK_BYTES, nbytes=BLOCK_BYTES))
    with pytest.raises(ReadError, match=r"a\.bin: holds 4096 bytes now, but 8192"):
        reader.image(batch_of(Read(file=0, file_offset=0, host_offset=0, nbytes=8192)))
    reader.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.EFAULT], ids=errno.errorcode.get)
def test_an_error_while_faulting_in_names_file_and_offset(files, monkeypatch, code):
    reader = MmapReader(files)

    def broken(_address, _nbytes, _advice):
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(reader, "_madvise", broken)
    with pytest.raises(ReadError, match=rf"a\.bin.*offset {BLOCK_BYTES}.*Input/output"):
        reader.fault_in(Extent(file=0, offset=BLOCK_BYTES, nbytes=BLOCK_BYTES))
    reader.close()


def test_on_an_older_kernel_faulting_in_starts_the_read_ahead_instead(files, monkeypatch):
    reader = MmapReader(files)
    advices = []

    def old_kernel(_address, _nbytes, advice):
        advices.append(advice)
        ctypes.set_errno(errno.EINVAL)
        return 0 if advice == mmap.MADV_WILLNEED else -1

    monkeypatch.setattr(reader, "_madvise", old_kernel)
    reader.fault_in(Extent(file=0, offset=0, nbytes=SIZE))
    assert advices[-1] == mmap.MADV_WILLNEED
    reader.close()


def test_a_tensor_that_is_still_referenced_stays_readable_after_its_mapping_was_closed(files):
    expected = files[0].read_bytes()
    reader = MmapReader(files)
    image = reader.image(batch_of(Read(file=0, file_offset=0, host_offset=0, nbytes=8192)))
    kept = image.bytes(0, 8192)
    reader.close()
    assert bytes(kept.numpy()) == expected[:8192]
    del kept, image
    assert mappings_of(files[0].parent) == []


def test_a_mapping_reports_how_much_is_in_memory_and_drops_it(tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as stream:
        stream.write(os.urandom(16 * BLOCK_BYTES + 100))
        os.fsync(stream.fileno())
    whole = Extent(file=0, offset=0, nbytes=16 * BLOCK_BYTES + 100)
    half = Extent(file=0, offset=8 * BLOCK_BYTES, nbytes=8 * BLOCK_BYTES + 100)
    reader = MmapReader([path])
    try:
        assert reader.resident_bytes(whole) == whole.nbytes
        assert reader.resident_bytes(half) == half.nbytes
        reader.evict(whole)
        left = reader.resident_bytes(whole)
        if left == whole.nbytes:
            pytest.skip("this filesystem keeps files in memory")
        reader.fault_in(half)
        assert reader.resident_bytes(half) == half.nbytes
    finally:
        reader.close()
