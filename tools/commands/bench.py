"""``layerstream bench``: compares one forward pass with other offloading libraries, in one run."""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerstream.stages.errors import ModelError
from layerstream.tools.compare.contenders import PEER_NAMES, select_contenders
from layerstream.tools.compare.machine import this_machine
from layerstream.tools.compare.report import print_report, write_chart
from layerstream.tools.compare.results import OURS, Row, make_rows
from layerstream.tools.compare.rounds import Setup, run_rounds
from layerstream.tools.console.arguments import (
    add_output_arguments,
    byte_count,
    picture_path,
    positive_int,
    token_ids,
)
from layerstream.tools.console.plot import require_matplotlib
from layerstream.tools.console.progress import progress
from layerstream.tools.console.signals import entered_whole, undoing_on_signals

__all__ = ["HELP", "add_arguments", "run"]

HELP = "compare with others who run what does not fit, and with what the machine could do"

# Ordinary tokens in any realistic vocabulary.
_FIRST_TOKEN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("model", metavar="PATH", help="a folder, or a hub id")
    parser.add_argument(
        "--against",
        type=_peer_names,
        default=list(PEER_NAMES),
        metavar="NAMES",
        help=f"of {','.join(PEER_NAMES)} (default: all)",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt-ids", type=token_ids, metavar="IDS", help="such as 1,2,3")
    prompt.add_argument(
        "--prompt-tokens",
        type=positive_int,
        default=16,
        metavar="N",
        help="tokens of each forward pass (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=5,
        metavar="N",
        help="turns of each contender (default: %(default)s)",
    )
    parser.add_argument(
        "--cold", action="store_true", help="only passes after weights left the cache"
    )
    parser.add_argument("--warm", action="store_true", help="only passes right after another pass")
    parser.add_argument(
        "--memory-limit",
        type=byte_count,
        metavar="SIZE",
        help="hold every contender in a memory cgroup of this size",
    )
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same weights for llama.cpp")
    parser.add_argument(
        "--llama-cpp", type=Path, metavar="FOLDER", help="where llama-server is (default: in PATH)"
    )
    parser.add_argument(
        "--python",
        type=_interpreter,
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="run a contender under another interpreter: airllm=/venv/bin/python",
    )
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="for contenders' files (default: beside PATH)"
    )
    parser.add_argument(
        "--timeout",
        type=positive_int,
        default=600,
        metavar="SECONDS",
        help="of opening, or of one pass (default: %(default)s)",
    )
    parser.add_argument("--plot", type=picture_path, metavar="FILE", help="draw bars: .png or .svg")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; exit code 1 if layerstream failed, or computed other logits than transformers."""
    from layerstream.pipeline.checkpoint.hub import resolve_model_path

    path = resolve_model_path(args.model).resolve()
    _check_files(args, path)
    with undoing_on_signals():  # folders, processes and cgroups
        result, rows = _compare(args, path)
    if args.plot is not None:
        write_chart(result, rows, args.plot)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print_report(result, rows)
    ours = next((row for row in rows if row.name == OURS), None)
    if ours is None or any(each["name"] == OURS for each in result["failed"]):
        return 1
    return int(ours.agreement is not None and not ours.agreement.equal)


def _compare(args: argparse.Namespace, path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Run all rounds; returns the result as JSON data, and the rows of the table."""
    from layerstream.stages.process.headroom import host_available_bytes
    from layerstream.tools.running.open_checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    selection = select_contenders(
        args,
        files=[Path(file.path) for file in checkpoint.files],
        model_bytes=checkpoint.total_bytes,
        free_bytes=host_available_bytes(),
    )
    with entered_whole(_work_folder(args, path)) as work:
        setup = Setup(
            model=path,
            prompt_ids=tuple(args.prompt_ids or _default_prompt_ids(path, args.prompt_tokens)),
            work=work,
            gguf=args.gguf,
            limit_bytes=args.memory_limit,
            cold=args.cold or not args.warm,
            warm=args.warm or not args.cold,
            timeout_seconds=args.timeout,
        )
        turns = args.rounds * len(selection.contenders)
        with progress("comparing, turns", turns) as advance:
            outcome = run_rounds(selection.contenders, setup, rounds=args.rounds, advance=advance)
        rows = make_rows(outcome, setup)
    result = {
        "model": str(path),
        "model_bytes": checkpoint.total_bytes,
        "date": time.strftime("%Y-%m-%d"),
        "rounds": args.rounds,
        "prompt_tokens": len(setup.prompt_ids),
        "memory_limit_bytes": args.memory_limit,
        "machine": this_machine(path),
        "contenders": [row.to_json() for row in rows],
        "failed": [{"name": each.name, "why": each.why} for each in outcome.failed],
        "left_out": [{"name": each.name, "why": each.why} for each in selection.left_out],
    }
    return result, rows


def _check_files(args: argparse.Namespace, path: Path) -> None:
    """Refuse at once what would otherwise fail after minutes."""
    if not path.is_dir():
        raise ModelError(f"{path} is no folder; others need a model's folder, with its config.json")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} holds no config.json; others need a transformers model")
    if args.gguf is not None and not args.gguf.is_file():
        raise FileNotFoundError(f"{args.gguf}, given with --gguf, is not there")
    if args.plot is not None:
        if not args.plot.parent.is_dir():
            raise FileNotFoundError(f"{args.plot} cannot be written: no folder {args.plot.parent}")
        require_matplotlib()


@contextmanager
def _work_folder(args: argparse.Namespace, path: Path) -> Iterator[Path]:
    """A folder for the contenders' files, for as long as the block runs.

    On the checkpoint's own disk if it is writable: elsewhere peers might read their copies from a faster disk.
    """
    parent = path.parent if os.access(path.parent, os.W_OK) else None
    if args.work is not None:
        parent = Path(args.work)
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".layerstream-bench-") as work:
        yield Path(work)


def _default_prompt_ids(path: Path, tokens: int) -> list[int]:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    vocabulary = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not vocabulary:
        raise ModelError(
            f"{path / 'config.json'} has no vocab_size; give the prompt with --prompt-ids"
        )
    return [(_FIRST_TOKEN + index) % vocabulary for index in range(tokens)]


# -- types of arguments ----------------------------------------------------------------------------


def _peer_names(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in PEER_NAMES:
            raise argparse.ArgumentTypeError(f"not one of {', '.join(PEER_NAMES)}: {name!r}")
    return names


def _interpreter(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if name not in PEER_NAMES or not python:
        raise argparse.ArgumentTypeError(f"not NAME=FILE, NAME one of {PEER_NAMES}: {text!r}")
    return name, python
