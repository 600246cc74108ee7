"""The pass runner of each thread: that of its request, or one of its own, which shares the module tree with others."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch

from layerstream.pipeline.scheduling.passes import PassRunner, Scheduler
from layerstream.pipeline.scheduling.stats import Outcome
from layerstream.stages.errors import ModelError
from layerstream.stages.process.forks import refuse_fork

__all__ = ["BeginPass", "ThreadPasses", "ThreadTurn"]

# Makes a request for a pass that belongs to none; see ``Engine``. Takes the runner of the pass, the path of the module
# that is called, and its inputs; returns the keyword arguments to call it with, and a function for the end of the pass.
BeginPass = Callable[
    [PassRunner, str, Sequence[Any], Mapping[str, Any]],
    tuple[Mapping[str, Any], Callable[[Outcome], None]],
]


class ThreadPasses:
    """The pass runners of all threads that call modules of one tree, or of its clones.

    Args:
        scheduler: Brings the layer batches.
        root: The module tree itself.
        begin_pass: Makes a request for a pass that belongs to none, and waits until it is admitted.
    """

    def __init__(
        self, scheduler: Scheduler, root: torch.nn.Module, *, begin_pass: BeginPass
    ) -> None:
        self._scheduler = scheduler
        self._root = root
        self.begin_pass = begin_pass
        self._local = threading.local()
        self._process = os.getpid()
        self._loop_thread = threading.get_ident()
        self.turn = threading.Lock()  # held by the thread that computes with the module tree itself

    @contextmanager
    def running(self, runner: PassRunner) -> Iterator[None]:
        """Have ``runner`` run the passes of the calling thread."""
        previous = self.current()
        if previous is not None:
            previous.abandon()  # an interrupt may have left its pass open
        self._local.runner = runner
        try:
            yield
        finally:
            runner.abandon()
            self._local.runner = previous

    def current(self) -> PassRunner | None:
        """The pass runner of the calling thread, if it has one."""
        # In a forked process it is a copy of the parent's, without the threads that it needs.
        if os.getpid() != self._process:
            return None
        return getattr(self._local, "runner", None)

    def wait(self, future: Future[Any], at_most_seconds: float | None = None) -> None:
        """Block until ``future`` is done, or the request of the calling thread is cancelled, which raises PassCancelled.

        Raises:
            TimeoutError: It took too long; only in a thread without a request.
        """
        runner = self.current()
        if runner is None:
            future.exception(at_most_seconds)
        else:
            runner.wait(future, at_most_seconds)

    @contextmanager
    def waiting(self) -> Iterator[Callable[[Future[Any]], None]]:
        """While the calling thread's pass waits for experts, with what this yields, another one may compute in its place."""
        runner = self.current()
        if runner is None:
            yield self.wait
            return
        self._scheduler.call_on_loop(self._scheduler.experts_awaited, runner)
        try:
            yield self.wait
        finally:
            self._scheduler.call_on_loop(self._scheduler.experts_arrived, runner)
        runner.check_cancelled()

    def in_request(self) -> bool:
        """Whether the calling thread belongs to a request, whose memory is reserved."""
        runner = self.current()
        return runner is not None and runner.turn is None

    def undo_at_release(self) -> list[Callable[[], None]] | None:
        """What the calling thread's pass calls when it gives back its layer batch; None if it holds none."""
        runner = self.current()
        return None if runner is None else runner.undo_at_release()

    def runner(self) -> PassRunner:
        """The pass runner of the calling thread; made if it has none.

        A thread without a request calls the module tree itself, not a clone: all such threads share its buffers,
        so their passes go one after the other.

        Raises:
            ClosedError: This process was forked from that of the model.
            ModelError: This is the thread of the event loop.
        """
        runner = self.current()
        if runner is None:
            self.refuse_on_loop()
            runner = self._local.runner = PassRunner(self._scheduler, turn=ThreadTurn(self))
            runner.root = self._root
        return runner

    def pass_ended(self) -> None:
        """The calling thread, without a request, has no pass any more: a thread that lives on must not keep the tree."""
        vars(self._local).pop("runner", None)

    def refuse_on_loop(self) -> None:
        """Raise a ModelError in the thread of the event loop, which would wait for itself; a ClosedError in a fork."""
        refuse_fork(self._process)
        if threading.get_ident() == self._loop_thread:
            raise ModelError(
                "the streamed module was called on the event loop, which feeds it; await the StreamedModel's "
                "forward or generate instead, or call the module in a thread"
            )


class ThreadTurn:
    """What a pass that belongs to no request waits for: admission as a request, then its turn.

    In this order: the thread that has the turn must not wait for memory of one that waits for the turn.
    """

    def __init__(self, passes: ThreadPasses) -> None:
        self._passes = passes
        self._end: Callable[[Outcome], None] | None = None  # of the pass under way

    def enter(
        self, runner: PassRunner, entry: str, inputs: Sequence[Any], named: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Wait until a pass of ``runner`` may begin; returns the keyword arguments to make it with."""
        try:
            replaced, end = self._passes.begin_pass(runner, entry, inputs, named)
            try:
                self._passes.turn.acquire()
            except BaseException:  # an interrupt
                end("cancelled")
                raise
        except BaseException:
            self._passes.pass_ended()
            raise
        self._end = end
        return replaced

    def leave(self, outcome: Outcome) -> None:
        """End the pass, and let the next thread begin."""
        end, self._end = self._end, None
        self._passes.pass_ended()
        if end is not None:
            self._passes.turn.release()
            end(outcome)
