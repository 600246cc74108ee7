"""``layerstream batch``: answers all requests of a file, as many in each sweep as pays."""

import argparse
import asyncio
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerstream.stages.errors import LayerstreamError, ModelError, PlanError
from layerstream.tools.console.arguments import (
    add_dtype_argument,
    add_model_arguments,
    add_verify_argument,
    byte_count,
    positive_int,
)
from layerstream.tools.console.progress import progress
from layerstream.tools.running.adapters import (
    adapter_names,
    adapter_size,
    add_adapter_arguments,
    find_model,
    open_options,
    tokenizer_of,
)

if TYPE_CHECKING:
    from layerstream.pipeline import Budget, Hardware, Plan, Workload
    from layerstream.pipeline.checkpoint.adapter_folder import Sources
    from layerstream.tools.serving.batch_file import BatchFile

__all__ = ["HELP", "add_arguments", "run"]

logger = logging.getLogger(__name__)

HELP = "answer all requests in a file of OpenAI's batch format"

# Requests for each sweep that are tried. Each takes a thread and a clone of the module tree.
_SIZES = (1, 2, 4, 8, 16, 32, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("model", metavar="PATH", help="a folder, a weight file, or a hub id")
    parser.add_argument("input", type=Path, metavar="IN", help="a request in each line, as JSON")
    parser.add_argument(
        "output",
        type=Path,
        metavar="OUT",
        help="for the answers, in the same order; what it has of an earlier run is kept",
    )
    parser.add_argument(
        "--new-tokens",
        type=positive_int,
        default=256,
        metavar="N",
        help="tokens of an answer whose request sets no limit (default: %(default)s)",
    )
    parser.add_argument(
        "--at-once",
        type=positive_int,
        metavar="N",
        help="requests in each sweep (default: as many as give the most tokens per second)",
    )
    parser.add_argument(
        "--throttle",
        type=byte_count,
        metavar="SIZE",
        help="read at most this many bytes per second",
    )
    add_adapter_arguments(parser, named=True)
    add_model_arguments(parser)
    add_dtype_argument(parser)
    add_verify_argument(parser)
    parser.add_argument("--verbose", action="store_true", help="log what happens")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see serve
    try:
        module = importlib.import_module("layerstream.tools.serving.batch_file")
    except ImportError as error:
        raise LayerstreamError(
            f"batch needs {error.name}, which is not installed: pip install 'layerstream[serve]'."
        ) from error
    sources = find_model(args)
    tokenizer = tokenizer_of(sources)
    if tokenizer is None:
        raise ModelError(
            f"{sources.model} has no tokenizer, which is needed to read and write text."
        )
    file: BatchFile = module.BatchFile(
        args.input, args.output, new_tokens=args.new_tokens, adapters=adapter_names(args)
    )
    if not file.left:
        print(f"{args.output} has all {len(file.lines)} answers.", file=sys.stderr)
        return 0
    asyncio.run(_answer(sources, tokenizer, file, args))
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choices:
    """How the model is opened."""

    at_once: int
    workload: "Workload"
    hardware: "Hardware"


async def _choose(
    sources: "Sources",
    tokenizer: Any,
    file: "BatchFile",
    budget: "Budget",
    args: argparse.Namespace,
) -> _Choices:
    """Look at the machine and the requests, and choose how many are answered at once."""
    from layerstream.pipeline import Checkpoint, Hardware, Workload, make_plan
    from layerstream.pipeline.checkpoint.quantization import refuse_packed_otherwise
    from layerstream.pipeline.planning.overheads import code_bytes
    from layerstream.stages.process.headroom import host_available_bytes
    from layerstream.tools.running.context import context_in

    checkpoint = await Checkpoint.open_async(sources.model)
    refuse_packed_otherwise(checkpoint)
    prompt_tokens, new_tokens = await asyncio.to_thread(
        file.largest, tokenizer, context=context_in(checkpoint.config or {})
    )
    dtype = None if args.dtype == "auto" else args.dtype
    hardware = await Hardware.probe(
        checkpoint,
        device=args.device,
        dtype=dtype,
        most_bytes=budget.host_bytes(host_available_bytes()),
    )

    def workload(size: int) -> Workload:
        return Workload(batch_size=size, prompt_tokens=prompt_tokens, new_tokens=new_tokens)

    def plan_for(size: int) -> "Plan":
        return make_plan(
            checkpoint,
            hardware,
            budget=budget,
            workload=workload(size),
            objective="throughput",
            reader=args.reader,
            kernels=args.kernels,
            throttle_bytes_per_second=args.throttle,
            code_to_load_bytes=code_bytes(len(checkpoint.tensors)),
            adapters=adapter_size(sources),
        )

    at_once = args.at_once or await asyncio.to_thread(_best_size, plan_for, len(file.left))
    return _Choices(at_once=at_once, workload=workload(at_once), hardware=hardware)


async def _answer(
    sources: "Sources", tokenizer: Any, file: "BatchFile", args: argparse.Namespace
) -> None:
    from layerstream.pipeline import Budget, StreamedModel
    from layerstream.tools.serving.app import make_answers
    from layerstream.tools.serving.embeddings import Pooling
    from layerstream.tools.serving.settings import Settings

    budget = Budget(vram=args.vram, host=args.host)
    choices = await _choose(sources, tokenizer, file, budget, args)
    at_once = choices.at_once
    settings = Settings(
        model_name="",
        adapters=adapter_names(args),
        api_key=None,
        chat_template=None,
        concurrent=at_once,
        new_tokens=args.new_tokens,
        max_answers=sys.maxsize,
        max_body_bytes=sys.maxsize,
        pooling=Pooling(),
    )
    async with StreamedModel.open(
        sources.source,
        device=args.device,
        budget=budget,
        workload=choices.workload,
        reader=args.reader,
        dtype=args.dtype,
        kernels=args.kernels,
        verify=args.verify,
        throttle_bytes_per_second=args.throttle,
        max_requests=at_once,
        objective="throughput",
        hardware=choices.hardware,
        **open_options(args),
    ) as model:
        logger.info(model.plan.describe())
        answers, _, _ = make_answers(model, tokenizer, settings)
        began, count = time.monotonic(), len(file.left)
        try:
            with progress(f"answering, {at_once} at once", count) as advance:
                advance(0)
                tokens = await file.answer(answers, at_once=at_once, on_answer=lambda: advance(1))
        finally:
            answers.stop()  # it has a thread of its own
        seconds, sweeps = time.monotonic() - began, model.stats().sweeps
        await model.verified()
    print(
        f"{count} answers with {tokens} tokens in {seconds:.2f} s, {at_once} at once: "
        f"{tokens / seconds:.2f} tokens/s, {sweeps} sweeps",
        file=sys.stderr,
    )


def _best_size(plan_for: Callable[[int], "Plan"], most: int) -> int:
    """How many requests at once are answered the fastest: more share a sweep, but leave less memory for residents."""
    best, best_rate = 1, 0.0
    for size in sorted({min(size, most) for size in _SIZES}):
        try:
            plan = plan_for(size)
        except PlanError:
            if best_rate:
                break
            raise
        rate = size / plan.prediction.request_seconds
        logger.info("%d at once: %.3g requests/s", size, rate)
        if rate > best_rate:
            best, best_rate = size, rate
    return best
