"""Plans: what they must hold to for any model and any budget, and what they say when there is none."""

import dataclasses
import itertools
import json
import math
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import CPU, GPU, write_checkpoint
from support.plans import plan_of

from layerstream.pipeline import Budget, Checkpoint, Hardware, Plan, PlanError, Workload, make_plan
from layerstream.pipeline.machine.measurement import ComputeRate
from layerstream.pipeline.planning.placement import evenly
from layerstream.pipeline.planning.workload_memory import estimate_memory
from layerstream.pipeline.report.plan_report import report_plan
from layerstream.stages.arena import ring_bytes
from layerstream.stages.batch import Place

KIB, MIB = 1 << 10, 1 << 20


byte_sizes = st.integers(1, 4 * MIB).map(lambda n: 2 * n)


@st.composite
def requests(draw):
    sizes = draw(st.lists(byte_sizes, min_size=1, max_size=12))
    some = st.sets(st.integers(0, len(sizes) - 1), max_size=2)
    hardware = draw(st.sampled_from([CPU, GPU]))
    total = sum(sizes)
    return {
        "sizes": sizes,
        "hardware": hardware,
        "always_resident": draw(some),
        "fused": draw(st.just(()) | st.just(range(len(sizes))) | some),
        "host": draw(st.integers(1, 3 * total + 20 * MIB)),
        "vram": None if hardware is CPU else draw(st.integers(1, 2 * total)),
        "reader": draw(st.sampled_from(["direct", "mmap"])),
        "layer_batch_size": draw(st.none() | st.integers(1, 4)),
    }


@given(requests())
def test_a_plan_never_exceeds_a_budget_or_it_is_refused_with_need_have_and_remedy(request):
    try:
        plan = plan_of(**request)
    except PlanError as error:
        says = str(error)
    else:
        says = None
    if says is not None:
        assert re.search(r"budget of .* cannot .* at least .* are needed .* raise the budget", says)
        return
    assert plan.host_memory.used_bytes <= request["host"]
    if request["vram"] is not None:
        assert plan.device_memory.used_bytes <= request["vram"]
    # and what it says that it uses is what running it takes
    on_cpu = request["hardware"] is CPU
    host = [b.host_bytes for b in plan.batches if b.host_resident]
    device = [b.device_bytes for b in plan.batches if b.device_resident]
    taken = plan.host_arena_bytes + sum(host)
    vram = plan.device_arena_bytes + sum(device)
    assert plan.host_memory.used_bytes >= taken + (vram if on_cpu else 0)
    assert on_cpu or plan.device_memory.used_bytes >= vram


@given(requests())
def test_every_layer_is_in_one_batch_in_order_and_every_batch_finds_room(request):
    try:
        plan = plan_of(**request)
    except PlanError:
        return
    names = [name for batch in plan.batches for name in batch.layers]
    assert names == [f"layer{i}" for i in range(len(request["sizes"]))]
    tensors = Counter(view.name for batch in plan.batches for view in batch.tensors)
    assert tensors == Counter(f"{name}.w" for name in names)
    maps = request["hardware"] is CPU and plan.reader == "mmap"
    for batch in plan.batches:
        if not (batch.host_resident or maps):
            assert batch.host_bytes <= plan.host_arena_bytes
        if not batch.device_resident:
            assert batch.device_bytes <= plan.device_arena_bytes


@given(requests())
def test_always_resident_layers_are_resident_where_computation_reads_them(request):
    try:
        plan = plan_of(**request)
    except PlanError:
        return
    for batch in plan.batches:
        if {f"layer{i}" for i in request["always_resident"]}.isdisjoint(batch.layers):
            continue
        for view in batch.tensors:
            if view.place is Place.DEVICE:
                assert batch.device_resident
            elif plan.reader != "mmap":
                assert batch.host_resident


@given(requests())
def test_a_plan_written_to_json_is_read_back_equal(request):
    try:
        plan = plan_of(**request, workload=Workload())
    except PlanError:
        return
    assert Plan.from_json(plan.to_json()) == plan


positive_rates = st.floats(1e6, 1e12)


@st.composite
def machines(draw):
    """CPUs and GPUs of any size, their rates known or not."""
    on_cpu = draw(st.booleans())
    names = ["disk_bytes_per_second", "mmap_bytes_per_second", "host_copy_bytes_per_second"]
    known = {name: draw(st.none() | positive_rates) for name in names}
    if not on_cpu:
        known["h2d_bytes_per_second"] = draw(st.none() | positive_rates)
    compute = draw(st.lists(positive_rates, max_size=3))
    return Hardware(
        device="cpu" if on_cpu else "cuda:0",
        host_available_bytes=draw(st.integers(0, 200 * MIB)),
        vram_free_bytes=None if on_cpu else draw(st.integers(0, 200 * MIB)),
        cores=draw(st.integers(1, 64)),
        cached_bytes=draw(st.integers(0, 50 * MIB)),
        compute=tuple(
            ComputeRate(tokens=16**i, bytes_per_second=rate) for i, rate in enumerate(compute)
        ),
        **known,
    )


budgets = st.none() | st.integers(1, 220 * MIB) | st.integers(1, 100).map(lambda n: f"{n}%")


@st.composite
def anything(draw):
    sizes = draw(st.lists(byte_sizes, min_size=1, max_size=12))
    heads = draw(st.sampled_from([1, 4]))
    sizes_told = {
        "hidden_size": 64 * heads,
        "num_hidden_layers": len(sizes),
        "num_attention_heads": heads,
        "vocab_size": draw(st.integers(1, 50_000)),
    }
    hardware = draw(machines())
    reader = draw(st.sampled_from([None, "direct", "mmap", "throttled"]))
    return {
        "sizes": sizes,
        "hardware": hardware,
        "config": draw(st.none() | st.just(sizes_told)),
        "always_resident": draw(st.sets(st.integers(0, len(sizes) - 1), max_size=2)),
        "fused": draw(st.sets(st.integers(0, len(sizes) - 1), max_size=2)),
        "host": draw(budgets),
        "vram": None if hardware.device == "cpu" else draw(budgets),
        "workload": draw(
            st.none()
            | st.builds(
                Workload,
                batch_size=st.integers(1, 8),
                prompt_tokens=st.integers(1, 5000),
                new_tokens=st.integers(1, 3000),
            )
        ),
        "objective": draw(st.sampled_from(["latency", "throughput"])),
        "reader": reader,
        "throttle_bytes_per_second": draw(positive_rates) if reader == "throttled" else None,
        "layer_batch_size": draw(st.none() | st.integers(1, 4)),
        "slots": draw(st.none() | st.integers(1, 4)),
        "held_bytes": draw(st.just(0) | st.integers(0, 50 * MIB)),
    }


@given(anything())
def test_any_request_gets_a_plan_within_its_budgets_or_hears_what_is_missing(request):
    hardware = request["hardware"]
    try:
        plan = plan_of(**request)
    except PlanError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert re.search(
            r"budget of \S+ \S+ (cannot hold one layer at a time: at least \S+ \S+ are needed .* raise the "
            r"budget|is more than the \S+ \S+ of (host RAM|VRAM) that are free; lower it)",
            refusal,
        )
        return
    free = hardware.host_available_bytes + request["held_bytes"]
    given_host = Budget(host=request["host"]).host_bytes(free)
    assert plan.host_memory.used_bytes <= (free if given_host is None else given_host)
    if hardware.vram_free_bytes is not None:
        given_vram = Budget(vram=request["vram"]).vram_bytes(hardware.vram_free_bytes)
        limit = hardware.vram_free_bytes if given_vram is None else given_vram
        assert plan.device_memory.used_bytes <= limit
    names = [name for batch in plan.batches for name in batch.layers]
    assert names == [f"layer{i}" for i in range(len(request["sizes"]))]
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.describe()
    assert report_plan(plan)
    times = [sweep.seconds for sweep in (plan.prediction.first, plan.prediction.decode)]
    assert all(0 <= each < math.inf for each in times)


@given(anything())
def test_what_stays_while_decoding_fits_in_what_the_prompt_gave_back(request):
    request["config"] = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    request["workload"] = Workload(prompt_tokens=4096)
    try:
        plan = plan_of(**request)
    except PlanError:
        return
    memory = estimate_memory(request["config"], request["workload"])
    gone = memory.prefill_bytes - memory.decode_bytes
    batches = [plan.batches[index] for index in plan.decode_residents]
    assert all(batch.streamed for batch in batches)
    if plan.device_memory is None:
        used = sum(b.device_bytes + (b.host_bytes if b.uses_host_image else 0) for b in batches)
        side = plan.host_memory
    else:
        used, side = sum(b.device_bytes for b in batches), plan.device_memory
    assert side.used_bytes + used <= side.budget_bytes + max(gone, 0)


def test_126_layers_of_six_gibibytes_are_planned_with_what_stays_spread_evenly():
    sizes = [*[6 << 30] * 126, 4 << 30]
    hardware = dataclasses.replace(GPU, disk_bytes_per_second=7e9, h2d_bytes_per_second=25e9)
    plan = plan_of(sizes, hardware, host="128GB", vram="24GB", workload=Workload())
    stay = [batch.index for batch in plan.batches if not batch.streamed]
    gaps = [after - before for before, after in itertools.pairwise(stay)]
    assert len(stay) > 10
    assert max(gaps) - min(gaps) <= 3
    assert plan.prediction.decode.bottleneck == "read"


TALKATIVE = {
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
    asked = {
        "config": TALKATIVE,
        "workload": Workload(batch_size=16, prompt_tokens=64, new_tokens=1000),
        "host": 2 << 30,
    }
    roomy = plan_of(sizes, fast, vram=2 << 30, **asked)
    tight = plan_of(sizes, fast, vram=420 * MIB, **asked)
    assert not roomy.kv_cache_on_host
    assert tight.kv_cache_on_host
    cache = 2 * 8 * 1024 * 2 * 16 * 1064
    assert tight.host_memory.reserved_bytes >= cache > tight.device_memory.reserved_bytes
    moved = 2 * cache / 1e9  # there and back, by the thread that computes
    assert tight.prediction.decode.compute_seconds >= moved
    assert roomy.prediction.decode.compute_seconds < moved
    assert "in host RAM, since VRAM cannot hold it" in tight.describe()
    # Requests of a running model have their caches where they are.
    anew = plan_of(sizes, fast, vram=2 << 30, running=tight, **asked)
    assert anew.kv_cache_on_host
    assert any(batch.device_resident for batch in anew.batches)
    with pytest.raises(PlanError, match="the VRAM budget of 420 MiB cannot hold"):
        plan_of(sizes, fast, vram=420 * MIB, running=roomy, **asked)


def test_what_counts_decides_whether_loading_residents_is_worth_while():
    # Two tokens on a GPU beside a slow disk: mapped files in the page cache serve the first one sooner.
    sizes = [2 * MIB, *[4 * MIB] * 8, 2 * MIB]
    hardware = dataclasses.replace(
        CPU,
        disk_bytes_per_second=1e8,
        mmap_bytes_per_second=1e8,
        host_copy_bytes_per_second=1e9,
        cached_bytes=sum(sizes),
        compute=(ComputeRate(tokens=1, bytes_per_second=1e10),),
        mmap_read_cpu_seconds_per_byte=0.0,
    )
    asked = {"workload": Workload(prompt_tokens=1, new_tokens=2), "reader": None}
    soon = plan_of(sizes, hardware, **asked, objective="latency")
    steady = plan_of(sizes, hardware, **asked, objective="throughput")
    assert soon.reader == "mmap"
    assert soon.prediction.first.seconds < 0.1
    assert soon.prediction.request_seconds == pytest.approx(
        soon.prediction.first.seconds + soon.prediction.decode.seconds
    )
    assert steady.prediction.request_seconds == pytest.approx(
        steady.prediction.prefill.seconds + steady.prediction.decode.seconds
    )


def test_an_objective_that_is_none_is_refused():
    with pytest.raises(PlanError, match="objective 'beauty' is unknown; use one of latency"):
        plan_of([MIB], objective="beauty")


def test_a_plan_tells_of_the_trivial_plan_however_many_are_faster():
    sizes = [2 * MIB, *[4 * MIB] * 100, 2 * MIB]
    plan = plan_of(sizes, host=100 * MIB, workload=Workload(), reader=None)
    assert len(plan.candidates) <= 12
    assert any(each.name and each.layer_batch_size == 1 for each in plan.candidates)
    times = [each.request_seconds for each in plan.candidates if not each.chosen]
    assert times == sorted(times)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_residents_are_spreadevenly(numbers):
    among, count = numbers
    chosen = evenly(among, count)
    assert len(set(chosen)) == count
    assert all(0 <= i < among for i in chosen)
    # The last sweep's end meets the next one's beginning.
    gaps = [b - a for a, b in zip(chosen, [*chosen[1:], chosen[0] + among], strict=True)]
    assert max(gaps) - min(gaps) <= 1


def test_what_is_left_of_the_budget_goes_to_residents_between_the_streamed_batches():
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


def test_a_large_head_stays_where_it_takes_hardly_more_room_than_passing():
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


def test_what_requests_take_beside_tensors_grows_with_modules_and_not_with_their_pieces_in_files():
    asked = {"config": TALKATIVE, "workload": Workload(batch_size=3), "host": 1 << 30}
    whole = plan_of([2 * MIB] * 6, **asked)
    pieces = plan_of([2 * MIB] * 6, fused=range(6), **asked)
    more = plan_of([2 * MIB] * 12, **asked)
    assert 0 < whole.overhead_bytes == pieces.overhead_bytes
    assert more.overhead_bytes - whole.overhead_bytes == 3 * 6 * 2200


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


def test_what_stays_in_vram_is_counted_as_its_allocator_takes_it():
    sizes = [3 * MIB] * 8
    plan = plan_of(sizes, GPU, host=1 << 30, vram=64 * MIB + 26 * MIB, layer_batch_size=1)
    stay = [batch for batch in plan.batches if batch.device_resident]
    memory = plan.device_memory
    assert stay
    assert memory.resident_bytes == 4 * MIB * len(stay)  # in blocks of two
    assert memory.arena_bytes == 10 * MIB  # three slots of three
    assert memory.used_bytes <= memory.budget_bytes
    assert plan.device_arena_bytes == 9 * MIB


def test_the_refusal_names_the_side_the_largest_layer_and_the_sizes():
    with pytest.raises(PlanError, match=r"host budget of 17 MiB .* at least 24 MiB .*layer2"):
        plan_of([MIB, MIB, 8 * MIB, MIB], host=17 * MIB)
    with pytest.raises(PlanError, match=r"VRAM budget of 1 MiB .* at least 72 MiB .*layer2"):
        plan_of([MIB, MIB, 8 * MIB, MIB], GPU, host=64 * MIB, vram=MIB)


def test_a_budget_beyond_what_is_free_is_refused():
    little = dataclasses.replace(CPU, host_available_bytes=100 * MIB)
    with pytest.raises(PlanError, match=r"the budget of 200 MiB is more than the 100 MiB"):
        plan_of([MIB], little, host=200 * MIB)
    # To so many bytes nobody knows what is free.
    assert plan_of([MIB], little, host=110 * MIB).host_memory.budget_bytes == 110 * MIB


def test_without_a_budget_a_tenth_of_what_is_free_is_left_alone():
    some = dataclasses.replace(CPU, host_available_bytes=100 * MIB)
    assert plan_of([MIB], some).host_memory.budget_bytes == 90 * MIB


def test_a_workload_is_reserved_for_where_computation_runs(tmp_path):
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"reader": "telepathy"}, "reader 'telepathy' is unknown; use one of direct, mmap"),
        ({"reader": "throttled"}, "throttle_bytes_per_second go together"),
        ({"reader": "mmap", "throttle_bytes_per_second": 5.0}, "go together"),
        ({"reader": "throttled", "throttle_bytes_per_second": 0}, "number above nothing"),
        ({"reader": None, "throttle_bytes_per_second": -5.0}, "number above nothing"),
        ({"reader": None, "throttle_bytes_per_second": float("nan")}, "number above nothing"),
        ({"reader": None, "throttle_bytes_per_second": float("inf")}, "number above nothing"),
        ({"reader": None, "throttle_bytes_per_second": "1GB/s"}, "number above nothing"),
        ({"layer_batch_size": 0}, "layer_batch_size is 0"),
        ({"layer_batch_size": 1.5}, "layer_batch_size is 1.5"),
        ({"layer_batch_size": "4"}, "layer_batch_size is '4'"),
        ({"slots": True}, "slots is True"),
        ({"slots": 2.0}, "slots is 2.0"),
        ({"vram": MIB}, "the device is the CPU"),
        ({"sizes": []}, "holds no tensors"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused(arguments, says):
    with pytest.raises(PlanError, match=says):
        plan_of(**{"sizes": [MIB], **arguments})


def test_a_mapped_plan_goes_on_with_no_batch_that_its_ring_cannot_pass():
    sizes = [1 << 20] * 4 + [8 << 20] + [1 << 20]
    everything = {"reader": "mmap", "fused": range(len(sizes)), "layer_batch_size": 1}
    roomy = plan_of(sizes, host=1 << 30, **everything)
    assert roomy.device_arena_bytes < 8 << 20
    with pytest.raises(PlanError, match="cannot hold"):  # and is no plan that would break
        plan_of(sizes, host=20 << 20, running=roomy, **everything)
    anew = plan_of(sizes, host=1 << 30, running=roomy, **everything)
    passing = [batch.device_bytes for batch in anew.batches if not batch.device_resident]
    assert max(passing, default=0) <= anew.device_arena_bytes


def test_what_a_refusal_says_is_needed_is_the_least_of_all_readers(tmp_path):
    write_checkpoint(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(PlanError, match=r"at least 16 MiB are needed .* 16 MiB are reserved"):
        make_plan(checkpoint, CPU, budget=Budget(host=1 << 20))
    make_plan(checkpoint, CPU, budget=Budget(host=16 << 20))


def test_of_mapped_batches_only_what_is_copied_stays_while_decoding():
    plan = plan_of([1 << 20] * 4, host=1 << 30, reader="mmap", layer_batch_size=1)
    mixed = tuple(
        dataclasses.replace(batch, device_bytes=4096, device_resident=False)
        for batch in plan.batches
    )
    plan = dataclasses.replace(plan, batches=mixed, decode_residents=(1, 2))
    kept = plan.while_decoding().batches
    assert all(batch.uses_host_image for batch in kept)
    assert [batch.device_resident for batch in kept] == [False, True, True, False]
    assert not any(batch.host_resident for batch in kept)
