"""Whose forward pass a thread is in: the rider of its request, or one of its own."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from layerstream.pipeline.rider import Rider
from layerstream.pipeline.stats import Outcome
from layerstream.pipeline.sweeps import Sweeps
from layerstream.stages.errors import ModelError

__all__ = ["BeginPass", "Riders"]

# Of a rider and the inputs of a pass: waits in the calling thread until it is admitted, and returns what ends it.
BeginPass = Callable[[Rider, Sequence[Any], Mapping[str, Any]], Callable[[Outcome], None]]


class Riders:
    """The riders of all threads that call modules of one tree, or of its clones.

    Args:
        sweeps: what they ride.
        root: the module tree itself.
        begin_pass: makes a request of a pass that belongs to none.
    """

    def __init__(self, sweeps: Sweeps, root: torch.nn.Module, *, begin_pass: BeginPass) -> None:
        self._sweeps = sweeps
        self._root = root
        self.begin_pass = begin_pass
        self._local = threading.local()
        self._loop_thread = threading.get_ident()
        self.turn = threading.Lock()  # of those who share the tree itself

    @contextmanager
    def riding(self, rider: Rider) -> Iterator[None]:
        """Let the forward passes of the calling thread be those of ``rider``."""
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
        """Whose pass the calling thread is in.

        A thread that was not given a rider calls the module tree itself, not a clone: all such threads
        share its buffers, so their passes go one after the other.
        """
        rider = self.current()
        if rider is None:
            self.refuse_on_loop()
            rider = self._local.rider = Rider(self._sweeps, gate=_OwnPasses(self))
            rider.root = self._root
        return rider

    def refuse_on_loop(self) -> None:
        """Refuse to wait on the event loop for what the event loop brings."""
        if threading.get_ident() == self._loop_thread:
            raise ModelError(
                "the streamed module was called on the event loop, which feeds it; await the StreamedModel's "
                "forward or generate instead, or call the module in a thread"
            )


class _OwnPasses:
    """What the passes of a thread without a request wait for: to be admitted as one, then their turn.

    In this order: who has the turn must not wait for memory that is held by who waits for the turn.
    """

    def __init__(self, riders: Riders) -> None:
        self._riders = riders
        self._end: Callable[[Outcome], None] | None = None  # of the pass under way

    def enter(self, rider: Rider, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        """A pass of ``rider`` with these inputs is about to begin."""
        end = self._riders.begin_pass(rider, inputs, named)
        try:
            self._riders.turn.acquire()
        except BaseException:  # an interrupt
            end("cancelled")
            raise
        self._end = end

    def leave(self, outcome: Outcome) -> None:
        """The pass has ended so."""
        end, self._end = self._end, None
        if end is not None:
            self._riders.turn.release()
            end(outcome)
