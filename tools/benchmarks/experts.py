"""Experts on demand compared with streaming whole layers: ``python -m layerstream.tools.benchmarks.experts PATH``.

The same model and budget, opened in turn with experts on demand and with whole layers (which an experts implementation that does
not allow reading on demand brings about). Text is sampled, so that it does not go round in a circle of a few
experts. Bytes are counted by /proc/self/io; weights are dropped from the page cache before each turn, where that is allowed.
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

from layerstream.pipeline import Budget, Checkpoint, StreamedModel, Workload
from layerstream.tools.benchmarks.streaming import bytes_read
from layerstream.tools.compare.page_cache import drop_from_cache
from layerstream.tools.console.arguments import budget_size, byte_rate, positive_int

__all__ = ["main"]

_WAYS = {"experts on demand": {}, "whole layers": {"experts_implementation": "batched_mm"}}
# The first steps still fill the cells.
_SKIPPED_STEPS = 4


def main() -> int:
    """Run the benchmark and print its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a mixture of experts")
    parser.add_argument("--host", type=budget_size, default="25%", help="host budget")
    parser.add_argument("--throttle", type=byte_rate, help="rate of a throttled reader")
    parser.add_argument("--prompt-tokens", type=positive_int, default=16)
    parser.add_argument("--new-tokens", type=positive_int, default=32)
    parser.add_argument("--whole-tokens", type=positive_int, default=8, help="with whole layers")
    parser.add_argument("--rounds", type=positive_int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    rounds = [{way: asyncio.run(_turn(args, way)) for way in _WAYS} for _ in range(args.rounds)]
    if args.json:
        print(json.dumps(rounds, indent=2))
        return 0
    for number, ways in enumerate(rounds, start=1):
        for way, result in ways.items():
            print(f"round {number}, {way}: " + ", ".join(f"{k} {v:.4g}" for k, v in result.items()))
    return 0


async def _turn(args: argparse.Namespace, way: str) -> dict[str, float]:
    checkpoint = Checkpoint.open(args.path)
    drop_from_cache([file.path for file in checkpoint.files])
    tokens = args.new_tokens if way == "experts on demand" else args.whole_tokens
    options: dict[str, Any] = dict(_WAYS[way])
    options |= (
        {"throttle_bytes_per_second": args.throttle} if args.throttle else {"reader": "direct"}
    )
    torch.manual_seed(0)
    ids = torch.randint(3, 200, (1, args.prompt_tokens))
    async with StreamedModel.open(
        args.path,
        device="cpu",
        budget=Budget(host=args.host),
        workload=Workload(prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens),
        measure=False,
        **options,
    ) as model:
        began = time.perf_counter()
        times, read = [began], [bytes_read()]
        async for _ in model.stream(input_ids=ids, max_new_tokens=tokens, do_sample=True, top_k=50):
            times.append(time.perf_counter())
            read.append(bytes_read())
        skipped = min(_SKIPPED_STEPS, tokens - 2)
        steps = [b - a for a, b in itertools.pairwise(times[1:])][skipped:]
        counts = model.timings().experts
        return {
            "first_token_seconds": times[1] - began,
            "median_step_seconds": statistics.median(steps),
            "mean_step_seconds": statistics.mean(steps),
            "read_bytes_per_token": (read[-1] - read[1 + skipped]) / len(steps),
            "hit_share": 0.0 if counts is None else counts.hit_share,
            "predicted_step_seconds": model.plan.prediction.decode.seconds,
            "planned_host_bytes": model.plan.host_memory.used_bytes,
        }


if __name__ == "__main__":
    sys.exit(main())
