"""``layerstream convert``: writes a checkpoint anew with fewer bytes, in the form of compressed-tensors."""

import argparse
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from layerstream.stages.errors import CheckpointError
from layerstream.stages.text import format_bytes
from layerstream.tools.console.arguments import add_output_arguments, byte_count, positive_int
from layerstream.tools.console.progress import progress, waiting
from layerstream.tools.console.tables import print_table

if TYPE_CHECKING:
    from layerstream.tools.convert.conversion import Conversion, Converted

__all__ = ["HELP", "add_arguments", "run"]

HELP = "write a checkpoint anew with packed weights, which stream in fewer bytes"

_SHARD_BYTES = 2_000_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a folder or file of plain weights (safetensors, .bin), or a hub id",
    )
    parser.add_argument(
        "folder",
        metavar="DST",
        type=Path,
        help="a new or empty folder, or that of an interrupted run, which goes on",
    )
    parser.add_argument(
        "--to",
        required=True,
        type=str.lower,
        choices=["fp8", "int8", "int4"],
        help="what the weights of linear layers are rounded to; all else stays as it is",
    )
    parser.add_argument(
        "--group-size",
        type=_group_size,
        metavar="N",
        help="values of a row that share a scale, or channel for one scale per row (default: 128 for int4, else channel)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=byte_count,
        default=_SHARD_BYTES,
        metavar="SIZE",
        help="of one file (default: 2GB)",
    )
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    # Here, since they load torch.
    from layerstream.pipeline.checkpoint.adapter_folder import resolve_sources
    from layerstream.tools.convert.conversion import convert, plan_conversion
    from layerstream.tools.convert.encoding import Encoding, Target
    from layerstream.tools.running.open_checkpoint import open_checkpoint

    encoding = Encoding.of(Target(args.to), args.group_size)
    sources = resolve_sources(args.source)
    if sources.model != sources.source:
        raise CheckpointError(
            f"{sources.source} holds an adapter alone, which stays as it is: convert its base model, {sources.model}, and open "
            "the adapter with the result as --base."
        )
    checkpoint = open_checkpoint(sources.model)
    with waiting("reading headers"):
        conversion = plan_conversion(
            checkpoint, args.folder, encoding, max_shard_bytes=args.max_shard_size
        )
    began = time.monotonic()
    try:
        with progress(
            f"Converting to {args.folder}", conversion.source_bytes, is_bytes=True
        ) as advance:
            converted = convert(conversion, advance=advance)
    except KeyboardInterrupt:
        print(f"Interrupted; the same command goes on in {args.folder}.", file=sys.stderr)
        raise
    seconds = time.monotonic() - began
    if args.json:
        print(json.dumps(_report(conversion, converted, seconds), indent=2))
    else:
        _print_report(conversion, converted, seconds)
    return 0


def _group_size(text: str) -> int | str:
    return text if text == "channel" else positive_int(text)


def _report(conversion: "Conversion", converted: "Converted", seconds: float) -> dict[str, object]:
    return {
        "source": str(conversion.checkpoint.path),
        "folder": str(conversion.folder),
        "to": str(conversion.encoding.target),
        "group_size": conversion.encoding.group_size,
        "source_bytes": conversion.source_bytes,
        "total_bytes": conversion.total_bytes,
        "shards": len(conversion.shards),
        "reused_shards": converted.reused_shards,
        "converted": sorted(conversion.chosen.converted),
        "left": dict(conversion.chosen.left),
        "relative_error": converted.error.relative,
        "layers": {name: error.relative for name, error in converted.errors.items()},
        "seconds": seconds,
    }


def _print_report(conversion: "Conversion", converted: "Converted", seconds: float) -> None:
    rows = [(name, f"{error.relative:.3%}") for name, error in converted.errors.items()]
    print_table("Relative error of converted weights (RMS):", ("layer", "error"), rows)
    kinds = Counter(
        (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), reason)
        for name, reason in conversion.chosen.left.items()
    )
    if kinds:
        print("\nLeft as they are:")
    for (name, reason), count in kinds.items():
        print(f"  {name}{f' ({count} tensors)' if count > 1 else ''}: {reason}")
    kept = (
        f", {converted.reused_shards} of them from an earlier run"
        if converted.reused_shards
        else ""
    )
    print(
        f"\n{conversion.folder}: {len(conversion.chosen.converted)} weights converted to {conversion.encoding.target}, "
        f"error {converted.error.relative:.3%}; {format_bytes(conversion.source_bytes)} -> "
        f"{format_bytes(conversion.total_bytes)} in {len(conversion.shards)} "
        f"{'file' if len(conversion.shards) == 1 else 'files'}{kept}; {seconds:.1f} s"
    )
