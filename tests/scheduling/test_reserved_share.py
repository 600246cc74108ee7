"""What requests take of the memory that is reserved for a workload."""

from dataclasses import replace

import pytest

from layerstream.pipeline import Workload
from layerstream.pipeline.planning.workload_memory import estimate_memory
from layerstream.pipeline.scheduling.reserved_share import Parts, ReservedShare
from layerstream.tools.synthetic.families import FAMILIES

CONFIG = FAMILIES["llama-3.1-8b"].config
WORKLOAD = Workload(batch_size=4, prompt_tokens=1000, new_tokens=24)


@pytest.fixture
def share() -> ReservedShare:
    """Of a model whose blocks are so large that hardly more is taken than is alive."""
    estimated = estimate_memory(CONFIG, WORKLOAD)
    assert estimated is not None
    taken = estimated.prefill_bytes * 11 // 10
    memory = replace(estimated, prefill_taken_bytes=taken, decode_taken_bytes=0)
    reserved = Parts(memory.kv_bytes, memory.reserved_bytes - memory.kv_bytes)
    return ReservedShare(CONFIG, workload=WORKLOAD, sinks=False, reserved=reserved, measured=memory)


def other(share: ReservedShare, rows: int, prompt: int) -> int:
    return share.of(Workload(batch_size=rows, prompt_tokens=prompt, new_tokens=24)).other


def test_the_workload_takes_what_is_reserved_for_it(share: ReservedShare) -> None:
    estimated = estimate_memory(CONFIG, WORKLOAD)
    assert estimated is not None
    cache, taken = share.of(WORKLOAD)
    assert cache == estimated.kv_bytes
    assert taken == pytest.approx(1.1 * estimated.prefill_bytes, rel=1e-6)


def test_as_many_requests_as_were_declared_fit_at_once(share: ReservedShare) -> None:
    whole = other(share, 4, 1000)
    for prompt in (1, 10, 300, 700, 999, 1000):
        assert 4 * other(share, 1, prompt) <= whole + 4


def test_small_requests_take_twice_what_is_alive(share: ReservedShare) -> None:
    """Their blocks are small, and the C library keeps them."""
    small = Workload(prompt_tokens=100, new_tokens=24)
    estimated = estimate_memory(CONFIG, small)
    assert estimated is not None
    assert share.of(small).other == pytest.approx(2 * estimated.prefill_bytes, rel=1e-6)


def test_more_tokens_than_declared_take_more_in_proportion(share: ReservedShare) -> None:
    assert other(share, 4, 2000) > 1.5 * other(share, 4, 1000)


def test_a_cache_that_was_measured_as_none_takes_nothing() -> None:
    share = ReservedShare(
        CONFIG, workload=WORKLOAD, sinks=False, reserved=Parts(0, 1 << 20), measured=None
    )
    assert share.of(WORKLOAD) == Parts(0, 1 << 20)
