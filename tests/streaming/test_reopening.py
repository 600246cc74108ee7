"""After a failure that lasts, the model is reopened in place: same object, same plan, and requests that waited go on."""

import asyncio
import errno
import fcntl
import os

import pytest
import torch
from support.faults import Gate
from support.leaks import nothing_left_behind
from support.loop import run, turns
from support.models import inputs_for, save_model
from support.streaming import open_streaming

from layerstream.pipeline import ClosedError, LayerstreamError, ReadError
from layerstream.stages.readers import guard as guard_module

GREEDY = {"max_new_tokens": 8, "do_sample": False}


class Disk:
    """Direct reads, those of layers, fail while it is broken."""

    def __init__(self, monkeypatch):
        self.broken = False
        preadv = os.preadv

        def read(descriptor, buffers, offset, *rest):
            if self.broken and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return preadv(descriptor, buffers, offset, *rest)

        monkeypatch.setattr(os, "preadv", read)
        monkeypatch.setattr(guard_module, "_PAUSES_SECONDS", (0.001,))


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture(scope="module", params=["llama", "t5"])
def case(request, tmp_path_factory):
    """A model, one of them with weights that are always bound, and inputs for it."""
    folder = save_model(tmp_path_factory.mktemp("models") / request.param, request.param)
    return folder, inputs_for(request.param)


async def until_failed(model):
    while model.failure is None:
        await turns(1)


def test_a_model_whose_disk_works_again_is_reopened_and_computes_the_same(case, disk):
    folder, inputs = case

    async def main():
        async with await open_streaming(folder, reader="direct") as model:
            plan = model.plan
            expected = await model.generate(**inputs, **GREEDY)
            assert model.failure is None
            await model.reopen()  # nothing to do
            assert model.stats().reopened == 0
            disk.broken = True
            with pytest.raises(LayerstreamError):
                await model.generate(**inputs, **GREEDY)
            await until_failed(model)
            assert isinstance(model.failure, ReadError)
            assert "Input/output error" in model.stats().failure
            with pytest.raises(ClosedError, match="failed before"):
                await model.generate(**inputs, **GREEDY)
            disk.broken = False
            await model.reopen()
            assert (model.failure, model.stats().failure, model.stats().reopened) == (None, None, 1)
            assert torch.equal(await model.generate(**inputs, **GREEDY), expected)
            assert model.plan is plan

    with nothing_left_behind():
        run(main())


def test_requests_that_wait_go_on_where_they_were_with_equal_results(case, disk):
    folder, inputs = case

    async def main():
        options = {"reader": "direct", "reopened_within_seconds": 60.0}
        async with await open_streaming(folder, **options) as model:
            expected = await model.generate(**inputs, **GREEDY)
            requests = [asyncio.create_task(model.generate(**inputs, **GREEDY)) for _ in range(3)]
            late = []
            for _ in range(2):
                began = model.stats().passes
                while model.stats().passes < began + 4:
                    await turns(1)
                disk.broken = True
                await until_failed(model)
                late.append(asyncio.create_task(model.generate(**inputs, **GREEDY)))
                await turns(20)
                disk.broken = False
                await model.reopen()
            for result in await asyncio.gather(*requests, *late):
                assert torch.equal(result, expected)
            assert model.stats().reopened == 2

    with nothing_left_behind():
        run(main())


def test_requests_wait_no_longer_than_they_may(case, disk):
    folder, inputs = case

    async def main():
        options = {"reader": "direct", "reopened_within_seconds": 0.3}
        async with await open_streaming(folder, **options) as model:
            disk.broken = True
            request = asyncio.create_task(model.forward(**inputs))
            await until_failed(model)
            with pytest.raises(LayerstreamError):
                await request
            for _ in range(
                2
            ):  # opening works, reading does not: each time with a new patience of none
                await model.reopen()
                with pytest.raises(LayerstreamError):
                    await model.forward(**inputs)
                await until_failed(model)

    with nothing_left_behind():
        run(main())


def test_a_model_is_closed_while_it_has_failed_or_is_being_reopened(case, disk, monkeypatch):
    folder, inputs = case

    async def main():
        options = {"reader": "direct", "reopened_within_seconds": 60.0}
        async with await open_streaming(folder, **options) as model:
            disk.broken = True
            request = asyncio.create_task(model.forward(**inputs))
            await until_failed(model)
            await model.aclose()
            with pytest.raises(LayerstreamError):
                await request
            disk.broken = False
        async with await open_streaming(folder, **options) as model:
            disk.broken = True
            request = asyncio.create_task(model.forward(**inputs))
            await until_failed(model)
            disk.broken = False
            with Gate() as gate:
                acquire = model._running.stream.pipeline._resources.acquire.__func__
                owner = type(model._running.stream.pipeline._resources)
                monkeypatch.setattr(
                    owner, "acquire", lambda *given, **named: (gate(), acquire(*given, **named))
                )
                reopening = asyncio.create_task(model.reopen())
                await asyncio.to_thread(gate.reached.wait, 20)
                closing = asyncio.create_task(model.aclose())
                await turns(20)
                gate.open()
                with pytest.raises(ClosedError, match="closed while it was being reopened"):
                    await reopening
                await closing
            with pytest.raises(LayerstreamError):
                await request

    with nothing_left_behind():
        run(main())
