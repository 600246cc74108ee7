"""Predictions of plans compared with measurements: ``python -m layerstream.tools.benchmarks.predicting PATH``.

Each setting is planned, run, and compared. With the probed rates, the error is that of the cost model and of its inputs
together; with the rates that the stages reached in the run itself, it is the model's own. With ``--disk`` the weights
are read as fast as the disk allows, and its rate is probed right before and after each run; otherwise a throttled
reader keeps the rate constant.
"""

import argparse
import asyncio
import dataclasses
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from layerstream.pipeline import Budget, Checkpoint, Hardware, StreamedModel, Workload
from layerstream.pipeline.machine.measurement import Figure, Origin
from layerstream.pipeline.planning.plan import Plan
from layerstream.pipeline.planning.replan import learn
from layerstream.stages.telemetry.spans import SweepSpan
from layerstream.tools.console.arguments import byte_count, positive_int
from layerstream.tools.console.tables import print_table

__all__ = ["main"]

_REQUESTS = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    """Options of one plan. The budget is a share of the model's size."""

    layer_batch_size: int | None
    budget: float
    prompt: int
    reader: str


_SETTINGS = (
    _Setting(layer_batch_size=1, budget=0.25, prompt=16, reader="direct"),
    _Setting(layer_batch_size=1, budget=0.6, prompt=16, reader="direct"),
    _Setting(layer_batch_size=1, budget=0.6, prompt=1024, reader="direct"),
    _Setting(layer_batch_size=4, budget=0.7, prompt=16, reader="direct"),
    _Setting(layer_batch_size=4, budget=0.9, prompt=512, reader="direct"),
    _Setting(layer_batch_size=12, budget=1.05, prompt=16, reader="direct"),
    _Setting(layer_batch_size=12, budget=1.6, prompt=512, reader="direct"),
    _Setting(layer_batch_size=1, budget=0.0, prompt=16, reader="mmap"),
    _Setting(layer_batch_size=4, budget=0.0, prompt=512, reader="mmap"),
    _Setting(layer_batch_size=None, budget=0.4, prompt=16, reader="direct"),
    _Setting(layer_batch_size=None, budget=0.0, prompt=16, reader="mmap"),
    _Setting(layer_batch_size=None, budget=0.0, prompt=256, reader="mmap"),
    _Setting(layer_batch_size=None, budget=0.0, prompt=1024, reader="mmap"),
)


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a checkpoint of a transformers model")
    parser.add_argument("--throttle", type=byte_count, default=800_000_000, help="bytes per second")
    parser.add_argument("--disk", action="store_true", help="as fast as the disk gives")
    parser.add_argument("--new-tokens", type=positive_int, default=5)
    parser.add_argument("--only", help="numbers of settings, such as 0,3,5")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    numbers = range(len(_SETTINGS)) if args.only is None else map(int, args.only.split(","))
    rows = [asyncio.run(_measure(_SETTINGS[number], args)) for number in numbers]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows)
    return 0


async def _measure(setting: _Setting, args: argparse.Namespace) -> dict[str, Any]:
    checkpoint = Checkpoint.open(args.path)
    mapped = setting.reader == "mmap"
    throttle = None if args.disk or mapped else args.throttle
    before = await _probe_disk(checkpoint) if args.disk and not mapped else None
    ids = torch.arange(setting.prompt)[None] % 1000 + 5
    async with StreamedModel.open(
        args.path,
        device="cpu",
        budget=Budget(host=None if mapped else int(setting.budget * checkpoint.total_bytes)),
        workload=Workload(prompt_tokens=setting.prompt, new_tokens=args.new_tokens),
        reader=None if throttle else setting.reader,
        throttle_bytes_per_second=throttle,
        layer_batch_size=setting.layer_batch_size,
    ) as model:
        options = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
        for _ in range(_REQUESTS):  # the first request loads residents
            await model.generate(input_ids=ids, do_sample=False, **options)
        timings, plan = model.timings(), model.plan
        learned = learn(model.hardware, plan, timings)
        probed = model.hardware
        after = await _probe_disk(checkpoint) if before is not None else None
        if before is not None and after is not None:
            rate = (before + after) / 2
            probed = dataclasses.replace(
                probed,
                disk_bytes_per_second=rate,
                figures={**probed.figures, "disk_bytes_per_second": Figure(origin=Origin.MEASURED)},
            )
        predicted, own = (model.plan_with(hardware) for hardware in (probed, learned))
    return {
        "setting": dataclasses.asdict(setting),
        "slots": plan.host_slots,
        "resident_batches": sum(not batch.streamed for batch in plan.batches),
        "batches": len(plan.batches),
        **_compare(timings.latest, args.new_tokens, predicted, own),
    }


async def _probe_disk(checkpoint: Checkpoint) -> float | None:
    hardware = await Hardware.probe(checkpoint, device="cpu", fresh=True)
    return hardware.disk_bytes_per_second


def _compare(
    sweeps: tuple[SweepSpan, ...], new_tokens: int, predicted: Plan, own: Plan
) -> dict[str, float]:
    """Compare the sweeps of all requests but the first with both predictions."""
    # From end to end, since the next sweep is read ahead between two sweeps.
    ends = [sweep.stop_seconds for sweep in sweeps]
    sweep_seconds = [stop - start for start, stop in itertools.pairwise(ends)][new_tokens - 1 :]
    prompt = statistics.median(sweep_seconds[::new_tokens])
    step = statistics.median(
        seconds for number, seconds in enumerate(sweep_seconds) if number % new_tokens
    )
    return {
        "measured_prefill_seconds": prompt,
        "predicted_prefill_seconds": predicted.prediction.prefill.seconds,
        "prefill_error": predicted.prediction.prefill.seconds / prompt - 1,
        "prefill_error_of_the_model": own.prediction.prefill.seconds / prompt - 1,
        "measured_step_seconds": step,
        "predicted_step_seconds": predicted.prediction.decode.seconds,
        "step_error": predicted.prediction.decode.seconds / step - 1,
        "step_error_of_the_model": own.prediction.decode.seconds / step - 1,
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    columns = (
        "reader",
        "batch size",
        "resident",
        "prompt",
        "prefill measured",
        "predicted",
        "error",
        "the model's own",
        "step measured",
        "predicted",
        "error",
        "the model's own",
    )
    print_table(
        "Seconds per sweep, as measured and as predicted",
        columns,
        [
            (
                row["setting"]["reader"],
                str(row["setting"]["layer_batch_size"] or "chosen"),
                f"{row['resident_batches']} of {row['batches']}",
                str(row["setting"]["prompt"]),
                f"{row['measured_prefill_seconds']:.2f}",
                f"{row['predicted_prefill_seconds']:.2f}",
                f"{row['prefill_error']:+.1%}",
                f"{row['prefill_error_of_the_model']:+.1%}",
                f"{row['measured_step_seconds']:.2f}",
                f"{row['predicted_step_seconds']:.2f}",
                f"{row['step_error']:+.1%}",
                f"{row['step_error_of_the_model']:+.1%}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
