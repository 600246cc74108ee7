"""``layerstream generate``: generates text with a model whose weights stream."""

import argparse
import asyncio
import json
import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from layerstream.stages.errors import ModelError
from layerstream.tools.console.arguments import (
    MODEL_HELP,
    add_dtype_argument,
    add_generation_arguments,
    add_model_arguments,
    add_output_arguments,
    add_verify_argument,
    token_ids,
)
from layerstream.tools.console.progress import waiting
from layerstream.tools.console.token_text import TerminalText, prompt_ids
from layerstream.tools.running.adapters import add_adapter_arguments, find_model, tokenizer_of
from layerstream.tools.running.conversation import chat_token_ids
from layerstream.tools.running.generation import stream_tokens
from layerstream.tools.running.read_ahead import reading_ahead
from layerstream.tools.running.speculation import add_speculation_argument, load_speculation

__all__ = ["HELP", "add_arguments", "run"]

logger = logging.getLogger(__name__)

HELP = "generate text from a model whose weights stream"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("model", metavar="PATH", help=MODEL_HELP)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to go on from")
    prompt.add_argument(
        "--prompt-ids", type=token_ids, metavar="1,2,3", help="the same as token ids"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is what a user says: the model's chat template is applied to it",
    )
    add_generation_arguments(parser, max_new_tokens=64)
    add_adapter_arguments(parser, named=False)
    add_speculation_argument(parser)
    add_model_arguments(parser)
    add_dtype_argument(parser)
    add_verify_argument(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if args.chat and args.prompt_ids:
        raise ModelError(
            "--chat applies a template to the text of --prompt; leave out --prompt-ids."
        )
    with reading_ahead(args):
        return _generate(args)


def _prompt(tokenizer: Any | None, args: argparse.Namespace, path: Path) -> list[int]:
    if not args.chat:
        return prompt_ids(tokenizer, args.prompt, path)
    messages = [{"role": "user", "content": args.prompt}]
    return chat_token_ids(tokenizer, messages, path=path)


def _generate(args: argparse.Namespace) -> int:
    # Before the event loop runs: a download that is interrupted by Ctrl-C ends at once.
    sources = find_model(args)
    path, tokenizer = sources.source, tokenizer_of(sources)
    prompt = args.prompt_ids or _prompt(tokenizer, args, path)
    text = TerminalText(tokenizer)
    pieces: list[str] = []

    with ExitStack() as until_first_token:
        until_first_token.enter_context(waiting("on the way to the first token"))

        def show(piece: str) -> None:
            until_first_token.close()
            pieces.append(piece)
            if not args.json:
                print(piece, end="", flush=True)

        generated = asyncio.run(
            stream_tokens(
                path,
                prompt,
                args=args,
                speculation=load_speculation(args.speculate, device=args.device),
                on_plan=lambda plan: logger.info(plan.describe()),
                on_token=lambda token: show(text.add(token)),
            )
        )
    show(text.finish())
    logger.info(generated.timings.summary())
    if args.json:
        report = {"model": str(path), "text": "".join(pieces), **generated.to_json()}
        print(json.dumps(report, indent=2))
    else:
        print()
        print(generated.summary(), file=sys.stderr)
    return 0
