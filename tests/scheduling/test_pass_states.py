"""The states of passes by themselves: Futures that have ended already."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.loop import run

from layerstream.pipeline import ClosedError, LayerstreamError, ReadError
from layerstream.pipeline.scheduling.pass_state import PassPhase, fail_future
from layerstream.pipeline.scheduling.pass_states import PassStates
from layerstream.pipeline.scheduling.passes import PassRunner


def test_a_future_that_has_ended_does_not_keep_errors_from_the_other_passes() -> None:
    async def main() -> None:
        states = PassStates(range(2), fits=lambda _: True)
        runners = [PassRunner(cast("Any", None)) for _ in range(4)]
        futures: list[Future[Any]] = [Future() for _ in runners]
        for runner, future in zip(runners, futures, strict=True):
            states.batch_wanted(runner, None, 0, "", future)
        for future in futures[:2]:  # in the threads that wait for them
            fail_future(future, ClosedError("the model was closed"))
        states.cancel(runners[0])
        states._fail_waiting(ReadError("broken"))
        assert all(isinstance(future.exception(0), LayerstreamError) for future in futures)

    run(main())


class PassesByHand:
    """The states of passes that a test begins and ends itself."""

    def __init__(self, *, batches: int = 3) -> None:
        self.states = PassStates(range(batches), fits=lambda _: True)
        self.futures: dict[PassRunner, Future[Any]] = {}

    def request(self) -> PassRunner:
        runner = PassRunner(cast("Any", None))
        self.states.request_began(runner)
        return runner

    def want(self, runner: PassRunner, index: int, *, first: bool = False) -> None:
        released = None if first else cast("Any", "event")
        self.futures[runner] = Future()
        self.states.batch_wanted(
            runner, released, index, "" if first else None, self.futures[runner]
        )

    def serve(self, index: int) -> bool:
        return self.states._hand_out(cast("Any", SimpleNamespace(index=index)))


def test_a_pass_waits_computes_and_ends_and_its_next_one_is_expected() -> None:
    async def main() -> None:
        by_hand = PassesByHand()
        runner = by_hand.request()
        state = by_hand.states._state(runner)
        phases = [state.phase]
        by_hand.want(runner, 0, first=True)
        phases.append(state.phase)
        assert by_hand.states._join_sweep() == (0, 1, 2)
        assert by_hand.serve(0)
        phases.append(state.phase)
        by_hand.states.experts_awaited(runner)
        phases.append(state.phase)
        by_hand.states.experts_arrived(runner)
        by_hand.states.pass_ended(runner, cast("Any", "event"), (0,))
        phases.append(state.phase)
        by_hand.want(runner, 0, first=True)
        assert by_hand.states._join_sweep() == (0,)
        assert phases == [
            PassPhase.EXPECTED,
            PassPhase.WAITING,
            PassPhase.COMPUTING,
            PassPhase.AWAITING_EXPERTS,
            PassPhase.EXPECTED,
        ]

    run(main())


def test_passes_are_served_in_the_order_in_which_they_wait_and_not_all_at_once() -> None:
    async def main() -> None:
        by_hand = PassesByHand()
        runners = [by_hand.request() for _ in range(5)]
        for runner in reversed(runners):
            by_hand.want(runner, 0, first=True)
        by_hand.states._join_sweep()
        by_hand.serve(0)
        served = [by_hand.futures[runner].done() for runner in reversed(runners)]
        assert served == [True, True, True, False, False]
        by_hand.states.experts_awaited(runners[4])  # which keeps its batch, but does not compute
        by_hand.serve(0)
        assert by_hand.futures[runners[1]].done()

    run(main())


def test_a_pass_that_wants_what_the_sweep_does_not_bring_joins_the_next_one_for_all_the_rest() -> (
    None
):
    async def main() -> None:
        by_hand = PassesByHand(batches=4)
        runner = by_hand.request()
        by_hand.want(runner, 0, first=True)
        by_hand.states._join_sweep()
        by_hand.serve(0)
        by_hand.states.pass_ended(runner, cast("Any", "event"), (0, 2))
        by_hand.want(runner, 0, first=True)
        assert by_hand.states._join_sweep() == (0, 2)
        by_hand.serve(0)
        by_hand.want(runner, 1)
        assert by_hand.states.passes_in_sweep == 0
        assert by_hand.states._join_sweep() == (1, 2, 3)

    run(main())


@pytest.mark.parametrize("pass_ends_first", [True, False])
def test_a_runner_whose_request_and_pass_have_ended_is_forgotten(*, pass_ends_first: bool) -> None:
    async def main() -> None:
        by_hand = PassesByHand()
        runner = by_hand.request()
        by_hand.want(runner, 0, first=True)
        by_hand.states._join_sweep()
        by_hand.serve(0)
        ends = [
            lambda: by_hand.states.pass_ended(runner, cast("Any", "event"), (0,)),
            lambda: by_hand.states.request_ended(runner),
        ]
        for end in ends if pass_ends_first else reversed(ends):
            end()
        by_hand.states.cancel(runner)
        by_hand.states.request_ended(runner)  # reported twice, in a thread and on the loop
        assert not by_hand.states._states

    run(main())
