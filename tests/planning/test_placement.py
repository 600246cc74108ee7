"""What a plan places where: residents, slots, the KV cache and memory for requests."""

import dataclasses
import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import CPU, GPU, write_checkpoint
from support.plans import plan_of

from layerstream.pipeline import Checkpoint, PlanError, Workload, make_plan
from layerstream.pipeline.planning.resident_choice import evenly
from layerstream.stages.arena import ring_bytes
from layerstream.stages.batch import Place, Residence
from layerstream.stages.process.headroom import MARGIN

KIB, MIB = 1 << 10, 1 << 20


def test_126_layers_of_six_gibibytes_are_planned_with_residents_spread_evenly():
    sizes = [*[6 << 30] * 126, 4 << 30]
    hardware = dataclasses.replace(GPU, disk_bytes_per_second=7e9, h2d_bytes_per_second=25e9)
    plan = plan_of(sizes, hardware, host="128GB", vram="24GB", workload=Workload())
    residents = [batch.index for batch in plan.batches if not batch.streamed]
    gaps = [after - before for before, after in itertools.pairwise(residents)]
    assert len(residents) > 10
    assert max(gaps) - min(gaps) <= 3
    assert plan.prediction.decode.bottleneck == "read"


CONFIG = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 1000,
    "dtype": "bfloat16",
}


def test_a_kv_cache_that_vram_cannot_hold_lives_in_host_ram_and_is_priced():
    sizes = [2 * MIB, *[4 * MIB] * 8, 2 * MIB]
    fast = dataclasses.replace(
        GPU,
        disk_bytes_per_second=1e12,
        h2d_bytes_per_second=1e12,
        pageable_h2d_bytes_per_second=1e9,
    )
    common = {
        "config": CONFIG,
        "workload": Workload(batch_size=16, prompt_tokens=64, new_tokens=1000),
        "host": 2 << 30,
    }
    loose = plan_of(sizes, fast, vram=2 << 30, **common)
    tight = plan_of(sizes, fast, vram=420 * MIB, **common)
    assert not loose.kv_cache_on_host
    assert tight.kv_cache_on_host
    cache = 2 * 8 * 1024 * 2 * 16 * 1064
    assert tight.host_memory.reserved_bytes >= cache > tight.device_memory.reserved_bytes
    copies = 2 * cache / 1e9  # both ways, by the thread that computes
    assert tight.prediction.decode.compute_seconds >= copies
    assert loose.prediction.decode.compute_seconds < copies
    assert "in host RAM, since VRAM cannot hold it" in tight.describe()
    # Requests of a running model have their caches where they are.
    again = plan_of(sizes, fast, vram=2 << 30, running=tight, **common)
    assert again.kv_cache_on_host
    assert any(batch.device_resident for batch in again.batches)
    with pytest.raises(PlanError, match="the VRAM budget of 420 MiB cannot hold"):
        plan_of(sizes, fast, vram=420 * MIB, running=loose, **common)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_residents_are_spread_evenly(numbers):
    among, count = numbers
    chosen = evenly(among, count)
    assert len(set(chosen)) == count
    assert all(0 <= i < among for i in chosen)
    # The end of a sweep is followed by the beginning of the next.
    gaps = [b - a for a, b in zip(chosen, [*chosen[1:], chosen[0] + among], strict=True)]
    assert max(gaps) - min(gaps) <= 1


def test_residents_take_the_rest_of_the_budget_between_the_streamed_batches():
    plan = plan_of([MIB] * 16, host=16 * MIB + 3 * MIB + 4 * MIB, layer_batch_size=1, slots=3)
    streamed = [batch.streamed for batch in plan.batches]
    assert streamed.count(False) == 4
    runs = "".join(".r"[not each] for each in streamed).strip(".").split("r")
    assert all(3 <= len(run) <= 4 for run in runs[1:-1])


def test_everything_is_resident_where_everything_fits():
    plan = plan_of([MIB] * 8, host=64 * MIB)
    assert not any(batch.streamed for batch in plan.batches)
    assert plan.disk_bytes_per_sweep == 0
    assert plan.first_sweep_bytes == 8 * MIB


def test_a_large_head_counts_once_in_the_ring():
    sizes = [64 * KIB] * 10 + [8 * MIB]
    plan = plan_of(sizes, host=16 * MIB + 8 * MIB, layer_batch_size=1)
    assert plan.batches[-1].streamed
    assert plan.host_arena_bytes <= ring_bytes(sizes, slots=4) == 8 * MIB + 192 * KIB


def test_a_large_head_is_resident_where_that_takes_hardly_more_memory_than_a_slot():
    sizes = [64 * KIB] * 10 + [8 * MIB]
    plan = plan_of(sizes, host=16 * MIB + 8 * MIB + 256 * KIB, layer_batch_size=1)
    assert not plan.batches[-1].streamed
    assert plan.disk_bytes_per_sweep < MIB


def test_a_tight_budget_takes_smaller_batches_before_it_gives_up_slots():
    sizes = [64 * KIB] + [MIB] * 32 + [64 * KIB]
    loose = plan_of(sizes, host=60 * MIB)
    tight = plan_of(sizes, host=16 * MIB + 3 * MIB)
    tightest = plan_of(sizes, host=16 * MIB + MIB)
    assert loose.layer_batch_size > tight.layer_batch_size == tightest.layer_batch_size == 1
    assert (loose.host_slots, tight.host_slots, tightest.host_slots) == (3, 3, 1)


def test_the_least_budget_that_a_refusal_tells_is_enough_and_one_byte_less_is_not():
    """It holds what libraries keep for bfloat16, besides what is fixed."""
    sizes, config = [2 * MIB] * 6, {**CONFIG, "dtype": "bfloat16"}
    given = {"config": config, "workload": Workload(batch_size=3)}
    with pytest.raises(PlanError) as refused:
        plan_of(sizes, host=1, **given)
    least = refused.value.needed_bytes
    plan = plan_of(sizes, host=least, **given)
    assert plan.host_memory.used_bytes == least
    assert plan.host_memory.reserved_bytes - plan.workload_bytes > (16 + 17) * MIB
    with pytest.raises(PlanError):
        plan_of(sizes, host=least - 1, **given)


@pytest.mark.parametrize("given", [None, "100%"])
def test_what_code_has_taken_is_not_planned_with_even_if_nothing_fits_otherwise(given):
    """It counts in the budget, and was added to what is free: a process in a cgroup was killed."""
    least = 16 * MIB + 2 * MIB  # what is fixed, and a slot
    given = {"sizes": [2 * MIB] * 6, "host": given, "held_bytes": 100 * MIB}
    enough = math.ceil(least / (1 - MARGIN)) if given["host"] is None else 2 * MIB
    plan = plan_of(hardware=dataclasses.replace(CPU, host_available_bytes=enough), **given)
    assert plan.host_memory.used_bytes == least
    with pytest.raises(PlanError, match=r"MiB are free beside code loaded for the model"):
        plan_of(hardware=dataclasses.replace(CPU, host_available_bytes=enough - 2), **given)


def test_the_overhead_of_requests_grows_with_modules_and_not_with_their_pieces_in_files():
    common = {"config": CONFIG, "workload": Workload(batch_size=3), "host": 1 << 30}
    whole = plan_of([2 * MIB] * 6, **common)
    pieces = plan_of([2 * MIB] * 6, fused=range(6), **common)
    more = plan_of([2 * MIB] * 12, **common)
    reserved = [plan.host_memory.reserved_bytes for plan in (whole, pieces, more)]
    assert reserved[0] == reserved[1]
    assert reserved[2] - reserved[0] == 3 * 6 * 2200


def test_a_gpu_written_by_hand_is_planned_for_on_a_machine_without_one():
    sizes = [MIB] * 10
    plan = plan_of(sizes, GPU, host=16 * MIB + 6 * MIB, vram=70 * MIB, layer_batch_size=1)
    assert plan.device == "cuda:0"
    assert plan.device_memory.budget_bytes == 70 * MIB
    assert all(view.place is Place.DEVICE for batch in plan.batches for view in batch.tensors)
    on_device = [b for b in plan.batches if b.device_resident]
    on_host = [b for b in plan.batches if b.host_resident]
    assert (len(on_device), len(on_host)) == (2, 3)  # VRAM first, then host RAM
    assert plan.describe()


def test_residents_in_vram_are_counted_as_its_allocator_takes_memory_for_them():
    sizes = [3 * MIB] * 8
    plan = plan_of(sizes, GPU, host=1 << 30, vram=64 * MIB + 26 * MIB, layer_batch_size=1)
    residents = [batch for batch in plan.batches if batch.device_resident]
    memory = plan.device_memory
    assert residents
    assert memory.resident_bytes == 4 * MIB * len(residents)  # in blocks of two
    assert memory.arena_bytes == 10 * MIB  # three slots of three
    assert memory.used_bytes <= memory.budget_bytes
    assert plan.device_arena_bytes == 9 * MIB


def test_memory_for_a_workload_is_reserved_where_computation_runs(tmp_path):
    write_checkpoint(tmp_path, blocks=3)
    config = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
    checkpoint = Checkpoint.open(tmp_path)

    def reserved(hardware, workload):
        plan = make_plan(checkpoint, hardware, workload=workload, reader="direct")
        device = plan.device_memory.reserved_bytes if plan.device_memory else 0
        return plan.host_memory.reserved_bytes, device

    small, large = Workload(prompt_tokens=16), Workload(prompt_tokens=4096, batch_size=8)
    assert reserved(CPU, None)[0] < reserved(CPU, small)[0] < reserved(CPU, large)[0]
    assert reserved(GPU, None)[1] < reserved(GPU, small)[1] < reserved(GPU, large)[1]
    assert reserved(GPU, large)[0] == reserved(GPU, None)[0]


def test_a_plan_that_follows_a_mapped_one_streams_no_batch_that_is_too_large_for_its_ring():
    sizes = [1 << 20] * 4 + [8 << 20] + [1 << 20]
    common = {"reader": "mmap", "fused": range(len(sizes)), "layer_batch_size": 1}
    running = plan_of(sizes, host=1 << 30, **common)
    assert running.device_arena_bytes < 8 << 20
    with pytest.raises(
        PlanError, match="cannot hold"
    ):  # and not a plan that would fail when it runs
        plan_of(sizes, host=20 << 20, running=running, **common)
    again = plan_of(sizes, host=1 << 30, running=running, **common)
    streamed = [batch.device_bytes for batch in again.batches if not batch.device_resident]
    assert max(streamed, default=0) <= again.device_arena_bytes


def test_decode_residents_of_a_mapped_plan_are_only_its_device_images():
    plan = plan_of([1 << 20] * 4, host=1 << 30, reader="mmap", layer_batch_size=1)
    mixed = tuple(
        dataclasses.replace(batch, device_bytes=4096, residence=Residence.STREAMED)
        for batch in plan.batches
    )
    plan = dataclasses.replace(plan, batches=mixed, decode_residents=(1, 2))
    batches = plan.while_decoding().batches
    assert all(batch.uses_host_image for batch in batches)
    assert [batch.device_resident for batch in batches] == [False, True, True, False]
    assert not any(batch.host_resident for batch in batches)


def test_slots_leave_memory_for_code_where_fewer_of_them_do() -> None:
    sizes, host = [10 << 20] * 10, 50 << 20
    assert plan_of(sizes, host=host).host_memory.used_bytes > 40 << 20  # three slots
    code = 10 << 20
    plan = plan_of(sizes, host=host, code_to_load_bytes=code)
    assert plan.host_memory.used_bytes + code <= host
    plan_of(sizes, host=host, code_to_load_bytes=60 << 20)  # for which no plan is refused
