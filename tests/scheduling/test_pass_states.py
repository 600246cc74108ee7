"""The states of passes by themselves: Futures that have ended already."""

from concurrent.futures import Future
from typing import Any, cast

from support.loop import run

from layerstream.pipeline import ClosedError, LayerstreamError, ReadError
from layerstream.pipeline.scheduling.pass_states import PassStates, fail_future
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
