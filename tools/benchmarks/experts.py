"""Experts on demand, measured: ``python -m layerstream.tools.benchmarks.experts PATH``.

By default with experts on demand, with everything in memory, and with whole layers in turn (which an experts implementation that does
not allow reading on demand brings about), with the same model; mean steps on demand are compared with what reading as many bytes takes
(raw, by requests of an expert's size, as many at once) and a step in memory together. With ``--budgets N`` in so many budgets from the smallest one to 1.2 times
the model, and after the first round with what was learnt in it. Text is sampled, so that it does not go round in a circle
of a few experts. Bytes are counted by /proc/self/io; weights are dropped from the page cache before each turn, where that is
allowed. Results and how they were measured: experts.md.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from layerstream.pipeline import Budget, Checkpoint, Hardware, PlanError, StreamedModel, Workload
from layerstream.pipeline.modeling.experts import expert_store
from layerstream.pipeline.planning.expert_replay import replay
from layerstream.pipeline.planning.plan import Plan
from layerstream.pipeline.planning.replan import learn
from layerstream.stages.experts.usage import ExpertRoute
from layerstream.stages.memory import round_up
from layerstream.stages.readers.direct import BLOCK_BYTES
from layerstream.tools.benchmarks.raw_read import raw_read
from layerstream.tools.benchmarks.streaming import bytes_read
from layerstream.tools.compare.page_cache import drop_from_cache
from layerstream.tools.console.arguments import budget_size, byte_rate, positive_int

__all__ = ["main"]

_ON_DEMAND, _IN_MEMORY, _WHOLE = "experts on demand", "in memory", "whole layers"
_RAW_BYTES = 1 << 30
_MOST_DEMANDS = 1_000_000
_LARGEST_SHARE = 1.2


def main() -> int:
    """Run the benchmark and print its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a mixture of experts")
    parser.add_argument("--host", type=budget_size, default="25%", help="host budget")
    parser.add_argument("--budgets", type=positive_int, metavar="N", help="several, on demand")
    parser.add_argument("--throttle", type=byte_rate, help="rate of a throttled reader")
    parser.add_argument("--prompt-tokens", type=positive_int, default=16)
    parser.add_argument("--new-tokens", type=positive_int, default=32)
    parser.add_argument("--skipped-tokens", type=positive_int, default=4, help="while cells fill")
    parser.add_argument("--whole-tokens", type=positive_int, default=8, help="with whole layers")
    parser.add_argument("--rounds", type=positive_int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    measured = _budgets(args) if args.budgets else _ways(args)
    if args.json:
        print(json.dumps(measured, indent=2))
        return 0
    for number, turns in enumerate(measured, start=1):
        for name, result in turns.items():
            shown = ", ".join(f"{key} {value:.4g}" for key, value in result.items())
            print(f"round {number}, {name}: {shown}")
    return 0


def _ways(args: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """Each round's results on demand, in memory, and with whole layers."""
    checkpoint = Checkpoint.open(args.path)
    paths = [file.path for file in checkpoint.files]
    rounds = []
    for _ in range(args.rounds):
        on_demand, _ = asyncio.run(_turn(args, host=args.host))
        everything = round(_LARGEST_SHARE * checkpoint.total_bytes)
        in_memory, _ = asyncio.run(_turn(args, host=everything, way=_IN_MEMORY))
        whole, _ = asyncio.run(_turn(args, host=args.host, way=_WHOLE))
        step, nbytes = on_demand["mean_step_seconds"], on_demand["read_bytes_per_token"]
        rate = args.throttle
        if rate is None:
            block = round_up(int(on_demand["expert_bytes"]), BLOCK_BYTES)
            threads = int(on_demand["reads_in_flight"])
            rate = raw_read(paths, block_bytes=block, threads=threads, limit_bytes=_RAW_BYTES)
        on_demand |= {
            "raw_bytes_per_second": rate,
            "step_over_reading": step / (nbytes / rate),
            "step_over_reading_and_memory": step / (nbytes / rate + in_memory["mean_step_seconds"]),
            "whole_layers_over_step": whole["mean_step_seconds"] / step,
        }
        rounds.append({_ON_DEMAND: on_demand, _IN_MEMORY: in_memory, _WHOLE: whole})
    return rounds


def _budgets(args: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """Each round's results in several budgets; all budgets of a round before the next one."""
    least = asyncio.run(_least_budget(args))
    largest = _LARGEST_SHARE * Checkpoint.open(args.path).total_bytes
    # Evenly in their logarithms: half of them are small ones, where they matter.
    sizes = [
        round(least * (largest / least) ** (step / max(args.budgets - 1, 1)))
        for step in range(args.budgets)
    ]
    rounds: list[dict[str, dict[str, float]]] = []
    learnt: Hardware | None = None
    for _ in range(args.rounds):
        turns = {}
        known = learnt
        for size in sizes:
            turns[f"{size / 1e6:.0f} MB"], hardware = asyncio.run(
                _turn(args, host=size, hardware=known)
            )
            if known is None and size == sizes[len(sizes) // 2]:
                learnt = hardware
        rounds.append(turns)
    return rounds


async def _least_budget(args: argparse.Namespace) -> int:
    size = 32 << 20
    while True:
        try:
            async with _opened(args, host=size):
                return size
        except PlanError:
            size += size // 16


def _opened(
    args: argparse.Namespace, *, host: Any, way: str = _ON_DEMAND, hardware: Hardware | None = None
) -> StreamedModel:
    options: dict[str, Any] = {"experts_implementation": "batched_mm"} if way == _WHOLE else {}
    options |= (
        {"throttle_bytes_per_second": args.throttle} if args.throttle else {"reader": "direct"}
    )
    return StreamedModel.open(
        args.path,
        device="cpu",
        budget=Budget(host=host),
        workload=Workload(prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens),
        measure=False,
        hardware=hardware,
        **options,
    )


async def _turn(
    args: argparse.Namespace, *, host: Any, way: str = _ON_DEMAND, hardware: Hardware | None = None
) -> tuple[dict[str, float], Hardware]:
    drop_from_cache([file.path for file in Checkpoint.open(args.path).files])
    tokens = args.whole_tokens if way == _WHOLE else args.new_tokens
    ids = torch.randint(3, 200, (1, args.prompt_tokens), generator=torch.Generator().manual_seed(0))
    async with _opened(args, host=host, way=way, hardware=hardware) as model:
        store, route = expert_store(model.module), ExpertRoute(most=_MOST_DEMANDS)
        if store is not None:
            store.record(route)
        if way == _IN_MEMORY:  # so that it is
            await _text(model, ids, tokens)
        times, read = await _text(model, ids, tokens)
        skipped = min(args.skipped_tokens, tokens - 2)
        steps = [b - a for a, b in itertools.pairwise(times[1:])][skipped:]
        counts, plan = model.timings().experts, model.plan
        read_bytes = (read[-1] - read[1 + skipped]) / len(steps)
        result = {
            "first_token_seconds": times[1] - times[0],
            "median_step_seconds": statistics.median(steps),
            "mean_step_seconds": statistics.mean(steps),
            "read_bytes_per_token": read_bytes,
            "hit_share": 0.0 if counts is None else counts.hit_share,
            "predicted_step_seconds": plan.prediction.decode.seconds,
            "predicted_expert_bytes_per_token": plan.expert_bytes_per_step,
            "planned_host_bytes": plan.host_memory.used_bytes,
            "cells": sum(each.cells for each in plan.experts) + plan.shared_expert_cells,
        }
        if plan.experts:
            result["expert_bytes"] = plan.experts[0].expert_bytes
            result["reads_in_flight"] = plan.reads_in_flight
            result["bytes_over_better_lru"] = read_bytes / _lru_bytes(plan, route, skipped)
        known = learn(model.hardware, plan, model.timings(), store.usage() if store else {})
        return result, known


async def _text(
    model: StreamedModel, ids: torch.Tensor, tokens: int
) -> tuple[list[float], list[int]]:
    """When it began and each token came, and how many bytes had been read by then; the same text each time."""
    torch.manual_seed(0)
    times, read = [time.perf_counter()], [bytes_read()]
    async for _ in model.stream(input_ids=ids, max_new_tokens=tokens, do_sample=True, top_k=50):
        times.append(time.perf_counter())
        read.append(bytes_read())
    return times, read


def _lru_bytes(plan: Plan, route: ExpertRoute, skipped: int) -> float:
    """What a token reads after the skipped ones: the streamed trunk, and misses of the better of two replayed lists."""
    layers = len(plan.experts)
    cells = sum(each.cells for each in plan.experts) + plan.shared_expert_cells
    # Passes are not told apart; each asks every layer once, the prompt's first.
    passes = [route.demands[at : at + layers] for at in range(0, len(route.demands), layers)]
    before = replay([d for each in passes[: 1 + skipped] for d in each], cells=cells)
    whole = replay([d for each in passes for d in each], cells=cells)
    wanted = whole.wanted - before.wanted
    hits = max(
        whole.quota_lru_hits - before.quota_lru_hits,
        whole.global_lru_hits - before.global_lru_hits,
    )
    decoding = plan.while_decoding()
    trunk = sum(batch.read_bytes for batch in decoding.batches if batch.streamed)
    steps = max(len(passes) - 1 - skipped, 1)
    return max(trunk + (wanted - hits) / steps * plan.experts[0].expert_bytes, 1.0)


if __name__ == "__main__":
    sys.exit(main())
