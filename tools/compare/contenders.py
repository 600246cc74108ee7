"""Selects the contenders that can run here; names the others, with the reason."""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerstream.stages.text import format_bytes

__all__ = ["PEER_NAMES", "Contender", "ContenderSelection", "NotMeasured", "select_contenders"]

PEER_NAMES = ("accelerate", "airllm", "llama.cpp")

# For the interpreter and activations of a model in memory.
_OVERHEAD_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contender:
    """A library, or a way of running it, that is measured: one row of the table."""

    name: str
    """Name of the row."""
    opener: str
    """Key in the worker's ``OPENERS``."""
    python: str = sys.executable
    """Path of the interpreter that runs it."""
    cold: bool = True
    """Whether a pass with a cold page cache is meaningful."""
    warm: bool = True
    """Whether a pass right after another is meaningful."""
    limited: bool = True
    """Whether the memory limit applies to it."""
    prepares: bool = False
    """Whether it writes its own files when first opened, which is neither timed nor limited."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the opener, in addition to those that all get."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotMeasured:
    """A contender without result."""

    name: str
    why: str


@dataclass(slots=True)
class ContenderSelection:
    """The contenders to measure, in the order of their turns, and those left out."""

    contenders: list[Contender]
    left_out: list[NotMeasured]

    def leave_out(self, name: str, why: str) -> None:
        """Record why ``name`` has no row."""
        self.left_out.append(NotMeasured(name=name, why=why))


def select_contenders(
    args: argparse.Namespace, *, files: Sequence[Path], model_bytes: int, free_bytes: int
) -> ContenderSelection:
    """Select layerstream, the lower bounds, and the peers in ``args.against`` that are installed.

    Args:
        args: Arguments of the command.
        files: The checkpoint's weight files.
        model_bytes: Bytes of the weights.
        free_bytes: Memory that is free now, without the limit.
    """
    selection = ContenderSelection([Contender(name="layerstream", opener="layerstream")], [])
    _add_lower_bounds(selection, args, files=files, model_bytes=model_bytes, free_bytes=free_bytes)
    add = {"accelerate": _add_accelerate, "airllm": _add_airllm, "llama.cpp": _add_llama_cpp}
    for name in args.against:
        add[name](selection, args)
    return selection


def _add_lower_bounds(
    selection: ContenderSelection,
    args: argparse.Namespace,
    *,
    files: Sequence[Path],
    model_bytes: int,
    free_bytes: int,
) -> None:
    paths = {"files": [str(path) for path in files]}
    if args.cold or not args.warm:
        selection.contenders.append(
            Contender(name="raw read", opener="raw", warm=False, request=paths)
        )
    else:
        selection.leave_out(
            "raw read", "it goes past the page cache, and only warm passes are wanted"
        )
    if args.memory_limit is not None:
        # What transformers does without offloading: weights are mapped, and the kernel evicts pages.
        selection.contenders.append(Contender(name="transformers, mapped", opener="transformers"))
    if model_bytes + _OVERHEAD_BYTES <= free_bytes:
        # Its weights are mapped too, but never evicted: a cold pass would measure the disk, not memory.
        name = "transformers, all in memory"
        selection.contenders.append(
            Contender(name=name, opener="transformers", cold=False, limited=False)
        )
    else:
        selection.leave_out(
            "transformers, all in memory",
            f"{format_bytes(model_bytes + _OVERHEAD_BYTES)} are needed, {format_bytes(free_bytes)} are free",
        )


def _add_accelerate(selection: ContenderSelection, args: argparse.Namespace) -> None:
    python = dict(args.python).get("accelerate", sys.executable)
    if not _can_import(python, "accelerate", "transformers"):
        selection.leave_out("accelerate", _not_installed(python, "accelerate transformers"))
        return
    selection.contenders.append(
        Contender(name="accelerate, all on disk", opener="accelerate-disk", python=python)
    )
    if args.memory_limit is not None:
        selection.contenders.append(
            Contender(
                name="accelerate, memory filled",
                opener="accelerate-filled",
                python=python,
                request={"memory_limit_bytes": args.memory_limit},
            )
        )


def _add_airllm(selection: ContenderSelection, args: argparse.Namespace) -> None:
    python = dict(args.python).get("airllm", sys.executable)
    if not _can_import(python, "airllm", "transformers"):
        selection.leave_out("airllm", _not_installed(python, "airllm"))
        return
    selection.contenders.append(
        Contender(name="AirLLM", opener="airllm", python=python, prepares=True)
    )


def _add_llama_cpp(selection: ContenderSelection, args: argparse.Namespace) -> None:
    folders = ["", "bin", "build/bin"] if args.llama_cpp else []
    path = ":".join(str(args.llama_cpp / folder) for folder in folders) or None
    server = shutil.which("llama-server", path=path)
    if server is None:
        selection.leave_out(
            "llama.cpp",
            "no llama-server in PATH; install llama.cpp, or say where it is with --llama-cpp FOLDER",
        )
    elif args.gguf is None:
        selection.leave_out(
            "llama.cpp", "it does not read safetensors; give its weights with --gguf FILE"
        )
    else:
        request = {"llama_server": str(Path(server).resolve()), "gguf": str(args.gguf.resolve())}
        selection.contenders.append(
            Contender(name="llama.cpp", opener="llama.cpp", request=request)
        )


def _can_import(python: str, *packages: str) -> bool:
    """Whether ``python`` has all ``packages``."""
    code = "import importlib.util as u, json, sys; print(json.dumps([u.find_spec(p) is not None for p in sys.argv[1:]]))"
    ran = subprocess.run(  # noqa: S603 - the user's own interpreter
        [python, "-c", code, *packages], capture_output=True, text=True, check=False, timeout=60
    )
    return ran.returncode == 0 and all(json.loads(ran.stdout))


def _not_installed(python: str, packages: str) -> str:
    return f"not installed; {python} -m pip install {packages}, or name another interpreter with --python"
