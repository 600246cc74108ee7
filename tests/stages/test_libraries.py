"""What libraries are told to keep, and what the environment has said already."""

import ctypes
import os

import pytest

from layerstream.stages.process import libraries

SAID = {
    "nothing": ({}, [(-8, 2)]),
    "heaps": ({"MALLOC_ARENA_MAX": "4"}, []),
    "heaps as glibc calls them now": ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, []),
    "another thing to glibc": ({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}, [(-8, 2)]),
}


class C:
    """A C library that takes note of what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def mallopt(self, what: int, value: int) -> int:
        self.told.append((what, value))
        return 1


@pytest.mark.parametrize("case", SAID)
def test_heaps_are_left_as_the_environment_says(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said, told = SAID[case]
    library = C()
    monkeypatch.setattr(os, "environ", dict(said))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    libraries.limit_library_memory()
    assert library.told == told


def test_a_c_library_without_heaps_to_count_is_told_nothing(
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


def test_more_kernels_than_plans_count_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "environ", {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"})
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    libraries.limit_library_memory()
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY is 1024" in caplog.text
