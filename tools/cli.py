"""The ``layerstream`` command: exit code 0 success, 1 an error on stderr, 2 wrong usage."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from layerstream.stages.errors import LayerstreamError
from layerstream.tools.commands import (
    batch,
    bench,
    demo,
    generate,
    make_checkpoint,
    plan,
    profile,
    serve,
)

__all__ = ["main"]

_COMMANDS = {
    "plan": plan,
    "generate": generate,
    "demo": demo,
    "profile": profile,
    "bench": bench,
    "serve": serve,
    "batch": batch,
    "make-checkpoint": make_checkpoint,
}

# A shell's exit code for a command that a signal ended: 128 plus the signal's number.
_INTERRUPTED = 130
_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` and return its exit code.

    Raises:
        SystemExit: On wrong usage, and after ``--help``, from argparse.
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("layerstream").setLevel(logging.DEBUG if args.verbose else logging.WARNING)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The process that read our output is gone; Python must not write to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        return _INTERRUPTED
    except (LayerstreamError, OSError) as error:
        print(f"layerstream: error: {_one_line(error)}", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="layerstream",
        description="Run models that do not fit: stream their weights, a few layers at a time.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=f"{module.HELP}.")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _one_line(error: BaseException) -> str:
    """The message of ``error`` and its notes, which say in which stage and batch it arose."""
    notes = getattr(error, "__notes__", [])
    text = f"{error} ({'; '.join(notes)})" if notes else str(error)
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
