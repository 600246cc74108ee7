"""One conformance suite for all readers, and what each of them guarantees beyond it."""

import errno
import fcntl
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.leaks import mappings_of, nothing_left_behind
from support.page_cache import cached_pages, drop_from_cache
from support.random_files import SIZE, random_files

from layerstream.stages.batch import Extent
from layerstream.stages.errors import ReadError
from layerstream.stages.memory import HostMemory
from layerstream.stages.readers.direct import BLOCK_BYTES, DirectReader
from layerstream.stages.readers.files import WeightFiles
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.readers.mapped import MmapReader
from layerstream.stages.readers.throttled import Throttle, ThrottledReader

BOUNDARIES = [
    pytest.param(0, BLOCK_BYTES, id="first block"),
    pytest.param(BLOCK_BYTES, 2 * BLOCK_BYTES, id="blocks in the middle"),
    pytest.param(4 * BLOCK_BYTES, BLOCK_BYTES, id="last whole block"),
    pytest.param(3 * BLOCK_BYTES, SIZE - 3 * BLOCK_BYTES, id="up to the end"),
    pytest.param(5 * BLOCK_BYTES, 100, id="only the end"),
    pytest.param(0, SIZE, id="everything"),
]


def no_direct_open(monkeypatch):
    real = os.open

    def refuse(path, flags, *rest, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)


def no_direct_preadv(monkeypatch):
    real = os.preadv

    def refuse(descriptor, buffers, offset, *rest):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, buffers, offset, *rest)

    monkeypatch.setattr(os, "preadv", refuse)


READERS = ("direct", "throttled", "mmap", "refused at open", "refused at the first read")
WITH_PREADV = tuple(name for name in READERS if name != "mmap")


@pytest.fixture
def open_reader(monkeypatch):
    """A function that opens a reader of the given kind; all are closed after the test."""
    opened = []

    def open_reader(kind, paths):
        if kind == "refused at open":
            no_direct_open(monkeypatch)
        if kind == "refused at the first read":
            no_direct_preadv(monkeypatch)
        if kind == "mmap":
            opened.append(MmapReader(paths))
        elif kind == "throttled":
            opened.append(ThrottledReader(paths, Throttle(1e12)))
        else:
            opened.append(DirectReader(paths))
        return opened[-1]

    yield open_reader
    for reader in opened:
        reader.close()


@pytest.fixture
def files(tmp_path):
    """Two files of random bytes, on the disk."""
    return random_files(tmp_path)


def read(reader, offset, nbytes, file=0):
    """Read an extent into a buffer that is longer by a block; returns all of the buffer."""
    padded = -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES
    memory = HostMemory(padded + BLOCK_BYTES)
    memory.tensor.fill_(0x5A)
    buffer = memoryview(memory.tensor.numpy())
    reader.read(Extent(file=file, offset=offset, nbytes=nbytes), buffer[:padded])
    return bytes(buffer)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(("offset", "nbytes"), BOUNDARIES)
def test_a_read_returns_the_bytes_of_the_file_and_writes_nothing_behind_its_buffer(
    kind, offset, nbytes, files, open_reader
):
    got = read(open_reader(kind, files), offset, nbytes, file=1)
    assert got[:nbytes] == files[1].read_bytes()[offset : offset + nbytes]
    assert got[-BLOCK_BYTES:] == b"\x5a" * BLOCK_BYTES


@pytest.mark.parametrize("kind", READERS)
def test_reads_in_many_threads_at_once_do_not_mix(kind, files, open_reader):
    reader = open_reader(kind, files)
    expected = [path.read_bytes() for path in files]
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            (file, block, pool.submit(read, reader, block * BLOCK_BYTES, BLOCK_BYTES, file))
            for _ in range(20)
            for block in range(5)
            for file in (0, 1)
        ]
    for file, block, job in jobs:
        begin = block * BLOCK_BYTES
        assert job.result()[:BLOCK_BYTES] == expected[file][begin : begin + BLOCK_BYTES]


@pytest.mark.parametrize("kind", WITH_PREADV)
@pytest.mark.parametrize("most", [BLOCK_BYTES, 2 * BLOCK_BYTES, 5000, 8193, 100])
def test_short_reads_are_completed(kind, most, files, open_reader, monkeypatch):
    real = os.preadv

    def short(descriptor, buffers, offset, *rest):
        # The kernel itself would refuse to read so few bytes directly, so cut what it read.
        return min(real(descriptor, buffers, offset, *rest), most)

    monkeypatch.setattr(os, "preadv", short)
    got = read(open_reader(kind, files), 0, SIZE)
    assert got[:SIZE] == files[0].read_bytes()


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("left", [0, BLOCK_BYTES, 2 * BLOCK_BYTES + 7, SIZE - 1])
def test_a_file_that_shrank_is_an_error_with_both_sizes_and_never_zeros(
    kind, left, files, open_reader
):
    reader = open_reader(kind, files)
    os.truncate(files[0], left)
    with pytest.raises(ReadError) as caught:
        read(reader, 0, SIZE)
    assert str(files[0]) in str(caught.value)
    assert f"holds {left} bytes now, but {SIZE} are needed" in str(caught.value)


@pytest.mark.parametrize("kind", WITH_PREADV)
def test_an_error_of_the_disk_names_file_and_offset_and_keeps_its_cause(
    kind, files, open_reader, monkeypatch
):
    reader = open_reader(kind, files)
    real = os.preadv

    def broken_from_the_third_block_on(descriptor, buffers, offset, *rest):
        if offset + sum(map(len, buffers)) > 2 * BLOCK_BYTES:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset, *rest)

    monkeypatch.setattr(os, "preadv", broken_from_the_third_block_on)
    assert read(reader, 0, BLOCK_BYTES, file=1)
    with pytest.raises(ReadError, match=rf"b\.bin.*offset {BLOCK_BYTES}.*Input/output") as caught:
        read(reader, BLOCK_BYTES, 2 * BLOCK_BYTES, file=1)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EIO


@pytest.mark.parametrize("kind", READERS)
def test_a_missing_file_is_named_and_the_others_are_closed_again(kind, files, open_reader):
    with nothing_left_behind(), pytest.raises(ReadError, match=r"gone\.bin.*No such file"):
        open_reader(kind, [*files, files[0].with_name("gone.bin")])


@pytest.mark.parametrize("call", [os.fstat, os.access, os.open], ids=lambda call: call.__name__)
@pytest.mark.parametrize("kind", ["direct", "mmap"])
@pytest.mark.parametrize("at", range(4))
def test_opening_that_fails_at_any_call_leaves_nothing(  # noqa: PLR0917
    kind, call, at, files, open_reader, monkeypatch
):
    left = at

    def fail(*given, **named):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return call(*given, **named)

    with nothing_left_behind():
        monkeypatch.setattr(os, call.__name__, fail)
        try:
            open_reader(kind, files).close()
        except (ReadError, OSError):
            assert left < 0
        monkeypatch.undo()
    assert mappings_of(files[0].parent) == []


def test_a_file_that_is_removed_as_soon_as_it_is_open_can_be_mapped(files, monkeypatch):
    content, real_open = files[0].read_bytes(), os.open

    def open_and_remove(path, *given):
        descriptor = real_open(path, *given)
        path.unlink()
        return descriptor

    with nothing_left_behind():
        monkeypatch.setattr(os, "open", open_and_remove)
        reader = MmapReader(files)
        assert read(reader, 0, SIZE)[:SIZE] == content
        reader.close()


@pytest.mark.parametrize("kind", READERS)
def test_closing_leaves_no_descriptor_and_no_mapping(kind, files, open_reader):
    with nothing_left_behind():
        reader = open_reader(kind, files)
        read(reader, 0, SIZE)
        reader.close()
    assert mappings_of(files[0].parent) == []


@pytest.mark.parametrize("kind", ["refused at open", "refused at the first read"])
def test_where_direct_reads_are_refused_one_warning_is_logged_and_reads_go_on(
    kind, files, open_reader, caplog
):
    reader = open_reader(kind, files)
    for _ in range(3):
        read(reader, 0, SIZE)
    assert reader.falls_back
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "direct reads are refused" in caplog.text


@pytest.mark.parametrize("refused_at", ["open", "first read"])
def test_only_files_whose_filesystem_refuses_direct_reads_are_read_through_the_page_cache(
    refused_at, files, monkeypatch
):
    real_open, real_preadv, direct = os.open, os.preadv, {}

    def open_(path, flags, *rest, **named):
        if flags & os.O_DIRECT and path == files[0] and refused_at == "open":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        descriptor = real_open(path, flags, *rest, **named)
        direct[descriptor] = path.name if flags & os.O_DIRECT else "buffered"
        return descriptor

    used = []

    def preadv(descriptor, *given):
        used.append(direct[descriptor])
        if direct[descriptor] == files[0].name:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_preadv(descriptor, *given)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    with nothing_left_behind():
        reader = DirectReader(files)
        for file in (0, 1, 0, 1):
            assert read(reader, 0, SIZE, file)[:SIZE] == files[file].read_bytes()
        assert reader.falls_back
        reader.close()
    assert set(used[-4:]) == {"buffered", files[1].name}
    assert used.count(files[0].name) == (refused_at == "first read")


@pytest.mark.parametrize("kind", WITH_PREADV)
def test_a_read_leaves_nothing_in_the_page_cache(kind, tmp_path, open_reader):
    path = tmp_path / "large.bin"
    size = (3 << 20) + 100
    path.write_bytes(os.urandom(size))
    drop_from_cache(path)
    if cached_pages(path):
        pytest.skip("this filesystem does not drop its page cache on request")
    reader = open_reader(kind, [path])
    read(reader, 1 << 20, 1 << 20)
    assert cached_pages(path) == 0
    for offset in range(0, size, 1 << 20):
        read(reader, offset, min(1 << 20, size - offset))
    assert cached_pages(path) == 0


def test_a_tensor_that_is_still_referenced_stays_readable_after_its_host_memory_was_closed():
    memory = HostMemory(1 << 20)
    memory.tensor.fill_(7)
    kept = memory.tensor[100:200]
    memory.close()
    assert torch.equal(kept, torch.full((100,), 7, dtype=torch.uint8))


def test_a_throttled_read_takes_at_least_the_time_of_the_disk_that_it_simulates(files):
    rate = 400_000
    reader = ThrottledReader(files, Throttle(rate))
    begin = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(read, reader, 0, SIZE, file) for file in (0, 1)]
    took = time.perf_counter() - begin
    assert [job.result()[:SIZE] for job in jobs] == [path.read_bytes() for path in files]
    assert took >= 2 * SIZE / rate  # the rate is that of all threads together
    reader.close()


def test_readers_that_share_a_simulated_disk_have_its_rate_together(files):
    rate = 400_000
    throttle = Throttle(rate)
    readers = [ThrottledReader(files, throttle) for _ in range(2)]
    begin = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda reader: read(reader, 0, SIZE), readers))
    assert time.perf_counter() - begin >= 2 * SIZE / rate
    for reader in readers:
        reader.close()


def test_interrupting_a_throttled_reader_ends_all_waits_now_and_later(files):
    reader = ThrottledReader(files, Throttle(1))  # a byte per second
    waiting = threading.Event()

    class Closing(threading.Event):
        def wait(self, timeout=None):
            waiting.set()
            return super().wait(timeout)

    reader._closing = Closing()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(read, reader, 0, SIZE)
        waiting.wait()
        assert not job.done()
        reader.interrupt()
        assert job.result()[:SIZE] == files[0].read_bytes()
        assert read(reader, 0, SIZE)[:SIZE] == files[0].read_bytes()
    reader.close()


def test_a_file_that_cannot_be_opened_without_permission_is_named(files, monkeypatch):
    def denied(*_args, **_named):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", denied)
    guard = ReadGuard()
    with pytest.raises(ReadError, match=r"a\.bin.*Permission denied"):
        WeightFiles(files, guard)
    guard.close()
