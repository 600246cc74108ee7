"""The states of concurrent forward passes: what each waits for and holds, and which sweep it takes part in.

The passes of a request are made by a ``PassRunner`` in a worker thread. Before a layer is called, a hook of its module
calls ``PassRunner.hold``, which requests the layer batch and waits for it in a Future. The scheduler takes batches from
the pipeline, hands each to the passes that wait for it, and gives it back when no pass holds it and none *in the sweep*
is expected to want it.

A pass is:  expected -> waiting -> holding -> waiting -> holding ... -> ended, at most one batch at a time.
A batch is: absent -> read -> transferred -> bound -> held by n passes -> unbound -> absent.

A pass joins a sweep while it waits for its first batch: the sweep that starts next, or the one that has just started,
before its first batch is given back. It leaves the sweep when it ends, is cancelled, or wants a batch that the sweep
does not bring; in the last case it joins the next one.
"""

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from layerstream.pipeline.modeling.binding import Bound
from layerstream.pipeline.scheduling.passes import PassCancelled, PassRunner
from layerstream.pipeline.scheduling.route_prediction import RoutePrediction
from layerstream.stages.devices.protocol import Event
from layerstream.stages.errors import copy_of, echo_of

__all__ = ["PassStates", "fail_future"]

# Passes that compute with a batch at the same time. Measured on two cores with eight requests over warm weights: three
# at once take 0.6 of the time that one after the other takes (they share weights in the processor's caches, and one
# computes while another is in Python); eight at once take 0.55, but each has a team of torch's threads at work, and
# the event loop is delayed twice as long.
_AT_ONCE = 3


class PassStates:
    """The state of each pass, and its transitions. For the event loop only.

    Args:
        batches: Indices of the layer batches that sweeps bring, in execution order.
        fits: Whether requests that need so many bytes each may run with the layers that are resident now.

    Attributes:
        passes_begun: Passes begun so far.
    """

    def __init__(self, batches: Iterable[int], *, fits: Callable[[list[int | None]], bool]) -> None:
        self._fits = fits
        self._routes = RoutePrediction(batches)
        self._running: set[PassRunner] = set()  # their requests have begun and not ended
        # Of those, the ones that are expected to begin a pass shortly.
        self._between_passes: set[PassRunner] = set()
        # The batch that a pass waits for, and the Future that gets it.
        self._waiting: dict[PassRunner, tuple[int, Future[Bound]]] = {}
        # For each pass in the sweep, the batches that it may still want.
        self._in_sweep: dict[PassRunner, list[int]] = {}
        # Passes that compute with the current batch, and the events behind the work of those that have done so.
        self._holders: set[PassRunner] = set()
        self._awaiting_experts: set[PassRunner] = (
            set()
        )  # of these, the ones that do not compute now
        self._events: list[Event] = []
        self._joinable: tuple[int, ...] = ()  # the route of a sweep that passes may still join
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        self.passes_begun = 0

    @property
    def passes_in_sweep(self) -> int:
        """The number of passes in the sweep under way."""
        return len(self._in_sweep)

    # -- reported by requests and passes ---------------------------------------------------------

    def request_began(self, runner: PassRunner) -> None:
        """The request of ``runner`` begins, so its first pass is expected."""
        self._running.add(runner)
        self._expect_pass(runner)

    def request_ended(self, runner: PassRunner) -> None:
        """The request of ``runner`` has ended: no more passes come from it."""
        self._running.discard(runner)
        self._between_passes.discard(runner)
        self._routes.forget(runner)
        self._changed.set()

    def batch_wanted(
        self,
        runner: PassRunner,
        released: Event | None,
        index: int,
        entry: str | None,
        future: Future[Bound],
    ) -> None:
        """A pass gives back the batch that it held, and waits for another one.

        Args:
            runner: The runner of the pass.
            released: The event behind its work with the batch that it held, if any.
            index: The index of the layer batch that it waits for.
            entry: The path of the module that the pass begins in, if this is its first batch; else None.
            future: Gets the batch, or an error.
        """
        self.batch_released(runner, released)
        if self._error is not None:
            fail_future(future, echo_of(self._error))
            return
        if runner.cancelled:
            fail_future(future, PassCancelled())
            return
        self._waiting[runner] = (index, future)
        if entry is not None:
            self._routes.begin(runner, entry)
            self._between_passes.discard(runner)
            self.passes_begun += 1
            if self._may_join(runner, index):
                self._in_sweep[runner] = self._route(runner)
        expected = self._in_sweep.get(runner)
        if expected is not None:
            if index in expected:
                self._in_sweep[runner] = [other for other in expected if other >= index]
            else:
                del self._in_sweep[runner]  # this sweep does not bring it: join the next one
        self._changed.set()

    def _may_join(self, runner: PassRunner, index: int) -> bool:
        """Whether ``runner`` may still join the sweep that was just begun."""
        return (
            index in self._joinable[:1]
            and set(self._route(runner)) <= set(self._joinable)
            and self._fits(self._demands([runner]))
        )

    def batch_released(self, runner: PassRunner, released: Event | None) -> None:
        """The pass has given back its batch, if any; ``released`` is the event behind its work with it."""
        if released is not None:
            self._holders.discard(runner)
            self._events.append(released)
        self._changed.set()

    def wait_given_up(self, runner: PassRunner) -> None:
        """The pass of ``runner`` neither waits for a batch nor holds one, and wants no more in this sweep."""
        self._waiting.pop(runner, None)
        self._in_sweep.pop(runner, None)
        self._holders.discard(runner)
        self._awaiting_experts.discard(runner)
        self._changed.set()

    def experts_awaited(self, runner: PassRunner) -> None:
        """``runner`` keeps its batch, but does not compute: it waits for experts."""
        self._awaiting_experts.add(runner)
        self._changed.set()

    def experts_arrived(self, runner: PassRunner) -> None:
        """``runner`` computes again."""
        self._awaiting_experts.discard(runner)

    def pass_ended(
        self,
        runner: PassRunner,
        released: Event | None,
        entry: str,
        visited: tuple[int, ...] | None,
    ) -> None:
        """``runner`` has ended its pass. ``visited``: its batches, in order; None if it did not complete."""
        self.batch_released(runner, released)
        self.wait_given_up(runner)
        self._routes.end(runner)
        if runner in self._running and not runner.cancelled:
            self._expect_pass(runner)
        if visited:
            self._routes.remember(None, entry, visited)
            if runner in self._running:
                self._routes.remember(runner, entry, visited)

    def _expect_pass(self, runner: PassRunner) -> None:
        """Expect a pass of ``runner`` shortly, unless it has to wait for its turn, which may take sweeps."""
        if runner.turn is None:
            self._between_passes.add(runner)

    def cancel(self, runner: PassRunner) -> None:
        """Unwind the pass of ``runner``: at once if it waits, for a batch or for bytes, otherwise when it next wants a batch."""
        runner.cancel()
        self._between_passes.discard(runner)
        waiting = self._waiting.pop(runner, None)
        if waiting is not None:
            self._in_sweep.pop(runner, None)
            fail_future(waiting[1], PassCancelled())
            self._changed.set()

    # -- used by the task that makes sweeps ------------------------------------------------------

    def _demands(self, runners: Iterable[PassRunner]) -> list[int | None]:
        """Bytes that running requests and these passes need in addition to the layers; None for what is unknown."""
        return [runner.demand_bytes for runner in {*self._running, *runners}]

    def _route(self, runner: PassRunner) -> list[int]:
        """The batches that ``runner``, which waits, may want from here on."""
        return self._routes.expected(runner, self._waiting[runner][0])

    def _join_sweep(self) -> tuple[int, ...]:
        """Let all passes that wait join the sweep that is about to start; returns its route."""
        for runner in self._waiting:
            self._in_sweep[runner] = self._route(runner)
        return tuple(sorted({index for route in self._in_sweep.values() for index in route}))

    def _hand_out(self, bound: Bound) -> bool:
        """Hand ``bound`` to passes that wait for it, a few at a time.

        Returns:
            Whether a pass holds it, or may still want it.
        """
        for runner, (index, future) in list(self._waiting.items()):
            if len(self._holders - self._awaiting_experts) >= _AT_ONCE:
                break
            if index == bound.index and runner in self._in_sweep:
                del self._waiting[runner]
                self._in_sweep[runner].remove(index)
                self._holders.add(runner)
                future.set_result(bound)
        return bool(self._holders) or any(
            bound.index in expected for expected in self._in_sweep.values()
        )

    def _fail_waiting(self, error: BaseException) -> None:
        """Fail the passes that wait, and those that will; the first of them gets ``error`` itself."""
        if self._error is None:
            self._error = copy_of(
                error
            )  # without its traceback, which refers to all that its caller has
        for number, (_, future) in enumerate(self._waiting.values()):
            fail_future(future, echo_of(self._error) if number else error)
        self._waiting.clear()

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition``, which depends on the states of passes, holds."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()


def fail_future(future: Future[Any], error: BaseException) -> None:
    """Let ``future`` end with ``error``, unless it has ended."""
    with suppress(InvalidStateError):
        future.set_exception(error)
