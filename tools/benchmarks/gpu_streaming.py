"""Rows of the GPU benchmark: copies, page-locking, and streamed layers."""

import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from layerstream.pipeline import Budget, Checkpoint, Hardware, Pipeline, Plan, make_plan
from layerstream.stages.compute import Batch
from layerstream.stages.text import format_bytes
from layerstream.tools.benchmarks.accelerator import PeakMemory
from layerstream.tools.benchmarks.copying import measure_copy_rate, measure_page_locking
from layerstream.tools.benchmarks.gpu_bench import MIB, Bench, NotMeasuredError, RowResult
from layerstream.tools.benchmarks.overlap import Lanes, draw_lanes, overlap_share, trace_lanes
from layerstream.tools.benchmarks.raw_read import raw_read

__all__ = [
    "compare_page_locking",
    "copied_bytes",
    "measure_bandwidth",
    "measure_overlap",
    "reader_of",
    "record_budget_share",
    "report_peak_vram",
    "stream_from_disk",
    "stream_from_ram",
    "streaming_plan",
]

# Allocators round the ring up by at most this.
_ROUNDING_BYTES = 8 * MIB
# A sweep from disk reads layers for about this time, or all layers if the disk is fast.
_DISK_SECONDS = 5.0
_DISK_SWEEPS = 3


def measure_bandwidth(bench: Bench) -> RowResult:
    """Measure the H2D bandwidth by block size, pinned and pageable."""
    rates = {
        kind: {
            size: measure_copy_rate(bench.accelerator, block_bytes=size, pinned=pinned)
            for size in bench.block_bytes
        }
        for kind, pinned in (("pinned", True), ("pageable", False))
    }
    best = {kind: max(by_block.values()) for kind, by_block in rates.items()}
    bench.found.update(best)
    return RowResult(
        ratio=best["pinned"] / best["pageable"],
        says=f"{best['pinned'] / 1e9:.1f} GB/s pinned, {best['pageable'] / 1e9:.1f} GB/s pageable",
        details={f"{kind}_bytes_per_second_by_block_bytes": each for kind, each in rates.items()},
    )


def compare_page_locking(bench: Bench) -> RowResult:
    """Compare page-locking by the library with torch's."""
    cost = measure_page_locking(bench.accelerator, nbytes=bench.pin_bytes)
    return RowResult(
        ratio=cost.registered_bytes_per_second / cost.torch_bytes_per_second,
        says=f"{(1 << 30) / cost.registered_bytes_per_second:.2f} s per GiB registered, "
        f"{(1 << 30) / cost.torch_bytes_per_second:.2f} s by torch's allocator",
        details={
            "registered_bytes_per_second": cost.registered_bytes_per_second,
            "torch_bytes_per_second": cost.torch_bytes_per_second,
        },
    )


def reader_of(bench: Bench, *, on_host: bool) -> str:
    """The reader: weights that stay in host RAM are read once, from the page cache, where making the files left them.

    On a CPU mapped files are used in place, so a rehearsal would not read; there it is always "direct".
    """
    return "mmap" if on_host and bench.accelerator.is_gpu else "direct"


def streaming_plan(bench: Bench, *, on_host: bool) -> Plan:
    """Make a plan with three slots on host and device, no layer in VRAM, and all or none resident in host RAM."""
    checkpoint = Checkpoint.open(bench.folder)
    hardware = asyncio.run(Hardware.probe(checkpoint, device=bench.device))
    reader = reader_of(bench, on_host=on_host)
    unbounded = make_plan(checkpoint, hardware, reader=reader, layer_batch_size=1)
    batches = unbounded.batches
    host = unbounded.host_memory.reserved_bytes + 3 * max(batch.host_bytes for batch in batches)
    vram = None
    if unbounded.device_memory is not None:
        vram = unbounded.device_memory.reserved_bytes + 3 * max(
            batch.device_bytes for batch in batches
        )
        vram += _ROUNDING_BYTES
    if on_host:
        host += sum(batch.host_bytes for batch in batches)
        if host > hardware.host_available_bytes:
            raise NotMeasuredError(
                f"{format_bytes(host)} of RAM are needed and {format_bytes(hardware.host_available_bytes)} are free"
            )
    plan = make_plan(
        checkpoint,
        hardware,
        budget=Budget(vram=vram, host=host),
        reader=reader,
        layer_batch_size=1,
        slots=3,
    )
    if on_host and any(batch.streamed for batch in plan.batches):
        raise NotMeasuredError("some layers would be read from disk")
    return plan


def _multiply(tensors: Mapping[str, torch.Tensor], repeats: int) -> None:
    """Multiply each matrix with a vector, which reads every byte ``repeats`` times."""
    for tensor in tensors.values():
        if tensor.dim() == 2:  # noqa: PLR2004 - a matrix
            vector = torch.ones((tensor.shape[1], 1), dtype=tensor.dtype, device=tensor.device)
            for _ in range(repeats):
                torch.mm(tensor, vector)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SweepResult:
    seconds: float
    """Seconds of all sweeps together."""
    peak: PeakMemory
    stages: Mapping[str, Any]


def _run_sweeps(
    bench: Bench,
    plan: Plan,
    *,
    sweeps: int,
    repeats: int = 1,
    route: Sequence[int] | None = None,
    trace_path: Path | None = None,
) -> tuple[_SweepResult, Lanes]:
    """Run sweeps on a warm pipeline, and one more under the profiler if ``trace_path`` is given."""

    def compute(batch: Batch, state: None) -> None:
        _multiply(batch.tensors, repeats)
        return state

    async def main(peak: Callable[[], PeakMemory]) -> tuple[_SweepResult, Lanes]:
        async with Pipeline(plan) as pipeline:
            if any(not batch.streamed for batch in plan.batches):
                await pipeline.run(compute, None)  # loads the residents
            await pipeline.run(compute, None, route=route)
            await asyncio.to_thread(bench.accelerator.synchronize)
            began = time.perf_counter()
            for _ in range(sweeps):
                await pipeline.run(compute, None, route=route)
            await asyncio.to_thread(bench.accelerator.synchronize)
            seconds = time.perf_counter() - began
            swept = _SweepResult(seconds=seconds, peak=peak(), stages=pipeline.timings().to_dict())
            spans: Lanes = ([], [])
            if trace_path is not None:
                try:
                    # In the main thread, where the profiler must be started.
                    with trace_lanes(bench.accelerator, path=trace_path) as spans:
                        await pipeline.run(compute, None)
                except Exception as error:  # noqa: BLE001 - the result without a trace is valid
                    print(f"   no trace: {error!r}", file=sys.stderr)
            return swept, spans

    with bench.accelerator.watched() as peak:
        swept, spans = asyncio.run(main(peak))
    record_budget_share(bench, plan, swept.peak)
    return swept, spans


def copied_bytes(plan: Plan) -> int:
    """Bytes that a sweep copies to the device; in a rehearsal, which copies nothing, all bytes."""
    if plan.on_cpu:
        return sum(batch.host_bytes for batch in plan.batches)
    return sum(batch.copied_bytes for batch in plan.batches if not batch.device_resident)


def stream_from_ram(bench: Bench) -> RowResult:
    """Stream layers that are resident in host RAM; compare with pinned copies before and after."""
    plan = streaming_plan(bench, on_host=True)
    before = bench.measure_pinned_rate()
    swept, _ = _run_sweeps(bench, plan, sweeps=bench.sweeps)
    floor = statistics.mean((before, bench.measure_pinned_rate()))
    rate = copied_bytes(plan) * bench.sweeps / swept.seconds
    bench.found["ram_sweep_seconds"] = swept.seconds / bench.sweeps
    return RowResult(
        ratio=rate / floor,
        says=f"{rate / 1e9:.1f} of {floor / 1e9:.1f} GB/s, {bench.sweeps} sweeps of "
        f"{copied_bytes(plan) / 1e9:.1f} GB",
        details={
            "bytes_per_second": rate,
            "pinned_bytes_per_second": floor,
            "copied_bytes_per_sweep": copied_bytes(plan),
            "peak_vram": asdict(swept.peak),
            "vram_budget_bytes": plan.device_memory and plan.device_memory.budget_bytes,
            "stages": swept.stages,
        },
    )


def measure_overlap(bench: Bench) -> RowResult:
    """Overlap copies with kernels that take nearly as long; writes a trace and a picture."""
    plan = streaming_plan(bench, on_host=True)
    copy_seconds = bench.found.get("ram_sweep_seconds")
    if copy_seconds is None:
        copy_seconds = _run_sweeps(bench, plan, sweeps=3)[0].seconds / 3
    # Matrices like the model's, resident on the device, to time a sweep's kernels alone.
    block = next(batch for batch in plan.batches if len(batch.tensors) > 1)
    tensors = {
        view.name: torch.zeros(view.shape, dtype=torch.bfloat16, device=bench.accelerator.device)
        for view in block.tensors
    }
    _multiply(tensors, 1)
    share = sum(view.nbytes for view in block.tensors) / sum(
        batch.host_bytes for batch in plan.batches
    )
    once = bench.accelerator.seconds(partial(_multiply, tensors, 10)) / 10 / share
    repeats = max(1, round(0.8 * copy_seconds / once))
    kernel_seconds = once * repeats
    del tensors
    trace_path = bench.out / "gpu_trace.json"
    swept, (copies, kernels) = _run_sweeps(
        bench, plan, sweeps=3, repeats=repeats, trace_path=trace_path
    )
    together = swept.seconds / 3
    traced = "no trace"
    if kernels:
        traced = f"a copy ran in {overlap_share(copies, kernels):.0%} of the kernels' time"
    name = bench.accelerator.describe()["name"]
    (bench.out / "gpu_overlap.svg").write_text(
        draw_lanes(copies, kernels, title=f"One sweep from RAM: {name}"), encoding="utf-8"
    )
    return RowResult(
        ratio=max(copy_seconds, kernel_seconds) / together,
        says=f"copies {copy_seconds:.2f} s, kernels {kernel_seconds:.2f} s, together {together:.2f} s; {traced}",
        details={
            "copies_alone_seconds": copy_seconds,
            "kernels_alone_seconds": kernel_seconds,
            "together_seconds": together,
            "overlap_in_trace": overlap_share(copies, kernels),
            "spans_in_trace": {"copies": len(copies), "kernels": len(kernels)},
        },
    )


def stream_from_disk(bench: Bench) -> RowResult:
    """Stream layers without residents from disk; compare with direct reads of the same files."""
    plan = streaming_plan(bench, on_host=False)
    paths = [Path(file.path) for file in plan.files]
    grid = ((4 * MIB, 4), (8 * MIB, 4), (16 * MIB, 2))
    try:
        rates = {each: raw_read(paths[:2], block_bytes=each[0], threads=each[1]) for each in grid}
    except OSError as error:
        raise NotMeasuredError(f"no direct reads here: {error}") from error
    block, threads = max(rates, key=lambda each: rates[each])
    route, nbytes = _route_of_bytes(plan, limit_bytes=int(_DISK_SECONDS * rates[block, threads]))
    if not nbytes:
        raise NotMeasuredError("nothing was read from disk")
    floor = partial(raw_read, paths, block_bytes=block, threads=threads, limit_bytes=nbytes)
    before = floor()
    swept, _ = _run_sweeps(bench, plan, sweeps=_DISK_SWEEPS, route=route)
    raw = statistics.mean((before, floor()))
    rate = nbytes * _DISK_SWEEPS / swept.seconds
    return RowResult(
        ratio=rate / raw,
        says=f"{rate / 1e9:.2f} of {raw / 1e9:.2f} GB/s, {_DISK_SWEEPS} sweeps of {nbytes / 1e9:.1f} GB",
        details={
            "bytes_per_second": rate,
            "raw_bytes_per_second": raw,
            "bytes_per_sweep": nbytes,
            "layer_batches_per_sweep": len(route),
            "stages": swept.stages,
        },
    )


def _route_of_bytes(plan: Plan, *, limit_bytes: int) -> tuple[list[int], int]:
    """The first layer batches, up to about ``limit_bytes`` on disk, and their bytes on disk."""
    route: list[int] = []
    nbytes = 0
    for batch in plan.batches:
        # Enough batches that those prefetched between sweeps do not dominate.
        if nbytes > limit_bytes and len(route) >= 4 * plan.host_slots:
            break
        route.append(batch.index)
        nbytes += batch.read_bytes if batch.streamed else 0
    return route, nbytes


def report_peak_vram(bench: Bench) -> RowResult:
    """Report the highest share of its VRAM budget that an earlier row used."""
    if "vram_share" not in bench.found:
        raise NotMeasuredError("no row before this one used VRAM")
    by_torch, by_driver = bench.found["vram_share"], bench.found["driver_share"]
    return RowResult(
        ratio=by_torch,
        says=f"the most of all streaming and decoding rows, by torch's counter; {by_driver:.3f} by the driver's, "
        "which has the kernels that were loaded meanwhile",
        details={"by_torch": by_torch, "by_driver": by_driver},
    )


def record_budget_share(bench: Bench, plan: Plan, peak: PeakMemory) -> None:
    """Record the share of its VRAM budget that ``plan`` used."""
    if plan.device_memory is None:
        return
    for name, used in (
        ("vram_share", peak.allocated_bytes),
        ("driver_share", peak.driver_bytes),
    ):
        share = used / plan.device_memory.budget_bytes
        bench.found[name] = max(share, bench.found.get(name, 0.0))
