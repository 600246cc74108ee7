"""Checkpoint + Hardware + Workload + Budget -> Plan. Pure: no file and no device is touched.

Every reasonable layer batch size, slot count and reader is fitted into the budgets (``residence``), and its time
predicted (``pricing``); the fastest is chosen. The plan also records its prediction and the alternatives.
"""

import math
from collections.abc import Sequence

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.layers import group_layers
from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.planning.advice import advise
from layerstream.pipeline.planning.assumptions import sizes_of
from layerstream.pipeline.planning.candidates import PricedChoice, search
from layerstream.pipeline.planning.layout import PlannedLayer, planned_layers
from layerstream.pipeline.planning.placement import Arenas
from layerstream.pipeline.planning.plan import Budget, Plan, PlannedFile, ReaderKind, Workload
from layerstream.pipeline.planning.prediction import Candidate, Objective
from layerstream.pipeline.planning.problem import Problem
from layerstream.pipeline.planning.workload_memory import WorkloadMemory, estimate_memory
from layerstream.stages.errors import PlanError

__all__ = ["make_plan"]

# The best, within noise, on all disks tried, from a virtual one to NVMe; a larger size only delays the last block of
# a batch.
_REQUEST_BYTES = 8 << 20
_REQUESTS = 4
# Candidates that a plan records, besides the trivial one.
_TOLD = 11


def make_plan(
    checkpoint: Checkpoint,
    hardware: Hardware,
    *,
    budget: Budget | None = None,
    workload: Workload | None = None,
    objective: Objective | str = Objective.LATENCY,
    layers: Sequence[PlannedLayer] | None = None,
    memory: WorkloadMemory | None = None,
    reader: ReaderKind | str | None = None,
    throttle_bytes_per_second: float | None = None,
    layer_batch_size: int | None = None,
    slots: int | None = None,
    held_bytes: int = 0,
    running: Plan | None = None,
) -> Plan:
    """Decide how ``checkpoint`` is streamed on ``hardware``.

    In every candidate, what slots leave of the budgets goes to residents: VRAM first, then host RAM. Of candidates
    with equal predicted times, the one that reads the least from disk is chosen.

    Args:
        checkpoint: The weight files.
        hardware: The machine, probed or written by hand.
        budget: Memory that may be used; by default what is free, less a tenth.
        workload: The expected requests; None reserves nothing, and predicts the time of sweeps alone.
        objective: "latency" counts the first sweep, "throughput" only what repeats.
        layers: What to stream, in execution order; by default all tensors, grouped by their names.
        memory: Of the workload, if it was measured; by default it is estimated from config.json.
        reader: "direct", "mmap" or "throttled"; by default the faster of the first two. With a host budget
            given, the page cache counts for what it holds now, and is not expected to hold more.
        throttle_bytes_per_second: The rate of the throttled reader.
        layer_batch_size: Blocks per layer batch, instead of the planner's choice.
        slots: On the host and on the device each, instead of the planner's choice.
        held_bytes: Host memory that loading code for this model took. It is not the pipeline's, so no plan is
            refused because of it, but residents leave it free.
        running: The plan of a running pipeline, which is to switch to the new one: its layer batches, slots, rings and
            reader stay, and so does the place of the KV cache, since running requests have theirs there.

    Raises:
        PlanError: No plan fits the budget, or an argument makes no sense.
    """
    if running is not None:
        reader, throttle_bytes_per_second = running.reader, running.throttle_bytes_per_second
        layer_batch_size, slots = running.layer_batch_size, running.host_slots
    problem = Problem(
        checkpoint=checkpoint,
        hardware=hardware,
        budget=budget or Budget(),
        workload=workload,
        objective=_objective(objective),
        layers=tuple(layers or planned_layers(checkpoint, group_layers(checkpoint))),
        memory=_memory(checkpoint, workload, memory),
        reader=_reader(reader, throttle_bytes_per_second),
        throttle_bytes_per_second=throttle_bytes_per_second,
        layer_batch_size=layer_batch_size,
        slots=slots,
        held_bytes=held_bytes,
        rings=None
        if running is None
        else Arenas(running.host_arena_bytes, running.device_arena_bytes),
        kv_on_host=None if running is None else running.kv_cache_on_host,
    )
    return _plan(problem, search(problem))


def _plan(problem: Problem, choices: Sequence[PricedChoice]) -> Plan:
    """The plan for the first of ``choices``, which records the others."""
    best = choices[0]
    placement, (host_memory, device_memory) = best.placement, best.memory
    return Plan(
        checkpoint=str(problem.checkpoint.path),
        files=tuple(
            PlannedFile(path=str(file.path), nbytes=file.size_bytes)
            for file in problem.checkpoint.files
        ),
        device=problem.hardware.device,
        reader=placement.reader,
        throttle_bytes_per_second=problem.throttle_bytes_per_second,
        read_request_bytes=_REQUEST_BYTES,
        reads_in_flight=_REQUESTS,
        layer_batch_size=placement.size,
        host_slots=placement.slots,
        device_slots=placement.slots,
        host_arena_bytes=placement.arenas.host,
        device_arena_bytes=placement.arenas.device,
        host_memory=host_memory,
        device_memory=device_memory,
        batches=tuple(placement.batches),
        workload=problem.workload,
        workload_bytes=problem.workload_bytes,
        kv_cache_bytes=0 if problem.memory is None else problem.memory.kv_bytes,
        overhead_bytes=best.frame.held_bytes,
        kv_cache_on_host=best.frame.kv_on_host_bytes > 0,
        always_resident=tuple(
            batch.index
            for batch in placement.batches
            if not best.frame.always_resident.isdisjoint(batch.layers)
        ),
        decode_residents=tuple(
            then.index
            for now, then in zip(placement.batches, placement.decode_batches, strict=True)
            if now.streamed and not then.streamed
        ),
        prediction=best.prediction,
        inputs=(
            *sizes_of(problem.hardware),
            *problem.rates.used(kv_on_host=best.frame.kv_on_host_bytes > 0),
        ),
        candidates=tuple(_told(choice, chosen=choice is best) for choice in _telling(choices)),
        advice=advise(problem, best),
        notes=_notes(problem, best),
    )


def _memory(
    checkpoint: Checkpoint, workload: Workload | None, measured: WorkloadMemory | None
) -> WorkloadMemory | None:
    if workload is None or measured is not None:
        return measured
    return estimate_memory(checkpoint.config, workload)


def _notes(problem: Problem, best: PricedChoice) -> tuple[str, ...]:
    """Assumptions, and explanations of the plan."""
    notes = []
    if best.placement.reader is ReaderKind.MMAP and problem.reader is None:
        notes.append("the files are mapped: computation reads them in the page cache")
    if problem.memory is not None and problem.workload is not None:
        how = (
            "measured on the meta device"
            if problem.memory.measured
            else "estimated from config.json"
        )
        w = problem.workload
        notes.append(
            f"KV cache and activations are {how} for {w.batch_size} x ({w.prompt_tokens} + "
            f"{w.new_tokens}) tokens"
        )
    elif problem.workload is not None:
        notes.append(
            "config.json does not tell the size of KV cache and activations: nothing is reserved for them"
        )
    return tuple(notes)


def _telling(choices: Sequence[PricedChoice]) -> list[PricedChoice]:
    """The best of each layer batch size and reader, and the trivial plan."""
    best = choices[0].placement
    kinds: dict[tuple[int, str], PricedChoice] = {}
    for choice in choices:
        kinds.setdefault((choice.placement.size, choice.placement.reader), choice)
    told = list(kinds.values())[:_TOLD]
    trivial = [c for c in choices if c.name and c.placement.reader is best.reader]
    told += sorted(trivial, key=lambda choice: choice.placement.size)[:1]
    return [choice for choice in choices if any(choice is each for each in told)]


def _told(choice: PricedChoice, *, chosen: bool) -> Candidate:
    placement, need = choice.placement, choice.need
    return Candidate(
        name=choice.name,
        layer_batch_size=placement.size,
        slots=placement.slots,
        reader=placement.reader,
        host_used_bytes=need.host,
        vram_used_bytes=need.vram,
        resident_batches=sum(not batch.streamed for batch in placement.batches),
        batches=len(placement.batches),
        sweep_seconds=choice.prediction.decode.seconds,
        request_seconds=choice.prediction.request_seconds,
        chosen=chosen,
    )


def _objective(given: Objective | str) -> Objective:
    if given not in list(Objective):
        raise PlanError(f"objective {given!r} is unknown; use one of {', '.join(Objective)}")
    return Objective(given)


def _reader(problem: ReaderKind | str | None, rate: float | None) -> ReaderKind | None:
    # Written so that NaN is refused too; JSON knows no infinity.
    if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate < math.inf):
        raise PlanError(
            f"throttle_bytes_per_second is {rate!r}, but must be a number above nothing"
        )
    if problem is None:
        return None if rate is None else ReaderKind.THROTTLED
    if problem not in list(ReaderKind):
        raise PlanError(f"reader {problem!r} is unknown; use one of {', '.join(ReaderKind)}")
    kind = ReaderKind(problem)
    if (kind is ReaderKind.THROTTLED) != (rate is not None):
        raise PlanError("the throttled reader and throttle_bytes_per_second go together")
    return kind
