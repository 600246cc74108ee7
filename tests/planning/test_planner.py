"""Which plan is chosen, and what the planner says when there is none."""

import dataclasses

import pytest
from support.checkpoints import CPU, GPU, write_checkpoint
from support.plans import plan_of

from layerstream.pipeline import Budget, Checkpoint, PlanError, Workload, make_plan
from layerstream.pipeline.machine.measurement import ComputeRate
from layerstream.pipeline.planning import layout
from layerstream.pipeline.planning.layout import layout_batch

MIB = 1 << 20


def test_the_objective_decides_whether_loading_residents_is_worth_while():
    # Two tokens with a slow disk: mapped files in the page cache give the first one sooner.
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
    common = {"workload": Workload(prompt_tokens=1, new_tokens=2), "reader": None}
    latency = plan_of(sizes, hardware, **common, objective="latency")
    throughput = plan_of(sizes, hardware, **common, objective="throughput")
    assert latency.reader == "mmap"
    assert latency.prediction.first.seconds < 0.1
    assert latency.prediction.request_seconds == pytest.approx(
        latency.prediction.first.seconds + latency.prediction.decode.seconds
    )
    assert throughput.prediction.request_seconds == pytest.approx(
        throughput.prediction.prefill.seconds + throughput.prediction.decode.seconds
    )


@pytest.mark.parametrize(("free", "reader"), [(1024, "mmap"), (70, "direct")])
def test_an_equal_question_has_one_answer_whatever_the_page_cache_holds(free, reader):
    sizes = [2 * MIB, *[4 * MIB] * 16, 2 * MIB]
    hardware = dataclasses.replace(
        CPU,
        host_available_bytes=free * MIB,
        disk_bytes_per_second=1e8,
        mmap_bytes_per_second=0.7e8,
        compute=(ComputeRate(tokens=1, bytes_per_second=1e10),),
    )
    plans = [
        plan_of(
            sizes,
            dataclasses.replace(hardware, cached_bytes=share * sum(sizes) // 10),
            host=40 * MIB,
            workload=Workload(prompt_tokens=8, new_tokens=64),
            reader=None,
        )
        for share in (0, 5, 9, 10)
    ]
    assert {plan.reader for plan in plans} == {reader}
    assert len({(plan.batches, plan.host_slots, plan.decode_residents) for plan in plans}) == 1
    other = "read directly" if reader == "mmap" else "mapped"
    for plan in plans:
        (note,) = (note for note in plan.notes if f"; {other}, a sweep would take" in note)
        assert "and a request" in note
    first = [plan.prediction.first.seconds for plan in plans]
    assert first == sorted(first, reverse=True)  # what is cached need not be read
    assert (first[-1] < first[0] / 2) == (reader == "mmap")


def test_files_that_the_address_space_cannot_hold_are_read_directly_and_the_plan_says_so():
    sizes = [2 * MIB, *[4 * MIB] * 8, 2 * MIB]
    common = {"workload": Workload(), "reader": None}
    fitting = dataclasses.replace(CPU, cached_bytes=sum(sizes), address_space_bytes=64 * MIB)
    assert plan_of(sizes, fitting, **common).reader == "mmap"
    narrow = dataclasses.replace(fitting, address_space_bytes=32 * MIB)
    plan = plan_of(sizes, narrow, **common)
    assert plan.reader == "direct"
    assert {each.reader for each in plan.candidates} == {"direct"}
    assert any("address space (ulimit -v)" in note for note in plan.notes)
    with pytest.raises(PlanError, match=r"reader is mmap, .* address space"):
        plan_of(sizes, narrow, **{**common, "reader": "mmap"})


@pytest.mark.parametrize("hardware", [CPU, GPU], ids=["cpu", "gpu"])
def test_a_model_is_laid_out_once_for_each_size_whatever_else_is_tried(monkeypatch, hardware):
    laid_out = []

    def counted(layers, **arguments):
        laid_out.append([layer.name for layer in layers])
        return layout_batch(layers, **arguments)

    monkeypatch.setattr(layout, "layout_batch", counted)
    plan = plan_of(
        [2 * MIB] * 14,
        hardware,
        host=70 * MIB,
        vram=None if hardware is CPU else 200 * MIB,
        workload=Workload(prompt_tokens=8, new_tokens=8),
    )
    sizes = {each.layer_batch_size: each.batches for each in plan.candidates}
    assert plan.advice
    assert sorted(sizes) == [1, 2, 3, 4, 6, 8, 12]
    assert len(laid_out) == sum(sizes.values())


def test_an_unknown_objective_is_refused():
    with pytest.raises(PlanError, match="objective 'beauty' is unknown; use one of latency"):
        plan_of([MIB], objective="beauty")


def test_a_plan_records_the_trivial_plan_however_many_are_faster():
    sizes = [2 * MIB, *[4 * MIB] * 100, 2 * MIB]
    plan = plan_of(sizes, host=100 * MIB, workload=Workload(), reader=None)
    assert len(plan.candidates) <= 12
    assert any(each.name and each.layer_batch_size == 1 for each in plan.candidates)
    times = [each.request_seconds for each in plan.candidates if not each.chosen]
    assert times == sorted(times)


def test_the_refusal_names_the_side_the_largest_layer_and_the_sizes():
    with pytest.raises(PlanError, match=r"host budget of 17 MiB .* at least 24 MiB .*layer2"):
        plan_of([MIB, MIB, 8 * MIB, MIB], host=17 * MIB)
    with pytest.raises(PlanError, match=r"VRAM budget of 1 MiB .* at least 72 MiB .*layer2"):
        plan_of([MIB, MIB, 8 * MIB, MIB], GPU, host=64 * MIB, vram=MIB)


def test_a_budget_beyond_what_is_free_is_refused():
    little = dataclasses.replace(CPU, host_available_bytes=100 * MIB)
    with pytest.raises(PlanError, match=r"the budget of 200 MiB is more than the 100 MiB"):
        plan_of([MIB], little, host=200 * MIB)
    # Free memory is not known any more exactly than this.
    assert plan_of([MIB], little, host=110 * MIB).host_memory.budget_bytes == 110 * MIB


def test_without_a_budget_a_tenth_of_free_memory_is_left_free():
    some = dataclasses.replace(CPU, host_available_bytes=100 * MIB)
    assert plan_of([MIB], some).host_memory.budget_bytes == 90 * MIB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reader": "telepathy"}, "reader 'telepathy' is unknown; use one of direct, mmap"),
        ({"reader": "throttled"}, "throttle_bytes_per_second go together"),
        ({"reader": "mmap", "throttle_bytes_per_second": 5.0}, "go together"),
        ({"reader": "throttled", "throttle_bytes_per_second": 0}, "number above zero"),
        ({"reader": None, "throttle_bytes_per_second": -5.0}, "number above zero"),
        ({"reader": None, "throttle_bytes_per_second": float("nan")}, "number above zero"),
        ({"reader": None, "throttle_bytes_per_second": float("inf")}, "number above zero"),
        ({"reader": None, "throttle_bytes_per_second": "1GB/s"}, "number above zero"),
        ({"layer_batch_size": 0}, "layer_batch_size is 0"),
        ({"layer_batch_size": 1.5}, "layer_batch_size is 1.5"),
        ({"layer_batch_size": "4"}, "layer_batch_size is '4'"),
        ({"slots": True}, "slots is True"),
        ({"slots": 2.0}, "slots is 2.0"),
        ({"vram": MIB}, "the device is the CPU"),
        ({"sizes": []}, "holds no tensors"),
    ],
)
def test_an_invalid_argument_is_refused(arguments, message):
    with pytest.raises(PlanError, match=message):
        plan_of(**{"sizes": [MIB], **arguments})


def test_the_memory_that_a_refusal_names_is_the_least_of_all_readers(tmp_path):
    write_checkpoint(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(PlanError, match=r"at least 16 MiB are needed .* 16 MiB are reserved"):
        make_plan(checkpoint, CPU, budget=Budget(host=1 << 20))
    make_plan(checkpoint, CPU, budget=Budget(host=16 << 20))
