"""Requests that end early or fail leave the streamed model usable, and nothing behind."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.faults import Gate
from support.leaks import nothing_left_behind
from support.loop import run, turns
from support.models import inputs_for, save_model
from support.streaming import open_streaming

from layerstream.pipeline import (
    CheckpointError,
    ClosedError,
)

GREEDY = {"max_new_tokens": 8, "do_sample": False}


def test_a_stream_that_is_closed_early_ends_its_generation(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            stream = model.stream(**inputs, max_new_tokens=10_000, do_sample=False)
            assert isinstance(await anext(stream), int)
            await stream.aclose()
            assert torch.is_tensor(await model.generate(**inputs, **GREEDY))

    with nothing_left_behind():
        run(main())


def test_a_cancelled_request_ends_and_the_next_one_is_served(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            for _ in range(20):
                request = asyncio.create_task(
                    model.generate(**inputs, max_new_tokens=10_000, do_sample=False)
                )
                await asyncio.sleep(0)
                request.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await request
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await model.generate(**inputs, max_new_tokens=10_000, do_sample=False)
            assert (await model.forward(**inputs)).logits.isfinite().all()

    with nothing_left_behind():
        run(main())


def test_a_read_that_hangs_is_among_the_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    preadv = os.preadv

    async def main() -> None:
        async with await open_streaming(folder, hanging_read_seconds=0.01) as model:
            with Gate() as gate:
                monkeypatch.setattr(os, "preadv", lambda *given: gate() or preadv(*given))
                request = asyncio.create_task(model.generate(**inputs_for("llama"), **GREEDY))
                while not (hanging := model.stats().hanging_reads):
                    await turns(1)
                assert {Path(read.path).parent for read in hanging} == {folder}
                assert model.stats().to_dict()["hanging_reads"][0]["seconds"] > 0
                gate.open()
                await request
            assert model.stats().hanging_reads == ()

    with nothing_left_behind():
        run(main())


def test_closing_the_model_fails_running_requests(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            stream = model.stream(**inputs, max_new_tokens=10_000, do_sample=False)
            await anext(stream)
            await model.aclose()
            with pytest.raises(ClosedError):
                [token async for token in stream]
        with pytest.raises(ClosedError):
            await model.forward(**inputs)

    with nothing_left_behind():
        run(main())


def test_an_error_of_the_model_itself_reaches_its_caller_alone(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            with pytest.raises(IndexError):
                await model.forward(input_ids=torch.tensor([[1_000_000]]))
            with pytest.raises(ValueError, match="input_ids"):
                await model.forward()
            assert (await model.forward(**inputs)).logits.isfinite().all()

    with nothing_left_behind():
        run(main())


@pytest.mark.filterwarnings("ignore:module forward hook")  # torch warns of the second error
def test_a_device_that_fails_while_a_batch_is_released_does_not_block_the_next_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    inputs = inputs_for("llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            device, calls = model.engine._device, 0
            record = device.record

            def failing(stream: object = None) -> Any:
                nonlocal calls
                calls += 1
                if calls > 1:  # the first is that of binding
                    raise RuntimeError("the device has failed")
                return record(stream)

            monkeypatch.setattr(device, "record", failing)
            with pytest.raises(RuntimeError, match="the device has failed"):
                await model.forward(**inputs)
            monkeypatch.undo()
            assert (await model.forward(**inputs)).logits.isfinite().all()

    run(main())


def test_a_failed_read_reaches_every_request(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", num_hidden_layers=6)
    inputs = inputs_for("llama")

    async def main() -> None:
        async with await open_streaming(folder, reader="direct") as model:
            await model.forward(**inputs)
            with (folder / "model.safetensors").open("r+b") as file:
                file.truncate(20_000)

            async def serve() -> None:
                for _ in range(3):  # what was read ahead may still serve the first
                    await model.forward(**inputs)

            with pytest.raises(CheckpointError, match=r"model\.safetensors.*(changed|shrunk)"):
                await serve()

    with nothing_left_behind():
        run(main())
