"""Whether cost grows with bytes alone: ``python -m layerstream.tools.benchmarks.scaling FOLDER``.

It answers three questions with checkpoints of random bytes that are swept alternately, in one run: whether eight times
the layers take eight times the time; whether a layer batch of many tensors takes as long as one of few; and how long a
layer batch with almost no bytes takes.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from layerstream.pipeline import Checkpoint, Hardware, Pipeline, Plan, make_plan
from layerstream.stages.arena import ring_bytes
from layerstream.stages.batch import Residence
from layerstream.stages.compute import Batch
from layerstream.tools.console.arguments import byte_count, positive_int

__all__ = ["main"]

# Rate of the throttled reader: below half of a slow disk's, so that the throttle is the bottleneck. A layer takes at
# most ten times the 1 ms of overhead that is allowed, so that overhead not hidden behind reading shows.
_THROTTLE_BYTES_PER_SECOND = 400_000_000
_LAYER_BYTES = 4 << 20
_FEW_LAYERS, _MANY_LAYERS = 12, 96
# The first sweep after a pause is not timed: the pipeline has read ahead for it.
_MIN_SWEEPS, _MIN_SECONDS = 3, 0.5
_SLOTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """A checkpoint of equal layers."""

    layers: int
    tensors: int
    """Tensors per layer."""
    nbytes: int
    """Bytes per layer."""

    def write(self, folder: Path) -> None:
        """Write one file of random bytes."""
        elements = self.nbytes // self.tensors // 2
        names = [
            f"model.layers.{layer}.t{number}.weight"
            for layer in range(self.layers)
            for number in range(self.tensors)
        ]
        save_file(
            {
                name: torch.randint(0, 1 << 15, (elements,), dtype=torch.int16).view(torch.bfloat16)
                for name in names
            },
            folder / "model.safetensors",
        )


def main() -> int:
    """Run the benchmark and print its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="on the disk to read from; gets 1.1 GB for a while"
    )
    parser.add_argument("--rounds", type=positive_int, default=5, help="alternations (default: 5)")
    parser.add_argument(
        "--wide", type=byte_count, default=64 << 20, help="a layer of many tensors (default: 64MiB)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    result = asyncio.run(_measure(args))
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        _print_result(result)
    return 0


async def _measure(args: argparse.Namespace) -> dict[str, Any]:
    few = _Shape(layers=_FEW_LAYERS, tensors=9, nbytes=_LAYER_BYTES)
    many = replace(few, layers=_MANY_LAYERS)
    empty = replace(many, nbytes=9 * 64)
    plain, split = (_Shape(layers=8, tensors=count, nbytes=args.wide) for count in (5, 500))
    alternate = partial(_alternate, args.folder, rounds=args.rounds)
    linear = await alternate((few, many), reader="throttled")
    idle = await alternate((empty,), reader="direct")
    result: dict[str, Any] = {
        "layers": [few.layers, many.layers],
        "throttle_bytes_per_second": _THROTTLE_BYTES_PER_SECOND,
        "throttled_sweep_seconds": linear,
        "linear_ratios": [b / a * few.layers / many.layers for a, b in linear],
        "overhead_seconds_per_batch": [seconds / empty.layers for (seconds,) in idle],
        "tensors": [plain.tensors, split.tensors],
    }
    for reader in ("direct", "mmap"):
        wide = await alternate((plain, split), reader=reader)
        result[f"{reader}_sweep_seconds"] = wide
        result[f"{reader}_tensors_ratios"] = [b / a for a, b in wide]
    return result


async def _alternate(
    folder: Path, shapes: Sequence[_Shape], *, rounds: int, reader: str
) -> list[tuple[float, ...]]:
    """Measure the seconds of a sweep over each of ``shapes``, in each round."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".scaling-") as work:
        folders = [Path(work, str(number)) for number in range(len(shapes))]
        for shape, each in zip(shapes, folders, strict=True):
            each.mkdir()
            shape.write(each)
        os.sync()  # so that nothing is written while we read
        # Opened again each time, so that none reads ahead while another one is measured.
        return [
            tuple([await _measure_sweep(each, reader) for each in folders]) for _ in range(rounds)
        ]


async def _measure_sweep(folder: Path, reader: str) -> float:
    async with Pipeline(await _plan(folder, reader)) as pipeline:
        await pipeline.run(_count_tensors, 0)
        began, sweeps, seconds = time.perf_counter(), 0, 0.0
        while sweeps < _MIN_SWEEPS or seconds < _MIN_SECONDS:
            await pipeline.run(_count_tensors, 0)
            sweeps, seconds = sweeps + 1, time.perf_counter() - began
        return seconds / sweeps


async def _plan(folder: Path, reader: str) -> Plan:
    """Make a plan with one layer per batch and no residents, which would hide the cost of reading."""
    checkpoint = Checkpoint.open(folder)
    plan = make_plan(
        checkpoint,
        await Hardware.probe(checkpoint, device="cpu", measure=False),
        reader=reader,
        layer_batch_size=1,
        throttle_bytes_per_second=_THROTTLE_BYTES_PER_SECOND if reader == "throttled" else None,
    )
    batches = tuple(batch.with_residence(Residence.STREAMED) for batch in plan.batches)
    arena_bytes = ring_bytes([batch.host_bytes for batch in batches], slots=_SLOTS)
    return replace(plan, batches=batches, host_arena_bytes=arena_bytes)


def _count_tensors(batch: Batch, seen: int) -> int:
    """A computation that takes almost no time."""
    return seen + len(batch.tensors)


def _print_result(result: dict[str, Any]) -> None:
    few, many = result["layers"]
    print(
        f"{many} layers against {few}, throttled: {_format_spread(result['linear_ratios'])} of {many // few} times"
    )
    overhead = [1e3 * seconds for seconds in result["overhead_seconds_per_batch"]]
    print(f"a layer batch of next to no bytes: {_format_spread(overhead)} ms")
    few, many = result["tensors"]
    for reader in ("direct", "mmap"):
        ratios = _format_spread(result[f"{reader}_tensors_ratios"])
        print(f"{many} tensors against {few} of the same bytes, {reader}: {ratios} times")


def _format_spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    sys.exit(main())
