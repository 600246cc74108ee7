"""Limits on the memory that libraries keep, unless the environment sets them already."""

import ctypes
import os
import subprocess
import sys

import pytest

from layerstream.stages.process import libraries

HEAPS, MAPPED = (-8, 2), (-3, 512 << 10)
ENVIRONMENTS = {
    "nothing": ({}, [HEAPS, MAPPED]),
    "heaps": ({"MALLOC_ARENA_MAX": "4"}, [MAPPED]),
    "mapped blocks": ({"MALLOC_MMAP_THRESHOLD_": "65536"}, [HEAPS]),
    "heaps by glibc's tunable": ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, [MAPPED]),
    "mapped blocks by a tunable": ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=9"}, [HEAPS]),
    "another tunable of glibc": (
        {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"},
        [HEAPS, MAPPED],
    ),
}

# Frees large blocks below small ones that stay, as activations lie below results.
FREEING = """
import torch
from layerstream.stages.process.libraries import limit_library_memory
from layerstream.stages.process.usage import anonymous_bytes

limit_library_memory()
first = torch.ones(31 << 20, dtype=torch.uint8)
del first  # from here on, glibc would take such blocks from its heap
before = anonymous_bytes()
kept = []
for _ in range(8):
    large = torch.ones(20 << 20, dtype=torch.uint8)
    kept.append((large, torch.ones(100_000, dtype=torch.uint8)))
kept = [small for _, small in kept]
del large
print((anonymous_bytes() - before) >> 20)
"""

# Blocks of ever different sizes replace one another, as activations of experts do; 24 MiB of them are alive on average.
DIFFERING = """
import random
import torch
from layerstream.stages.process.libraries import limit_library_memory
from layerstream.stages.process.usage import anonymous_bytes

limit_library_memory()
rng = random.Random(0)
alive, most, most_taken = [], 0, 0
before = anonymous_bytes()
for _ in range(400):
    alive.append(torch.ones(rng.randrange(1 << 20, 4 << 20), dtype=torch.uint8))
    most = max(most, sum(each.nbytes for each in alive))
    most_taken = max(most_taken, anonymous_bytes() - before)
    while len(alive) > 10:
        alive.pop(rng.randrange(len(alive)))
print(most_taken / most)
"""


class RecordingLibrary:
    """A C library that records calls of ``mallopt``."""

    def __init__(self) -> None:
        self.options: list[tuple[int, int]] = []

    def mallopt(self, option: int, value: int) -> int:
        self.options.append((option, value))
        return 1


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_heaps_are_left_as_the_environment_says(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, options = ENVIRONMENTS[case]
    library = RecordingLibrary()
    monkeypatch.setattr(os, "environ", dict(environment))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    libraries.limit_library_memory()
    assert library.options == options


def test_large_blocks_that_are_freed_below_small_ones_are_returned_to_the_system() -> None:
    result = subprocess.run(
        [sys.executable, "-c", FREEING], capture_output=True, text=True, timeout=100, check=True
    )
    assert int(result.stdout) < 20  # of 160 MiB


def test_blocks_of_differing_sizes_leave_no_holes() -> None:
    result = subprocess.run(
        [sys.executable, "-c", DIFFERING], capture_output=True, text=True, timeout=100, check=True
    )
    assert float(result.stdout) < 1.3  # times what was alive


def test_a_c_library_without_mallopt_is_not_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"})
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    libraries.limit_library_memory()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"


def test_a_heap_that_is_slow_to_trim_is_trimmed_the_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, trimmed = [0.0], []

    class Heap:
        def malloc_trim(self, _pad: int) -> None:
            trimmed.append(now[0])
            now[0] += 0.05

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Heap())
    monkeypatch.setattr(libraries.time, "perf_counter", lambda: now[0])
    leftovers = libraries.LibraryMemory()
    while now[0] < 12:
        leftovers.release()
        now[0] += 0.01
    assert len(trimmed) > 2
    assert len(trimmed) * 0.05 < 0.06 * now[0]


def test_a_warning_is_logged_for_more_kernels_than_plans_count(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "environ", {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"})
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    libraries.limit_library_memory()
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY is 1024" in caplog.text
