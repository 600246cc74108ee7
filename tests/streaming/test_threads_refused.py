"""A system that starts no more threads: what has begun goes on, what has not is refused, and all is closed."""

import asyncio
import gc
import threading

import pytest
import torch
from support.leaks import nothing_left_behind
from support.loop import run, turns
from support.models import inputs_for, save_model
from support.streaming import SMALL

from layerstream.pipeline import DeviceError, StreamedModel, load_streamed


class Starts:
    """Counts the threads that are started, and refuses all after the first ``allowed``."""

    def __init__(self, monkeypatch, allowed):
        self.allowed, self.refused = allowed, 0
        works = threading.Thread.start

        def start(thread):
            if thread.name.startswith("layerstream"):
                if self.allowed <= 0:
                    self.refused += 1
                    raise RuntimeError("can't start new thread")
                self.allowed -= 1
            works(thread)

        monkeypatch.setattr(threading.Thread, "start", start)


def test_without_more_threads_opening_is_refused_and_what_is_open_can_be_used_and_closed(
    tmp_path, monkeypatch
):
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")
    outcomes = []

    async def with_threads(allowed):
        """Open, use and close a model while the system starts so many threads; whether it refused any."""
        with monkeypatch.context() as patch:
            starts = Starts(patch, allowed)
            model = StreamedModel.open(
                folder, device="cpu", workload=SMALL, measure=False, max_requests=3
            )
            try:
                async with model:
                    outcomes.append("opened")
                    requests = [model.forward(**inputs) for _ in range(4)]
                    for result in await asyncio.gather(*requests):
                        assert result.logits.isfinite().all()
            except DeviceError as error:
                outcomes.append("refused" if "refuses a thread" in str(error) else str(error))
            await model.aclose()
            return starts.refused

    run(with_threads(1000))  # what is loaded once for the process
    with nothing_left_behind():
        allowed = 0
        while run(with_threads(allowed)):
            allowed += 1
    assert {*outcomes} == {"opened", "refused"}


def test_a_drop_in_without_a_thread_for_its_loop_is_refused(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model", "llama")
    Starts(monkeypatch, 0)
    with nothing_left_behind(), pytest.raises(DeviceError, match="refuses a thread"):
        load_streamed(folder, device="cpu")


def test_a_request_that_is_cancelled_twice_reports_nothing_to_the_loop(tmp_path):
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")

    async def main():
        reported = []
        asyncio.get_running_loop().set_exception_handler(lambda _, about: reported.append(about))
        async with StreamedModel.open(folder, device="cpu", workload=SMALL, measure=False) as model:
            for _ in range(4):
                begun = model.stats().passes
                options = {"max_new_tokens": 10_000, "do_sample": False}
                request = asyncio.create_task(model.generate(**inputs, **options))
                while model.stats().passes == begun:
                    await turns(1)
                request.cancel()
                await asyncio.sleep(0)
                request.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await request
                del request
                gc.collect()
            assert torch.is_tensor(await model.generate(**inputs, max_new_tokens=2))
        assert reported == []

    with nothing_left_behind():
        run(main())
