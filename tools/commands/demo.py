"""``layerstream demo``: streams a model in a third of its own size of memory, beside what the page cache would give."""

import argparse
import asyncio
import json
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerstream.stages.errors import CheckpointError
from layerstream.stages.readers.readahead import fits_page_cache
from layerstream.stages.text import format_bytes
from layerstream.tools.commands.make_checkpoint import make_with_progress
from layerstream.tools.console.arguments import (
    add_dtype_argument,
    add_generation_arguments,
    add_model_arguments,
    add_output_arguments,
)
from layerstream.tools.console.progress import progress
from layerstream.tools.console.tables import print_table
from layerstream.tools.console.token_text import TerminalText, load_tokenizer, prompt_ids
from layerstream.tools.running.conversation import chat_token_ids
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

HELP = "stream a model under a third of its own size, beside what the page cache would give"

# Apache-2.0, 0.72 GB. Its largest layer, the head, is an eighth of it, so that a third holds it and what is read meanwhile: of many
# models of this size the embeddings are a third.
HUB_MODEL = "HuggingFaceTB/SmolLM2-360M-Instruct"
_HUB_SECONDS = 5.0

_PROMPT = "Once upon a time there was a model that did not fit, and"
_QUESTION = "Why is the sky blue? Answer in two sentences."

# For models without a tokenizer: ids that are in every vocabulary.
_PROMPT_IDS = [1, 2, 3, 4, 5, 6, 7, 8]

_BUDGET_SHARE = 3

# Enough for a rate; the demo is to end soon.
_CACHED_TOKENS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("model", metavar="PATH_OR_ID", nargs="?", help="a model of your own")
    parser.add_argument(
        "--synthetic",
        action="store_true",
        help=f"ask no hub for {HUB_MODEL}: take a checkpoint of 1 GB with random weights",
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=_default_folder(),
        help="where that checkpoint is made and kept (default: %(default)s)",
    )
    add_generation_arguments(parser, max_new_tokens=32)
    add_model_arguments(parser)
    add_dtype_argument(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    path = _demo_model(args) if args.model is None else _resolve(args.model)
    model_bytes = _model_bytes(path)
    # The page cache would hold a model of this size: it is left out, to show what is for models that it does not hold.
    streaming = _with(
        args, host=args.host or model_bytes // _BUDGET_SHARE, reader=args.reader or "direct"
    )
    tokenizer = load_tokenizer(path)
    asked, prompt = _prompt(tokenizer, path)
    if not args.json:
        print(f"{path}: {format_bytes(model_bytes)} of weights")
    streamed = _generate(path, prompt, streaming, "Streaming")
    cached = None
    if args.host is None and args.reader is None and fits_page_cache(model_bytes):
        few = min(args.max_new_tokens, _CACHED_TOKENS)
        mapped = _with(args, host=None, reader="mmap", quiet=True, max_new_tokens=few)
        cached = _generate(path, prompt, mapped, "The same from the page cache")
    text = TerminalText(tokenizer)
    continuation = "".join(map(text.add, streamed.token_ids)) + text.finish()
    if args.json:
        report = {"model": str(path), "model_bytes": model_bytes, "text": continuation}
        report |= streamed.to_json() | {"page_cache": None if cached is None else cached.to_json()}
        print(json.dumps(report, indent=2))
    else:
        print(f"\n{asked}{continuation}\n")
        _print_report(streamed, cached, model_bytes=model_bytes)
    return 0


def _with(args: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "quiet": args.json, **changes})


def _prompt(tokenizer: Any | None, path: Path) -> tuple[str, list[int]]:
    """What the model is asked, as text and as tokens."""
    if tokenizer is None:
        return "", _PROMPT_IDS
    if tokenizer.chat_template is None:
        return _PROMPT, prompt_ids(tokenizer, _PROMPT, path)
    messages = [{"role": "user", "content": _QUESTION}]
    return f"> {_QUESTION}\n", chat_token_ids(tokenizer, messages, path=path)


def _generate(
    path: Path, prompt: list[int], args: argparse.Namespace, label: str
) -> GenerationResult:
    with progress(label, args.max_new_tokens) as advance:

        def show_plan(plan: "Plan") -> None:
            if not args.quiet:
                print(plan.describe())
            advance(0)

        return asyncio.run(
            stream_tokens(path, prompt, args=args, on_plan=show_plan, on_token=lambda _: advance(1))
        )


def _print_report(
    streamed: GenerationResult, cached: GenerationResult | None, *, model_bytes: int
) -> None:
    print(f"{streamed.summary()}\n")
    print_table("What each stage did", STAGE_COLUMNS, stage_rows(streamed.timings.stages))
    if streamed.peak_added_bytes is not None:
        print(
            f"\nMemory: {format_bytes(streamed.peak_added_bytes)} added at most, of a host budget "
            f"of {format_bytes(streamed.host_budget_bytes)}; the weights are "
            f"{format_bytes(model_bytes)}."
        )
    if cached is not None and streamed.step_tokens_per_second > 0:
        slow, fast = streamed.step_tokens_per_second, cached.step_tokens_per_second
        faster = f"{fast / slow:.1f} times as fast" if fast > slow else "no faster here"
        print(
            f"After the first token: {slow:.2f} tokens/s streamed; {fast:.2f} tokens/s from the page cache, which is "
            f"{faster} and takes {format_bytes(model_bytes)} of free memory for the weights. Where free memory can hold "
            "them, layerstream uses it by itself."
        )


def _default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "layerstream" / "demo-checkpoint"


def _demo_model(args: argparse.Namespace) -> Path:
    """A small model from the hub if it is there or the hub answers; else one with random weights. Says which, and why."""
    reason = "as asked" if args.synthetic else _no_hub()
    if reason is None:
        print(
            f"Taking {HUB_MODEL} (0.7 GB, Apache-2.0), which the hub's cache keeps; --synthetic does without.",
            file=sys.stderr,
        )
        try:
            return _resolve(HUB_MODEL)
        except CheckpointError as error:
            reason = str(error)
    print(
        f"Taking random weights, whose text means nothing ({reason}).", file=sys.stderr, flush=True
    )
    return _demo_checkpoint(args.dir)


def _no_hub() -> str | None:
    """Why the demo's model cannot be had soon; None if it can."""
    try:
        from huggingface_hub import HfApi, try_to_load_from_cache
    except ImportError:
        return "models of the hub need pip install 'layerstream[hf]'"
    if isinstance(try_to_load_from_cache(HUB_MODEL, "config.json"), str):
        return None
    failures: list[str] = []

    def ask() -> None:
        try:
            HfApi().model_info(HUB_MODEL, timeout=_HUB_SECONDS)
        except Exception as error:  # noqa: BLE001 - the hub's client changes its exceptions between versions
            failures.append(type(error).__name__)

    # A thread: looking up a name may take longer than any timeout of the client.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_HUB_SECONDS)
    if asking.is_alive():
        return f"the hub has not answered within {_HUB_SECONDS:.0f} s"
    return f"the hub cannot be asked: {failures[0]}" if failures else None


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
    from layerstream.tools.running.open_checkpoint import open_checkpoint

    return sum(file.size_bytes for file in open_checkpoint(path).files)
