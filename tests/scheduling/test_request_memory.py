"""With KV caches in host RAM, requests take from two memories, and neither is exceeded."""

import dataclasses
import re
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import GPU
from support.plans import plan_of

from layerstream.pipeline import AdmissionError, Plan, Workload
from layerstream.pipeline.modeling.host_kv_cache import with_host_cache
from layerstream.pipeline.scheduling.request_cost import Estimator, RequestCost
from layerstream.pipeline.scheduling.request_memory import Parts, RequestMemory, request_memory_of

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
ONE_SEQUENCE = {"max_new_tokens": 1000, "do_sample": False}


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan with a KV cache that VRAM cannot hold."""
    sizes = [2 * MIB, *[4 * MIB] * 8, 2 * MIB]
    made = plan_of(sizes, GPU, config=CONFIG, workload=WORKLOAD, host=2 << 30, vram=420 * MIB)
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


PARTS = st.builds(Parts, st.integers(0, 120), st.integers(0, 120))


@given(st.integers(1, 100), st.integers(1, 100), st.lists(PARTS, max_size=12))
def test_requests_that_fit_as_one_number_fit_both_memories(
    cache: int, other: int, requests: list[Parts]
) -> None:
    memory = RequestMemory(nbytes=cache + other, cache_bytes=cache)
    admitted = Parts(0, 0)
    left = memory.nbytes
    for parts in requests:
        alone = parts.cache <= cache and parts.other <= other
        assert (memory.taken_by(parts) <= memory.nbytes) == alone
        if (taken := memory.taken_by(parts)) <= left:
            left -= taken
            admitted = Parts(admitted.cache + parts.cache, admitted.other + parts.other)
    assert admitted.cache <= cache
    assert admitted.other <= other


def test_a_workload_fits_and_takes_all_the_memory_reserved_for_it(
    plan: Plan, module: Any, estimator: Estimator
) -> None:
    memory = request_memory_of(plan, module, CONFIG)
    assert memory.nbytes == plan.workload_bytes
    cost = cost_of(estimator, module, "generate", 64, rows=16, **ONE_SEQUENCE)
    assert cost.nbytes == pytest.approx(memory.nbytes, rel=0.001)
    one = cost_of(estimator, module, "generate", 64, **ONE_SEQUENCE)
    assert 16 * one.nbytes == pytest.approx(memory.nbytes, rel=0.01)


def test_activations_that_vram_cannot_hold_are_refused_however_much_host_ram_is_free(
    plan: Plan, module: Any, estimator: Estimator
) -> None:
    message = r"4000 tokens needs (\d+) MiB of VRAM for .* there, but there are (\d+) MiB for"
    with pytest.raises(AdmissionError, match=message) as refused:
        cost_of(estimator, module, "forward", 4000)
    found = re.search(message, str(refused.value))
    assert found is not None
    need, have = map(int, found.groups())
    assert have == (plan.workload_bytes - plan.kv_cache_bytes) // MIB < need
    assert need + 4000 * plan.kv_cache_bytes // (16 * 1064 * MIB) < plan.workload_bytes // MIB


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
    assert cost.nbytes <= plan.workload_bytes


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
    assert in_vram.step_bytes >= step + cache


def test_a_pass_that_keeps_no_cache_takes_no_memory_for_one(
    module: Any, estimator: Estimator
) -> None:
    without = cost_of(estimator, module, "forward", 1000, use_cache=False)
    in_vram = {"past_key_values": transformers.DynamicCache()}
    assert without.nbytes < cost_of(estimator, module, "forward", 1000, **in_vram).nbytes


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
    assert first.nbytes > empty.nbytes


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
    assert cost_of(estimator, module, "forward", 64, **{name: state}).nbytes > 0


def test_layers_may_be_resident_according_to_what_requests_take_of_vram(
    plan: Plan, module: Any, estimator: Estimator
) -> None:
    cost = cost_of(
        estimator, module, "generate", 64, **ONE_SEQUENCE | {"max_new_tokens": 16 * 1064 - 64}
    )
    memory = request_memory_of(plan, module, CONFIG)
    assert cost.nbytes == pytest.approx(
        memory.nbytes, rel=0.001
    )  # its cache is as large as it may be
    assert cost.step_bytes < memory.shared_with_residents_bytes / 2


def test_a_new_plan_does_not_change_the_memory_for_requests(plan: Plan, module: Any) -> None:
    assert plan.device_memory is not None
    larger = dataclasses.replace(
        plan,
        device_memory=dataclasses.replace(
            plan.device_memory, budget_bytes=plan.device_memory.budget_bytes + 100 * MIB
        ),
    )
    assert request_memory_of(larger, module, CONFIG) == request_memory_of(plan, module, CONFIG)
