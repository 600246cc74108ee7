"""Plans: what they must hold to for any model and any budget, and what they say when there is none."""

import dataclasses
import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import CPU, GPU, write_checkpoint
from support.plans import plan_of

from layerstream.pipeline import Budget, Checkpoint, Plan, PlanError, Workload, make_plan
from layerstream.pipeline.residence import evenly
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
        "pinned": draw(some),
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
def test_pinned_layers_are_resident_where_computation_reads_them(request):
    try:
        plan = plan_of(**request)
    except PlanError:
        return
    for batch in plan.batches:
        if {f"layer{i}" for i in request["pinned"]}.isdisjoint(batch.layers):
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


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_residents_are_spreadevenly(numbers):
    among, count = numbers
    chosen = evenly(among, count)
    assert len(set(chosen)) == count
    assert all(0 <= i < among for i in chosen)
    gaps = [
        b - a for a, b in zip(chosen, [*chosen[1:], chosen[0] + among], strict=True)
    ]  # the last sweep's end meets the next one's beginning
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


def test_a_gpu_written_by_hand_is_planned_for_on_a_machine_without_one():
    sizes = [MIB] * 10
    plan = plan_of(sizes, GPU, host=16 * MIB + 6 * MIB, vram=69 * MIB, layer_batch_size=1)
    assert plan.device == "cuda:0"
    assert plan.device_memory.budget_bytes == 69 * MIB
    assert all(view.place is Place.DEVICE for batch in plan.batches for view in batch.tensors)
    on_device = [b for b in plan.batches if b.device_resident]
    on_host = [b for b in plan.batches if b.host_resident]
    assert (len(on_device), len(on_host)) == (2, 3)  # VRAM first, then host RAM
    assert plan.describe()


def test_the_refusal_names_the_side_the_largest_layer_and_the_sizes():
    with pytest.raises(PlanError, match=r"host budget of 17 MiB .* at least 24 MiB .*layer2"):
        plan_of([MIB, MIB, 8 * MIB, MIB], host=17 * MIB)
    with pytest.raises(PlanError, match=r"VRAM budget of 1 MiB .* at least 72 MiB .*layer2"):
        plan_of([MIB, MIB, 8 * MIB, MIB], GPU, host=64 * MIB, vram=MIB)


def test_a_budget_beyond_what_is_free_is_refused():
    little = dataclasses.replace(CPU, host_available_bytes=100 * MIB)
    with pytest.raises(PlanError, match=r"the budget of 200 MiB is more than the 100 MiB"):
        plan_of([MIB], little, host=200 * MIB)


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
    ("text", "nbytes"),
    [
        ("4GiB", 4 << 30),
        ("80 GB", 80 * 10**9),
        (" 1.5gib ", 3 << 29),
        ("512 MiB", 512 << 20),
        ("4096", 4096),
        ("4096B", 4096),
        (4096, 4096),
    ],
)
def test_a_budget_is_a_number_of_bytes_or_a_string_with_a_unit(text, nbytes):
    assert Budget(host=text).host_bytes(1) == Budget(vram=text).vram_bytes(1) == nbytes


@pytest.mark.parametrize(
    "nonsense",
    [
        "",
        "much",
        "4 GiBs",
        "-4GiB",
        "4,5GiB",
        "0",
        "0GiB",
        "GiB",
        "1e9",
        "9" * 400,
        0,
        -1,
        True,
        1.5,
    ],
)
def test_a_budget_that_is_no_size_is_refused_where_it_is_written(nonsense):
    with pytest.raises(PlanError, match="host budget"):
        Budget(host=nonsense)
    with pytest.raises(PlanError, match="VRAM budget"):
        Budget(vram=nonsense)


@pytest.mark.parametrize("field", ["batch_size", "prompt_tokens", "new_tokens"])
@pytest.mark.parametrize("nonsense", [0, -1, 1.5, "8", True, None])
def test_a_workload_that_makes_no_sense_is_refused(field, nonsense):
    with pytest.raises(PlanError, match=f"{field} is .*whole number from 1"):
        Workload(**{field: nonsense})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"reader": "telepathy"}, "reader 'telepathy' is unknown; use one of direct, mmap"),
        ({"reader": "throttled"}, "throttle_bytes_per_second go together"),
        ({"reader": "mmap", "throttle_bytes_per_second": 5.0}, "go together"),
        ({"reader": "throttled", "throttle_bytes_per_second": 0}, "more than nothing"),
        ({"reader": None, "throttle_bytes_per_second": -5.0}, "more than nothing"),
        ({"reader": None, "throttle_bytes_per_second": float("nan")}, "more than nothing"),
        ({"layer_batch_size": 0}, "layer_batch_size is 0"),
        ({"vram": MIB}, "the device is the CPU"),
        ({"sizes": []}, "holds no tensors"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused(arguments, says):
    with pytest.raises(PlanError, match=says):
        plan_of(**{"sizes": [MIB], **arguments})


def raw_plan():
    return json.loads(plan_of([MIB] * 3, host=64 * MIB).to_json())


def without(key):
    raw = raw_plan()
    del raw[key]
    return raw


def with_batch(**changes):
    raw = raw_plan()
    raw["batches"][1].update(changes)
    return raw


NOT_PLANS = {
    "not JSON": "nonsense",
    "empty": "",
    "null": "null",
    "a list": "[]",
    "brackets without end": "[" * 100_000,
    "another version": json.dumps({"version": 0}),
    "no version": json.dumps(without("version")),
    "a version of another type": json.dumps({**raw_plan(), "version": True}),
    "a field missing": json.dumps(without("batches")),
    "a field too many": json.dumps({**raw_plan(), "more": 1}),
    "a string for a number": json.dumps({**raw_plan(), "host_arena_bytes": "1"}),
    "a float for a count": json.dumps({**raw_plan(), "host_slots": 1.5}),
    "a bool for a count": json.dumps({**raw_plan(), "host_slots": True}),
    "an unknown reader": json.dumps({**raw_plan(), "reader": "telepathy"}),
    "a list for a string": json.dumps({**raw_plan(), "device": []}),
    "a number for a list": json.dumps({**raw_plan(), "notes": 1}),
    "a nonsensical workload": json.dumps({**raw_plan(), "workload": {"batch_size": 0}}),
    "a batch that is no batch": json.dumps({**raw_plan(), "batches": [1]}),
    "batches out of order": json.dumps(with_batch(index=2)),
    "an unknown place": json.dumps(with_batch(tensors=[{"place": "moon"}])),
    "more memory than its budget": json.dumps(
        {**raw_plan(), "host_memory": {**raw_plan()["host_memory"], "budget_bytes": 1}}
    ),
}


@pytest.mark.parametrize("text", NOT_PLANS.values(), ids=NOT_PLANS)
def test_what_is_not_a_plan_is_refused(text):
    with pytest.raises(PlanError, match=r"plan|workload"):
        Plan.from_json(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.sampled_from(sorted(raw_plan())),
)
def test_a_plan_with_garbage_in_a_field_is_refused_or_read_but_never_crashes(garbage, field):
    raw = {**raw_plan(), field: garbage}
    try:
        plan = Plan.from_json(json.dumps(raw))
    except PlanError:
        return
    assert Plan.from_json(plan.to_json()) == plan
