"""``layerstream demo``: streams a model in a third of its own size of memory."""

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from layerstream.stages.text import format_bytes
from layerstream.tools.commands.make_checkpoint import make_with_progress
from layerstream.tools.console.arguments import (
    add_generation_arguments,
    add_model_arguments,
    add_output_arguments,
)
from layerstream.tools.console.progress import progress
from layerstream.tools.console.tables import print_table
from layerstream.tools.console.token_text import TerminalText, load_tokenizer, prompt_ids
from layerstream.tools.running.generation import (
    STAGE_COLUMNS,
    GenerationResult,
    stage_rows,
    stream_tokens,
)
from layerstream.tools.synthetic.checkpoints import CheckpointSpec
from layerstream.tools.synthetic.families import FAMILIES

if TYPE_CHECKING:
    from layerstream.pipeline import Plan

__all__ = ["HELP", "add_arguments", "run"]

HELP = "stream a model under a third of its own size in memory; make one of 1 GB if none is given"

_PROMPT = "Once upon a time there was a model that did not fit, and"

# For models without a tokenizer: ids that are in every vocabulary.
_PROMPT_IDS = [1, 2, 3, 4, 5, 6, 7, 8]

_BUDGET_SHARE = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("model", metavar="PATH_OR_ID", nargs="?", help="a model of your own")
    parser.add_argument(
        "--dir",
        type=Path,
        default=_default_folder(),
        help="where the demo's checkpoint is made and kept (default: %(default)s)",
    )
    add_generation_arguments(parser, max_new_tokens=16)
    add_model_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    path = _demo_checkpoint(args.dir) if args.model is None else _resolve(args.model)
    model_bytes = _model_bytes(path)
    args.host = args.host or model_bytes // _BUDGET_SHARE
    tokenizer = load_tokenizer(path)
    prompt = prompt_ids(tokenizer, _PROMPT, path) if tokenizer else _PROMPT_IDS
    with progress("Generating", args.max_new_tokens) as advance:

        def show_plan(plan: "Plan") -> None:
            if not args.json:
                print(f"{path}: {format_bytes(model_bytes)} of weights\n{plan.describe()}")
            advance(0)

        generated = asyncio.run(
            stream_tokens(path, prompt, args=args, on_plan=show_plan, on_token=lambda _: advance(1))
        )
    text = TerminalText(tokenizer)
    continuation = "".join(map(text.add, generated.token_ids)) + text.finish()
    if args.json:
        report = {"model": str(path), "model_bytes": model_bytes, "text": continuation}
        print(json.dumps(report | generated.to_json(), indent=2))
    else:
        print(f"\n{_PROMPT if tokenizer else ''}{continuation}\n")
        _print_report(generated, model_bytes=model_bytes)
    return 0


def _print_report(generated: GenerationResult, *, model_bytes: int) -> None:
    print(f"{generated.summary()}\n")
    print_table("What each stage did", STAGE_COLUMNS, stage_rows(generated.timings.stages))
    if generated.peak_added_bytes is not None:
        print(
            f"\nMemory: {format_bytes(generated.peak_added_bytes)} added at most, of a host budget "
            f"of {format_bytes(generated.host_budget_bytes)}; the weights are "
            f"{format_bytes(model_bytes)}."
        )


def _default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "layerstream" / "demo-checkpoint"


def _demo_checkpoint(folder: Path) -> Path:
    family = FAMILIES["demo"]
    spec = CheckpointSpec(
        family="demo",
        config=family.config,
        dtype="bfloat16",
        max_shard_bytes=family.max_shard_bytes,
        seed=0,
        sparse=False,
    )
    made = make_with_progress(folder, spec)
    if not made.reused:
        print(
            f"Made the demo's checkpoint, with random weights, in {folder}; the next demo uses it "
            "again. Remove the folder when you are done.",
            file=sys.stderr,
        )
    return folder


def _resolve(model: str) -> Path:
    from layerstream.pipeline.checkpoint.hub import resolve_model_path

    # Before the event loop runs: a download that is interrupted by Ctrl-C ends at once.
    return resolve_model_path(model)


def _model_bytes(path: Path) -> int:
    from layerstream.pipeline import Checkpoint

    return sum(file.size_bytes for file in Checkpoint.open(path).files)
