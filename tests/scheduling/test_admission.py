"""Requests reserve their memory before they begin: which wait, which are refused, and what is freed."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from support.leaks import nothing_left_behind
from support.loop import run, turns
from support.models import save_model
from support.streaming import SMALL, open_streaming

from layerstream.pipeline import AdmissionError, Budget, ClosedError, Workload, load_streamed
from layerstream.pipeline.planning.workload_memory import workload_bytes
from layerstream.pipeline.scheduling.admission import Admission, Reservation
from layerstream.pipeline.scheduling.request_cost import Estimator
from layerstream.pipeline.scheduling.request_memory import RequestMemory

IDS = torch.arange(3, 10)[None]
LONG = {
    "max_new_tokens": 8000,
    "do_sample": False,
}  # takes most of the request memory of a tiny model
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def enqueue(admission: Admission, nbytes: int, *, threads: int = 1) -> Reservation:
    """A reservation that is granted or waits in the queue."""
    reservation = Reservation(RequestMemory(shared_bytes=nbytes), threads=threads)
    admission.enqueue(reservation)
    return reservation


# -- the queue -----------------------------------------------------------------------------------


def test_a_small_request_does_not_overtake_a_large_one_that_waits() -> None:
    admission = Admission(memory=RequestMemory(shared_bytes=10), threads=9)
    first = enqueue(admission, 6)
    large, small = enqueue(admission, 8), enqueue(admission, 1)
    assert (first.done(), large.done(), small.done()) == (True, False, False)
    admission.release(first)
    assert (large.done(), small.done()) == (True, True)
    assert (admission.reserved.nbytes, admission.waiting) == (9, 0)


def test_a_request_that_leaves_the_queue_lets_those_behind_it_begin() -> None:
    admission = Admission(memory=RequestMemory(shared_bytes=10), threads=9)
    enqueue(admission, 6)
    large, small = enqueue(admission, 8), enqueue(admission, 1)
    admission.release(large)
    assert large.cancelled()
    assert small.done()
    assert admission.reserved.nbytes == 7


def test_with_less_memory_granted_requests_keep_theirs_and_those_that_can_never_fit_fail() -> None:
    admission = Admission(memory=RequestMemory(shared_bytes=10), threads=9)
    first = enqueue(admission, 6)
    large, small = enqueue(admission, 8), enqueue(admission, 5)
    admission.resize(RequestMemory(shared_bytes=7))
    assert isinstance(large.exception(timeout=0), AdmissionError)
    assert (admission.reserved.nbytes, admission.waiting) == (6, 1)
    admission.resize(RequestMemory(shared_bytes=11))
    assert small.done()
    admission.release(first)
    admission.release(large)
    assert admission.reserved.nbytes == 5


def test_requests_wait_for_worker_threads_too() -> None:
    admission = Admission(memory=RequestMemory(shared_bytes=10), threads=1)
    first, second = enqueue(admission, 1), enqueue(admission, 1)
    assert (first.done(), second.done()) == (True, False)
    admission.release(first)
    assert second.done()


def test_closing_fails_waiting_requests_and_new_ones() -> None:
    admission = Admission(memory=RequestMemory(shared_bytes=10), threads=1)
    enqueue(admission, 10)
    waiting = enqueue(admission, 1)
    admission.close("closed")
    for reservation in (waiting, enqueue(admission, 1)):
        with pytest.raises(ClosedError):
            reservation.result(0)


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 1), st.booleans()), max_size=40))
def test_memory_and_threads_are_never_exceeded_and_all_are_freed(
    steps: list[tuple[int, int, bool]],
) -> None:
    admission = Admission(memory=RequestMemory(shared_bytes=10), threads=3)
    active: list[Reservation] = []
    for nbytes, threads, leaves in steps:
        active.append(enqueue(admission, nbytes, threads=threads))
        if leaves:
            admission.release(active.pop(len(active) // 2))
        granted = [each for each in active if each.done()]
        assert admission.reserved.nbytes == sum(each.memory.nbytes for each in granted) <= 10
        assert sum(each.threads for each in granted) <= 3
        # First come, first served: no request that is granted came after one that waits.
        assert [each.done() for each in active] == sorted(
            (each.done() for each in active), reverse=True
        )
    for each in active:
        admission.release(each)
    assert (admission.reserved.nbytes, admission.waiting) == (0, 0)


# -- requests ------------------------------------------------------------------------------------


def test_requests_whose_caches_do_not_fit_together_run_one_after_the_other(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            first = model.stream(input_ids=IDS, **LONG)
            await anext(first)
            second = asyncio.create_task(model.generate(input_ids=IDS, **GREEDY | {"num_beams": 2}))
            large = asyncio.create_task(anext(model.stream(input_ids=IDS, **LONG)))
            await second  # there is memory for it and the first
            await turns()
            stats = model.stats()
            assert (stats.requests_waiting, stats.requests_riding) == (1, 1)
            assert stats.reserved_bytes <= stats.reservable_bytes
            await first.aclose()
            assert isinstance(await large, int)

    with nothing_left_behind():
        run(main())


def test_a_request_that_is_cancelled_while_it_waits_leaves_the_queue(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            first = model.stream(input_ids=IDS, **LONG)
            await anext(first)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await model.generate(input_ids=IDS, **LONG)
            assert model.stats().requests_waiting == 0
            assert model.stats().requests_cancelled == 1
            await model.generate(input_ids=IDS, **GREEDY)
            await first.aclose()

    with nothing_left_behind():
        run(main())


def test_closing_the_model_fails_requests_that_wait_for_memory(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            first = model.stream(input_ids=IDS, **LONG)
            await anext(first)
            waiting = asyncio.create_task(model.generate(input_ids=IDS, **LONG))
            await turns()
            await model.aclose()
            with pytest.raises(ClosedError, match="before this request's turn"):
                await waiting
            with pytest.raises(ClosedError):
                [token async for token in first]

    with nothing_left_behind():
        run(main())


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 100_000}, {"max_length": 100_000}, {**LONG, "num_beams": 3}],
    ids=["tokens", "length", "beams"],
)
def test_a_request_that_can_never_fit_is_refused_at_once_with_need_have_and_remedy(
    options: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            message = r"generating 1 x \(7 \+ \d+\) tokens needs .* MiB .* there are .* workload or budget"
            with pytest.raises(AdmissionError, match=message):
                await model.generate(input_ids=IDS, **options)
            with pytest.raises(AdmissionError):
                await anext(model.stream(input_ids=IDS, **options))
            stats = model.stats()
            assert (stats.requests_refused, stats.requests_started, stats.sweeps) == (2, 0, 0)

    with nothing_left_behind():
        run(main())


def estimator_for(folder: Path, memory_bytes: int = 1 << 40) -> tuple[Estimator, Any]:
    """The estimator for the model in ``folder``, and the model's config."""
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = module.config.to_dict()
    return Estimator(
        module, config, workload=SMALL, memory=RequestMemory(shared_bytes=memory_bytes)
    ), config


def test_a_generation_as_large_as_the_workload_takes_what_the_plan_reserves(tmp_path: Path) -> None:
    estimator, config = estimator_for(save_model(tmp_path / "model", "llama"))
    cost = estimator.generation((), {"input_ids": torch.ones((1, 8)).long(), **GREEDY})
    assert cost.memory.nbytes == workload_bytes(config, SMALL)[0]
    assert (cost.sequences, cost.prompt_tokens, cost.new_tokens) == (1, 8, 8)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"max_new_tokens": 8}, {"max_new_tokens": 9}),
        ({"max_new_tokens": 8}, {"max_length": 100}),
        ({"max_new_tokens": 8}, {}),  # transformers' own default is 20
        ({"num_beams": 2}, {"num_beams": 3}),
        ({}, {"num_return_sequences": 2, "do_sample": True}),
        ({}, {"guidance_scale": 1.5}),
        ({}, {"use_cache": False}),
        ({}, {"output_scores": True}),
        ({}, {"prompt_lookup_num_tokens": 40}),
        ({}, {"generation_config": transformers.GenerationConfig(max_new_tokens=100)}),
    ],
    ids=str,
)
def test_the_options_of_a_generation_are_in_its_estimate(
    less: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    estimator, _ = estimator_for(save_model(tmp_path / "model", "llama"))

    def estimate(options: dict[str, Any]) -> int:
        return estimator.generation((IDS,), options).memory.nbytes

    assert estimate(less) < estimate(more)


def test_the_states_of_all_layers_are_in_the_estimate_of_a_pass_that_keeps_them(
    tmp_path: Path,
) -> None:
    folder = save_model(tmp_path / "model", "llama")
    estimator, config = estimator_for(folder)
    plain, keeping = (
        estimator.forward((IDS,), {"output_hidden_states": keep}).memory.nbytes
        for keep in (False, True)
    )
    item_bytes = transformers.AutoModelForCausalLM.from_pretrained(folder).dtype.itemsize
    states = (config["num_hidden_layers"] + 1) * config["hidden_size"] * item_bytes
    assert keeping - plain == IDS.shape[1] * states


def test_inputs_that_are_not_tokens_count_as_a_workload_and_are_never_refused(
    tmp_path: Path,
) -> None:
    folder = save_model(tmp_path / "model", "vit")
    module = transformers.ViTForImageClassification.from_pretrained(folder)
    config = module.config.to_dict()
    reserved = workload_bytes(config, SMALL)[0]
    estimator = Estimator(
        module, config, workload=SMALL, memory=RequestMemory(shared_bytes=reserved)
    )
    for images in (1, 5):
        cost = estimator.forward((torch.ones((images, 3, 32, 32)),), {})
        assert cost.memory.nbytes == reserved


def test_attention_with_sinks_reserves_all_scores(tmp_path: Path) -> None:
    estimator, config = estimator_for(save_model(tmp_path / "model", "gpt-oss"))
    cost = estimator.forward((torch.ones((1, 512)).long(),), {})
    assert cost.memory.nbytes > 3 * config["num_attention_heads"] * 512 * 512 * 4


# -- long prompts --------------------------------------------------------------------------------


def test_a_long_prompt_is_processed_in_pieces_only_if_its_activations_would_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerstream.pipeline.scheduling.request_memory._MINIMUM_BYTES", 0)
    folder = save_model(tmp_path / "model", "llama", intermediate_size=256)
    prompt = torch.arange(600)[None] % 97 + 3
    reference = transformers.LlamaForCausalLM.from_pretrained(folder)
    expected = reference.generate(input_ids=prompt, **GREEDY)

    async def generated(workload: Workload) -> tuple[torch.Tensor, Any]:
        async with await open_streaming(folder, workload=workload, reader="direct") as model:
            result = await model.generate(input_ids=prompt, **GREEDY)
            return result, model.stats()

    whole, stats = run(generated(Workload(prompt_tokens=600, new_tokens=8)))
    assert torch.equal(whole, expected)
    assert (stats.prompts_chunked, stats.passes) == (0, 8)
    pieces, stats = run(generated(Workload(prompt_tokens=200, new_tokens=700)))
    assert torch.equal(pieces, expected)
    assert stats.prompts_chunked == 1
    assert stats.passes > 8


def test_a_prompt_in_pieces_keeps_what_libraries_take_for_one_piece(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", torch_dtype="float32")
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = module.config.to_dict() | {"dtype": "float32"}
    memory = RequestMemory(shared_bytes=1 << 40)
    beside, alone = (
        Estimator(module, config, workload=SMALL, memory=memory, on_cpu=on_cpu)
        for on_cpu in (True, False)
    )

    def kept(**options: Any) -> int:
        prompt = {"input_ids": torch.ones((1, 600)).long(), **GREEDY, **options}
        return (
            beside.generation((), prompt).memory.nbytes - alone.generation((), prompt).memory.nbytes
        )

    assert kept(prefill_chunk_size=64) < kept()


# -- the drop-in ---------------------------------------------------------------------------------


def test_the_drop_in_reserves_memory_for_generate_and_forward(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    seen: list[int] = []
    with (
        nothing_left_behind(),
        load_streamed(folder, device="cpu", budget=Budget(host="64MiB")) as model,
    ):
        streamed = vars(model)["_layerstream_close"].model

        def record(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(streamed.engine.requests._admission.reserved.nbytes)
            return scores

        model.generate(IDS, **GREEDY, logits_processor=[record])
        assert set(seen) == {streamed.engine._estimator.generation((IDS,), GREEDY).memory.nbytes}
        model(IDS)
        with pytest.raises(AdmissionError, match="a forward pass over 4000 x 4000 tokens"):
            model(torch.ones((4000, 4000), dtype=torch.long))
        with pytest.raises(AdmissionError):
            model.generate(IDS, max_new_tokens=10_000_000)
        assert model(IDS).logits.isfinite().all()
        # Runs after the call that this thread has queued on the loop.
        vars(model)["_layerstream_close"]._loop_thread.run(turns())
        assert streamed.stats().reserved_bytes == 0
