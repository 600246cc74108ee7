"""Reads that fail for a passing reason are repeated; reads that hang are reported."""

import errno
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.faults import Gate
from support.random_files import SIZE, random_files
from support.readers import PASSING, buffered, throttled

from layerstream.stages.batch import Extent
from layerstream.stages.errors import ReadError
from layerstream.stages.memory import HostMemory
from layerstream.stages.readers import watch as watch_module
from layerstream.stages.readers.direct import BLOCK_BYTES, DirectReader
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.readers.mapped import MmapReader

WHOLE = Extent(file=0, offset=0, nbytes=SIZE)
BLOCK = Extent(file=0, offset=BLOCK_BYTES, nbytes=BLOCK_BYTES)


@pytest.fixture
def files(tmp_path):
    """Two files of random bytes, on the disk."""
    return random_files(tmp_path)


@pytest.fixture(params=[DirectReader, throttled, buffered, MmapReader])
def reader(request, files):
    """A reader of each kind."""
    opened = request.param(files)
    yield opened
    opened.close()


@pytest.fixture
def direct(files):
    """A direct reader."""
    opened = DirectReader(files)
    yield opened
    opened.close()


def read(reader, extent):
    """Read an extent the way that the read stage does; returns its bytes."""
    if isinstance(reader, MmapReader):
        reader.fault_in(extent)
    memory = HostMemory(-(-extent.nbytes // BLOCK_BYTES) * BLOCK_BYTES)
    buffer = memoryview(memory.tensor.numpy())
    reader.read(extent, buffer)
    return bytes(buffer[: extent.nbytes])


def passing_fault(monkeypatch, code, times):
    """Let the first ``times`` reads of each offset fail, on either way; returns the offsets that were read."""
    seen = []
    preadv, populate = os.preadv, MmapReader._populate

    def fail_first(offset):
        seen.append(offset)
        if seen.count(offset) <= times:
            raise OSError(code, os.strerror(code))

    def failing_preadv(descriptor, buffers, offset, *rest):
        fail_first(offset)
        return preadv(descriptor, buffers, offset, *rest)

    def failing_populate(self, extent):
        fail_first(extent.offset)
        populate(self, extent)

    monkeypatch.setattr(os, "preadv", failing_preadv)
    monkeypatch.setattr(MmapReader, "_populate", failing_populate)
    return seen


@pytest.mark.parametrize("code", PASSING, ids=errno.errorcode.get)
def test_a_passing_fault_is_read_over_with_the_attempts_in_the_log(
    reader, code, files, monkeypatch, caplog
):
    passing_fault(monkeypatch, code, times=2)
    assert read(reader, BLOCK) == files[0].read_bytes()[BLOCK_BYTES : 2 * BLOCK_BYTES]
    why = f"offset {BLOCK_BYTES} failed: {os.strerror(code)}"
    for record, attempt in zip(caplog.records, (2, 3), strict=True):
        assert str(files[0]) in record.message
        assert f"{why}; attempt {attempt} of 4" in record.message


@pytest.mark.parametrize("code", [*PASSING, errno.EACCES], ids=errno.errorcode.get)
def test_a_lasting_fault_is_an_error_after_four_attempts_and_one_that_cannot_pass_at_once(
    code, direct, monkeypatch
):
    seen = passing_fault(monkeypatch, code, times=99)
    with pytest.raises(ReadError, match=re.escape(os.strerror(code))):
        read(direct, WHOLE)
    assert len(seen) == (4 if code in PASSING else 1)


def test_a_reader_that_is_interrupted_repeats_nothing(direct, monkeypatch):
    seen = passing_fault(monkeypatch, errno.EIO, times=99)
    direct.interrupt()
    with pytest.raises(ReadError):
        read(direct, WHOLE)
    assert len(seen) == 1


@pytest.mark.parametrize("falls_back", [False, True])
def test_an_intact_file_whose_reading_ends_early_is_not_said_to_have_shrunk(
    falls_back, direct, monkeypatch
):
    if falls_back:
        direct.fall_back(0, OSError(errno.EINVAL, os.strerror(errno.EINVAL)))
    preadv = os.preadv

    def end_early(descriptor, buffers, offset, *rest):
        got = preadv(descriptor, buffers, offset, *rest)
        return min(got, max(0, 2 * BLOCK_BYTES - offset))

    monkeypatch.setattr(os, "preadv", end_early)
    with pytest.raises(ReadError) as caught:
        read(direct, WHOLE)
    says = f"offset {2 * BLOCK_BYTES} gives no more bytes, although the file has {SIZE}"
    assert says in str(caught.value)


@pytest.mark.parametrize("kind", [DirectReader, MmapReader])
def test_a_read_that_hangs_is_reported_with_its_file_and_offset(kind, files, monkeypatch):
    guard = ReadGuard(0.02)
    reader = kind(files, guard=guard)
    logged = threading.Event()
    monkeypatch.setattr(watch_module.logger, "warning", lambda *_: logged.set())
    extent = Extent(file=1, offset=BLOCK_BYTES, nbytes=BLOCK_BYTES)
    preadv = os.preadv
    with Gate() as gate, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(os, "preadv", lambda *given: gate() or preadv(*given))
        monkeypatch.setattr(MmapReader, "_populate", lambda *_: gate())
        job = pool.submit(read, reader, extent)
        assert logged.wait(20)
        (hanging,) = guard.hanging()
        assert (hanging.path, hanging.offset) == (str(files[1]), BLOCK_BYTES)
        assert hanging.seconds >= 0.02
        gate.open()
        assert job.result() == files[1].read_bytes()[BLOCK_BYTES : 2 * BLOCK_BYTES]
    assert guard.hanging() == ()
    reader.close()
    guard.close()
