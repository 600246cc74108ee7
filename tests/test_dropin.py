"""The module of a streamed model, called directly: how its passes are counted, and what memory they reserve."""

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.faults import Gate
from support.leaks import nothing_left_behind
from support.loop import happens, run, turns
from support.models import CACHE, save_model
from support.streaming import open_streaming

from layerstream.pipeline import AdmissionError, Budget, ClosedError, StreamedModel, load_streamed

IDS = torch.arange(3, 10)[None]
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def stopping_at(gate: Gate, module: Any) -> None:
    """Have the next pass over ``module`` stop in its last layer until ``gate`` opens."""

    def stop(*_: Any) -> None:
        handle.remove()
        gate()

    handle = module.model.layers[-1].register_forward_hook(stop)


async def while_a_pass_stops(model: StreamedModel, gate: Gate) -> asyncio.Task[Any]:
    """A task that calls the module itself in a thread, stopped in the middle of the pass."""
    stopping_at(gate, model.module)
    calling = asyncio.create_task(asyncio.to_thread(model.module, IDS))
    await happens(gate.reached)
    return calling


def test_a_pass_without_a_request_is_counted_as_one(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        with Gate() as gate:
            async with await open_streaming(folder) as model:
                calling = await while_a_pass_stops(model, gate)
                running = model.stats()
                assert (running.requests_riding, running.requests_started) == (1, 1)
                assert running.reserved_bytes > 0
                gate.open()
                await calling
                with pytest.raises(IndexError):
                    await asyncio.to_thread(model.module, torch.tensor([[1_000_000]]))
                with pytest.raises(AdmissionError):
                    await asyncio.to_thread(model.module, torch.ones((4000, 4000)).long())
                await turns()
                stats = model.stats()
                assert (stats.requests_riding, stats.reserved_bytes) == (0, 0)
                assert (stats.requests_completed, stats.requests_failed) == (1, 1)
                assert stats.requests_refused == 1

    with nothing_left_behind():
        run(main())


def test_the_end_of_a_request_is_logged_as_info_and_that_of_a_single_pass_as_debug(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    caplog.set_level(logging.DEBUG, logger="layerstream")
    with load_streamed(folder, device="cpu", budget=Budget(host="64MiB")) as model:
        model(IDS)
        model.generate(IDS, **GREEDY)
        vars(model)["_layerstream_close"]._loop_thread.run(
            turns()
        )  # after the calls that report the ends
    ends = [each for each in caplog.records if hasattr(each, "outcome")]
    assert [each.levelname for each in ends] == ["DEBUG", "INFO"]
    assert [each.getMessage().split(":")[0] for each in ends] == [
        "request 1 (forward) completed",
        "request 2 (generate) completed",
    ]


def test_draining_waits_for_a_pass_without_a_request_and_refuses_new_ones(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    expected = transformers.LlamaForCausalLM.from_pretrained(folder)(IDS).logits

    async def main() -> None:
        with Gate() as gate:
            async with await open_streaming(folder) as model:
                calling = await while_a_pass_stops(model, gate)
                draining = asyncio.create_task(model.drain())
                await turns()
                assert not draining.done()
                with pytest.raises(ClosedError, match="no more requests"):
                    await asyncio.to_thread(model.module, IDS)
                gate.open()
                await draining
                assert torch.equal((await calling).logits, expected)

    with nothing_left_behind():
        run(main())


def test_no_sweep_waits_for_a_pass_that_waits_for_its_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("layerstream.pipeline.scheduling.scheduler._PATIENCE_SECONDS", 1000.0)
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            with model.engine.passes.turn:  # as if another thread were in a long pass
                calling = asyncio.create_task(asyncio.to_thread(model.module, IDS))
                while not model.stats().requests_started:
                    await turns()
                await model.forward(IDS)
            await calling

    with nothing_left_behind():
        run(main())


def test_a_request_of_a_thread_that_is_made_during_the_drain_is_refused_or_waited_for(
    tmp_path: Path,
) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            engine = model.engine
            estimate, gate = engine._estimator.forward, Gate()

            def estimate_slowly(*arguments: Any) -> Any:
                cost = estimate(*arguments)
                gate()
                return cost

            engine._estimator.forward = estimate_slowly  # type: ignore[method-assign]
            with gate:
                calling = asyncio.create_task(asyncio.to_thread(model.module, IDS))
                await happens(gate.reached)  # it was made before the drain, and is not queued yet
                await model.drain()
                gate.open()
                with pytest.raises(ClosedError, match="no more requests"):
                    await calling

    with nothing_left_behind():
        run(main())


def test_a_cache_that_the_caller_keeps_between_passes_counts_only_while_a_pass_runs(
    tmp_path: Path,
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    reference = transformers.LlamaForCausalLM.from_pretrained(folder)
    expected = reference.generate(IDS, **GREEDY)

    async def main() -> None:
        async with await open_streaming(folder) as model:
            estimate = model.engine._estimator.forward
            ids, past = IDS, None
            for _ in range(8):
                new = ids if past is None else ids[:, -1:]
                output = await asyncio.to_thread(model.module, new, use_cache=True, **{CACHE: past})
                await turns()
                assert model.stats().reserved_bytes == 0
                if past is not None:
                    cache = {CACHE: past}
                    assert (
                        estimate((new,), cache).memory.nbytes > estimate((new,), {}).memory.nbytes
                    )
                past = output[CACHE]
                ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
            assert torch.equal(ids, expected)

    with nothing_left_behind():
        run(main())


def test_a_request_admitted_after_its_threads_are_closed_raises_that_the_model_was_closed(
    tmp_path: Path,
) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            model.engine.threads.close()
            with pytest.raises(ClosedError, match="closed before this request's turn"):
                await model.forward(IDS)
            assert model.stats().reserved_bytes == 0

    with nothing_left_behind():
        run(main())


def test_threads_that_call_a_drop_in_while_it_is_closed_all_end(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    for _ in range(5):
        model = load_streamed(folder, device="cpu", budget=Budget(host="64MiB"))
        ends: list[BaseException | None] = []
        begun = threading.Semaphore(0)

        def call(model: Any = model, ends: Any = ends, begun: Any = begun) -> None:
            try:
                while True:
                    model(IDS)
                    begun.release()
                    model.generate(IDS, **GREEDY)
            except ClosedError as error:
                ends.append(error)

        threads = [threading.Thread(target=call, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert begun.acquire(timeout=20)
        model.close()
        for thread in threads:
            thread.join(20)
        assert len(ends) == 3
