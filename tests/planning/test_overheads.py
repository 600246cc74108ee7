"""Memory of requests besides tensors, and the memory that there is for all requests together."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from support.checkpoints import CPU, GPU
from support.plans import plan_of
from support.streaming import SMALL

from layerstream.pipeline import Plan, Workload
from layerstream.pipeline.scheduling.request_cost import Estimator
from layerstream.pipeline.scheduling.request_memory import RequestMemory, request_memory_of

WIDEST, VOCABULARY = 4096, 6000
MODULE_BYTES = 2200  # of a clone of one
SCRATCH_BYTES = 900_000
MIB = 1 << 20


@pytest.fixture(scope="module")
def module() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=WIDEST,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def tree_bytes(module: Any) -> int:
    return MODULE_BYTES * len(list(module.modules()))


def panel_bytes(columns: int, rows: int) -> int:
    """Bytes that MKL packs two float32 matrices into, with so many columns and rows."""
    return 2 * 192 * 4 * (columns + rows)


def overhead_bytes(module: Any, dtype: str, call: str, *shape: int, **options: Any) -> int:
    """Bytes that a request with ids of ``shape`` reserves more on a CPU than on a GPU."""
    config = module.config.to_dict() | {"dtype": dtype}
    on_cpu, on_gpu = (
        Estimator(
            module,
            config,
            workload=SMALL,
            memory=RequestMemory(shared_bytes=1 << 50),
            on_cpu=on_cpu,
        )
        for on_cpu in (True, False)
    )
    arguments = {"input_ids": torch.ones(shape, dtype=torch.long), **options}
    cpu, gpu = (getattr(each, call)((), arguments).memory.nbytes for each in (on_cpu, on_gpu))
    return cpu - gpu


@pytest.mark.parametrize(
    ("shape", "options", "packed"),
    [
        ((1, 2), {}, 0),  # so few rows are multiplied as they are
        ((1, 5), {"logits_to_keep": 1}, panel_bytes(WIDEST, 5)),
        ((4, 5), {}, panel_bytes(VOCABULARY, 20)),
        ((50, 100), {}, panel_bytes(VOCABULARY, 720)),  # and never higher than that
    ],
    ids=["two tokens", "the last logits", "all logits", "many tokens"],
)
def test_in_float32_a_request_on_a_cpu_takes_the_memory_its_matrices_are_packed_into(
    shape: tuple[int, int], options: dict[str, Any], packed: int, module: Any
) -> None:
    assert (
        overhead_bytes(module, "float32", "forward", *shape, **options)
        == tree_bytes(module) + packed
    )


def test_a_generation_has_as_many_logits_as_it_verifies_tokens(module: Any) -> None:
    one = overhead_bytes(module, "float32", "generation", 1, 8, max_new_tokens=4)
    assert one == tree_bytes(module) + panel_bytes(WIDEST, 8)
    more = overhead_bytes(
        module, "float32", "generation", 1, 8, max_new_tokens=4, prompt_lookup_num_tokens=5
    )
    assert more == tree_bytes(module) + panel_bytes(VOCABULARY, 8)


@pytest.mark.parametrize("shape", [(1, 2), (50, 100)])
def test_in_bfloat16_a_request_on_a_cpu_takes_scratch_whatever_its_size(
    shape: tuple[int, int], module: Any
) -> None:
    for call in ("forward", "generation"):
        assert (
            overhead_bytes(module, "bfloat16", call, *shape) == tree_bytes(module) + SCRATCH_BYTES
        )


SIZES = [8 * MIB] * 6
WORKLOAD = Workload(batch_size=3, prompt_tokens=160, new_tokens=4)


def planned(module: Any, hardware: Any, **budget: int) -> Plan:
    """A plan for a model in bfloat16 whose requests are those of ``WORKLOAD``."""
    config = module.config.to_dict() | {"dtype": "bfloat16"}
    return plan_of(SIZES, hardware, config=config, workload=WORKLOAD, **budget)


def request_bytes(plan: Plan, module: Any) -> int:
    return request_memory_of(plan, module, module.config.to_dict() | {"dtype": "bfloat16"}).nbytes


def with_free(plan: Plan, side: str, free: int) -> Plan:
    """The plan in a budget of which so much is free."""
    memory = getattr(plan, side)
    return replace(plan, **{side: replace(memory, budget_bytes=memory.used_bytes + free)})


def test_on_a_cpu_requests_have_the_reserved_and_the_free_memory_and_their_overheads(
    module: Any,
) -> None:
    plan = planned(module, CPU)
    assert plan.workload_bytes > 4 * MIB
    overhead = tree_bytes(module) + SCRATCH_BYTES
    plan = with_free(plan, "host_memory", plan.overhead_bytes + 5 * MIB)
    assert request_bytes(plan, module) == plan.workload_bytes + 5 * MIB + 3 * overhead
    # The overhead of requests is in the plan already: it is not free a second time.
    plan = with_free(plan, "host_memory", plan.overhead_bytes - MIB)
    assert request_bytes(plan, module) == plan.workload_bytes + 4 * MIB + 3 * overhead
    assert request_bytes(replace(plan, workload=None), module) == plan.workload_bytes + 4 * MIB


def test_on_a_gpu_requests_have_the_reserved_and_the_free_vram(module: Any) -> None:
    plan = planned(module, GPU)
    assert not plan.kv_cache_on_host
    plan = with_free(with_free(plan, "host_memory", 99 * MIB), "device_memory", 5 * MIB)
    assert request_bytes(plan, module) == plan.workload_bytes + 5 * MIB


def test_however_little_a_plan_reserves_requests_may_take_a_few_mib(module: Any) -> None:
    for hardware, side in ((CPU, "host_memory"), (GPU, "device_memory")):
        plan = replace(with_free(planned(module, hardware), side, 0), workload_bytes=1)
        assert request_bytes(replace(plan, workload=None), module) == 1 + 4 * MIB
