"""Rows of the GPU benchmark: copies, page-locking, and layers that stream past a computation."""

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
from layerstream.tools.benchmarks.copying import Peak, copy_rate, pinning
from layerstream.tools.benchmarks.gpu_bench import MIB, Bench, NotMeasuredError, Result
from layerstream.tools.benchmarks.overlap import Lanes, overlap_of, picture, trace
from layerstream.tools.benchmarks.raw_read import raw_read

__all__ = [
    "bandwidth",
    "copied_bytes",
    "from_disk",
    "from_ram",
    "overlap",
    "page_locking",
    "reader_of",
    "streaming_plan",
    "vram",
    "within_budget",
]

# What allocators round the ring up by.
_ROUNDED_BYTES = 8 * MIB
# A sweep from disk visits so many seconds' worth of layers, or all of them where the disk is fast.
_DISK_SECONDS = 5.0
_DISK_SWEEPS = 3


def bandwidth(bench: Bench) -> Result:
    """H2D bandwidth by block size, pinned and pageable."""
    rates = {
        kind: {
            b: copy_rate(bench.accelerator, block_bytes=b, pinned=pin) for b in bench.block_bytes
        }
        for kind, pin in (("pinned", True), ("pageable", False))
    }
    best = {kind: max(by_block.values()) for kind, by_block in rates.items()}
    bench.found.update(best)
    return Result(
        ratio=best["pinned"] / best["pageable"],
        says=f"{best['pinned'] / 1e9:.1f} GB/s pinned, {best['pageable'] / 1e9:.1f} GB/s pageable",
        details={f"{kind}_bytes_per_second_by_block_bytes": each for kind, each in rates.items()},
    )


def page_locking(bench: Bench) -> Result:
    """Time to pin, the library's way and torch's."""
    cost = pinning(bench.accelerator, nbytes=bench.pin_bytes)
    return Result(
        ratio=cost.registered_bytes_per_second / cost.torch_bytes_per_second,
        says=f"{(1 << 30) / cost.registered_bytes_per_second:.2f} s per GiB registered, "
        f"{(1 << 30) / cost.torch_bytes_per_second:.2f} s by torch's allocator",
        details={
            "registered_bytes_per_second": cost.registered_bytes_per_second,
            "torch_bytes_per_second": cost.torch_bytes_per_second,
        },
    )


def reader_of(bench: Bench, *, on_host: bool) -> str:
    """How files are read: what stays in host RAM comes there once, out of the page cache, where making them left them.

    A processor would compute with mapped files where they are, and rehearse nothing.
    """
    return "mmap" if on_host and bench.accelerator.is_gpu else "direct"


def streaming_plan(bench: Bench, *, on_host: bool) -> Plan:
    """Three slots on either side, no layer in VRAM, and all of them in host RAM or none."""
    checkpoint = Checkpoint.open(bench.folder)
    hardware = asyncio.run(Hardware.probe(checkpoint, device=bench.device))
    reader = reader_of(bench, on_host=on_host)
    whole = make_plan(checkpoint, hardware, reader=reader, layer_batch_size=1)
    batches = whole.batches
    host = whole.host_memory.reserved_bytes + 3 * max(batch.host_bytes for batch in batches)
    vram = None
    if whole.device_memory is not None:
        vram = whole.device_memory.reserved_bytes + 3 * max(b.device_bytes for b in batches)
        vram += _ROUNDED_BYTES
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


def _products(tensors: Mapping[str, torch.Tensor], repeats: int) -> None:
    """A product with each matrix: every byte is read, ``repeats`` times."""
    for tensor in tensors.values():
        if tensor.dim() == 2:  # noqa: PLR2004 - a matrix
            vector = torch.ones((tensor.shape[1], 1), dtype=tensor.dtype, device=tensor.device)
            for _ in range(repeats):
                torch.mm(tensor, vector)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Swept:
    seconds: float
    """Of all sweeps together."""
    peak: Peak
    stages: Mapping[str, Any]


def _sweep(
    bench: Bench,
    plan: Plan,
    *,
    sweeps: int,
    repeats: int = 1,
    route: Sequence[int] | None = None,
    profiled: Path | None = None,
) -> tuple[_Swept, Lanes]:
    """Sweep after sweep on a warm pipeline, and once more under the profiler if ``profiled``."""

    def compute(batch: Batch, state: None) -> None:
        _products(batch.tensors, repeats)
        return state

    async def main(peak: Callable[[], Peak]) -> tuple[_Swept, Lanes]:
        async with Pipeline(plan) as pipeline:
            if any(not batch.streamed for batch in plan.batches):
                await pipeline.run(compute, None)  # loads what stays
            await pipeline.run(compute, None, route=route)
            await asyncio.to_thread(bench.accelerator.synchronize)
            began = time.perf_counter()
            for _ in range(sweeps):
                await pipeline.run(compute, None, route=route)
            await asyncio.to_thread(bench.accelerator.synchronize)
            seconds = time.perf_counter() - began
            swept = _Swept(seconds=seconds, peak=peak(), stages=pipeline.timings().to_dict())
            spans: Lanes = ([], [])
            if profiled is not None:
                try:
                    # In the main thread, where the profiler has to begin.
                    with trace(bench.accelerator, path=profiled) as spans:
                        await pipeline.run(compute, None)
                except Exception as error:  # noqa: BLE001 - what was measured without it stands
                    print(f"   no trace: {error!r}", file=sys.stderr)
            return swept, spans

    with bench.accelerator.watched() as peak:
        swept, spans = asyncio.run(main(peak))
    within_budget(bench, plan, swept.peak)
    return swept, spans


def copied_bytes(plan: Plan) -> int:
    """Bytes that go to the device in a sweep; rehearsing, where nothing is copied, all bytes."""
    if plan.device_memory is None:
        return sum(batch.host_bytes for batch in plan.batches)
    return sum(batch.copied_bytes for batch in plan.batches if not batch.device_resident)


def from_ram(bench: Bench) -> Result:
    """Sweeps of layers that stay in host RAM, against pinned copies before and after."""
    plan = streaming_plan(bench, on_host=True)
    before = bench.pinned_rate()
    swept, _ = _sweep(bench, plan, sweeps=bench.sweeps)
    floor = statistics.mean((before, bench.pinned_rate()))
    rate = copied_bytes(plan) * bench.sweeps / swept.seconds
    bench.found["ram_sweep_seconds"] = swept.seconds / bench.sweeps
    return Result(
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


def overlap(bench: Bench) -> Result:
    """Kernels that take nearly as long as the copies, under them; with a trace and a picture."""
    plan = streaming_plan(bench, on_host=True)
    alone = bench.found.get("ram_sweep_seconds")
    if alone is None:
        alone = _sweep(bench, plan, sweeps=3)[0].seconds / 3
    # Matrices like the model's, in the device's memory: what a sweep's kernels take by themselves.
    block = next(b for b in plan.batches if len(b.tensors) > 1)
    tensors = {
        view.name: torch.zeros(view.shape, dtype=torch.bfloat16, device=bench.accelerator.device)
        for view in block.tensors
    }
    _products(tensors, 1)
    share = sum(b.nbytes for b in block.tensors) / sum(b.host_bytes for b in plan.batches)
    once = bench.accelerator.seconds(partial(_products, tensors, 10)) / 10 / share
    repeats = max(1, round(0.8 * alone / once))
    computing = once * repeats
    del tensors
    trace_path = bench.out / "gpu_trace.json"
    swept, (copies, kernels) = _sweep(bench, plan, sweeps=3, repeats=repeats, profiled=trace_path)
    together = swept.seconds / 3
    traced = "no trace"
    if kernels:
        traced = f"a copy ran in {overlap_of(copies, kernels):.0%} of the kernels' time"
    name = bench.accelerator.describe()["name"]
    (bench.out / "gpu_overlap.svg").write_text(
        picture(copies, kernels, title=f"One sweep from RAM: {name}"), encoding="utf-8"
    )
    return Result(
        ratio=max(alone, computing) / together,
        says=f"copies {alone:.2f} s, kernels {computing:.2f} s, together {together:.2f} s; {traced}",
        details={
            "copies_alone_seconds": alone,
            "kernels_alone_seconds": computing,
            "together_seconds": together,
            "overlap_in_trace": overlap_of(copies, kernels),
            "spans_in_trace": {"copies": len(copies), "kernels": len(kernels)},
        },
    )


def from_disk(bench: Bench) -> Result:
    """Sweeps of layers that stay nowhere, against direct reads of the same files."""
    plan = streaming_plan(bench, on_host=False)
    paths = [Path(file.path) for file in plan.files]
    grid = ((4 * MIB, 4), (8 * MIB, 4), (16 * MIB, 2))
    try:
        rates = {each: raw_read(paths[:2], block_bytes=each[0], threads=each[1]) for each in grid}
    except OSError as error:
        raise NotMeasuredError(f"no direct reads here: {error}") from error
    block, threads = max(rates, key=lambda each: rates[each])
    route, nbytes = _visited(plan, most_bytes=int(_DISK_SECONDS * rates[block, threads]))
    if not nbytes:
        raise NotMeasuredError("nothing was read from disk")
    floor = partial(raw_read, paths, block_bytes=block, threads=threads, limit_bytes=nbytes)
    before = floor()
    swept, _ = _sweep(bench, plan, sweeps=_DISK_SWEEPS, route=route)
    raw = statistics.mean((before, floor()))
    rate = nbytes * _DISK_SWEEPS / swept.seconds
    return Result(
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


def _visited(plan: Plan, *, most_bytes: int) -> tuple[list[int], int]:
    """The first layer batches, up to about ``most_bytes`` on disk, and what they are there."""
    route: list[int] = []
    nbytes = 0
    for batch in plan.batches:
        # Beside what is prefetched while nobody waits, too few would show nothing.
        if nbytes > most_bytes and len(route) >= 4 * plan.host_slots:
            break
        route.append(batch.index)
        nbytes += batch.read_bytes if batch.streamed else 0
    return route, nbytes


def vram(bench: Bench) -> Result:
    """The most VRAM that a row before this one used, against its budget."""
    if "vram_share" not in bench.found:
        raise NotMeasuredError("no row before this one used VRAM")
    by_torch, by_driver = bench.found["vram_share"], bench.found["driver_share"]
    return Result(
        ratio=by_torch,
        says=f"the most of all streaming and decoding rows, by torch's counter; {by_driver:.3f} by the driver's, "
        "which has the kernels that were loaded meanwhile",
        details={"by_torch": by_torch, "by_driver": by_driver},
    )


def within_budget(bench: Bench, plan: Plan, peak: Peak) -> None:
    """Note how much of its VRAM budget ``plan`` took."""
    if plan.device_memory is None:
        return
    for name, used in (
        ("vram_share", peak.allocated_bytes),
        ("driver_share", peak.driver_bytes),
    ):
        share = used / plan.device_memory.budget_bytes
        bench.found[name] = max(share, bench.found.get(name, 0.0))
