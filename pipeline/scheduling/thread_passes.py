"""The rider of each thread: that of its request, or one of its own."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from layerstream.pipeline.scheduling.passes import Rider
from layerstream.pipeline.scheduling.scheduler import Sweeps
from layerstream.pipeline.scheduling.stats import Outcome
from layerstream.stages.errors import ModelError

__all__ = ["BeginPass", "Gate", "Riders"]

# Makes a request of a pass that belongs to none; see ``Engine``. Takes the rider, the path of the module that is
# called, and its inputs; returns the keyword arguments to call it with, and what to call when the pass has ended.
BeginPass = Callable[
    [Rider, str, Sequence[Any], Mapping[str, Any]],
    tuple[Mapping[str, Any], Callable[[Outcome], None]],
]


class Riders:
    """The riders of all threads that call modules of one tree, or of its clones.

    Args:
        sweeps: they bring the layer batches.
        root: the module tree itself.
        begin_pass: makes a request of a pass that belongs to none, and waits until it is admitted.
    """

    def __init__(self, sweeps: Sweeps, root: torch.nn.Module, *, begin_pass: BeginPass) -> None:
        self._sweeps = sweeps
        self._root = root
        self.begin_pass = begin_pass
        self._local = threading.local()
        self._loop_thread = threading.get_ident()
        self.turn = threading.Lock()  # held by the thread that computes with the module tree itself

    @contextmanager
    def riding(self, rider: Rider) -> Iterator[None]:
        """Make ``rider`` the rider of the calling thread."""
        before = self.current()
        if before is not None:
            before.abandon()  # an interrupt may have left its pass open
        self._local.rider = rider
        try:
            yield
        finally:
            rider.abandon()
            self._local.rider = before

    def current(self) -> Rider | None:
        """The rider of the calling thread, if it has one."""
        return getattr(self._local, "rider", None)

    def in_request(self) -> bool:
        """Whether the calling thread belongs to a request, whose memory is reserved."""
        rider = self.current()
        return rider is not None and rider.gate is None

    def rider(self) -> Rider:
        """The rider of the calling thread; made if it has none.

        A thread without a request calls the module tree itself, not a clone: all such threads share its buffers,
        so their passes go one after the other.
        """
        rider = self.current()
        if rider is None:
            self.refuse_on_loop()
            rider = self._local.rider = Rider(self._sweeps, gate=Gate(self))
            rider.root = self._root
        return rider

    def refuse_on_loop(self) -> None:
        """Raise a ModelError in the thread of the event loop, which would wait for itself."""
        if threading.get_ident() == self._loop_thread:
            raise ModelError(
                "the streamed module was called on the event loop, which feeds it; await the StreamedModel's "
                "forward or generate instead, or call the module in a thread"
            )


class Gate:
    """What a pass that belongs to no request waits for: to be admitted as one, then for its turn.

    In this order: the thread that has the turn must not wait for memory of one that waits for the turn.
    """

    def __init__(self, riders: Riders) -> None:
        self._riders = riders
        self._end: Callable[[Outcome], None] | None = None  # of the pass under way

    def enter(
        self, rider: Rider, entry: str, inputs: Sequence[Any], named: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Wait until a pass of ``rider`` may begin; returns the keyword arguments to make it with."""
        given, end = self._riders.begin_pass(rider, entry, inputs, named)
        try:
            self._riders.turn.acquire()
        except BaseException:  # an interrupt
            end("cancelled")
            raise
        self._end = end
        return given

    def leave(self, outcome: Outcome) -> None:
        """Note that the pass has ended, and let the next thread begin."""
        end, self._end = self._end, None
        if end is not None:
            self._riders.turn.release()
            end(outcome)
