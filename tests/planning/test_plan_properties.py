"""What holds for every plan, whatever the model, the machine and the budgets."""

import math
import re
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import CPU, GPU
from support.plans import plan_of

from layerstream.pipeline import Budget, Hardware, Plan, PlanError, Workload
from layerstream.pipeline.machine.measurement import ComputeRate
from layerstream.pipeline.planning.workload_memory import estimate_memory
from layerstream.pipeline.report.plan_report import report_plan
from layerstream.stages.batch import Place

MIB = 1 << 20


byte_sizes = st.integers(1, 4 * MIB).map(lambda n: 2 * n)


@st.composite
def fitting_arguments(draw):
    """Arguments of plan_of with budgets around the size of the model."""
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


@given(fitting_arguments())
def test_a_plan_never_exceeds_a_budget_or_it_is_refused_with_need_have_and_remedy(arguments):
    try:
        plan = plan_of(**arguments)
    except PlanError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        says = r"budget of .* cannot .* at least .* are needed .* raise the budget"
        assert re.search(says, refusal)
        return
    assert plan.host_memory.used_bytes <= arguments["host"]
    if arguments["vram"] is not None:
        assert plan.device_memory.used_bytes <= arguments["vram"]
    # The use that it reports is what running it takes.
    on_cpu = arguments["hardware"] is CPU
    host = [b.host_bytes for b in plan.batches if b.host_resident]
    device = [b.device_bytes for b in plan.batches if b.device_resident]
    taken = plan.host_arena_bytes + sum(host)
    vram = plan.device_arena_bytes + sum(device)
    assert plan.host_memory.used_bytes >= taken + (vram if on_cpu else 0)
    assert on_cpu or plan.device_memory.used_bytes >= vram


@given(fitting_arguments())
def test_every_layer_is_in_one_batch_in_order_and_every_batch_fits_its_ring(arguments):
    try:
        plan = plan_of(**arguments)
    except PlanError:
        return
    names = [name for batch in plan.batches for name in batch.layers]
    assert names == [f"layer{i}" for i in range(len(arguments["sizes"]))]
    tensors = Counter(view.name for batch in plan.batches for view in batch.tensors)
    assert tensors == Counter(f"{name}.w" for name in names)
    maps = arguments["hardware"] is CPU and plan.reader == "mmap"
    for batch in plan.batches:
        if not (batch.host_resident or maps):
            assert batch.host_bytes <= plan.host_arena_bytes
        if not batch.device_resident:
            assert batch.device_bytes <= plan.device_arena_bytes


@given(fitting_arguments())
def test_always_resident_layers_are_resident_where_computation_reads_them(arguments):
    try:
        plan = plan_of(**arguments)
    except PlanError:
        return
    for batch in plan.batches:
        if {f"layer{i}" for i in arguments["always_resident"]}.isdisjoint(batch.layers):
            continue
        for view in batch.tensors:
            if view.place is Place.DEVICE:
                assert batch.device_resident
            elif plan.reader != "mmap":
                assert batch.host_resident


@given(fitting_arguments())
def test_a_plan_written_to_json_is_read_back_equal(arguments):
    try:
        plan = plan_of(**arguments, workload=Workload())
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
def any_arguments(draw):
    """Arguments of plan_of of any kind, valid one by one."""
    sizes = draw(st.lists(byte_sizes, min_size=1, max_size=12))
    heads = draw(st.sampled_from([1, 4]))
    config = {
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
        "config": draw(st.none() | st.just(config)),
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


@given(any_arguments())
def test_any_arguments_give_a_plan_within_the_budgets_or_a_refusal_that_says_what_is_missing(
    arguments,
):
    hardware = arguments["hardware"]
    try:
        plan = plan_of(**arguments)
    except PlanError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert re.search(
            r"budget of \S+ \S+?(?:, of which \S+ \S+ are free beside code loaded for the model,)? (cannot hold one layer( batch of \d blocks)? at a time: at least \S+ \S+ are needed .* raise the "
            r"budget|is more than the \S+ \S+ of (host RAM|VRAM) that are free; lower it)",
            refusal,
        )
        return
    free = hardware.host_available_bytes + arguments["held_bytes"]
    given_host = Budget(host=arguments["host"]).host_bytes(free)
    assert plan.host_memory.used_bytes <= (free if given_host is None else given_host)
    # What code has taken is not free any more. With a given budget, the page cache may be why there seems to be less.
    uncertain = 0 if given_host is None else 16 * MIB
    assert plan.host_memory.used_bytes <= hardware.host_available_bytes + uncertain
    if hardware.vram_free_bytes is not None:
        given_vram = Budget(vram=arguments["vram"]).vram_bytes(hardware.vram_free_bytes)
        limit = hardware.vram_free_bytes if given_vram is None else given_vram
        assert plan.device_memory.used_bytes <= limit
    names = [name for batch in plan.batches for name in batch.layers]
    assert names == [f"layer{i}" for i in range(len(arguments["sizes"]))]
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.describe()
    assert report_plan(plan)
    times = [sweep.seconds for sweep in (plan.prediction.first, plan.prediction.decode)]
    assert all(0 <= each < math.inf for each in times)


@given(any_arguments())
def test_decode_residents_fit_in_the_memory_of_the_prompts_activations(arguments):
    arguments["config"] = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    arguments["workload"] = Workload(prompt_tokens=4096)
    try:
        plan = plan_of(**arguments)
    except PlanError:
        return
    memory = estimate_memory(arguments["config"], arguments["workload"])
    freed = memory.prefill_bytes - memory.decode_bytes
    batches = [plan.batches[index] for index in plan.decode_residents]
    assert all(batch.streamed for batch in batches)
    if plan.device_memory is None:
        used = sum(b.device_bytes + (b.host_bytes if b.uses_host_image else 0) for b in batches)
        side = plan.host_memory
    else:
        used, side = sum(b.device_bytes for b in batches), plan.device_memory
    assert side.used_bytes + used <= side.budget_bytes + max(freed, 0)
