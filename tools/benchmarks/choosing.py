"""Is the chosen plan the fastest? ``python -m layerstream.tools.benchmarks.choosing PATH``.

Every layer batch size and number of slots that fits is planned and run, alternating with the chosen plan, through a
throttled reader. The decoding step is timed, from the end of one sweep to the end of the next.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from layerstream.pipeline import Budget, Checkpoint, Hardware, PlanError, StreamedModel, Workload
from layerstream.pipeline.planning.plan import Plan
from layerstream.tools.console.arguments import byte_count, positive_int
from layerstream.tools.console.tables import print_table

__all__ = ["main"]

_SLOTS = (1, 2, 3, 4)


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a checkpoint of a transformers model")
    parser.add_argument("--host", default="40%", help="share of the model's size, or a size")
    parser.add_argument("--throttle", type=byte_count, default=500_000_000, help="bytes per second")
    parser.add_argument("--sizes", default="1,2,4,8", help="layer batch sizes (default: 1,2,4,8)")
    parser.add_argument("--steps", type=positive_int, default=4, help="that are timed of each plan")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    rows = asyncio.run(_measure(args))
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows)
    return 0


async def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    checkpoint = Checkpoint.open(args.path)
    share = args.host.removesuffix("%")
    budget = Budget(
        host=args.host if share == args.host else int(float(share) / 100 * checkpoint.total_bytes)
    )
    hardware = await Hardware.probe(checkpoint, device="cpu")
    rows: list[dict[str, Any]] = []
    for batch_size, slots in itertools.product(map(int, args.sizes.split(",")), _SLOTS):
        options: dict[str, Any] = {"layer_batch_size": batch_size, "slots": slots}
        try:
            plan, seconds = await _run(args, budget, hardware, **options)
        except PlanError:  # it does not fit
            continue
        best, chosen_seconds = await _run(args, budget, hardware)
        rows.append(
            {
                **options,
                "resident_batches": sum(not batch.streamed for batch in plan.batches),
                "batches": len(plan.batches),
                "predicted_step_seconds": plan.prediction.decode.seconds,
                "step_seconds": seconds,
                "chosen_layer_batch_size": best.layer_batch_size,
                "chosen_slots": best.host_slots,
                "chosen_step_seconds": chosen_seconds,
                "chosen_by_this": chosen_seconds / seconds,
            }
        )
    return rows


async def _run(
    args: argparse.Namespace, budget: Budget, hardware: Hardware, **options: Any
) -> tuple[Plan, float]:
    ids = torch.arange(16)[None]
    async with StreamedModel.open(
        args.path,
        device="cpu",
        budget=budget,
        workload=Workload(prompt_tokens=16, new_tokens=args.steps + 2),
        throttle_bytes_per_second=args.throttle,
        hardware=hardware,
        **options,
    ) as model:
        new_tokens = args.steps + 2  # the first two sweeps fill the pipeline and load residents
        await model.generate(
            input_ids=ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        )
        ends = [sweep.stop_seconds for sweep in model.timings().latest]
        step_seconds = [stop - start for start, stop in itertools.pairwise(ends)][1:]
        return model.plan, statistics.median(step_seconds)


def _print_table(rows: list[dict[str, Any]]) -> None:
    columns = ("batch size", "slots", "resident", "predicted", "measured", "chosen", "ratio")
    print_table(
        "Seconds per decoding step; ratio: the chosen plan's by this one's",
        columns,
        [
            (
                str(row["layer_batch_size"]),
                str(row["slots"]),
                f"{row['resident_batches']} of {row['batches']}",
                f"{row['predicted_step_seconds']:.3f}",
                f"{row['step_seconds']:.3f}",
                f"{row['chosen_step_seconds']:.3f} ({row['chosen_layer_batch_size']} x {row['chosen_slots']})",
                f"{row['chosen_by_this']:.3f}",
            )
            for row in rows
        ],
    )
    print(f"\nat worst {max(row['chosen_by_this'] for row in rows):.3f}")


if __name__ == "__main__":
    sys.exit(main())
