"""``layerstream plan``: the dry run. It reads no weights and needs neither a GPU nor transformers."""

import argparse
import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerstream.stages.text import format_bytes
from layerstream.tools.console.arguments import (
    MODEL_HELP,
    add_model_arguments,
    add_output_arguments,
    byte_count,
    byte_rate,
    positive_int,
)
from layerstream.tools.console.files import naming
from layerstream.tools.running.adapters import adapter_size, add_adapter_arguments, find_model

if TYPE_CHECKING:
    from layerstream.pipeline import Budget, Checkpoint, Hardware, Plan
    from layerstream.pipeline.planning.adapter_size import AdapterSize
    from layerstream.pipeline.planning.what_if import WhatIf

__all__ = ["HELP", "add_arguments", "run"]

# The page of the service looks the same.
_LOOK = Path(__file__).parent.parent / "serving" / "page" / "look.css"

HELP = "say how a model would be streamed, how fast that is, and why, before anything runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("model", metavar="PATH", help=MODEL_HELP)
    add_model_arguments(parser)
    add_adapter_arguments(parser, named=True)
    what_if = parser.add_argument_group(
        "what if", "plan for another machine: also with a --device that is not here"
    )
    what_if.add_argument("--ram", type=byte_count, metavar="SIZE", help="host RAM that is free")
    what_if.add_argument(
        "--disk-bandwidth", type=byte_rate, metavar="RATE", help="of direct reads, such as 7GB/s"
    )
    what_if.add_argument(
        "--h2d-bandwidth", type=byte_rate, metavar="RATE", help="host to device, such as 25GB/s"
    )
    workload = parser.add_argument_group("what the model is asked for")
    for name, default, meaning in (
        ("--batch-size", 1, "sequences at a time"),
        ("--prompt-tokens", 512, "of each sequence"),
        ("--new-tokens", 128, "of each sequence"),
    ):
        workload.add_argument(
            name,
            type=positive_int,
            default=default,
            metavar="N",
            help=f"{meaning} (default: %(default)s)",
        )
    workload.add_argument(
        "--objective",
        choices=["latency", "throughput"],
        default="latency",
        help="latency: one request, loading what stays included; throughput: what repeats (default: %(default)s)",
    )
    parser.add_argument(
        "--layer-batch-size", type=positive_int, metavar="N", help="blocks that travel together"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="measure this machine again, whatever is known of it"
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write the report as one page that needs nothing else, too",
    )
    parser.add_argument("--markdown", action="store_true", help="print the report as Markdown")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    from layerstream.pipeline import Budget
    from layerstream.pipeline.checkpoint.quantization import refuse_packed_otherwise
    from layerstream.pipeline.planning.what_if import WhatIf
    from layerstream.pipeline.report.plan_report import html_report, report_plan, summarize_plan
    from layerstream.stages.devices.lookup import missing_device
    from layerstream.tools.running.open_checkpoint import open_checkpoint

    budget = Budget(vram=args.vram, host=args.host)
    what_if = WhatIf(
        missing_device=missing_device(args.device),
        ram_bytes=args.ram,
        disk_bytes_per_second=args.disk_bandwidth,
        h2d_bytes_per_second=args.h2d_bandwidth,
    )
    sources = find_model(args)
    checkpoint = open_checkpoint(sources.model)
    refuse_packed_otherwise(checkpoint)
    hardware = asyncio.run(_hardware(checkpoint, budget, what_if, args=args))
    plan = _plan(checkpoint, hardware, budget, what_if, size=adapter_size(sources), args=args)
    # As the user calls it: reports are sent to others, who need not know where models of the hub are kept.
    named = replace(plan, checkpoint=args.model)
    if args.html is not None:
        page = html_report(named, style=_LOOK.read_text("utf-8"))
        with naming(args.html):
            args.html.write_text(page, encoding="utf-8")
    if args.json:
        print(json.dumps({"summary": summarize_plan(plan), "plan": json.loads(plan.to_json())}))
    else:
        print(report_plan(named, markdown=args.markdown))
    return 0


async def _hardware(
    checkpoint: "Checkpoint", budget: "Budget", what_if: "WhatIf", *, args: argparse.Namespace
) -> "Hardware":
    from layerstream.pipeline import Hardware

    # A what-if is about another machine: values that are not given are taken from what is known of this one.
    this_machine = await Hardware.probe(
        checkpoint,
        "cpu" if what_if.missing_device else args.device,
        fresh=args.fresh,
        measure=args.fresh or not what_if.is_given,
    )
    return what_if.complete(this_machine, budget)


def _plan(
    checkpoint: "Checkpoint",
    hardware: "Hardware",
    budget: "Budget",
    what_if: "WhatIf",
    *,
    size: "AdapterSize",
    args: argparse.Namespace,
) -> "Plan":
    from layerstream.pipeline import Workload, make_plan
    from layerstream.pipeline.checkpoint.layers import group_layers
    from layerstream.pipeline.planning.overheads import code_bytes
    from layerstream.pipeline.planning.planned_layers import planned_layers

    groups = group_layers(checkpoint)
    on_cpu = hardware.device == "cpu"
    layers = planned_layers(
        checkpoint,
        groups,
        gathers_tables=True,
        experts_on_demand=True,
        packed_experts=on_cpu,
        sequences=args.batch_size,
    )
    plan = make_plan(
        checkpoint,
        hardware,
        budget=budget,
        workload=Workload(
            batch_size=args.batch_size,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
        ),
        objective=args.objective,
        layers=layers,
        reader=args.reader,
        kernels=args.kernels,
        layer_batch_size=args.layer_batch_size,
        code_to_load_bytes=code_bytes(len(checkpoint.tensors)),
        adapters=size,
    )
    streamed_bytes = sum(
        layer.nbytes + sum(experts.nbytes for experts in layer.experts) for layer in layers
    )
    table_bytes = (
        sum(checkpoint.tensors[name].nbytes for group in groups for name in group.tensors)
        - streamed_bytes
    )
    code = format_bytes(plan.overhead_bytes)
    notes = [
        *plan.notes,
        f"{code} for code and module tree are ASSUMED: the first model of a process takes about so much of the budget",
    ]
    if table_bytes:
        notes.append(
            f"embedding tables of {format_bytes(table_bytes)} stay in their files: the rows that are looked up are read"
        )
    return replace(plan, notes=(*notes, *what_if.notes(hardware)))
