"""Opening that is ended at any of its awaits leaves nothing behind: by closing, cancelling, or the end of the event loop."""

import asyncio
from functools import partialmethod

import pytest
from support.checkpoints import GPU, arranged, plan_for, write_checkpoint
from support.fake_device import FakeDevice
from support.leaks import nothing_left_behind, our_tasks
from support.loop import Interrupted, run, turns
from support.models import save_model
from support.streaming import SMALL

from layerstream.pipeline import ClosedError, Pipeline, StreamedModel


class OpenedPipeline:
    """A pipeline on the fake device that is about to be opened."""

    kind = Pipeline

    def __init__(self, folder):
        write_checkpoint(folder, blocks=2)
        self.plan = arranged(plan_for(folder, GPU), slots=2, on_device=(1,), on_host=(2,))

    def make(self):
        self.device = FakeDevice()
        return Pipeline(self.plan, device=self.device)

    def check_closed(self):
        assert self.device.host_memories == 0


class OpenedModel:
    """A model with tied embeddings, which are loaded while it is opened."""

    kind = StreamedModel

    def __init__(self, folder):
        self.folder = save_model(folder / "model", "t5")
        self.options = {"device": "cpu", "workload": SMALL, "measure": False}

    def make(self):
        return StreamedModel.open(self.folder, **self.options)

    def check_closed(self):
        pass


async def end_by_closing(made, opening):
    await asyncio.gather(made.aclose(), made.aclose())
    with pytest.raises(ClosedError, match="closed while it was being opened"):
        await opening


async def end_by_cancelling(made, opening):
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await made.aclose()


async def end_by_closing_and_cancelling_both(made, opening):
    closing = asyncio.create_task(made.aclose())
    await asyncio.sleep(0)
    opening.cancel()
    closing.cancel()
    await asyncio.wait([opening, closing])
    assert opening.cancelled()
    assert closing.cancelled()


@pytest.mark.parametrize(
    "end", [end_by_closing, end_by_cancelling, end_by_closing_and_cancelling_both]
)
@pytest.mark.parametrize("opened", [OpenedPipeline, OpenedModel])
def test_opening_that_is_ended_at_any_await_leaves_nothing_behind(
    tmp_path, monkeypatch, opened, end
):
    kind, case = opened.kind, opened(tmp_path)
    opens = kind._open

    async def ended_at(number):
        """Open, and end that at await ``number``; whether it came so far."""
        ending = asyncio.Event()
        interrupted = Interrupted(opens, number, ending.set)
        monkeypatch.setattr(kind, "_open", partialmethod(interrupted))
        made = case.make()
        opening = asyncio.create_task(made.__aenter__())
        waiting = asyncio.create_task(ending.wait())
        await asyncio.wait([opening, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if interrupted.reached:
            await end(made, opening)
        else:
            await opening
            await made.aclose()
        case.check_closed()
        assert our_tasks() == []
        return interrupted.reached

    number = 0
    run(ended_at(10_000))  # what is loaded once for the process
    with nothing_left_behind():
        while run(ended_at(number)):
            number += 1
    assert number > 0


@pytest.mark.parametrize("opened", [OpenedPipeline, OpenedModel])
def test_a_second_opening_is_refused_while_the_first_one_goes_on(tmp_path, opened):
    case = opened(tmp_path)

    async def main():
        made = case.make()
        opening = asyncio.create_task(made.__aenter__())
        await asyncio.sleep(0)
        with pytest.raises(ClosedError, match="opened once"):
            await made.__aenter__()
        await opening
        await made.aclose()

    with nothing_left_behind():
        run(main())


@pytest.mark.parametrize("opened", [OpenedPipeline, OpenedModel])
def test_a_loop_that_ends_closes_what_is_open(tmp_path, opened):
    case = opened(tmp_path)

    async def main():
        await case.make().__aenter__()

    run(main())
    with nothing_left_behind():
        run(main())


@pytest.mark.parametrize("turns_before", [None, 3])
@pytest.mark.parametrize("opened", [OpenedPipeline, OpenedModel])
def test_a_loop_that_is_merely_closed_closes_what_is_open_or_being_opened(
    tmp_path, opened, turns_before
):
    case = opened(tmp_path)

    async def main():
        made = case.make()
        opening = asyncio.create_task(made.__aenter__())
        if turns_before is None:
            return await opening
        await turns(turns_before)
        return opening

    def run_and_close():
        loop = asyncio.new_event_loop()
        try:
            return loop.run_until_complete(main())
        finally:
            loop.close()

    run(main())
    with nothing_left_behind():
        opening = run_and_close()
        if turns_before is not None:
            with pytest.raises(ClosedError):
                opening.result()
    case.check_closed()
