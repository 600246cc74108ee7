"""``layerstream serve``: serves a model whose weights stream over an OpenAI-compatible HTTP API."""

import argparse
import asyncio
import gc
import importlib
import json
import logging
import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerstream.stages.errors import LayerstreamError, ModelError
from layerstream.tools.console.arguments import (
    MODEL_HELP,
    add_dtype_argument,
    add_model_arguments,
    add_verify_argument,
    byte_count,
    non_negative_int,
    positive_float,
    positive_int,
)
from layerstream.tools.running.adapters import (
    adapter_names,
    add_adapter_arguments,
    find_model,
    open_options,
    tokenizer_of,
)
from layerstream.tools.running.generation import check_generates
from layerstream.tools.running.speculation import add_speculation_argument, load_speculation

if TYPE_CHECKING:
    from layerstream.tools.serving.settings import Settings

__all__ = ["HELP", "add_arguments", "run"]

logger = logging.getLogger(__name__)

# A disk that fails over or is plugged in again takes less; clients that wait for longer are told.
_REOPENED_WITHIN_SECONDS = 60.0

HELP = "serve a model whose weights stream, over HTTP as OpenAI does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("model", metavar="PATH", help=MODEL_HELP)
    parser.add_argument(
        "--bind",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: %(default)s, this machine only); --host is memory",
    )
    parser.add_argument(
        "--port", type=_port, default=8000, help="0: any that is free (default: %(default)s)"
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("LAYERSTREAM_API_KEY"),
        metavar="KEY",
        help="that clients must send; better in LAYERSTREAM_API_KEY, which `ps` does not show",
    )
    parser.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="by which clients ask (default: PATH's last part)",
    )
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja template instead of the model's"
    )
    parser.add_argument(
        "--response-template",
        type=Path,
        metavar="FILE",
        help="JSON that tells reasoning and tool calls from text, as transformers takes it, instead of the model's",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="whose pages may use it from a browser, such as https://example.org; * is any (may be repeated)",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="by which clients may address it (default: names of this machine on 127.0.0.1, any elsewhere)",
    )
    parser.add_argument(
        "--no-page", action="store_true", help="leave out the page for browsers at /"
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse unknown fields, instead of ignoring them"
    )
    add_adapter_arguments(parser, named=True)
    add_speculation_argument(parser)
    _add_limits(parser)
    add_model_arguments(parser)
    add_dtype_argument(parser)
    add_verify_argument(parser)
    parser.add_argument("--no-access-log", action="store_true", help="do not log requests")
    parser.add_argument("--verbose", action="store_true", help="log more of what happens")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    for name, default, meaning in (
        ("--concurrent", 4, "answers whose memory is reserved, each with:"),
        ("--prompt-tokens", 512, "tokens of its prompt"),
        ("--new-tokens", 256, "tokens after it"),
        ("--max-answers", 64, "under way or waiting; more are told to come back later (429)"),
    ):
        parser.add_argument(
            name,
            type=positive_int,
            default=default,
            metavar="N",
            help=f"{meaning} (default: {default})",
        )
    parser.add_argument(
        "--max-body",
        type=byte_count,
        default=1 << 20,
        metavar="SIZE",
        help="of a request (default: 1MiB)",
    )
    parser.add_argument(
        "--keep-alive-seconds",
        type=positive_float,
        default=10.0,
        metavar="N",
        help="after which a client that waits gets a comment or a blank (default: 10)",
    )
    parser.add_argument(
        "--stall-seconds",
        type=positive_float,
        default=600.0,
        metavar="N",
        help="after which /health reports that nothing moves (default: 600)",
    )
    parser.add_argument(
        "--throttle",
        type=byte_count,
        metavar="SIZE",
        help="read at most this many bytes per second",
    )
    parser.add_argument(
        "--shutdown-seconds",
        type=non_negative_int,
        default=30,
        metavar="N",
        help="on SIGTERM, let what runs finish for so long (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    # Before torch is loaded. Threads of OpenMP that wait would spin, beside requests and other processes that compute: with two
    # cores and others at work, one request took five times the time and the processor time; four at once took the same.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        importlib.import_module("layerstream.tools.serving.app")
    except ImportError as error:
        raise LayerstreamError(
            f"serve needs {error.name}, which is not installed: pip install 'layerstream[serve]'."
        ) from error
    if args.api_key is not None and not re.fullmatch("[!-~]+", args.api_key):
        raise LayerstreamError(
            "The API key is empty, or has blanks or other than ASCII characters, which no header can hold; "
            "give another one, or unset LAYERSTREAM_API_KEY."
        )
    template = None if args.chat_template is None else args.chat_template.read_text("utf-8")
    sources = find_model(args)
    path, tokenizer = sources.model, tokenizer_of(sources)
    if tokenizer is None:
        raise ModelError(f"{path} has no tokenizer, which a service needs to read and write text.")
    from layerstream.tools.serving.prompts import check_template

    check_template(tokenizer, template)
    if not _on_loopback(args) and args.api_key is None:
        logger.warning("without --api-key, anyone who can reach %s can use this service", args.bind)
    if template is None and tokenizer.chat_template is None:
        logger.warning("the model has no chat template, so chats are refused: see --chat-template")
    for name in (__name__, "layerstream.tools.serving", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.DEBUG if args.verbose else logging.INFO)
    asyncio.run(_serve(sources.source, tokenizer, _settings(path, template, args), args))
    return 0


def _settings(path: Path, template: str | None, args: argparse.Namespace) -> "Settings":
    from layerstream.tools.serving.embeddings import read_pooling
    from layerstream.tools.serving.settings import Settings

    return Settings(
        model_name=_model_name(args),
        adapters=adapter_names(args),
        api_key=args.api_key,
        chat_template=template,
        concurrent=args.concurrent,
        new_tokens=args.new_tokens,
        max_answers=args.max_answers,
        max_body_bytes=args.max_body,
        keep_alive_seconds=args.keep_alive_seconds,
        stall_seconds=args.stall_seconds,
        response_template=_json(args.response_template),
        pooling=read_pooling(path if path.is_dir() else path.parent),
        speculation=load_speculation(args.speculate, device=args.device),
        page=not args.no_page,
        strict=args.strict,
        hosts=_hosts(args),
        origins=frozenset(args.allow_origin),
    )


def _model_name(args: argparse.Namespace) -> str:
    name: str = args.served_model_name or _default_name(args.model)
    if name in adapter_names(args):
        raise ModelError(
            f"--adapter {name} has the model's own name: give it another, or a --served-model-name."
        )
    return name


async def _serve(
    path: Path, tokenizer: Any, settings: "Settings", args: argparse.Namespace
) -> None:
    from layerstream.pipeline import Budget, StreamedModel, Workload
    from layerstream.tools.serving.app import make_app
    from layerstream.tools.serving.loop_lag import prompt_loop
    from layerstream.tools.serving.recovery import Recovery
    from layerstream.tools.serving.server import Server

    opening = StreamedModel.open(
        path,
        device=args.device,
        budget=Budget(vram=args.vram, host=args.host),
        workload=Workload(
            batch_size=args.concurrent,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
        ),
        reader=args.reader,
        dtype=args.dtype,
        kernels=args.kernels,
        verify=args.verify,
        throttle_bytes_per_second=args.throttle,
        reopened_within_seconds=_REOPENED_WITHIN_SECONDS,
        **open_options(args),
    )
    # Opening the model takes seconds, so an address in use is reported before; until the socket listens,
    # connections are refused.
    with _bind(args.bind, args.port) as listener:
        async with opening as model:
            check_generates(model.module, path)
            logger.info(model.plan.describe())
            app = make_app(model, tokenizer, settings)
            # All objects that exist now live as long as the process. A full collection that traverses them
            # blocks the event loop for some hundred milliseconds each time.
            gc.collect()
            gc.freeze()
            with prompt_loop():
                async with Recovery(model, app.state.answers):
                    await Server(app, listener, args).serve(sockets=[listener])


def _json(path: Path | None) -> Any:
    """The content of a JSON file, if one is given."""
    try:
        return None if path is None else json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is no JSON: {error}.") from error


def _on_loopback(args: argparse.Namespace) -> bool:
    return args.bind in ("127.0.0.1", "::1", "localhost")


def _hosts(args: argparse.Namespace) -> frozenset[str] | None:
    """The names by which clients may address the service; None for any."""
    from layerstream.tools.serving.access import LOOPBACK_HOSTS

    if not _on_loopback(args) and not args.allow_host:
        return None
    return LOOPBACK_HOSTS | {args.bind, *args.allow_host}


def _bind(address: str, port: int) -> socket.socket:
    """Bind a socket, which does not listen yet."""
    try:
        family, kind, protocol, _, socket_address = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(socket_address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise LayerstreamError(
            f"Cannot listen on {address}, port {port}: {error.strerror}; choose another --bind or --port."
        ) from error
    return listener


def _default_name(model: str) -> str:
    """The model's name unless one is given: the hub id, or the name of the folder or of the GGUF file."""
    path = Path(model)
    if not path.exists():
        return model
    path = path.resolve()
    if path.suffix == ".gguf":
        return path.stem
    return path.name if path.is_dir() else path.parent.name


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:  # noqa: PLR2004
        raise argparse.ArgumentTypeError(f"not a port: {text!r}")
    return int(text)
