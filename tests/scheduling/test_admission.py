"""Requests reserve their memory before they board: who waits, who is refused, and what comes back."""

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
LONG = {"max_new_tokens": 8000, "do_sample": False}  # takes most of the room of a tiny model
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def asked(admission: Admission, nbytes: int, *, places: int = 1) -> Reservation:
    """A reservation that has been asked for."""
    reservation = Reservation(nbytes, places=places)
    admission.ask(reservation)
    return reservation


# -- the queue -----------------------------------------------------------------------------------


def test_a_small_request_does_not_overtake_a_large_one_that_waits() -> None:
    admission = Admission(memory_bytes=10, places=9)
    first = asked(admission, 6)
    large, small = asked(admission, 8), asked(admission, 1)
    assert (first.done(), large.done(), small.done()) == (True, False, False)
    admission.give_back(first)
    assert (large.done(), small.done()) == (True, True)
    assert (admission.reserved_bytes, admission.waiting) == (9, 0)


def test_who_leaves_the_queue_lets_those_behind_in() -> None:
    admission = Admission(memory_bytes=10, places=9)
    asked(admission, 6)
    large, small = asked(admission, 8), asked(admission, 1)
    admission.give_back(large)
    assert large.cancelled()
    assert small.done()
    assert admission.reserved_bytes == 7


def test_when_there_is_less_who_has_some_keeps_it_and_who_can_never_fit_hears_of_it() -> None:
    admission = Admission(memory_bytes=10, places=9)
    first = asked(admission, 6)
    large, small = asked(admission, 8), asked(admission, 5)
    admission.resize(7)
    assert isinstance(large.exception(timeout=0), AdmissionError)
    assert (admission.reserved_bytes, admission.waiting) == (6, 1)
    admission.resize(11)
    assert small.done()
    admission.give_back(first)
    admission.give_back(large)
    assert admission.reserved_bytes == 5


def test_places_are_waited_for_too() -> None:
    admission = Admission(memory_bytes=10, places=1)
    first, second = asked(admission, 1), asked(admission, 1)
    assert (first.done(), second.done()) == (True, False)
    admission.give_back(first)
    assert second.done()


def test_closing_fails_those_who_wait_and_those_who_come() -> None:
    admission = Admission(memory_bytes=10, places=1)
    asked(admission, 10)
    waiting = asked(admission, 1)
    admission.close("closed")
    for reservation in (waiting, asked(admission, 1)):
        with pytest.raises(ClosedError):
            reservation.result(0)


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 1), st.booleans()), max_size=40))
def test_memory_and_places_never_exceed_what_there_is_and_all_come_back(
    steps: list[tuple[int, int, bool]],
) -> None:
    admission = Admission(memory_bytes=10, places=3)
    alive: list[Reservation] = []
    for nbytes, places, leaves in steps:
        alive.append(asked(admission, nbytes, places=places))
        if leaves:
            admission.give_back(alive.pop(len(alive) // 2))
        granted = [each for each in alive if each.done()]
        assert admission.reserved_bytes == sum(each.nbytes for each in granted) <= 10
        assert sum(each.places for each in granted) <= 3
        # First come, first served: nobody who has it came after somebody who waits.
        assert [each.done() for each in alive] == sorted(
            (each.done() for each in alive), reverse=True
        )
    for each in alive:
        admission.give_back(each)
    assert (admission.reserved_bytes, admission.waiting) == (0, 0)


# -- requests ------------------------------------------------------------------------------------


def test_requests_whose_caches_do_not_fit_together_go_one_after_the_other(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            first = model.stream(input_ids=IDS, **LONG)
            await anext(first)
            second = asyncio.create_task(model.generate(input_ids=IDS, **GREEDY | {"num_beams": 2}))
            large = asyncio.create_task(anext(model.stream(input_ids=IDS, **LONG)))
            await second  # there is room for it beside the first
            await turns()
            stats = model.stats()
            assert (stats.requests_waiting, stats.requests_riding) == (1, 1)
            assert stats.reserved_bytes <= stats.reservable_bytes
            await first.aclose()
            assert isinstance(await large, int)

    with nothing_left_behind():
        run(main())


def test_a_request_that_gives_up_waiting_leaves_the_queue(tmp_path: Path) -> None:
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
def test_what_can_never_fit_is_refused_at_once_with_need_have_and_remedy(
    options: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "llama")

    async def main() -> None:
        async with await open_streaming(folder) as model:
            says = r"generating 1 x \(7 \+ \d+\) tokens needs .* MiB .* there are .* workload or budget"
            with pytest.raises(AdmissionError, match=says):
                await model.generate(input_ids=IDS, **options)
            with pytest.raises(AdmissionError):
                await anext(model.stream(input_ids=IDS, **options))
            stats = model.stats()
            assert (stats.requests_refused, stats.requests_started, stats.sweeps) == (2, 0, 0)

    with nothing_left_behind():
        run(main())


def prices(folder: Path, memory_bytes: int = 1 << 40) -> tuple[Estimator, Any]:
    """What prices the requests of the model in ``folder``, and what the plan reserves by."""
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = module.config.to_dict()
    return Estimator(
        module, config, workload=SMALL, memory=RequestMemory(nbytes=memory_bytes)
    ), config


def test_a_generation_as_large_as_the_workload_takes_what_the_plan_reserves(tmp_path: Path) -> None:
    estimator, config = prices(save_model(tmp_path / "model", "llama"))
    need = estimator.generation((), {"input_ids": torch.ones((1, 8)).long(), **GREEDY})
    assert need.nbytes == workload_bytes(config, SMALL)[0]
    assert (need.sequences, need.prompt_tokens, need.new_tokens) == (1, 8, 8)


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
def test_what_a_generation_is_asked_for_is_priced(
    less: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    estimator, _ = prices(save_model(tmp_path / "model", "llama"))

    def price(options: dict[str, Any]) -> int:
        return estimator.generation((IDS,), options).nbytes

    assert price(less) < price(more)


def test_inputs_that_are_no_tokens_are_taken_for_a_workload_and_never_refused(
    tmp_path: Path,
) -> None:
    folder = save_model(tmp_path / "model", "vit")
    module = transformers.ViTForImageClassification.from_pretrained(folder)
    config = module.config.to_dict()
    reserved = workload_bytes(config, SMALL)[0]
    estimator = Estimator(module, config, workload=SMALL, memory=RequestMemory(nbytes=reserved))
    for images in (1, 5):
        need = estimator.forward((torch.ones((images, 3, 32, 32)),), {})
        assert need.nbytes == reserved


# -- long prompts --------------------------------------------------------------------------------


def test_a_long_prompt_is_read_in_pieces_only_where_its_activations_would_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerstream.pipeline.scheduling.request_memory._SMALL_CHANGE_BYTES", 0)
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


# -- the drop-in ---------------------------------------------------------------------------------


def test_the_drop_in_accounts_its_own_generate_and_forward(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    seen: list[int] = []
    with (
        nothing_left_behind(),
        load_streamed(folder, device="cpu", budget=Budget(host="64MiB")) as model,
    ):
        streamed = vars(model)["_layerstream_close"].model

        def look(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(streamed._engine.requests._admission.reserved_bytes)
            return scores

        model.generate(IDS, **GREEDY, logits_processor=[look])
        assert set(seen) == {streamed._engine._estimator.generation((IDS,), GREEDY).nbytes}
        model(IDS)
        with pytest.raises(AdmissionError, match="a forward pass over 4000 x 4000 tokens"):
            model(torch.ones((4000, 4000), dtype=torch.long))
        with pytest.raises(AdmissionError):
            model.generate(IDS, max_new_tokens=10_000_000)
        assert model(IDS).logits.isfinite().all()
        # What this thread has told the loop of the pass's end is heard before this.
        vars(model)["_layerstream_close"]._host.run(turns())
        assert streamed.stats().reserved_bytes == 0
