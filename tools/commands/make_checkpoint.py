"""``layerstream make-checkpoint``: writes a checkpoint in the true shapes of a named model family."""

import argparse
import json
import math
import time
from pathlib import Path

from layerstream.stages.errors import CheckpointError
from layerstream.stages.text import format_bytes
from layerstream.tools.console.arguments import (
    add_output_arguments,
    byte_count,
    non_negative_int,
    positive_int,
)
from layerstream.tools.console.progress import progress
from layerstream.tools.synthetic.checkpoints import CheckpointSpec, MadeCheckpoint, make_checkpoint
from layerstream.tools.synthetic.families import FAMILIES, scaled
from layerstream.tools.synthetic.shapes import tensors_of
from layerstream.tools.synthetic.weights import DTYPES, data_bytes

__all__ = ["BUSIEST_TENTH", "HELP", "add_arguments", "make_with_progress", "run"]

HELP = "write a checkpoint with random weights, or only its headers"


# --skew -> the share of the router's choices that fall on a tenth of the experts, the busiest one. Measured with 512
# random tokens on qwen3-30b-a3b of 2 layers and a hidden size of 64; argparse wants "%" doubled.
BUSIEST_TENTH = {0.0: 0.20, 0.25: 0.28, 0.5: 0.38, 1.0: 0.51, 2.0: 0.62}
_SHARES = ", ".join(f"{100 * share:.0f} %% at {skew:g}" for skew, share in BUSIEST_TENTH.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="a new or empty folder")
    parser.add_argument(
        "--like",
        metavar="FAMILY",
        required=True,
        type=str.lower,
        choices=FAMILIES,
        help=f"whose shapes: {', '.join(FAMILIES)}",
    )
    parser.add_argument(
        "--sparse", action="store_true", help="true headers, holes for weights: takes no disk"
    )
    parser.add_argument("--layers", type=positive_int, metavar="N", help="another number of blocks")
    parser.add_argument(
        "--hidden", type=_hidden_size, metavar="N", help="another hidden size; the rest follows it"
    )
    parser.add_argument("--vocab", type=positive_int, metavar="N", help="another vocabulary size")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the weights")
    parser.add_argument(
        "--max-shard-size", type=byte_count, metavar="SIZE", help="of one file (default: by family)"
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the random weights")
    parser.add_argument(
        "--skew",
        type=_skew,
        default=0.0,
        metavar="S",
        help="routers that prefer some experts, as real ones do: the spread of their rows' norms. On tiny "
        f"qwen3-30b-a3b, the busiest tenth of the experts gets {_SHARES} of all choices (default: 0)",
    )
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    family = FAMILIES[args.like]
    spec = CheckpointSpec(
        family=args.like,
        config=scaled(family.config, layers=args.layers, hidden=args.hidden, vocab=args.vocab),
        dtype=args.dtype,
        max_shard_bytes=args.max_shard_size or family.max_shard_bytes,
        seed=args.seed,
        sparse=args.sparse,
        skew=args.skew,
    )
    if spec.skew and not any(tensor.is_router for tensor in tensors_of(spec.config)):
        raise CheckpointError(
            f"{spec.family} is no mixture of experts, so --skew has no meaning; leave it out, or choose a mixture."
        )
    began = time.monotonic()
    made = make_with_progress(args.folder, spec)
    seconds = time.monotonic() - began
    if args.json:
        report = {
            "folder": str(made.folder),
            "family": spec.family,
            "dtype": spec.dtype,
            "sparse": spec.sparse,
            "skew": spec.skew,
            "tensors": made.tensors,
            "shards": made.shards,
            "total_bytes": made.total_bytes,
            "reused": made.reused,
            "seconds": seconds,
        }
        print(json.dumps(report, indent=2))
    else:
        status = "was there already" if made.reused else f"made in {seconds:.1f} s"
        print(
            f"{made.folder}: {spec.family}, {made.tensors} tensors in {made.shards} "
            f"{'file' if made.shards == 1 else 'files'}, {format_bytes(made.total_bytes)}"
            f"{' with holes for weights' if spec.sparse else ''}; {status}"
        )
    return 0


def make_with_progress(folder: Path, spec: CheckpointSpec) -> MadeCheckpoint:
    """Write the checkpoint of ``spec``, with a progress bar."""
    total = data_bytes(tensors_of(spec.config), spec.dtype)
    with progress(f"Writing {folder}", total, is_bytes=True) as advance:
        return make_checkpoint(folder, spec, advance=advance)


def _hidden_size(text: str) -> int:
    hidden = positive_int(text)
    if hidden % 8:
        raise argparse.ArgumentTypeError(f"not a multiple of 8: {text}")
    return hidden


def _skew(text: str) -> float:
    try:
        skew = float(text)
    except ValueError:
        skew = math.nan
    if not 0 <= skew < math.inf:
        raise argparse.ArgumentTypeError(f"not a number, zero or above: {text!r}")
    return skew
