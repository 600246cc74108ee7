"""Checkpoint + Hardware + Workload + Budget -> Plan. Pure: no I/O.

Every reasonable layer batch size, slot count and reader is fitted into the budgets (``placement``), and its time
predicted (``cost_model``); the fastest is chosen. The plan also records its prediction and the alternatives.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.layers import group_layers
from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.planning.adapter_size import AdapterSize
from layerstream.pipeline.planning.advice import advise
from layerstream.pipeline.planning.assumptions import memory_inputs
from layerstream.pipeline.planning.candidates import search
from layerstream.pipeline.planning.choices import PlanChoices, reader_kind
from layerstream.pipeline.planning.expert_cells import ExpertCells
from layerstream.pipeline.planning.kernels import Kernels, kernels_of
from layerstream.pipeline.planning.layout import Layouts
from layerstream.pipeline.planning.placement import ArenaBytes
from layerstream.pipeline.planning.plan import Budget, Plan, PlannedFile, ReaderKind, Workload
from layerstream.pipeline.planning.plan_notes import encodings_in, notes_on
from layerstream.pipeline.planning.planned_layer import PlannedLayer
from layerstream.pipeline.planning.planned_layers import planned_layers
from layerstream.pipeline.planning.prediction import Candidate, Objective
from layerstream.pipeline.planning.priced_candidate import PricedCandidate
from layerstream.pipeline.planning.problem import READ_REQUEST_BYTES, READS_IN_FLIGHT, Problem
from layerstream.pipeline.planning.workload_memory import (
    WorkloadMemory,
    estimate_memory,
    has_sinks,
)
from layerstream.stages.errors import PlanError

__all__ = ["make_plan", "plan_model"]

# Candidates that a plan records, besides the trivial one.
_MOST_RECORDED = 11


# Longer than 60 lines: it names and explains each argument.
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
    kernels: Kernels | str = Kernels.EXACT,
    held_bytes: int = 0,
    code_to_load_bytes: int = 0,
    adapters: AdapterSize | None = None,
    running: Plan | None = None,
) -> Plan:
    """Decide how ``checkpoint`` is streamed on ``hardware``.

    Residents fill the budgets, VRAM first. Of equally fast candidates, the one that reads the least is chosen.

    Args:
        checkpoint: The weight files.
        hardware: The machine, probed or written by hand.
        budget: Memory that may be used; by default what is free, less a tenth.
        workload: The expected requests; None reserves nothing, and predicts the time of sweeps alone.
        objective: "latency" counts the first sweep, "throughput" only what repeats.
        layers: What to stream, in execution order; by default all tensors, grouped by their names.
        memory: Of the workload, if it was measured; by default it is estimated from config.json.
        reader: "direct", "mmap" or "throttled"; by default the faster of the first two, whatever the page cache holds now:
            memory that is free besides the plan can hold mapped files, also with a host budget.
        throttle_bytes_per_second: The rate of the throttled reader.
        layer_batch_size: Blocks per layer batch, instead of the planner's choice.
        slots: On the host and on the device each, instead of the planner's choice.
        kernels: "exact", "fused" or "auto": see ``Kernels``.
        held_bytes: Host memory that loading code for this model took; residents leave it free, no plan is refused.
        code_to_load_bytes: The same of code that is not loaded yet; see ``overheads.code_bytes``.
        adapters: What the model's adapters take; they are resident.
        running: The plan of a running pipeline, which is to switch to the new one: batches, reader, kernels, cells of experts
            and place of the KV cache stay for its requests; and so do slots, unless nothing fits then.

    Raises:
        PlanError: No plan fits the budget, or an argument is invalid.
    """
    choices = PlanChoices(
        budget=budget or Budget(),
        workload=workload,
        objective=Objective.of(objective),
        reader=reader_kind(reader, throttle_bytes_per_second),
        throttle_bytes_per_second=throttle_bytes_per_second,
        layer_batch_size=layer_batch_size,
        slots=slots,
        kernels=kernels_of(kernels),
    )
    return plan_model(
        checkpoint,
        hardware,
        choices,
        layers=layers or planned_layers(checkpoint, group_layers(checkpoint)),
        memory=_memory(checkpoint, workload, memory),
        loaded_code_bytes=held_bytes,
        code_to_load_bytes=code_to_load_bytes,
        adapters=adapters or AdapterSize(),
        running=running,
    )


def plan_model(
    checkpoint: Checkpoint,
    hardware: Hardware,
    choices: PlanChoices,
    *,
    layers: Sequence[PlannedLayer],
    memory: WorkloadMemory | None,
    loaded_code_bytes: int,
    code_to_load_bytes: int = 0,
    adapters: AdapterSize,
    running: Plan | None = None,
) -> Plan:
    """The plan for a model, all that is known of it given; see ``make_plan``."""
    make_layouts = partial(
        Layouts,
        file_bytes=[file.size_bytes for file in checkpoint.files],
        reads_host_images=hardware.device == "cpu",
    )
    problem = Problem(
        checkpoint=checkpoint,
        hardware=hardware,
        choices=choices if running is None else _as_running(choices, running),
        layouts=make_layouts(layers),
        memory=memory,
        loaded_code_bytes=loaded_code_bytes,
        code_to_load_bytes=code_to_load_bytes,
        adapters=adapters,
        **({} if running is None else _fixed_by(running)),
    )
    if not problem.fused_tokens:
        problem = replace(problem, layouts=make_layouts(list(map(_for_exact_kernels, layers))))
    try:
        candidates = search(problem)
    except PlanError:
        if running is None:
            raise
        # Nothing fits beside the rings that there are: with others, the pipeline is opened anew.
        freed = replace(problem.choices, slots=choices.slots)
        candidates = search(problem := replace(problem, choices=freed, arenas=None))
    return _plan(problem, candidates)


def _for_exact_kernels(layer: PlannedLayer) -> PlannedLayer:
    return replace(layer, tile_bytes=max(layer.tile_bytes, layer.exact_tile_bytes))


def _as_running(choices: PlanChoices, running: Plan) -> PlanChoices:
    """``choices`` with what a running pipeline cannot change."""
    return replace(
        choices,
        reader=running.reader,
        throttle_bytes_per_second=running.throttle_bytes_per_second,
        layer_batch_size=running.layer_batch_size,
        slots=running.host_slots,
    )


def _plan(problem: Problem, candidates: Sequence[PricedCandidate]) -> Plan:
    """The plan for the first of ``candidates``, with a record of the others."""
    best = candidates[0]
    placement, (host_memory, device_memory) = best.placement, best.memory
    return Plan(
        checkpoint=str(problem.checkpoint.path),
        files=tuple(
            PlannedFile(path=str(file.path), nbytes=file.size_bytes, version=file.version)
            for file in problem.checkpoint.files
        ),
        device=problem.hardware.device,
        reader=placement.reader,
        throttle_bytes_per_second=problem.choices.throttle_bytes_per_second,
        read_request_bytes=READ_REQUEST_BYTES,
        reads_in_flight=READS_IN_FLIGHT,
        layer_batch_size=placement.size,
        host_slots=placement.slots,
        device_slots=placement.slots,
        host_arena_bytes=placement.arenas.host,
        device_arena_bytes=placement.arenas.device,
        host_memory=host_memory,
        device_memory=device_memory,
        batches=tuple(placement.batches),
        workload=problem.choices.workload,
        workload_bytes=problem.workload_bytes,
        kv_cache_bytes=0 if problem.memory is None else problem.memory.kv_bytes,
        overhead_bytes=problem.code_bytes,
        kv_cache_on_host=best.placer.kv_on_host_bytes > 0,
        always_resident=tuple(
            batch.index
            for batch in placement.batches
            if not best.placer.always_resident.isdisjoint(batch.layers)
        ),
        decode_residents=tuple(
            batch.index
            for batch, decoding in zip(placement.batches, placement.decode_batches, strict=True)
            if batch.streamed and not decoding.streamed
        ),
        prediction=best.prediction,
        inputs=(
            *memory_inputs(problem.hardware),
            *problem.rates.used_inputs(
                kv_on_host=best.placer.kv_on_host_bytes > 0, encodings=encodings_in(problem.layers)
            ),
        ),
        candidates=tuple(_record(each, chosen=each is best) for each in _to_record(candidates)),
        advice=advise(problem, best),
        notes=notes_on(problem, candidates),
        experts=tuple(itertools.chain.from_iterable(placement.expert_sets.values())),
        shared_expert_cells=placement.expert_cells.shared,
        kv_cache_device_bytes=problem.kv_on_device_bytes(best.placer.kv_on_host_bytes),
        unpacked_once_bytes=problem.unpacked_once.nbytes,
        fused_tokens=problem.fused_tokens,
    )


def _fixed_by(running: Plan) -> dict[str, Any]:
    """What a running pipeline cannot change, as arguments of ``Problem``."""
    return {
        "arenas": ArenaBytes(running.host_arena_bytes, running.device_arena_bytes),
        "kv_on_host": running.kv_cache_on_host,
        "running_fused_tokens": running.fused_tokens,
        "running_once_bytes": running.unpacked_once_bytes,
        "expert_cells": ExpertCells(
            own=tuple(each.cells for each in running.experts), shared=running.shared_expert_cells
        ),
    }


def _memory(
    checkpoint: Checkpoint, workload: Workload | None, measured: WorkloadMemory | None
) -> WorkloadMemory | None:
    if workload is None or measured is not None:
        return measured
    return estimate_memory(checkpoint.config, workload, sinks=has_sinks(checkpoint.tensors))


def _to_record(candidates: Sequence[PricedCandidate]) -> list[PricedCandidate]:
    """The best of each layer batch size and reader, and the trivial plan."""
    best = candidates[0].placement
    kinds: dict[tuple[int, str], PricedCandidate] = {}
    for candidate in candidates:
        kinds.setdefault((candidate.placement.size, candidate.placement.reader), candidate)
    recorded = list(kinds.values())[:_MOST_RECORDED]
    trivial = [each for each in candidates if each.name and each.placement.reader is best.reader]
    recorded += sorted(trivial, key=lambda candidate: candidate.placement.size)[:1]
    return [candidate for candidate in candidates if any(candidate is each for each in recorded)]


def _record(candidate: PricedCandidate, *, chosen: bool) -> Candidate:
    placement, need = candidate.placement, candidate.need
    return Candidate(
        name=candidate.name,
        layer_batch_size=placement.size,
        slots=placement.slots,
        reader=placement.reader,
        host_used_bytes=need.host,
        vram_used_bytes=need.vram,
        resident_batches=sum(not batch.streamed for batch in placement.batches),
        batches=len(placement.batches),
        sweep_seconds=candidate.prediction.decode.seconds,
        request_seconds=candidate.prediction.request_seconds,
        chosen=chosen,
    )
