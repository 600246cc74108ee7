"""What a guard gives up when a read hangs or a page does not come, and files that are opened again."""

import ctypes
import errno
import fcntl
import mmap
import os
import re
import struct
import threading
from pathlib import Path

import pytest
from support.random_files import SIZE, random_files
from support.readers import PASSING, buffered, throttled

from layerstream.stages.batch import Extent
from layerstream.stages.errors import ReadError
from layerstream.stages.memory import HostMemory, address_of
from layerstream.stages.readers.direct import BLOCK_BYTES, DirectReader
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.readers.mapped import MmapReader
from layerstream.stages.readers.page_faults import PageFaults

WHOLE = Extent(file=0, offset=0, nbytes=SIZE)


def direct(paths):
    return DirectReader(paths)


@pytest.fixture
def files(tmp_path):
    """Two files of random bytes, on the disk."""
    return random_files(tmp_path)


def read(reader, extent):
    memory = HostMemory(-(-extent.nbytes // BLOCK_BYTES) * BLOCK_BYTES)
    buffer = memoryview(memory.tensor.numpy())
    reader.read(extent, buffer)
    return bytes(buffer[: extent.nbytes])


class Abandoned:
    """Calls that are told to be given up."""

    def __init__(self):
        self.told = False

    def abandon(self, _error):
        self.told = True
        return True


def test_stopping_a_part_gives_up_what_belongs_to_it_alone_and_stopping_the_whole_all():
    whole = ReadGuard()
    first, second = whole.part(), whole.part()
    calls = [Abandoned() for _ in range(3)]
    for guard, each in zip((whole, first, second), calls, strict=True):
        guard.give_up_when_stopped(each)
    first.stop()
    assert whole.calls_to_give_up() == [calls[1]]
    assert not second.stopped.done()
    whole.stop()
    assert {*whole.calls_to_give_up()} == {*calls}
    assert whole.part().stopped.done()
    whole.close()


MARK = (
    12_345  # the position of an open file, which its duplicates share, and which no read here uses
)


def open_descriptors():
    return {link.name for link in Path("/proc/self/fd").iterdir()}


def lost(monkeypatch, descriptors):
    """Let every read fail through what ``descriptors`` lead to now, as after a disk was detached."""
    preadv = os.preadv
    for descriptor in descriptors:
        os.lseek(descriptor, MARK, os.SEEK_SET)

    def read(descriptor, *given):
        if os.lseek(descriptor, 0, os.SEEK_CUR) == MARK:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return preadv(descriptor, *given)

    monkeypatch.setattr(os, "preadv", read)


@pytest.mark.parametrize("kind", [direct, throttled, buffered])
def test_a_file_whose_descriptor_is_lost_is_opened_again(kind, files, monkeypatch):
    reader = kind(files)
    each = [reader._buffered, *filter(None, reader._direct)]
    lost(monkeypatch, [number for opened in each for number in opened.descriptors])
    before = open_descriptors()
    for _ in range(2):
        assert read(reader, WHOLE) == files[0].read_bytes()
    assert open_descriptors() == before
    reader.close()


def test_a_file_that_was_replaced_is_not_opened_in_place_of_a_lost_descriptor(files, monkeypatch):
    reader = buffered(files)
    lost(monkeypatch, reader._buffered.descriptors)
    other = files[0].with_suffix(".new")
    other.write_bytes(files[0].read_bytes())
    other.replace(files[0])
    with pytest.raises(ReadError, match=re.escape(os.strerror(errno.ENODEV))):
        read(reader, WHOLE)
    reader.close()


@pytest.mark.parametrize("code", PASSING, ids=errno.errorcode.get)
def test_files_that_cannot_be_opened_for_a_moment_are_opened(code, files, monkeypatch):
    works, tried = os.open, []

    def fail_twice(path, flags):
        tried.append(path)
        if tried.count(path) <= 2:
            raise OSError(code, os.strerror(code))
        return works(path, flags)

    monkeypatch.setattr(os, "open", fail_twice)
    reader = MmapReader(files)
    assert read(reader, WHOLE) == files[0].read_bytes()
    reader.close()


# -- page faults -------------------------------------------------------------------------------------

_USERFAULTFD = {"x86_64": 323, "aarch64": 282}  # numbers of the system call
_USER_MODE_ONLY = 1  # faults of the kernel need a privilege
_API, _REGISTER = 0xC018AA3F, 0xC020AA00
_MISSING = 1


class HeldPages:
    """A page that does not come before the ``with`` block ends, for whoever touches it: as a file on a disk that hangs."""

    def __init__(self):
        number = _USERFAULTFD.get(os.uname().machine)
        if number is None:
            pytest.skip("the number of the system call is not known here")
        self._descriptor = ctypes.CDLL(None).syscall(number, os.O_CLOEXEC | _USER_MODE_ONLY)
        if self._descriptor < 0:
            pytest.skip("this system has no userfaultfd")
        self._memory = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = address_of(self._memory)
        fcntl.ioctl(self._descriptor, _API, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
        place = struct.pack("QQQQ", self.address, mmap.PAGESIZE, _MISSING, 0)
        fcntl.ioctl(self._descriptor, _REGISTER, bytearray(place))

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        os.close(self._descriptor)  # whoever waits goes on


def test_a_thread_that_waits_for_a_page_is_seen_to_do_so_and_not_one_that_waits_otherwise():
    faults, waiting = PageFaults(), threading.Event()
    other = threading.Thread(target=waiting.wait)
    other.start()
    with HeldPages() as page:
        assert faults.longest_seconds() == 0.0
        thread = threading.Thread(
            target=ctypes.CDLL(None).memset, args=(ctypes.c_void_p(page.address), 1, 1)
        )
        thread.start()
        while not (first := faults.longest_seconds()):
            pass
        assert faults.longest_seconds() > first
    thread.join(20)
    assert faults.longest_seconds() == 0.0
    waiting.set()
    other.join(20)


def test_page_faults_that_last_give_up_what_computes_with_mapped_files_and_no_reads(files):
    limit, given_up = 0.02, threading.Event()
    guard, reads, computing = ReadGuard(limit), Abandoned(), Abandoned()
    guard.give_up_when_stopped(reads)
    guard.give_up_when_stopped(computing, in_page_faults=True)
    computing.abandon = lambda error: given_up.set() or "page of the mapped file" in str(error())
    reader = MmapReader(files, guard=guard)
    with HeldPages() as page:
        memset = ctypes.CDLL(None).memset
        thread = threading.Thread(target=memset, args=(ctypes.c_void_p(page.address), 1, 1))
        thread.start()
        while not guard.hanging():
            pass
        assert {(each.path, each.offset) for each in guard.hanging()} == {(str(files[0]), None)}
        assert not given_up.is_set()
        guard.stop()
        assert given_up.wait(20)
        assert not reads.told
    thread.join(20)
    reader.close()
    guard.close()
