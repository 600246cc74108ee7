"""The ``layerstream`` command: exit code 0 success, 1 an error on stderr, 2 wrong usage, 130 or 143 after a signal."""

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from layerstream.tools.console.signals import INTERRUPTED, Interrupted, end_on_signals

if TYPE_CHECKING:
    from argparse import ArgumentParser

__all__ = ["main"]

_COMMANDS = (
    "plan",
    "chat",
    "generate",
    "demo",
    "profile",
    "bench",
    "serve",
    "batch",
    "convert",
    "verify",
    "make-checkpoint",
)

# A shell's exit code for a process that SIGPIPE ended.
_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` and return its exit code.

    Raises:
        SystemExit: On wrong usage, and after ``--help``, from argparse.
    """
    alone = argv is None  # in a process of its own
    if alone:
        end_on_signals()  # before the imports, which take long
    if not _open_standard_streams():
        return _report("standard output is closed; redirect it, to /dev/null if nobody reads it.")
    try:
        return _run(argv)
    finally:
        if alone:
            end_on_signals()  # a service has had handlers of its own


def _run(argv: Sequence[str] | None) -> int:
    import logging
    import traceback

    from layerstream.stages.errors import LayerstreamError

    args = _parser().parse_args(argv)
    logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("layerstream").setLevel(logging.DEBUG if args.verbose else logging.WARNING)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return _BROKEN_PIPE
    except Interrupted as error:
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except (LayerstreamError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _discard_output()
        return _report(_one_line(error))
    except Exception as error:  # noqa: BLE001 - nothing that goes wrong ends in a traceback unasked
        if args.verbose:
            traceback.print_exc()
        return _report(
            f"{type(error).__name__}: {_one_line(error)} (this is a fault of layerstream or of a library that it "
            "uses; --verbose shows where it arose)"
        )
    return code


def _report(message: str) -> int:
    """Print an error; returns the exit code for errors, also if nobody reads stderr."""
    with suppress(OSError):
        print(f"layerstream: error: {message}", file=sys.stderr, flush=True)
    return 1


def _open_standard_streams() -> bool:
    """Open those of stdin, stdout and stderr that are closed on nothing; returns whether stdout was open.

    Otherwise the first files that are opened get their numbers, and what libraries print would be written to them.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:  # noqa: PLR2004 - stderr's
        descriptor = os.dup(descriptor)
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for as long as the process lives
    return sys.stdout is not None


def _discard_output() -> None:
    """Discard what was not written, which Python would write at exit, where nobody can handle that it fails."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> "ArgumentParser":
    import argparse

    parser = argparse.ArgumentParser(
        prog="layerstream",
        description="Run models that do not fit: stream their weights, a few layers at a time.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in _COMMANDS:
        module = importlib.import_module(f"layerstream.tools.commands.{name.replace('-', '_')}")
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
