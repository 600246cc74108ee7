"""Streaming compared with the disk's bandwidth: ``python -m layerstream.tools.benchmarks.streaming PATH``.

Sweeps back to back alternate with raw direct reads of the same files; bytes are counted by /proc/self/io. While sweeps
run, a task on the same event loop records how late it wakes up.
"""

import argparse
import asyncio
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from layerstream.pipeline import Budget, Checkpoint, Hardware, Pipeline, make_plan
from layerstream.stages.compute import Batch
from layerstream.stages.process.usage import anonymous_bytes
from layerstream.stages.text import format_bytes
from layerstream.tools.benchmarks.raw_read import best_raw_read
from layerstream.tools.console.arguments import byte_count, positive_int

__all__ = ["bytes_read", "main"]

_HEARTBEAT_SECONDS = 0.005


def main() -> int:
    """Run the benchmark and print its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a checkpoint")
    parser.add_argument(
        "--host", type=byte_count, default=1 << 30, help="host budget (default: 1GiB)"
    )
    parser.add_argument(
        "--sweeps", type=positive_int, default=10, help="back to back (default: 10)"
    )
    parser.add_argument("--rounds", type=positive_int, default=5, help="alternations (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    result = asyncio.run(_measure(args))
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        _print_result(result)
    return 0


async def _measure(args: argparse.Namespace) -> dict[str, Any]:
    checkpoint = Checkpoint.open(args.path)
    hardware = await Hardware.probe(checkpoint, device="cpu")
    plan = make_plan(checkpoint, hardware, budget=Budget(host=args.host), reader="direct")
    paths = [file.path for file in checkpoint.files]
    before = anonymous_bytes() or 0
    rounds: list[dict[str, float]] = []
    lateness: list[float] = []
    peak = 0
    async with Pipeline(plan) as pipeline:
        await pipeline.run(_count_tensors, 0)  # the first sweep also loads the residents
        for _ in range(args.rounds):
            raw = [await asyncio.to_thread(best_raw_read, paths)]
            heartbeat = asyncio.create_task(_record_lateness(lateness))
            read, began = bytes_read(), time.perf_counter()
            for _ in range(args.sweeps):
                await pipeline.run(_count_tensors, 0)
            seconds, read = time.perf_counter() - began, bytes_read() - read
            heartbeat.cancel()
            peak = max(peak, (anonymous_bytes() or 0) - before)
            raw.append(await asyncio.to_thread(best_raw_read, paths))
            rounds.append(
                {
                    "bytes_per_second": read / seconds,
                    "raw_bytes_per_second": statistics.mean(raw),
                    "ratio": read / seconds / statistics.mean(raw),
                    "sweep_seconds": seconds / args.sweeps,
                }
            )
    return {
        "machine": platform.processor() or platform.machine(),
        "model_bytes": checkpoint.total_bytes,
        "host_budget_bytes": args.host,
        "planned_bytes": plan.host_memory.used_bytes,
        "added_bytes": peak,
        "sweeps": args.sweeps,
        "rounds": rounds,
        "median_ratio": statistics.median(each["ratio"] for each in rounds),
        "heartbeat_late_p99_seconds": statistics.quantiles(lateness, n=100)[98],
    }


def _count_tensors(batch: Batch, seen: int) -> int:
    """A computation that takes almost no time."""
    return seen + len(batch.tensors)


def bytes_read() -> int:
    """What this process has read from disk, as the kernel counts it."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


async def _record_lateness(lateness: list[float]) -> None:
    while True:
        began = time.perf_counter()
        await asyncio.sleep(_HEARTBEAT_SECONDS)
        lateness.append(time.perf_counter() - began - _HEARTBEAT_SECONDS)


def _print_result(result: dict[str, Any]) -> None:
    for number, each in enumerate(result["rounds"], start=1):
        print(
            f"round {number}: {each['bytes_per_second'] / 1e9:.2f} GB/s, raw "
            f"{each['raw_bytes_per_second'] / 1e9:.2f} GB/s, ratio {each['ratio']:.3f}, "
            f"{each['sweep_seconds']:.2f} s per sweep"
        )
    print(
        f"median ratio {result['median_ratio']:.3f}; added memory "
        f"{format_bytes(result['added_bytes'])} of a budget of "
        f"{format_bytes(result['host_budget_bytes'])}; the event loop was late by "
        f"{result['heartbeat_late_p99_seconds'] * 1e3:.1f} ms at the 99th percentile"
    )


if __name__ == "__main__":
    sys.exit(main())
