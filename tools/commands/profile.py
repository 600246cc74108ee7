"""``layerstream profile``: shows where the time of a sweep goes, and what to change."""

import argparse
import asyncio
import json
import logging
import statistics
from pathlib import Path

from layerstream.stages.telemetry.spans import StageTimings
from layerstream.stages.text import format_bytes, format_seconds
from layerstream.tools.console.arguments import (
    MODEL_HELP,
    add_dtype_argument,
    add_model_arguments,
    add_output_arguments,
    byte_count,
    picture_path,
    positive_int,
)
from layerstream.tools.console.plot import require_matplotlib, write_timeline
from layerstream.tools.console.tables import print_table
from layerstream.tools.running.adapters import add_adapter_arguments, find_model
from layerstream.tools.running.sweeps import Profile, profile_model

__all__ = ["HELP", "add_arguments", "run"]

logger = logging.getLogger(__name__)

HELP = "show where the time of a sweep goes, and what to change"

_COLUMNS = (
    "stage",
    "batches",
    "bytes",
    "busy",
    "waiting in",
    "waiting out",
    "GB/s while busy",
    "of the link",
)

# Hits of the two usual ways to use a number of cells, and of the best one.
_EXPERT_COLUMNS = ("cells", "of all", "LRU per layer", "one LRU", "best possible")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("model", metavar="PATH", help=MODEL_HELP)
    parser.add_argument(
        "--sweeps",
        type=positive_int,
        default=5,
        metavar="N",
        help="passes over the weights; the first one fills the pipeline (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=positive_int,
        default=16,
        metavar="N",
        help="tokens of each forward pass (default: %(default)s)",
    )
    without = parser.add_mutually_exclusive_group()
    without.add_argument(
        "--no-compute", action="store_true", help="stream the weights past no computation"
    )
    parser.add_argument(
        "--experts",
        type=positive_int,
        nargs="?",
        const=64,
        metavar="N",
        help="then decode so many tokens of a mixture of experts (default: %(const)s), and show what other numbers of cells, "
        "and the best possible choice of experts to keep, would have hit",
    )
    add_dtype_argument(without)
    add_model_arguments(parser)
    add_adapter_arguments(parser, named=False)
    parser.add_argument(
        "--throttle", type=byte_count, metavar="SIZE", help="read at this many bytes per second"
    )
    parser.add_argument(
        "--layer-batch-size", type=positive_int, metavar="N", help="blocks that travel together"
    )
    parser.add_argument(
        "--no-ceiling", action="store_true", help="do not measure what the disk could give"
    )
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write Chrome trace events, for ui.perfetto.dev"
    )
    parser.add_argument(
        "--plot", type=picture_path, metavar="FILE", help="draw the stages' timeline: .png or .svg"
    )
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    # Refuse paths that cannot be written before the sweeps, not after.
    for path in (args.trace, args.plot):
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    if args.plot is not None:
        require_matplotlib()
    sources = find_model(args)
    profile = asyncio.run(profile_model(sources, args=args))
    logger.info(profile.plan.describe())
    if args.json:
        print(json.dumps({"model": str(sources.source), **profile.to_json()}, indent=2))
    else:
        _print_report(profile)
    # Behind the report, which a full disk must not cost.
    if args.trace is not None:
        profile.timings.write_trace(args.trace)
    if args.plot is not None:
        write_timeline(profile.timings, args.plot)
    return 0


def _print_report(profile: Profile) -> None:
    plan, steady = profile.plan, profile.steady
    work = (
        "weights alone, no computation"
        if profile.prompt_tokens is None
        else f"a forward pass, prompt tokens: {profile.prompt_tokens}"
    )
    print(
        f"Each sweep: {work}; {len(plan.batches)} layer batches, "
        f"{format_bytes(plan.disk_bytes_per_sweep)} from disk (reader {plan.reader}, on {plan.device})"
    )
    swept = "the only sweep" if len(profile.sweep_seconds) == 1 else f"{steady.sweeps} sweeps"
    title = f"{swept} in {format_seconds(steady.wall_seconds)}:"
    rows = [_row(profile, stage) for stage in steady.stages]
    if (unpacking := steady.unpacking) is not None and unpacking.items:
        name, _, *rest = _row(profile, unpacking)
        rows.append((f"  {name}", "-", *rest))
    print_table(title, _COLUMNS, rows)
    print()
    for line in _summary_lines(profile):
        print(line)
    if profile.experts is not None:
        print()
        print_table(f"Experts: {profile.experts.sentence}", _EXPERT_COLUMNS, profile.experts.rows())


def _row(profile: Profile, stage: StageTimings) -> tuple[str, ...]:
    ceiling = profile.ceiling(stage)
    return (
        stage.name,
        str(stage.items),
        format_bytes(stage.bytes),
        format_seconds(stage.busy_seconds),
        format_seconds(stage.waited_in_seconds),
        format_seconds(stage.waited_out_seconds),
        f"{stage.bytes_per_second / 1e9:.2f}" if stage.bytes else "-",
        f"{stage.bytes_per_second / ceiling:.0%}" if ceiling and stage.bytes else "-",
    )


def _summary_lines(profile: Profile) -> list[str]:
    seconds = profile.steady_seconds
    first, *others = profile.sweep_seconds
    median = statistics.median(seconds)
    spread = f" ({min(seconds):.3f} to {max(seconds):.3f})" if others else ""
    ceiling = profile.disk_ceiling_bytes_per_second
    throttled = profile.plan.throttle_bytes_per_second is not None
    lines = [
        f"Time per sweep: median {median:.3f} s{spread}; the first {first:.3f} s",
        *(line.strip().capitalize() for line in profile.forecast.lines()),
        f"Overlap efficiency: {profile.steady.overlap_efficiency:.2f}",
        f"Bottleneck: {profile.steady.bottleneck().sentence}",
    ]
    if ceiling is not None:
        origin = "as given" if throttled else "measured with raw reads of a sample, after the run"
        lines.insert(1, f"The disk's ceiling: {ceiling / 1e9:.2f} GB/s, {origin}")
    return lines
