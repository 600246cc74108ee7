"""Rows of the GPU benchmark: whole models, compared with peers and with predictions."""

import asyncio
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from layerstream.pipeline import Budget, Checkpoint, Hardware, Plan, StreamedModel, Workload
from layerstream.stages.telemetry.timings import Timings
from layerstream.tools.benchmarks.accelerator import PeakMemory
from layerstream.tools.benchmarks.gpu_bench import MIB, Bench, NotMeasuredError, RowResult
from layerstream.tools.benchmarks.gpu_streaming import (
    copied_bytes,
    reader_of,
    record_budget_share,
    streaming_plan,
)
from layerstream.tools.compare.peers import PEERS, NotInstalledError

__all__ = ["compare_with", "measure_decoding"]

# For a model's memory in addition to its layers: buffers, and weights that are used several times.
_SPARE_BYTES = 256 * MIB
_WORKLOAD = Workload(prompt_tokens=32, new_tokens=16)
# Tokens after the first, whose steps are timed.
_TIMED_TOKENS = 12


def _ids(bench: Bench) -> torch.Tensor:
    ids = torch.arange(_WORKLOAD.prompt_tokens).remainder(200).add(3)
    return ids.unsqueeze(0).to(bench.accelerator.device)


def _budget(bench: Bench, *, resident_share: float = 0.0, on_host: bool = True) -> Budget:
    plan = streaming_plan(bench, on_host=on_host)
    layers = sum(batch.device_bytes or batch.host_bytes for batch in plan.batches)
    host = plan.host_memory.budget_bytes + _SPARE_BYTES
    if plan.device_memory is None:
        return Budget(host=host)
    vram = plan.device_memory.budget_bytes + _SPARE_BYTES + int(resident_share * layers)
    return Budget(vram=vram, host=host)


def _run_ours(bench: Bench, *, on_host: bool) -> tuple[float, torch.Tensor]:
    """Median seconds of three forward passes, and the logits."""

    async def main() -> tuple[float, torch.Tensor]:
        async with StreamedModel.open(
            bench.folder,
            device=bench.device,
            budget=budget,
            workload=_WORKLOAD,
            reader=reader_of(bench, on_host=on_host),
        ) as model:
            seconds, logits = [], torch.empty(0)
            for _ in range(4):
                began = time.perf_counter()
                logits = (await model.forward(input_ids=_ids(bench), use_cache=False)).logits.cpu()
                seconds.append(time.perf_counter() - began)
            return statistics.median(seconds[1:]), logits

    budget = _budget(bench, on_host=on_host)
    return asyncio.run(main())


def compare_with(name: str, *, on_host: bool) -> Callable[[Bench], RowResult]:
    """Make a row: a forward pass of the peer ``name`` compared with ours, from host RAM or from disk."""

    def measure(bench: Bench) -> RowResult:
        with tempfile.TemporaryDirectory(dir=bench.folder.parent) as scratch:
            try:
                forward = PEERS[name](bench.folder, bench.accelerator.device, Path(scratch))
            except NotInstalledError as error:
                raise NotMeasuredError(str(error)) from error
            ids, logits = _ids(bench), torch.empty(0)
            seconds = []
            for _ in range(3):
                began = time.perf_counter()
                logits = forward(ids).cpu()
                seconds.append(time.perf_counter() - began)
            theirs = statistics.median(seconds[1:])
            del forward
            gc.collect()
        key = f"ours_seconds_{'ram' if on_host else 'disk'}"
        ours, our_logits = _run_ours(bench, on_host=on_host)
        bench.found[key] = ours
        pageable = bench.pinned_bytes_per_second / bench.found.get("pageable", math.nan)
        return RowResult(
            ratio=theirs / ours,
            says=f"{theirs:.2f} s against our {ours:.2f} s per forward pass; logits "
            f"{'equal' if torch.equal(logits, our_logits) else 'NOT equal'}",
            details={
                "their_seconds": theirs,
                "our_seconds": ours,
                "equal": torch.equal(logits, our_logits),
                "wanted": {"of_airllm": 5.0, "of_pageable_copies": max(2.0, 0.9 * pageable)},
            },
        )

    return measure


def measure_decoding(share: float) -> Callable[[Bench], RowResult]:
    """Make a row: seconds per token with ``share`` of the layers resident in VRAM, compared with the prediction."""

    def measure(bench: Bench) -> RowResult:
        budget = _budget(bench, resident_share=share)
        # Probed before, so that its memory is not counted as the model's.
        hardware = asyncio.run(Hardware.probe(Checkpoint.open(bench.folder), device=bench.device))

        async def main(peak: Callable[[], PeakMemory]) -> tuple[float, PeakMemory, Plan, Timings]:
            async with StreamedModel.open(
                bench.folder,
                device=bench.device,
                budget=budget,
                workload=_WORKLOAD,
                reader=reader_of(bench, on_host=True),
                hardware=hardware,
            ) as model:
                await model.generate(_ids(bench), max_new_tokens=2, do_sample=False)
                tokens = model.stream(
                    _ids(bench), max_new_tokens=_TIMED_TOKENS + 1, do_sample=False
                )
                stamps = [time.perf_counter() async for _ in tokens]
                seconds = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
                return seconds, peak(), model.plan, model.timings()

        with bench.accelerator.watched() as peak:
            seconds, used, plan, timings = asyncio.run(main(peak))
        predicted = plan.prediction.decode
        copy_seconds = copied_bytes(plan) / bench.pinned_bytes_per_second
        memory = plan.device_memory
        record_budget_share(bench, plan, used)
        return RowResult(
            ratio=seconds / predicted.seconds,
            says=f"{seconds * 1e3:.1f} ms per token, predicted {predicted.seconds * 1e3:.1f} "
            f"({predicted.bottleneck}); its copies alone {copy_seconds * 1e3:.1f} ms",
            details={
                "seconds_per_token": seconds,
                "predicted": asdict(predicted),
                "inputs": [asdict(each) for each in plan.inputs],
                "copied_bytes_per_token": copied_bytes(plan),
                "copy_seconds_per_token": copy_seconds,
                "layer_batch_size": plan.layer_batch_size,
                "slots": plan.device_slots,
                "peak_vram": asdict(used),
                "vram_budget_bytes": memory and memory.budget_bytes,
                "stages": timings.to_dict(),
            },
        )

    return measure
