"""Readers, devices and computations that stop or fail at a chosen step."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from layerstream.stages.batch import Extent
from layerstream.stages.devices.protocol import Copy
from layerstream.stages.readers.direct import DirectReader
from support.fake_device import FakeDevice, FakeEvent

__all__ = ["Gate", "RecordingReader", "SteppedFakeDevice", "Steps", "failing_with"]


class Gate:
    """Blocks the thread that reaches it until it is opened, at the end of the ``with`` block at the latest."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        self._open.wait()

    def open(self) -> None:
        self._open.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        # A failing test must not hang at its end.
        self.reached.set()
        self.open()


def failing_with(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


class Steps:
    """Counts steps, from 0, in any thread; calls the actions that are set before them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._actions: dict[int, Callable[[], None]] = {}
        self.count = 0

    def before(self, step: int, action: Callable[[], None]) -> None:
        """Before ``step``, call ``action`` in the thread that takes the step."""
        self._actions[step] = action

    def take(self) -> None:
        with self._changed:
            step = self.count
            self.count += 1
            self._changed.notify_all()
        action = self._actions.get(step)
        if action is not None:
            action()

    def wait_for(self, count: int) -> None:
        """Block until ``count`` steps have begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.count >= count, timeout=20), (
                "too few steps were taken"
            )


class RecordingReader(DirectReader):
    """Direct reads that are recorded, and that stop or fail where a test wants it."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(paths)
        self.steps = Steps()
        self.log: list[int] = []  # files, in the order of the requests
        self._halfway: dict[int, Callable[[], None]] = {}
        self._lock = threading.Lock()

    def halfway(self, file: int, action: Callable[[], None]) -> None:
        """Once half of the next read of ``file`` is in its slot, call ``action`` in the reading thread."""
        self._halfway[file] = action

    def read(self, extent: Extent, into: memoryview) -> None:
        with self._lock:
            self.log.append(extent.file)
        self.steps.take()
        half = extent.nbytes // 2 // 4096 * 4096
        if half:
            first = Extent(file=extent.file, offset=extent.offset, nbytes=half)
            super().read(first, into[:half])
        self._halfway.pop(extent.file, lambda: None)()
        rest = Extent(file=extent.file, offset=extent.offset + half, nbytes=extent.nbytes - half)
        super().read(rest, into[half:])


class SteppedFakeDevice(FakeDevice):
    """A fake device whose copies stop or fail, as they are queued, where a test wants it."""

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)
        self.steps = Steps()

    def copy(self, copies: Sequence[Copy], *, after: Sequence[FakeEvent]) -> FakeEvent:
        if copies:
            self.steps.take()
        return super().copy(copies, after=after)
