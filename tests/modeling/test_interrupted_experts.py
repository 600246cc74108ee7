"""A signal between any two lines of a pass in the main thread: every cell of the expert store comes home."""

import linecache
import sys
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
from support.experts import RandomExperts, idle_cells
from support.leaks import nothing_left_behind

from layerstream.pipeline.modeling.experts import _Access
from layerstream.stages.experts.store import ExpertStore

SECONDS = 10


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with nothing_left_behind():
        yield


class InterruptAtLine:
    """Traces the lines of this package that run, and raises KeyboardInterrupt before one of them."""

    def __init__(self, number: int) -> None:
        self.lines_left = number

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> "InterruptAtLine | None":
        if "layerstream" not in frame.f_code.co_filename and frame.f_code is not compute.__code__:
            return None
        # Before a lock is given up is a line for tracing, but no place where Python looks for signals.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and line.strip() != "with self._lock:":
            self.lines_left -= 1
            if self.lines_left == 0:
                raise KeyboardInterrupt
        return self


def compute(store: ExpertStore) -> None:
    """What a pass does that needs more experts than its quota."""
    module: Any = SimpleNamespace(down=None, up=None)
    banks: Any = None
    access = _Access(
        store,
        0,
        store.sets[0],
        module=module,
        waiting=lambda: nullcontext(lambda future: future.exception()),
        banks=banks,
    )
    with closing(access.leases(store.groups(0, range(5)))) as leases:
        for lease in leases:
            assert lease.cells
            store.read_ahead(1, tokens=100)


def home(store: ExpertStore) -> bool:
    return all(idle_cells(region) == region.count for region in store._cells.regions)


def until_home(store: ExpertStore) -> None:
    """Wait for reads that nobody waits for."""
    deadline = time.monotonic() + SECONDS
    while not home(store) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert home(store)


def test_an_interrupt_between_any_two_lines_loses_no_cell(tmp_path: Path) -> None:
    experts = RandomExperts(tmp_path)
    line, interrupted = 0, True
    with experts.store(cells=2, shared=2) as store:
        while interrupted:
            line += 1
            interrupted = False
            try:
                sys.settrace(InterruptAtLine(line))
                compute(store)
            except KeyboardInterrupt:
                interrupted = True
            finally:
                sys.settrace(None)
            until_home(store)
        for layer in (0, 1):
            experts.fetch(store, layer, range(6))
        assert home(store)
    assert line > 300
