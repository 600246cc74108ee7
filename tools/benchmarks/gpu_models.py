"""Rows of the GPU benchmark: whole models, beside others' ways to run them."""

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
from layerstream.tools.benchmarks.copying import Peak
from layerstream.tools.benchmarks.gpu_bench import MIB, Bench, NotMeasuredError, Result
from layerstream.tools.benchmarks.gpu_streaming import (
    copied_bytes,
    reader_of,
    streaming_plan,
    within_budget,
)
from layerstream.tools.compare.peers import PEERS, NotInstalledError

__all__ = ["against", "decode"]

# Room for what a model takes beside its layers: buffers, and weights that are used several times.
_SPARE_BYTES = 256 * MIB
_WORKLOAD = Workload(prompt_tokens=32, new_tokens=16)
# Tokens behind the first, whose steps are timed.
_TIMED = 12


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


def _ours(bench: Bench, *, on_host: bool) -> tuple[float, torch.Tensor]:
    """Seconds of a forward pass, the median of three, and its logits."""

    async def main() -> tuple[float, torch.Tensor]:
        async with StreamedModel.open(
            bench.folder,
            device=bench.device,
            budget=_models_budget,
            workload=_WORKLOAD,
            reader=reader_of(bench, on_host=on_host),
        ) as model:
            seconds, logits = [], torch.empty(0)
            for _ in range(4):
                began = time.perf_counter()
                logits = (await model.forward(input_ids=_ids(bench), use_cache=False)).logits.cpu()
                seconds.append(time.perf_counter() - began)
            return statistics.median(seconds[1:]), logits

    _models_budget = _budget(bench, on_host=on_host)
    return asyncio.run(main())


def against(name: str, *, on_host: bool) -> Callable[[Bench], Result]:
    """A forward pass of the peer ``name`` against ours, from host RAM or from disk."""

    def measure(bench: Bench) -> Result:
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
        ours, own_logits = _ours(bench, on_host=on_host)
        bench.found[key] = ours
        pageable = bench.pinned_bytes_per_second / bench.found.get("pageable", math.nan)
        return Result(
            ratio=theirs / ours,
            says=f"{theirs:.2f} s against our {ours:.2f} s per forward pass; logits "
            f"{'equal' if torch.equal(logits, own_logits) else 'NOT equal'}",
            details={
                "their_seconds": theirs,
                "our_seconds": ours,
                "equal": torch.equal(logits, own_logits),
                "wanted": {"of_airllm": 5.0, "of_pageable_copies": max(2.0, 0.9 * pageable)},
            },
        )

    return measure


def decode(share: float) -> Callable[[Bench], Result]:
    """Seconds per token with ``share`` of the layers resident in VRAM, against what the plan had said."""

    def measure(bench: Bench) -> Result:
        budget = _budget(bench, resident_share=share)
        # Now, lest what probing takes counts as the model's.
        hardware = asyncio.run(Hardware.probe(Checkpoint.open(bench.folder), device=bench.device))

        async def main(peak: Callable[[], Peak]) -> tuple[float, Peak, Plan, Timings]:
            async with StreamedModel.open(
                bench.folder,
                device=bench.device,
                budget=budget,
                workload=_WORKLOAD,
                reader=reader_of(bench, on_host=True),
                hardware=hardware,
            ) as model:
                await model.generate(_ids(bench), max_new_tokens=2, do_sample=False)
                tokens = model.stream(_ids(bench), max_new_tokens=_TIMED + 1, do_sample=False)
                stamps = [time.perf_counter() async for _ in tokens]
                seconds = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
                return seconds, peak(), model.plan, model.timings()

        with bench.accelerator.watched() as peak:
            seconds, used, plan, timings = asyncio.run(main(peak))
        predicted = plan.prediction.decode
        bound = copied_bytes(plan) / bench.pinned_bytes_per_second
        memory = plan.device_memory
        within_budget(bench, plan, used)
        return Result(
            ratio=seconds / predicted.seconds,
            says=f"{seconds * 1e3:.1f} ms per token, predicted {predicted.seconds * 1e3:.1f} "
            f"({predicted.bottleneck}); its copies alone {bound * 1e3:.1f} ms",
            details={
                "seconds_per_token": seconds,
                "predicted": asdict(predicted),
                "inputs": [asdict(each) for each in plan.inputs],
                "copied_bytes_per_token": copied_bytes(plan),
                "copy_seconds_per_token": bound,
                "layer_batch_size": plan.layer_batch_size,
                "slots": plan.device_slots,
                "peak_vram": asdict(used),
                "vram_budget_bytes": memory and memory.budget_bytes,
                "stages": timings.to_dict(),
            },
        )

    return measure
