"""Files are brought into the page cache in the background, and stopping leaves nothing behind."""

import os
import threading
from pathlib import Path

import pytest
from support.checkpoints import write_checkpoint

from layerstream.pipeline import Budget, Checkpoint, Hardware, make_plan
from layerstream.stages.batch import Extent
from layerstream.stages.process.headroom import host_available_bytes
from layerstream.stages.readers.mapped import MmapReader
from layerstream.stages.readers.readahead import Readahead, fits_page_cache

MIB = 1 << 20


def cached_share(path: Path) -> float | None:
    reader = MmapReader([path])
    whole = Extent(file=0, offset=0, nbytes=path.stat().st_size)
    resident = reader.resident_bytes(whole)
    reader.close()
    return None if resident is None else resident / whole.nbytes


def drop(path: Path) -> None:
    """Take ``path`` out of the page cache, or skip the test where the system does not let us."""
    reader = MmapReader([path])
    reader.evict(Extent(file=0, offset=0, nbytes=path.stat().st_size))
    reader.close()
    if cached_share(path) != 0.0:
        pytest.skip("the page cache keeps the file, as tmpfs does")


def test_what_is_read_ahead_is_in_the_page_cache_when_it_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.write(b"\1" * (24 * MIB + 123))
        file.flush()
        os.fsync(file.fileno())
    drop(path)
    ahead = Readahead([tmp_path / "missing", path])
    ahead.start()
    ahead._running.result()
    ahead.stop()
    reader = MmapReader([path])
    # Waits for reads that are in progress.
    reader.fault_in(Extent(file=0, offset=0, nbytes=path.stat().st_size))
    reader.close()
    assert cached_share(path) == 1.0


def test_stopping_leaves_no_thread_and_may_come_before_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(MIB))
    Readahead([path]).stop()
    with Readahead([path] * 1000):
        pass
    assert not [t for t in threading.enumerate() if t.name.startswith("layerstream-readahead")]


def test_files_beyond_the_free_memory_are_not_read_ahead() -> None:
    assert fits_page_cache(MIB)
    assert not fits_page_cache(host_available_bytes())


def test_what_fits_the_page_cache_is_mapped_unless_a_budget_says_otherwise(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    roomy = Hardware(device="cpu", host_available_bytes=1 << 30, vram_free_bytes=None, cores=2)
    assert make_plan(checkpoint, roomy).reader == "mmap"
    assert make_plan(checkpoint, roomy, budget=Budget(host="64MiB")).reader == "direct"
