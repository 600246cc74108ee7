"""``layerstream verify``: is a model on this disk what was downloaded?"""

import argparse
import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from layerstream.stages.errors import CheckpointError
from layerstream.stages.text import first_names, format_bytes
from layerstream.tools.console.arguments import MODEL_HELP, add_output_arguments
from layerstream.tools.console.progress import progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
    from layerstream.tools.integrity import FileCheck

__all__ = ["HELP", "add_arguments", "run"]

_NAMED = 4  # changes in an error

HELP = "check a model's files: their structure, and their content against recorded SHA-256 digests"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("model", metavar="PATH", help=MODEL_HELP)
    parser.add_argument(
        "--digests",
        type=Path,
        metavar="FILE",
        help="as sha256sum or --record writes it, with names relative to the model's folder (default: what --record wrote there, "
        "else what the hub recorded at the download)",
    )
    parser.add_argument(
        "--record",
        nargs="?",
        type=Path,
        const=True,
        metavar="FILE",
        help="after the check, write the digest of every tensor to FILE (default: layerstream.sha256 in the model's folder), "
        "for later checks that name the tensor, and for --verify of other commands",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="have --record replace a record of other content (default: refuse, and say what has changed)",
    )
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    from layerstream.pipeline.checkpoint.digests import parse_digests
    from layerstream.pipeline.checkpoint.hub import resolve_model_path
    from layerstream.tools.integrity import check_content, digests_beside
    from layerstream.tools.running.open_checkpoint import open_checkpoint

    if args.overwrite and args.record is None:
        raise CheckpointError("--overwrite goes with --record: without it, nothing is written.")
    began = time.monotonic()
    recorded = None
    digests = None if args.digests is None else parse_digests(args.digests)
    path = resolve_model_path(args.model)
    checks: list[FileCheck] = []
    try:
        # Opening reads headers and index, and checks that each tensor is whole and where they say.
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        problems = [str(error)]
    else:
        with ExitStack() as shown:

            def advance_of(total: int) -> "Callable[[int], object]":
                return shown.enter_context(progress(f"Reading {path}", total, is_bytes=True))

            if digests is None and args.record is None:
                digests = digests_beside(checkpoint)
            checks = check_content(checkpoint, digests, advance_of)
            problems = [check.problem for check in checks if check.problem]
            if not problems and args.record is not None:
                recorded = _record(checkpoint, args.record, advance_of, overwrite=args.overwrite)
        if not problems and not args.json:
            seconds = time.monotonic() - began
            print(_summary(path, checks, len(checkpoint.tensors), seconds, recorded))
    if args.json:
        print(json.dumps(_report(path, checks, problems, time.monotonic() - began), indent=2))
    elif problems:
        raise CheckpointError(" ".join(problems))
    return 1 if problems else 0


def _record(
    checkpoint: "Checkpoint",
    path: Path | bool,
    progress: "Callable[[int], Callable[[int], object]]",
    *,
    overwrite: bool,
) -> str:
    """Record the digests of all tensors; returns what was done."""
    from layerstream.pipeline.checkpoint.digests import RECORD_FILE, parse_digests, to_record
    from layerstream.pipeline.machine.probe_cache import replace_file
    from layerstream.tools.integrity import changes_of, digests_of

    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    target = folder / RECORD_FILE if path is True else Path(str(path))
    before = parse_digests(target) if target.is_file() and not overwrite else None
    if before is not None and any(file.size_bytes is None for file in before.values()):
        raise CheckpointError(
            f"{target} has digests of whole files: name another file, or have it replaced (--overwrite)."
        )
    try:
        digests = digests_of(checkpoint, progress)
        if before is not None and (changes := changes_of(before, digests)):
            raise CheckpointError(
                f"{target} is a record of other content: {first_names(changes, _NAMED)}; find out why, or have the record replaced "
                "(--overwrite)."
            )
        if before is None:
            replace_file(target, to_record(digests))
    except OSError as error:
        raise CheckpointError(
            f"the digests of {checkpoint.path} cannot be recorded in {target}: {error.strerror or error}; name another file."
        ) from error
    if before is None:
        return f"the digests of all tensors are recorded in {target}"
    return f"the content is that of {target}"


def _summary(
    path: Path, checks: "list[FileCheck]", tensors: int, seconds: float, recorded: str | None
) -> str:
    compared = [check for check in checks if check.pieces]
    nbytes = sum(check.size_bytes for check in compared)
    text = f"{path}: {tensors:,} tensors, each whole and in its place"
    if compared:
        text += f"; {len(compared)} of {len(checks)} files equal their SHA-256 digests ({format_bytes(nbytes)} in {seconds:.1f} s)"
    if recorded is not None:
        text += f"; {recorded}"
    elif len(compared) < len(checks):
        names = ", ".join(check.name for check in checks if not check.pieces)
        text += f"; no digest is recorded of {names}, whose content was not checked"
    return f"{text}."


def _report(
    path: Path, checks: "list[FileCheck]", problems: list[str], seconds: float
) -> dict[str, object]:
    return {
        "path": str(path),
        "intact": not problems,
        "problems": problems,
        "files": [
            {
                "name": check.name,
                "size_bytes": check.size_bytes,
                "expected_sha256": check.expected_sha256,
                "pieces": len(check.pieces),
                "problem": check.problem,
            }
            for check in checks
        ],
        "seconds": seconds,
    }
