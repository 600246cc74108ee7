"""The states of concurrent forward passes: what each waits for and holds, and which sweep it takes part in.

The passes of a request are made by a ``PassRunner`` in a worker thread. Before a layer is called, a hook of its module
calls ``PassRunner.hold``, which requests the layer batch and waits for it in a Future. The scheduler takes batches from
the pipeline, hands each to the passes that wait for it, and gives it back when no pass holds it and none *in the sweep*
is expected to want it.

A pass is:  expected -> waiting -> computing -> waiting -> computing ... -> ended, at most one batch at a time: ``PassState``.
A batch is: absent -> read -> transferred -> bound -> held by n passes -> unbound -> absent.

A pass joins a sweep while it waits for its first batch: the sweep that starts next, or the one that has just started,
before its first batch is given back. It leaves the sweep when it ends, is cancelled, or wants a batch that the sweep
does not bring; in the last case it joins the next one.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

from layerstream.pipeline.modeling.binding import Bound
from layerstream.pipeline.scheduling.pass_state import PassPhase, PassState, fail_future
from layerstream.pipeline.scheduling.passes import PassCancelled, PassRunner
from layerstream.pipeline.scheduling.route_prediction import RoutePrediction
from layerstream.stages.devices.protocol import Event
from layerstream.stages.errors import copy_of, echo_of

__all__ = ["PassStates"]

# Passes that compute with a batch at the same time. Measured on two cores with eight requests over warm weights: three
# at once take 0.6 of the time that one after the other takes (they share weights in the processor's caches, and one
# computes while another is in Python); eight at once take 0.55, but each has a team of torch's threads at work, and
# the event loop is delayed twice as long.
_AT_ONCE = 3


class PassStates:
    """The states of all passes. For the event loop only.

    Args:
        batches: Indices of the layer batches that sweeps bring, in execution order.
        fits: Whether requests that need so many bytes each may run with the layers that are resident now.

    Attributes:
        passes_begun: Passes begun so far.
    """

    def __init__(self, batches: Iterable[int], *, fits: Callable[[list[int | None]], bool]) -> None:
        self._fits = fits
        self._routes = RoutePrediction(batches)
        # Those that wait are in the order in which they have begun to.
        self._states: dict[PassRunner, PassState] = {}
        # Behind the work of passes that have given the current batch back.
        self._events: list[Event] = []
        self._joinable: tuple[int, ...] = ()  # the route of a sweep that passes may still join
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        self.passes_begun = 0

    @property
    def passes_in_sweep(self) -> int:
        """The number of passes in the sweep under way."""
        return sum(state.route is not None for state in self._states.values())

    # -- reported by requests and passes ---------------------------------------------------------

    def request_began(self, runner: PassRunner) -> None:
        """The request of ``runner`` begins, so its first pass is expected."""
        state = self._state(runner)
        state.has_request = True
        state.expect()

    def request_ended(self, runner: PassRunner) -> None:
        """The request of ``runner`` has ended: no more passes come from it."""
        state = self._state(runner)
        state.has_request = False
        state.expect_no_more()
        self._routes.forget(runner)
        self._forget_without_pass(state)
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
        state = self._state(runner)
        self._states[runner] = self._states.pop(runner)  # behind those that wait already
        if entry is not None:
            state.begin(entry)
            self.passes_begun += 1
        state.wait(index, future)
        if entry is not None and self._may_join(state):
            state.route = self._route(state)
        self._changed.set()

    def _may_join(self, state: PassState) -> bool:
        """Whether a pass that waits may still join the sweep that was just begun."""
        return (
            state.index in self._joinable[:1]
            and set(self._route(state)) <= set(self._joinable)
            and self._fits(self._demands())
        )

    def batch_released(self, runner: PassRunner, released: Event | None) -> None:
        """The pass has given back its batch, if any; ``released`` is the event behind its work with it."""
        if released is not None:
            self._state(runner).release()
            self._events.append(released)
        self._changed.set()

    def wait_given_up(self, runner: PassRunner) -> None:
        """The pass of ``runner`` neither waits for a batch nor holds one, and wants no more in this sweep."""
        self._state(runner).leave()
        self._changed.set()

    def experts_awaited(self, runner: PassRunner) -> None:
        """``runner`` keeps its batch, but does not compute: it waits for experts."""
        self._state(runner).await_experts()
        self._changed.set()

    def experts_arrived(self, runner: PassRunner) -> None:
        """``runner`` computes again."""
        self._state(runner).go_on()

    def pass_ended(
        self, runner: PassRunner, released: Event | None, visited: tuple[int, ...] | None
    ) -> None:
        """``runner`` has ended its pass. ``visited``: its batches, in order; None if it did not complete."""
        self.batch_released(runner, released)
        state = self._state(runner)
        state.leave()
        state.expect()
        if visited:
            self._routes.remember(None, state.entry, visited)
            if state.has_request:
                self._routes.remember(runner, state.entry, visited)
        self._forget_without_pass(state)

    def cancel(self, runner: PassRunner) -> None:
        """Unwind the pass of ``runner``: at once if it waits, for a batch or for bytes, otherwise when it next wants a batch."""
        runner.cancel()
        state = self._state(runner)
        state.expect_no_more()
        if state.phase is PassPhase.WAITING:
            state.fail(PassCancelled())
            self._changed.set()

    def _state(self, runner: PassRunner) -> PassState:
        return self._states.setdefault(runner, PassState(runner))

    def _forget_without_pass(self, state: PassState) -> None:
        """Forget a runner that has no request, and so makes no more passes, unless one is under way."""
        if not state.has_request and state.phase is PassPhase.IDLE:
            del self._states[state.runner]

    # -- used by the task that makes sweeps ------------------------------------------------------

    def _in(self, phase: PassPhase) -> list[PassState]:
        return [state for state in self._states.values() if state.phase is phase]

    def _is_held(self) -> bool:
        return any(state.holds for state in self._states.values())

    def _in_sweep(self) -> Iterator[tuple[PassRunner, list[int]]]:
        """The passes in the sweep under way, each with the batches that it may still want."""
        for state in self._states.values():
            if state.route is not None:
                yield state.runner, state.route

    def _demands(self) -> list[int | None]:
        """Bytes that requests and waiting passes need in addition to the layers; None for what is unknown."""
        return [
            state.runner.demand_bytes
            for state in self._states.values()
            if state.has_request or state.phase is PassPhase.WAITING
        ]

    def _route(self, state: PassState) -> list[int]:
        """The batches that a pass, which waits, may want from here on."""
        return self._routes.expected(
            state.runner, state.entry, state.index, is_surprising=state.is_surprising
        )

    def _join_sweep(self) -> tuple[int, ...]:
        """Let all passes that wait join the sweep that is about to start; returns its route."""
        for state in self._in(PassPhase.WAITING):
            state.route = self._route(state)
        return tuple(sorted({index for _, route in self._in_sweep() for index in route}))

    def _hand_out(self, bound: Bound) -> bool:
        """Hand ``bound`` to passes that wait for it, a few at a time.

        Returns:
            Whether a pass holds it, or may still want it.
        """
        free = _AT_ONCE - len(self._in(PassPhase.COMPUTING))
        for state in self._in(PassPhase.WAITING):
            if free > 0 and state.index == bound.index and state.route is not None:
                state.compute(bound)
                free -= 1
        return self._is_held() or any(bound.index in route for _, route in self._in_sweep())

    def _fail_waiting(self, error: BaseException) -> None:
        """Fail the passes that wait, and those that will; the first of them gets ``error`` itself."""
        if self._error is None:
            self._error = copy_of(
                error
            )  # without its traceback, which refers to all that its caller has
        for number, state in enumerate(self._in(PassPhase.WAITING)):
            state.fail(echo_of(self._error) if number else error)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition``, which depends on the states of passes, holds."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()
