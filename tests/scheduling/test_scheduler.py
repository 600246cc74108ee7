"""Concurrent requests share sweeps: what they cost together, and that none disturbs another."""

import asyncio
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.faults import Gate
from support.leaks import nothing_left_behind
from support.loop import happens, run, turns
from support.models import inputs_for, save_model
from support.streaming import open_streaming
from transformers.generation.streamers import BaseStreamer

from layerstream.pipeline import Budget, ClosedError, StreamedModel, Workload, load_streamed
from layerstream.pipeline.modeling.clone import clone_modules

GREEDY = {"max_new_tokens": 8, "do_sample": False}
PROMPTS = [torch.arange(3, 3 + length)[None] for length in (4, 12, 6, 20, 5, 9, 16, 7)]
ROPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
        "max_position_embeddings": 8,
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 12,
            "factor": 4.0,
        },
        "max_position_embeddings": 48,
    },
}


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps wait to start as long as it takes for requests between two steps: what is counted depends on no clock."""
    monkeypatch.setattr("layerstream.pipeline.scheduling.scheduler._PATIENCE_SECONDS", 20.0)


async def streaming(folder: Path) -> StreamedModel:
    """The model in ``folder`` with hardly any memory for weights, and enough for many requests."""
    workload = Workload(batch_size=8, prompt_tokens=32, new_tokens=32)
    return await open_streaming(folder, reader="direct", workload=workload)


def generate_unstreamed(folder: Path, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """What the unstreamed model generates; a new one each time, since a long prompt changes its frequencies."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens: torch.Tensor = reference.generate(input_ids=ids, **{**GREEDY, **options})
    return tokens


class Stalling(BaseStreamer):
    """A streamer whose caller is stuck from its second token on, until a gate opens."""

    def __init__(self, gate: Gate) -> None:
        self._gate, self._puts = gate, 0

    def put(self, _value: torch.Tensor) -> None:
        self._puts += 1
        if self._puts > 2:
            self._gate()

    def end(self) -> None:
        pass


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("rope", ROPES)
def test_eight_requests_take_the_sweeps_and_the_bytes_of_one(rope: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", num_hidden_layers=6, **ROPES[rope])
    expected = [generate_unstreamed(folder, ids) for ids in PROMPTS]

    async def main() -> None:
        async with await streaming(folder) as model:
            await model.generate(input_ids=PROMPTS[0], **GREEDY)
            one = model.stats()
            results = await asyncio.gather(
                *(model.generate(input_ids=ids, **GREEDY) for ids in PROMPTS)
            )
            both = model.stats()
            assert all(map(torch.equal, expected, results))
            assert one.sweeps == 8
            assert both.sweeps - one.sweeps <= 9
            assert both.bytes_read - one.bytes_read <= 1.15 * one.bytes_read
            assert both.passes - one.passes == 64
            assert both.tokens_generated == 9 * 8
            assert both.requests_completed == 9

    with nothing_left_behind():
        run(main())


def test_a_buffer_that_one_clone_changes_is_unchanged_in_another(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", **ROPES["longrope"])
    module = transformers.LlamaForCausalLM.from_pretrained(folder)
    one, other = clone_modules(module), clone_modules(module)
    before = other.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        one(torch.arange(3, 40)[None])  # longrope updates its frequencies in place
    assert not torch.equal(one.model.rotary_emb.inv_freq, before)
    assert torch.equal(other.model.rotary_emb.inv_freq, before)
    assert torch.equal(module.model.rotary_emb.inv_freq, before)
    assert one.model.layers[0].mlp.up_proj.weight is module.model.layers[0].mlp.up_proj.weight


def test_a_request_that_arrives_during_a_sweep_gets_its_first_token_in_the_next_one(
    tmp_path: Path,
) -> None:
    folder = save_model(tmp_path / "model", "llama", num_hidden_layers=6)

    async def main() -> None:
        async with await streaming(folder) as model:
            first = model.stream(input_ids=PROMPTS[0], max_new_tokens=200, do_sample=False)
            await anext(first)
            for _ in range(5):
                before = model.stats().sweeps
                second = model.stream(input_ids=PROMPTS[1], **GREEDY)
                await anext(second)
                # The next, its own, and one that has begun since.
                assert model.stats().sweeps - before <= 3
                await second.aclose()
            await first.aclose()
            assert model.stats().reserved_bytes == 0

    with nothing_left_behind():
        run(main())


def test_a_request_stuck_in_its_callers_code_delays_no_other(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        with Gate() as gate:
            async with await streaming(folder) as model:
                stuck = asyncio.create_task(
                    model.generate(input_ids=PROMPTS[0], **GREEDY, streamer=Stalling(gate))
                )
                await happens(gate.reached)
                result = await model.generate(input_ids=PROMPTS[1], **GREEDY)
                assert torch.equal(result, generate_unstreamed(folder, PROMPTS[1]))
                assert not stuck.done()
                gate.open()
                assert torch.equal(await stuck, generate_unstreamed(folder, PROMPTS[0]))

    with nothing_left_behind():
        run(main())


def test_a_slow_consumer_of_a_stream_delays_no_other_request(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with await streaming(folder) as model:
            slow = model.stream(input_ids=PROMPTS[0], **GREEDY)
            begun = [await anext(slow)]
            await model.generate(input_ids=PROMPTS[1], **{**GREEDY, "max_new_tokens": 20})
            rest = begun + [token async for token in slow]
            assert rest == generate_unstreamed(folder, PROMPTS[0])[0, 4:].tolist()

    run(main())


@pytest.mark.usefixtures("patient")
def test_passes_with_other_routes_share_sweeps_with_those_that_visit_all(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "t5", num_layers=3, num_decoder_layers=3)
    reference = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    prompts = [ids % 97 + 3 for ids in PROMPTS[:5]]
    expected = [reference.generate(input_ids=ids, **GREEDY) for ids in prompts]

    async def main() -> None:
        async with await streaming(folder) as model:
            for _ in range(2):
                results = await asyncio.gather(
                    *(model.generate(input_ids=ids, **GREEDY) for ids in prompts)
                )
                assert all(map(torch.equal, expected, results))

    with nothing_left_behind():
        run(main())


@pytest.mark.usefixtures("patient")
def test_threads_that_share_a_drop_in_share_its_sweeps(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", **ROPES["dynamic"])
    expected = [generate_unstreamed(folder, ids) for ids in PROMPTS[:4]]
    results: dict[int, torch.Tensor] = {}
    with (
        nothing_left_behind(),
        load_streamed(folder, device="cpu", budget=Budget(host="1GiB"), reader="direct") as model,
    ):
        streamed = vars(model)["_layerstream_close"].model
        threads = [
            threading.Thread(
                target=lambda i=i: results.update({i: model.generate(PROMPTS[i], **GREEDY)})
            )
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        # Runs after the calls that the threads have queued on the loop.
        vars(model)["_layerstream_close"]._loop_thread.run(turns())
        stats = streamed.stats()
        assert stats.sweeps < stats.passes == 32
        assert (stats.requests_completed, stats.reserved_bytes) == (4, 0)
    assert all(torch.equal(results[i], expected[i]) for i in range(4))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["sampling", "beam sampling"])
def test_requests_that_sample_use_generators_of_their_own(
    options: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    sampling = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12, **options}
    expected = []
    for seed, ids in enumerate(PROMPTS):
        torch.manual_seed(seed)
        expected.append(generate_unstreamed(folder, ids, **sampling))

    async def main() -> None:
        async with await streaming(folder) as model:
            results = await asyncio.gather(
                *(
                    model.generate(
                        input_ids=ids, generator=torch.Generator().manual_seed(seed), **sampling
                    )
                    for seed, ids in enumerate(PROMPTS)
                )
            )
            assert all(map(torch.equal, expected, results))

    run(main())


# -- life ----------------------------------------------------------------------------------------


def test_a_model_that_drains_finishes_running_requests_and_refuses_new_ones(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with await streaming(folder) as model:
            running = [
                asyncio.create_task(model.generate(input_ids=ids, **GREEDY)) for ids in PROMPTS
            ]
            await asyncio.sleep(0)
            draining = asyncio.create_task(model.drain())
            await asyncio.sleep(0)
            with pytest.raises(ClosedError, match="no more requests"):
                await model.forward(**inputs_for("llama"))
            await draining
            assert all(task.done() for task in running)
            stats = model.stats()
            assert (stats.requests_completed, stats.requests_refused) == (len(PROMPTS), 1)

    with nothing_left_behind():
        run(main())


def test_statistics_count_every_outcome_of_a_request(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with await streaming(folder) as model:
            await model.forward(**inputs_for("llama"))
            with pytest.raises(IndexError):
                await model.forward(input_ids=torch.tensor([[1_000_000]]))
            stream = model.stream(input_ids=PROMPTS[0], max_new_tokens=1000, do_sample=False)
            await anext(stream)
            running = model.stats()
            assert (running.requests_riding, running.requests_waiting) == (1, 0)
            assert 0 < running.reserved_bytes < running.reservable_bytes
            await stream.aclose()
            reported = model.stats().to_dict()
            outcomes = {
                name: reported[f"requests_{name}"] for name in ("completed", "failed", "cancelled")
            }
            assert outcomes == {"completed": 1, "failed": 1, "cancelled": 1}
            assert (reported["requests_started"], reported["requests_riding"]) == (3, 0)
            assert reported["reserved_bytes"] == 0
            assert [stage["name"] for stage in reported["stages"]] == [
                "read",
                "transfer",
                "compute",
            ]
            assert all(0 <= stage["utilisation"] <= 1 for stage in reported["stages"])

    run(main())


def test_memory_of_a_request_is_freed_when_it_ends_without_the_garbage_collector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    clones = []

    def recorded_clone(*args: Any) -> Any:
        clone = clone_modules(*args)
        clones.append(weakref.ref(clone))
        return clone

    monkeypatch.setattr("layerstream.pipeline.scheduling.engine.clone_modules", recorded_clone)

    async def scenario() -> list[bool]:
        async with await streaming(folder) as model:
            gc.disable()
            try:
                for ids in PROMPTS[:3]:
                    await model.generate(input_ids=ids, **GREEDY)
                return [clone() is None for clone in clones]
            finally:
                gc.enable()

    assert run(scenario()) == [True] * 3
