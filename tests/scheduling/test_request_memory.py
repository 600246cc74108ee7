"""With KV caches in host RAM, requests take from two memories, and neither is exceeded."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import GPU
from support.gpu_models import wide_model
from support.gpus import StandIn
from support.loop import run
from support.plans import plan_of

from layerstream.pipeline import AdmissionError, Budget, Plan, StreamedModel, Workload
from layerstream.pipeline.modeling.host_kv_cache import with_host_cache
from layerstream.pipeline.scheduling.admission import Admission, Reservation
from layerstream.pipeline.scheduling.request_cost import Estimator, RequestCost
from layerstream.pipeline.scheduling.request_memory import RequestMemory, request_memory_of

MIB = 1 << 20
CONFIG = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 4096,
    "vocab_size": 1000,
    "dtype": "bfloat16",
}
WORKLOAD = Workload(batch_size=16, prompt_tokens=64, new_tokens=1000)
CACHE_BYTES_PER_TOKEN = 2 * 8 * 1024 * 2  # keys and values, layers, width, bytes
ONE_SEQUENCE = {"max_new_tokens": 1000, "do_sample": False}


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan with a KV cache that VRAM cannot hold."""
    sizes = [2 * MIB, *[4 * MIB] * 8, 2 * MIB]
    made = plan_of(sizes, GPU, config=CONFIG, workload=WORKLOAD, host=620 * MIB, vram=420 * MIB)
    assert made.kv_cache_on_host
    return made


@pytest.fixture(scope="module")
def module() -> Any:
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))


@pytest.fixture
def estimator(plan: Plan, module: Any) -> Estimator:
    config = module.config.to_dict() | CONFIG
    return Estimator(
        module,
        config,
        workload=WORKLOAD,
        memory=request_memory_of(plan, module, config),
        plan=plan,
    )


def cost_of(
    estimator: Estimator, module: Any, what: str, tokens: int, rows: int = 1, **named: Any
) -> RequestCost:
    """The cost of such a call with the cache that it would get."""
    named = with_host_cache(module, what, (torch.ones((rows, tokens)).long(),), named)
    ids = torch.ones((rows, tokens)).long()
    cost: RequestCost = (estimator.generation if what == "generate" else estimator.forward)(
        (ids,), named
    )
    return cost


def memory_of(cache: int, shared: int) -> RequestMemory:
    return RequestMemory(cache_bytes=cache, shared_bytes=shared)


@given(
    st.builds(memory_of, st.integers(1, 100), st.integers(1, 100)),
    st.lists(st.builds(memory_of, st.integers(0, 60), st.integers(0, 60)), max_size=12),
)
def test_either_memory_is_granted_to_the_last_byte_and_never_exceeded(
    memory: RequestMemory, requests: list[RequestMemory]
) -> None:
    admission = Admission(memory=memory, threads=len(requests))
    reservations = [Reservation(needed, threads=1) for needed in requests if needed.fits(memory)]
    for reservation in reservations:
        admission.enqueue(reservation)
    granted = [each.memory for each in reservations if each.done()]
    reserved = memory_of(
        sum(each.cache_bytes for each in granted), sum(each.shared_bytes for each in granted)
    )
    assert admission.reserved == reserved
    assert reserved.fits(memory)
    if len(granted) < len(reservations):
        assert not reserved.plus(reservations[len(granted)].memory).fits(memory)
    for reservation in reservations:
        admission.release(reservation)
    assert admission.reserved == RequestMemory()


def test_a_request_with_a_large_cache_and_one_with_large_activations_run_at_once(
    plan: Plan, module: Any, estimator: Estimator
) -> None:
    memory = request_memory_of(plan, module, CONFIG)
    tokens = 9 * memory.cache_bytes // (10 * CACHE_BYTES_PER_TOKEN)
    caching = cost_of(
        estimator, module, "generate", 64, **ONE_SEQUENCE | {"max_new_tokens": tokens}
    ).memory
    computing = cost_of(estimator, module, "forward", 2000, use_cache=False).memory
    assert caching.cache_bytes >= 0.9 * memory.cache_bytes
    assert computing.shared_bytes > 0.3 * memory.shared_bytes
    # The larger one of the shares of either memory was reserved in both.
    assert caching.share_of(memory) + computing.share_of(memory) > memory.nbytes
    admission = Admission(memory=memory, threads=2)
    reservations = [Reservation(needed, threads=1) for needed in (caching, computing)]
    for reservation in reservations:
        admission.enqueue(reservation)
    assert all(reservation.done() for reservation in reservations)


@given(
    st.builds(memory_of, st.integers(1, 100), st.integers(1, 100)),
    st.builds(memory_of, st.integers(0, 120), st.integers(0, 120)),
    st.integers(1, 5),
)
def test_so_many_requests_fit_as_their_shares_say(
    memory: RequestMemory, needed: RequestMemory, count: int
) -> None:
    all_needed = memory_of(count * needed.cache_bytes, count * needed.shared_bytes)
    if count * needed.share_of(memory) <= memory.nbytes:
        assert all_needed.fits(memory)
    if count == 1:
        assert (needed.share_of(memory) <= memory.nbytes) == needed.fits(memory)


def test_a_workload_takes_all_the_memory_reserved_for_it(
    plan: Plan, module: Any, estimator: Estimator
) -> None:
    whole = cost_of(estimator, module, "generate", 64, rows=16, **ONE_SEQUENCE).memory
    assert whole.cache_bytes == pytest.approx(plan.kv_cache_bytes, rel=0.001)
    assert plan.kv_cache_device_bytes  # the layers of the cache that compute are in VRAM
    in_vram = plan.workload_bytes - plan.kv_cache_bytes + plan.kv_cache_device_bytes
    assert whole.shared_bytes == pytest.approx(in_vram, rel=0.001)
    assert whole.fits(request_memory_of(plan, module, CONFIG))
    one = cost_of(estimator, module, "generate", 64, **ONE_SEQUENCE).memory
    assert 16 * one.cache_bytes == pytest.approx(plan.kv_cache_bytes, rel=0.01)


def test_activations_that_vram_cannot_hold_are_refused_however_much_host_ram_is_free(
    plan: Plan, module: Any, estimator: Estimator
) -> None:
    message = r"8000 tokens needs (\d+) MiB of VRAM for .* there, but there are (\d+) MiB for"
    with pytest.raises(AdmissionError, match=message) as refused:
        cost_of(estimator, module, "forward", 8000)
    found = re.search(message, str(refused.value))
    assert found is not None
    need, have = map(int, found.groups())
    memory = request_memory_of(plan, module, CONFIG)
    assert have == memory.shared_bytes // MIB < need
    assert need * MIB < memory.nbytes


def test_a_cache_that_does_not_fit_the_host_is_refused(module: Any, estimator: Estimator) -> None:
    with pytest.raises(
        AdmissionError, match=r"needs .* of host RAM for its KV cache, but there are"
    ):
        cost_of(estimator, module, "generate", 64, **ONE_SEQUENCE | {"max_new_tokens": 20_000})


def test_a_long_prompt_is_processed_in_pieces_that_vram_can_hold(
    plan: Plan, module: Any, estimator: Estimator
) -> None:
    cost = cost_of(estimator, module, "generate", 6000, **ONE_SEQUENCE)
    assert cost.chunk_tokens is not None
    assert cost.memory.fits(request_memory_of(plan, module, CONFIG))


@pytest.mark.parametrize(
    "named",
    [
        {"cache_implementation": "static"},
        {"cache": transformers.DynamicCache()},
        {"past_key_values": transformers.DynamicCache()},
        {"guidance_scale": 1.5},
    ],
    ids=lambda named: next(iter(named)),
)
def test_a_cache_that_is_in_vram_is_counted_there(
    module: Any, estimator: Estimator, named: dict[str, Any]
) -> None:
    step = cost_of(estimator, module, "generate", 64, **ONE_SEQUENCE).step_bytes
    cache = 2 * 8 * 1024 * 2 * 1064
    in_vram = cost_of(estimator, module, "generate", 64, **ONE_SEQUENCE, **named)
    assert in_vram.step_bytes >= step + cache * 6 // 8  # of one in host RAM, two layers are in VRAM


def test_a_pass_that_keeps_no_cache_takes_no_memory_for_one(
    module: Any, estimator: Estimator
) -> None:
    without = cost_of(estimator, module, "forward", 1000, use_cache=False)
    in_vram = {"past_key_values": transformers.DynamicCache()}
    assert (
        without.memory.nbytes < cost_of(estimator, module, "forward", 1000, **in_vram).memory.nbytes
    )


@pytest.mark.parametrize("what", ["forward", "generate"])
def test_a_cache_is_priced_alike_under_each_of_its_names(
    module: Any, estimator: Estimator, what: str
) -> None:
    cache = transformers.DynamicCache()
    cache.update(*torch.empty((2, 1, 8, 500, 128), device="meta"), 0)
    options = ONE_SEQUENCE if what == "generate" else {}
    first, second = (
        cost_of(estimator, module, what, 64, **options, **{name: cache})
        for name in ("cache", "past_key_values")
    )
    assert first == second
    empty = cost_of(estimator, module, what, 64, **options, cache=transformers.DynamicCache())
    assert first.memory.nbytes > empty.memory.nbytes


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_a_cache_of_the_callers_own_is_not_filled_in_pieces(
    module: Any, estimator: Estimator, name: str
) -> None:
    with pytest.raises(AdmissionError):
        cost_of(
            estimator,
            module,
            "generate",
            6000,
            **ONE_SEQUENCE,
            **{name: transformers.DynamicCache()},
        )


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_a_recurrent_state_counts_no_tokens(module: Any, estimator: Estimator, name: str) -> None:
    state = transformers.DynamicCache(config=transformers.MambaConfig(num_hidden_layers=2))
    assert cost_of(estimator, module, "forward", 64, **{name: state}).memory.nbytes > 0


def test_layers_may_be_resident_according_to_what_requests_take_of_vram(
    plan: Plan, module: Any, estimator: Estimator
) -> None:
    cost = cost_of(
        estimator, module, "generate", 64, **ONE_SEQUENCE | {"max_new_tokens": 16 * 1064 - 64}
    )
    assert cost.memory.cache_bytes == pytest.approx(plan.kv_cache_bytes, rel=0.001)
    step = cost.step_bytes - plan.kv_cache_device_bytes
    assert step < request_memory_of(plan, module, CONFIG).shared_bytes / 2


def test_requests_have_what_a_plan_leaves_of_either_budget_and_no_more(
    plan: Plan, module: Any
) -> None:
    def with_budgets(more: int) -> tuple[Plan, RequestMemory]:
        assert plan.device_memory is not None
        changed = dataclasses.replace(
            plan,
            device_memory=dataclasses.replace(
                plan.device_memory, budget_bytes=plan.device_memory.budget_bytes + more
            ),
            host_memory=dataclasses.replace(
                plan.host_memory, budget_bytes=plan.host_memory.budget_bytes + more
            ),
        )
        return changed, request_memory_of(changed, module, CONFIG)

    _, less = with_budgets(0)
    changed, more = with_budgets(100 * MIB)
    assert more == less.plus(memory_of(100 * MIB, 100 * MIB))
    assert changed.device_memory is not None
    vram, host = changed.device_memory, changed.host_memory
    assert more.shared_bytes + vram.taken_bytes <= vram.budget_bytes
    assert more.cache_bytes + host.taken_bytes + changed.overhead_bytes <= host.budget_bytes


def test_on_a_device_both_run_at_once_and_are_counted_in_both_memories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StandIn(monkeypatch)
    folder = wide_model(tmp_path)
    workload = Workload(batch_size=8, prompt_tokens=16, new_tokens=2032)
    options: dict[str, Any] = {"device": "auto", "workload": workload, "layer_batch_size": 1}

    async def main() -> None:
        async with StreamedModel.open(folder, **options) as large:
            assert large.plan.device_memory is not None
            reserved = large.plan.device_memory.reserved_bytes
        vram = reserved - large.plan.kv_cache_bytes // 4
        budget = Budget(vram=vram, host="700MiB")
        async with StreamedModel.open(folder, budget=budget, **options) as model:
            assert model.plan.kv_cache_on_host
            memory = model.engine.requests.memory
            tokens = 9 * memory.cache_bytes // (10 * CACHE_BYTES_PER_TOKEN)
            ids = torch.ones((1, 16), dtype=torch.long)
            first = model.stream(input_ids=ids, max_new_tokens=tokens, do_sample=False)
            await anext(first)
            count = 16
            while True:  # the longest pass for which the first request leaves VRAM
                cost = model.engine._estimator.forward(
                    (torch.ones((1, 2 * count), dtype=torch.long),), {"use_cache": False}
                )
                if not model.engine.requests.reserved.plus(cost.memory).fits(memory):
                    break
                count *= 2
            assert count > 16
            one_pass = torch.ones((1, count), dtype=torch.long)
            await model.forward(input_ids=one_pass, use_cache=False)  # while the first one runs
            assert model.stats().requests_riding == 1
            assert model.stats().reserved_bytes > 0.8 * memory.cache_bytes
            await first.aclose()

    run(main(), seconds=100)
