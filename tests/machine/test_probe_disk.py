"""The disk probe: what is read, how rates follow from it, and when there is none."""

import errno
import logging
import os
import threading
from itertools import pairwise
from types import SimpleNamespace

import pytest
from support.faults import Gate
from support.leaks import nothing_left_behind

from layerstream.pipeline.machine import probe_disk, volumes
from layerstream.pipeline.machine.probe_disk import (
    _CompletedRead,
    _rates_of_reads,
    cached_bytes,
    measure_direct,
    measure_mmap,
)
from layerstream.stages.batch import Extent
from layerstream.stages.errors import ReadError
from layerstream.stages.readers.direct import DirectReader
from layerstream.stages.readers.mapped import MmapReader

MIB = 1 << 20
SIZE = 96 * MIB


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of random bytes that are on the disk."""
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / "a", folder / "b"]
    for path in paths:
        with path.open("wb") as stream:
            stream.write(os.urandom(MIB) * (SIZE // MIB // 2))
            os.fsync(stream.fileno())
    return paths


@pytest.fixture
def sparse(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as stream:
        stream.write(os.urandom(MIB))
        stream.truncate(1 << 30)
        os.fsync(stream.fileno())
    if path.stat().st_blocks * 512 > 64 * MIB:
        pytest.skip("this filesystem has no sparse files")
    return path


class Recorder:
    """A reader that reads nothing and records the requests."""

    falls_back = False

    def __init__(self):
        self.lock = threading.Lock()
        self.extents = []
        self.closed = False

    def read(self, extent, into):
        assert len(into) == extent.nbytes
        with self.lock:
            self.extents.append(extent)

    def close(self):
        self.closed = True


@pytest.fixture
def recorder(monkeypatch):
    """The reader double that the direct measurement uses instead of the real one."""
    double = Recorder()
    monkeypatch.setattr(probe_disk, "DirectReader", lambda _: double)
    return double


def all_data(monkeypatch):
    monkeypatch.setattr(probe_disk, "data_ranges", lambda path: [(0, path.stat().st_size)])


# -- rates of requests ----------------------------------------------------------------------------


def test_a_steady_stream_has_one_rate_whatever_the_order_of_its_threads():
    done = [_CompletedRead(10 + 0.01 * (n + 1), 8 * MIB, 0.002) for n in range(32)]
    rate, cost = _rates_of_reads(done, 10.0)
    assert rate.samples == cost.samples == 4
    assert rate.least == pytest.approx(rate.most) == pytest.approx(8 * MIB / 0.01)
    assert cost.median == pytest.approx(0.002 / (8 * MIB))


def test_a_pause_of_the_disk_shows_in_the_spread_and_not_in_the_median():
    ends = [0.01 * (n + 1) + (0.5 if n >= 20 else 0) for n in range(64)]
    rate, _ = _rates_of_reads([_CompletedRead(end, 8 * MIB, 0.0) for end in ends], 0.0)
    assert rate.median == pytest.approx(8 * MIB / 0.01)
    assert rate.least < rate.median / 4


def test_few_requests_are_one_sample():
    rate, _ = _rates_of_reads([_CompletedRead(0.5, MIB, 0.0), _CompletedRead(2.0, MIB, 0.0)], 0.0)
    assert (rate.samples, rate.median) == (1, MIB)


# -- what is read ---------------------------------------------------------------------------------


def test_no_more_than_a_gibibyte_is_read_and_no_byte_twice(sparse, recorder, monkeypatch):
    os.truncate(sparse, 4 << 30)
    all_data(monkeypatch)
    measure_direct([sparse], [0])
    spans = sorted((each.offset, each.offset + each.nbytes) for each in recorder.extents)
    assert 64 * MIB < sum(end - begin for begin, end in spans) <= 1024 * MIB
    pilots = [each for each in recorder.extents if each.nbytes == MIB]
    rest = sorted(set(spans) - {(each.offset, each.offset + each.nbytes) for each in pilots})
    assert all(end <= begin for (_, end), (begin, _) in pairwise(rest))
    assert recorder.closed


def test_a_slow_disk_gets_small_requests_until_the_time_limit(sparse, recorder, monkeypatch):
    all_data(monkeypatch)
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], thread_time=lambda: 0.0)
    monkeypatch.setattr(probe_disk, "time", clock)
    record = recorder.read

    def read(extent, into):
        record(extent, into)
        with recorder.lock:
            now[0] += 0.1  # 10 MB/s

    recorder.read = read
    rates = measure_direct([sparse], [0])
    assert {each.nbytes for each in recorder.extents} == {MIB}
    assert len(recorder.extents) <= 1 + 4 + 4
    assert rates["disk_bytes_per_second"].median == pytest.approx(10 * MIB)


def test_only_the_data_of_a_file_that_is_sparse_in_part_is_read(tmp_path, recorder):
    path = tmp_path / "partly"
    with path.open("wb") as stream:
        stream.truncate(100 * MIB)
        stream.seek(16 * MIB)
        stream.write(os.urandom(MIB) * 72)
        os.fsync(stream.fileno())
    if volumes.data_ranges(path) != [(16 * MIB, 88 * MIB)]:
        pytest.skip("this filesystem does not tell where holes are")
    measure_direct([path], [0])
    assert recorder.extents
    assert all(16 * MIB <= each.offset <= 88 * MIB - each.nbytes for each in recorder.extents)


@pytest.mark.parametrize("measure", [measure_direct, measure_mmap])
def test_a_sparse_file_shows_no_rate_and_the_log_says_why(sparse, measure, caplog):
    caplog.set_level(logging.INFO, logger="layerstream")
    assert measure([sparse], [0]) == {}
    assert "its files are sparse, with" in caplog.text


def test_a_sparse_file_whose_holes_are_not_reported_is_recognised_by_its_blocks(
    sparse, monkeypatch
):
    monkeypatch.setattr(volumes, "_iterate_data_ranges", lambda _: iter([(0, 1 << 30)]))
    assert volumes.data_ranges(sparse) == []


def test_a_small_file_shows_no_rate(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="layerstream")
    path = tmp_path / "small"
    path.write_bytes(os.urandom(100_000))
    assert measure_direct([path], [0]) == {}
    assert "too little to show a rate" in caplog.text


# -- on a real disk -------------------------------------------------------------------------------


def test_direct_reads_are_measured_and_leave_nothing_open(files):
    with nothing_left_behind():
        rates = measure_direct(files, [0, 1])
    rate = rates["disk_bytes_per_second"]
    assert 0 < rate.least <= rate.median <= rate.most
    assert rates["direct_read_cpu_seconds_per_byte"].median >= 0


def test_only_the_files_of_the_volume_are_read(files, recorder):
    measure_direct([*files, *files], [3, 2])
    assert {each.file for each in recorder.extents} <= {2, 3}


def test_a_refusal_of_direct_reads_is_logged_with_the_rate(files, monkeypatch, caplog):
    class Buffered(DirectReader):
        def __init__(self, paths):
            super().__init__(paths)
            self.fall_back(1, OSError(errno.EINVAL, os.strerror(errno.EINVAL)))

    monkeypatch.setattr(probe_disk, "DirectReader", Buffered)
    caplog.set_level(logging.INFO, logger="layerstream")
    assert measure_direct(files, [0, 1])
    assert "that of buffered ones, as they will run here" in caplog.text


def test_an_error_of_the_disk_is_raised_and_leaves_nothing_open(files, monkeypatch):
    class Failing(DirectReader):
        def read(self, extent, into):
            if extent.nbytes > MIB:  # not the first one
                raise ReadError(f"{extent.offset}: the disk has failed")
            super().read(extent, into)

    monkeypatch.setattr(probe_disk, "DirectReader", Failing)
    with nothing_left_behind(), pytest.raises(ReadError, match="the disk has failed"):
        measure_direct(files, [0, 1])


@pytest.fixture
def mapped(files):
    """A reader of ``files`` where the page cache can be emptied of them; empties it before and after."""
    reader = MmapReader(files)

    def empty():
        for file in range(len(files)):
            reader.evict(Extent(file=file, offset=0, nbytes=0))  # all of it

    empty()
    if cached_bytes(files):
        reader.close()
        pytest.skip("this filesystem keeps files in memory, or does not tell")
    yield reader
    reader.close()


@pytest.mark.usefixtures("mapped")
def test_mapped_files_are_measured_where_they_are_not_in_memory(files):
    with nothing_left_behind():
        rates = measure_mmap(files, [0, 1])
    assert rates["mmap_bytes_per_second"].median > 0
    assert rates["mmap_read_cpu_seconds_per_byte"].median > 0
    assert cached_bytes(files) >= 32 * MIB


@pytest.mark.usefixtures("mapped")
def test_if_files_are_all_in_the_page_cache_a_sample_is_dropped_from_it(files, monkeypatch):
    for path in files:
        path.read_bytes()
    assert cached_bytes(files) == SIZE
    dropped = []
    evict = MmapReader.evict
    monkeypatch.setattr(
        MmapReader,
        "evict",
        lambda self, extent: dropped.append(extent.nbytes) or evict(self, extent),
    )
    assert measure_mmap(files, [0, 1])["mmap_bytes_per_second"].median > 0
    assert 0 < sum(dropped) <= 128 * MIB


def test_files_that_cannot_be_dropped_from_memory_show_no_rate(files, mapped, caplog):
    caplog.set_level(logging.INFO, logger="layerstream")
    for file in range(2):
        mapped.fault_in(Extent(file=file, offset=0, nbytes=SIZE // 2))  # mapped in: they stay
    assert measure_mmap(files, [0, 1]) == {}
    assert "in the page cache, or the system does not tell" in caplog.text


def test_for_files_of_other_users_the_page_cache_is_unknown(files, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: -1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cached_bytes(files) == 0
    assert measure_mmap(files, [0, 1]) == {}


# -- volumes --------------------------------------------------------------------------------------


def test_a_file_is_on_the_volume_with_the_deepest_mount_point_above_it(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "file").write_bytes(b"x")
    link = tmp_path / "link"
    link.symlink_to(inner / "file")
    mounts = [(tmp_path, "outer"), (inner, "under"), (inner, "over")]
    assert volumes.volume_of(inner / "file", mounts) == "over"
    assert volumes.volume_of(link, mounts) == "over"
    assert volumes.volume_of(inner / "file", []).startswith("device ")


def test_mount_points_with_spaces_are_parsed(tmp_path):
    table = tmp_path / "mountinfo"
    table.write_text("27 1 254:0 / /with\\040blank rw,relatime shared:1 - ext4 /dev/vda rw\n")
    [(point, name)] = volumes._mount_points(table)
    assert (str(point), name) == ("/with blank", "ext4 /dev/vda on /with blank")


def test_windows_begin_and_end_on_blocks_and_too_small_ones_are_left_out():
    found = volumes.windows(
        [(100, 10_000), (20_480, 61_441)], file=3, window_bytes=16_384, min_bytes=8192
    )
    assert found == [
        Extent(file=3, offset=20_480, nbytes=16_384),
        Extent(file=3, offset=36_864, nbytes=16_384),
        Extent(file=3, offset=53_248, nbytes=8192),
    ]


def test_the_page_cache_is_sampled_for_a_large_checkpoint_and_not_just_at_its_headers():
    extents = probe_disk._evenly_spread_extents([4 << 30] * 200)
    assert 1000 < len(extents) <= 2048
    assert {each.file for each in extents} == set(range(200))
    assert not any(each.offset < 64 << 10 for each in extents[:100])
    assert all(each.offset % 4096 == 0 for each in extents)


def test_the_page_cache_is_checked_in_full_for_small_files():
    sizes = [100_000, 1, 70_000]
    extents = probe_disk._evenly_spread_extents(sizes)
    for file, size in enumerate(sizes):
        assert sum(each.nbytes for each in extents if each.file == file) == size


def test_a_machine_too_busy_to_start_threads_in_time_still_shows_a_rate(files, monkeypatch):
    monkeypatch.setattr(probe_disk, "_MAX_SECONDS", 0.0)
    assert measure_direct(files, [0, 1])["disk_bytes_per_second"].samples >= 1


def test_a_disk_that_hangs_is_not_measured_for_ever(files, monkeypatch):
    with Gate() as gate:

        class Hanging(DirectReader):
            def read(self, extent, into):
                if extent.nbytes > MIB:  # not the first one
                    gate()
                super().read(extent, into)

        monkeypatch.setattr(probe_disk, "DirectReader", Hanging)
        monkeypatch.setattr(probe_disk, "_HANGS_AFTER_SECONDS", 0.3)
        with pytest.raises(ReadError, match="has not returned"):
            measure_direct(files, [0, 1])
