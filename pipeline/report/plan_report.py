"""Plans -> text: the decision and the predicted speed. ``plan_reasons`` has the reasons.

For timings see ``Timings.summary``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from layerstream.pipeline.machine.measurement import Origin
from layerstream.pipeline.planning.plan import MemoryUse, Plan, ReaderKind
from layerstream.pipeline.planning.prediction import Objective, SweepPrediction
from layerstream.pipeline.report.document import (
    Bar,
    Block,
    Drawing,
    Facts,
    Section,
    Table,
    as_markdown,
    as_text,
)
from layerstream.pipeline.report.html import as_html
from layerstream.pipeline.report.layer_map import LayerPlace, legend, memory_parts, place_of
from layerstream.pipeline.report.plan_reasons import reasons
from layerstream.stages.batch import LayerBatch
from layerstream.stages.text import format_bytes, format_seconds

__all__ = ["describe_plan", "html_report", "report_plan", "summarize_plan"]

_MAP_COLUMNS = 76


def _mark(plan: Plan, batch: LayerBatch) -> str:
    on_cpu = plan.on_cpu
    return {
        LayerPlace.DISK: ".",
        LayerPlace.DECODING: "*" if on_cpu else "+",
        LayerPlace.UNPACKED: "u",
        LayerPlace.HOST: "h",
        LayerPlace.DEVICE: "d",
    }[place_of(plan, batch)]


def describe_plan(plan: Plan) -> str:
    """The decision as text, on one screen."""
    return as_text([_decision(plan)])


def report_plan(plan: Plan, *, markdown: bool = False) -> str:
    """The decision and its reasons, with everything that is needed to check it by hand."""
    sections = [_decision(plan), *reasons(plan)]
    return as_markdown(sections) if markdown else as_text(sections)


def html_report(plan: Plan, *, style: str) -> str:
    """The same as ``report_plan`` as one HTML page, with ``style`` for its look."""
    sections = [_decision(plan), *reasons(plan)]
    return as_html(sections, title=f"layerstream plan: {plan.checkpoint}", style=style)


def summarize_plan(plan: Plan) -> dict[str, Any]:
    """The decision as plain data for JSON; each key carries its unit."""
    predicted, host, device = plan.prediction, plan.host_memory, plan.device_memory
    residents = [batch for batch in plan.batches if not batch.streamed]
    on_device = [batch for batch in residents if _mark(plan, batch) == "d"]
    return {
        "checkpoint": plan.checkpoint,
        "device": plan.device,
        "objective": predicted.objective,
        "workload": None if plan.workload is None else asdict(plan.workload),
        "layer_batch_size": plan.layer_batch_size,
        "layer_batches": len(plan.batches),
        "host_slots": plan.host_slots,
        "device_slots": plan.device_slots,
        "reader": plan.reader,
        "host_resident_layer_batches": len(residents) - len(on_device),
        "vram_resident_layer_batches": len(on_device),
        "unpacked_layer_batches": sum(batch.unpacked_bytes > 0 for batch in plan.batches),
        "decode_resident_layer_batches": len(plan.decode_residents),
        "kv_cache_on_host": plan.kv_cache_on_host,
        "beside_bytes": plan.overhead_bytes,
        "host_used_bytes": host.used_bytes,
        "host_budget_bytes": host.budget_bytes,
        "vram_used_bytes": device and device.used_bytes,
        "vram_budget_bytes": device and device.budget_bytes,
        "disk_bytes_per_sweep": plan.disk_bytes_per_sweep,
        "expert_bytes_per_step": plan.expert_bytes_per_step,
        "expert_cells": sum(each.cells for each in plan.experts),
        "experts": sum(each.experts for each in plan.experts),
        "expert_memory_bytes": host.expert_bytes,
        "adapter_bytes": (device or host).adapter_bytes,
        "predicted_first_sweep_seconds": predicted.first.seconds,
        "predicted_prefill_seconds": predicted.prefill.seconds,
        "predicted_sweep_seconds": predicted.decode.seconds,
        "predicted_request_seconds": predicted.request_seconds,
        "predicted_tokens_per_second": predicted.tokens_per_second,
        "bottleneck": predicted.decode.bottleneck,
        "ceiling_ratio": predicted.decode.ceiling,
        "assumed": [each.name for each in plan.inputs if each.origin is Origin.ASSUMED],
        "contended": [each.name for each in plan.inputs if each.origin is Origin.CONTENDED],
    }


def _decision(plan: Plan) -> Section:
    workload, requests = plan.workload, "weights alone"
    if workload is not None:
        tokens = f"{workload.prompt_tokens} prompt + {workload.new_tokens} new"
        requests = f"{workload.batch_size} x ({tokens}) tokens"
    size = format_bytes(
        plan.first_sweep_bytes + sum(e.experts * e.expert_bytes for e in plan.experts)
    )
    blocks: list[Block] = [
        Facts(pairs=list(_facts(plan))),
        Facts(pairs=list(_memory_facts(plan))),
        _layer_drawing(plan),
        Table(columns=_TIME_COLUMNS, rows=list(_time_rows(plan)), left=(0, len(_TIME_COLUMNS) - 1)),
        Facts(pairs=list(_speed_facts(plan))),
    ]
    return Section(
        title=f"{plan.checkpoint}: {size} of weights on {plan.device}, {requests}", blocks=blocks
    )


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    marks = [_mark(plan, batch) for batch in plan.batches]
    yield (
        "layer batch size",
        f"{plan.layer_batch_size}: {len(plan.batches)} layer batches, {_slots(plan)}",
    )
    how = f"{plan.reads_in_flight} requests of {format_bytes(plan.read_request_bytes)} in flight"
    yield "reader", plan.reader if plan.reader is ReaderKind.MMAP else f"{plan.reader}, {how}"
    streamed = sum(batch.streamed for batch in plan.batches)
    where = {"h": "in host RAM", "u": "in host RAM, unpacked", "d": "in VRAM"}
    residents = ", ".join(
        f"{marks.count(mark)} stay {side}" for mark, side in where.items() if mark in marks
    )
    yield (
        "every sweep",
        (
            f"reads {format_bytes(plan.disk_bytes_per_sweep)} in {streamed} layer batches; "
            f"{residents or 'none stays'}"
        ),
    )
    if plan.experts:
        yield "experts", _experts(plan)
    side, memory = next(iter(plan.memories.items()))
    if plan.decode_residents:
        yield "while decoding", f"{len(plan.decode_residents)} more stay in {side}"
    if nbytes := memory.adapter_bytes:
        yield "adapters", f"{format_bytes(nbytes)} of weights stay in {side}"
    if plan.kv_cache_on_host:
        yield "KV cache", "in host RAM, since VRAM cannot hold it; it travels with its layers"


def _experts(plan: Plan) -> str:
    cells = sum(each.cells for each in plan.experts)
    experts = sum(each.experts for each in plan.experts)
    step = format_bytes(plan.expert_bytes_per_step)
    learnt = all(each.usage is not None for each in plan.experts)
    why = "as past sweeps have shown" if learnt else "if routing is even (ASSUMED)"
    return (
        f"read on demand: {cells} of {experts} in {len(plan.experts)} layers stay in host RAM; a decoding step reads "
        f"{step} of them, {why}"
    )


def _memory_facts(plan: Plan) -> Iterator[tuple[str, str | Bar]]:
    for name, memory in plan.memories.items():
        yield name, _memory_bar(memory)
    if plan.overhead_bytes:
        size = format_bytes(plan.overhead_bytes)
        yield "in addition", f"{size} of code for the model, which is left free"


def _slots(plan: Plan) -> str:
    if not plan.host_arena_bytes and not plan.device_arena_bytes:
        return "no slots"
    sides = "" if plan.on_cpu else " on either side"
    return f"{plan.host_slots} slot{'s' if plan.host_slots > 1 else ''}{sides}"


def _memory_bar(memory: MemoryUse) -> Bar:
    parts = memory_parts(memory)
    sizes = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in parts.items())
    used, budget = format_bytes(memory.used_bytes), format_bytes(memory.budget_bytes)
    return Bar(
        shares={name: nbytes / memory.budget_bytes for name, nbytes in parts.items()},
        text=f"{used} of {budget}: {sizes}",
    )


def _layer_drawing(plan: Plan) -> Drawing:
    meanings = legend(plan)
    cells = [
        (
            str(place_of(plan, batch)),
            f"{batch.label}: {format_bytes(batch.read_bytes)}, {meanings[place_of(plan, batch)]}",
        )
        for batch in plan.batches
    ]
    return Drawing(
        lines=list(_layer_map(plan)),
        cells=cells,
        legend={str(place): meaning for place, meaning in meanings.items()},
    )


def _layer_map(plan: Plan) -> Iterator[str]:
    groups = [_mark(plan, batch) * len(batch.layers) for batch in plan.batches]
    gap = " " if any(len(group) > 1 for group in groups) else ""
    row = ""
    for group in groups:
        if row and len(row) + len(gap) + len(group) > _MAP_COLUMNS:
            yield row
            row = ""
        row += (gap if row else "") + group
    while len(row) > _MAP_COLUMNS:
        yield row[:_MAP_COLUMNS]
        row = row[_MAP_COLUMNS:]
    yield row
    yield f"one mark per layer{', layer batches apart' if gap else ''}"
    meanings = legend(plan)
    drawn = {place_of(plan, batch): _mark(plan, batch) for batch in plan.batches}
    yield "; ".join(f"{drawn[place]} {meanings[place]}" for place in LayerPlace if place in drawn)


_TIME_COLUMNS = ("predicted", "time", "read", "transfer", "compute", "hand-offs", "held back by")


def _time_rows(plan: Plan) -> Iterator[Sequence[str]]:
    predicted = plan.prediction
    late = plan.workload is not None and plan.at_first() != plan
    yield _time_row("first sweep" if late else "first sweep (loads what stays)", predicted.first)
    if late:
        yield _time_row("second sweep (loads what stays)", predicted.second)
    if plan.workload is None:
        yield _time_row("every further sweep", predicted.decode)
        return
    yield _time_row("prompt of a later request", predicted.prefill)
    yield _time_row("every further token", predicted.decode)


def _time_row(name: str, sweep: SweepPrediction) -> Sequence[str]:
    parts = (
        sweep.seconds,
        sweep.read_seconds,
        sweep.transfer_seconds,
        sweep.compute_seconds,
        sweep.overhead_seconds,
    )
    return (name, *map(format_seconds, parts), sweep.bottleneck)


def _speed_facts(plan: Plan) -> Iterator[tuple[str, str]]:
    predicted, sweep = plan.prediction, plan.prediction.decode
    if plan.workload is not None:
        loading_counts = predicted.objective is Objective.LATENCY
        yield (
            "speed",
            f"{predicted.tokens_per_second:.3g} tokens/s while decoding; "
            f"{format_seconds(predicted.request_seconds)} for a whole request"
            + (", loading included" if loading_counts else ""),
        )
    if any(each.origin is Origin.CONTENDED for each in plan.inputs):
        yield "caution", "measured on a BUSY machine: it may be several times as fast or as slow"
    stage_seconds = sweep.read_seconds + sweep.transfer_seconds + sweep.compute_seconds
    yield (
        "bottleneck",
        (
            f"{sweep.bottleneck}; one stage after another {format_seconds(stage_seconds)}, "
            f"overlapped at best {sweep.ceiling:.2f} times faster"
        ),
    )
