"""Rows of the GPU benchmark: copies, page-locking, and layers that stream past a computation."""

import asyncio
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from layerstream.pipeline import Budget, Checkpoint, Hardware, Pipeline, Plan, make_plan
from layerstream.stages.compute import Batch
from layerstream.stages.units import format_bytes
from layerstream.tools.benchmarks.copying import copy_rate, pinning
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
    "streaming_plan",
    "vram",
    "within_budget",
]


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


def streaming_plan(bench: Bench, *, on_host: bool) -> Plan:
    """Three slots on either side, no layer in VRAM, and all of them in host RAM or none."""
    checkpoint = Checkpoint.open(bench.folder)
    hardware = asyncio.run(Hardware.probe(checkpoint, device=bench.device))
    whole = make_plan(checkpoint, hardware, reader="direct", layer_batch_size=1)
    batches = whole.batches
    host = whole.host_memory.reserved_bytes + 3 * max(batch.host_bytes for batch in batches)
    vram = None
    if whole.device_memory is not None:
        vram = whole.device_memory.reserved_bytes + 3 * max(b.device_bytes for b in batches)
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
        reader="direct",
        layer_batch_size=1,
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
    seconds: float  # of all sweeps together
    peak_vram_bytes: int
    stages: Mapping[str, Any]


def _sweep(
    bench: Bench, plan: Plan, *, sweeps: int, repeats: int = 1, profiled: Path | None = None
) -> tuple[_Swept, Lanes]:
    """Sweep after sweep on a warm pipeline, and once more under the profiler if ``profiled``."""

    def compute(batch: Batch, state: None) -> None:
        _products(batch.tensors, repeats)
        return state

    peak = bench.accelerator.begin_peak()

    async def main() -> tuple[_Swept, Lanes]:
        async with Pipeline(plan) as pipeline:
            await pipeline.run(compute, None)  # loads what stays
            await pipeline.run(compute, None)
            bench.accelerator.synchronize()
            began = time.perf_counter()
            for _ in range(sweeps):
                await pipeline.run(compute, None)
            await asyncio.to_thread(bench.accelerator.synchronize)
            seconds = time.perf_counter() - began
            spans: Lanes = ([], [])
            if profiled is not None:
                # In the main thread, where the profiler has to begin.
                with trace(bench.accelerator, path=profiled) as spans:
                    await pipeline.run(compute, None)
            swept = _Swept(
                seconds=seconds, peak_vram_bytes=peak(), stages=pipeline.timings().to_dict()
            )
            return swept, spans

    swept, spans = asyncio.run(main())
    within_budget(bench, plan, swept.peak_vram_bytes)
    return swept, spans


def copied_bytes(plan: Plan) -> int:
    """Bytes that go to the device in a sweep; rehearsing, where nothing is copied, all bytes."""
    copied = sum(batch.copied_bytes for batch in plan.batches if not batch.device_resident)
    return copied or sum(batch.host_bytes for batch in plan.batches)


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
            "peak_vram_bytes": swept.peak_vram_bytes,
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
    name = bench.accelerator.describe()["name"]
    (bench.out / "gpu_overlap.svg").write_text(
        picture(copies, kernels, title=f"One sweep from RAM: {name}"), encoding="utf-8"
    )
    return Result(
        ratio=max(alone, computing) / together,
        says=f"copies {alone:.2f} s, kernels {computing:.2f} s, together {together:.2f} s; a copy ran in "
        f"{overlap_of(copies, kernels):.0%} of the kernels' time",
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
        block, threads = max(rates, key=lambda each: rates[each])
        before = raw_read(paths, block_bytes=block, threads=threads)
    except OSError as error:
        raise NotMeasuredError(f"no direct reads here: {error}") from error
    swept, _ = _sweep(bench, plan, sweeps=3)
    floor = statistics.mean((before, raw_read(paths, block_bytes=block, threads=threads)))
    nbytes = sum(read.nbytes for batch in plan.batches if batch.streamed for read in batch.reads)
    if not nbytes:
        raise NotMeasuredError("nothing was read from disk")
    rate = nbytes * 3 / swept.seconds
    return Result(
        ratio=rate / floor,
        says=f"{rate / 1e9:.2f} of {floor / 1e9:.2f} GB/s",
        details={"bytes_per_second": rate, "raw_bytes_per_second": floor, "stages": swept.stages},
    )


def vram(bench: Bench) -> Result:
    """The most VRAM that a row before this one used, against its budget."""
    share = bench.found.get("vram_share")
    if share is None:
        raise NotMeasuredError("no row before this one used VRAM")
    return Result(
        ratio=share,
        says="the highest of the streaming and decoding rows, by torch's counter",
        details={},
    )


def within_budget(bench: Bench, plan: Plan, used_bytes: int) -> None:
    """Note how much of its VRAM budget ``plan`` took."""
    if plan.device_memory is None:
        return
    share = used_bytes / plan.device_memory.budget_bytes
    bench.found["vram_share"] = max(share, bench.found.get("vram_share", 0.0))
