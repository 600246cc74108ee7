"""Rows of the GPU benchmark: a mixture of experts, of which a token needs a part."""

import asyncio
import gc
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from layerstream.pipeline import Budget, Plan, StreamedModel, Workload
from layerstream.stages.telemetry.spans import ExpertCounts
from layerstream.tools.benchmarks.gpu_bench import MIB, Bench, NotMeasuredError, RowResult
from layerstream.tools.compare.peers import PEERS, NotInstalledError
from layerstream.tools.synthetic.checkpoints import CheckpointSpec, make_checkpoint
from layerstream.tools.synthetic.families import FAMILIES, scaled

__all__ = ["compare_mixture_with", "measure_mixture"]

_WORKLOAD = Workload(prompt_tokens=16, new_tokens=64)
# Cells are filled while the first tokens are made, which are not timed.
_WARM_TOKENS, _TIMED_TOKENS = 24, 24
_SPARE_BYTES = 256 * MIB


def _mixture(bench: Bench) -> Path:
    """A mixture of 2.1 GB in 8 layers with routers of skew 1, beside the other checkpoint; made when first needed."""
    rehearse = bench.accelerator.device.type == "cpu"
    family = FAMILIES["bench-moe"]
    config = scaled(
        family.config,
        layers=2 if rehearse else 8,
        hidden=64 if rehearse else None,
        vocab=320 if rehearse else None,
    )
    spec = CheckpointSpec(
        family="bench-moe",
        config=config | {"bos_token_id": 256, "eos_token_id": None},
        dtype="bfloat16",
        max_shard_bytes=1 << 30,
        seed=0,
        sparse=False,
        skew=1.0,
    )
    return make_checkpoint(bench.folder.with_name("mixture"), spec).folder


def _ids(bench: Bench) -> torch.Tensor:
    ids = torch.arange(_WORKLOAD.prompt_tokens).remainder(200).add(3)
    return ids.unsqueeze(0).to(bench.accelerator.device)


@asynccontextmanager
async def _opened(
    bench: Bench, *, host_share: float, vram_share: float, **options: Any
) -> AsyncIterator[StreamedModel]:
    """The mixture, with memory for such shares of its experts beside what is needed at least."""
    folder = _mixture(bench)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    host = int(host_share * size) + 2 * _SPARE_BYTES
    budget = Budget(host=host)
    if bench.accelerator.device.type != "cpu":
        budget = Budget(host=host, vram=int(vram_share * size) + 3 * _SPARE_BYTES)
    async with StreamedModel.open(
        folder,
        device=bench.device,
        budget=budget,
        workload=_WORKLOAD,
        reader="direct",
        layer_batch_size=1,
        **options,
    ) as model:
        yield model


async def _decode(
    bench: Bench, model: StreamedModel
) -> tuple[float, list[int], ExpertCounts | None]:
    """Median seconds of a step once cells are filled, all tokens, and what experts were needed in those steps."""
    before, stamps, tokens = None, list[float](), list[int]()
    async for token in model.stream(
        _ids(bench), max_new_tokens=_WARM_TOKENS + _TIMED_TOKENS, do_sample=False
    ):
        tokens.append(token)
        stamps.append(time.perf_counter())
        if len(tokens) == _WARM_TOKENS:
            before = model.timings().experts
    after = model.timings().experts
    steps = [b - a for a, b in zip(stamps[_WARM_TOKENS - 1 :], stamps[_WARM_TOKENS:], strict=False)]
    counts = None
    if before is not None and after is not None:
        counts = ExpertCounts(
            wanted=after.wanted - before.wanted,
            hits=after.hits - before.hits,
            read_bytes=after.read_bytes - before.read_bytes,
            wait_seconds=after.wait_seconds - before.wait_seconds,
        )
    return statistics.median(steps), tokens, counts


def _resident(bench: Bench) -> tuple[float, list[int]]:
    """The same of transformers' model that is in the device's memory as a whole."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(_mixture(bench), dtype="auto")
    model = model.to(bench.accelerator.device)
    ids, seconds, tokens = _ids(bench), list[float](), list[int]()
    for count in (2, 2 + _TIMED_TOKENS, _WARM_TOKENS + _TIMED_TOKENS):
        began = time.perf_counter()
        found = model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]
        tokens = found.tolist()
        seconds.append(time.perf_counter() - began)
    del model
    gc.collect()
    return (seconds[1] - seconds[0]) / _TIMED_TOKENS, tokens


def measure_mixture(host_share: float, vram_share: float) -> Callable[[Bench], RowResult]:
    """Make a row: a step, and what a resident model's step and its missed experts would take one after the other."""

    def measure(bench: Bench) -> RowResult:
        async def main() -> tuple[float, list[int], ExpertCounts | None, Plan]:
            async with _opened(bench, host_share=host_share, vram_share=vram_share) as model:
                return *await _decode(bench, model), model.plan

        resident, expected = _resident(bench)
        seconds, tokens, counts, plan = asyncio.run(main())
        if counts is None or not plan.experts:
            raise NotMeasuredError("no experts are read on demand")
        missed = (counts.wanted - counts.hits) * plan.experts[0].expert_bytes / _TIMED_TOKENS
        copying = missed / bench.pinned_bytes_per_second
        bench.found[f"mixture_seconds_{host_share}_{vram_share}"] = seconds
        equal = tokens == expected
        hits = counts.hits / max(counts.wanted, 1)
        return RowResult(
            ratio=seconds / (resident + copying),
            says=f"{seconds * 1e3:.1f} ms per token; resident {resident * 1e3:.1f}, copies {copying * 1e3:.1f}; "
            f"{hits:.0%} hits in VRAM, {counts.read_bytes / _TIMED_TOKENS / 1e6:.1f} MB read per token; tokens "
            f"{'equal' if equal else 'NOT equal'}",
            details={
                "seconds_per_token": seconds,
                "resident_seconds_per_token": resident,
                "copied_bytes_per_token": missed,
                "read_bytes_per_token": counts.read_bytes / _TIMED_TOKENS,
                "hits": hits,
                "equal": equal,
                "cells": [[each.cells, each.device_cells] for each in plan.experts],
                "predicted": asdict(plan.prediction.decode),
            },
        )

    return measure


def compare_mixture_with(name: str) -> Callable[[Bench], RowResult]:
    """Make a row: a forward pass of the peer ``name``, or with "whole layers" of ours, compared with ours on demand."""

    def measure(bench: Bench) -> RowResult:
        ours, logits = asyncio.run(_forward(bench))
        if name == "whole layers":
            # An implementation that multiplies with all experts is not given them one by one.
            theirs, their_logits = asyncio.run(_forward(bench, experts_implementation="batched_mm"))
        else:
            theirs, their_logits = _forward_of_peer(bench, name)
        equal = torch.equal(logits, their_logits)
        return RowResult(
            ratio=theirs / ours,
            says=f"{theirs:.3f} s against our {ours:.3f} s per token; logits {'equal' if equal else 'not equal'}",
            details={"their_seconds": theirs, "our_seconds": ours, "equal": equal},
        )

    return measure


async def _forward(bench: Bench, **options: Any) -> tuple[float, torch.Tensor]:
    """Median seconds of a pass over one token, and its logits, with a quarter of the model in host RAM."""
    async with _opened(bench, host_share=0.25, vram_share=0.1, **options) as model:
        seconds, logits = list[float](), torch.empty(0)
        for at in range(4):  # each token is routed to other experts
            began = time.perf_counter()
            output = await model.forward(input_ids=_ids(bench)[:, at : at + 1], use_cache=False)
            logits = output.logits.cpu()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[1:]), logits


def _forward_of_peer(bench: Bench, name: str) -> tuple[float, torch.Tensor]:
    folder = _mixture(bench)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        try:
            forward = PEERS[name](folder, bench.accelerator.device, Path(scratch))
        except NotInstalledError as error:
            raise NotMeasuredError(str(error)) from error
        seconds, logits = list[float](), torch.empty(0)
        for at in range(1, 4):
            began = time.perf_counter()
            logits = forward(_ids(bench)[:, at : at + 1]).cpu()
            seconds.append(time.perf_counter() - began)
        del forward
        gc.collect()
    return statistics.median(seconds[1:]), logits
