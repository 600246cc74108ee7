"""Who takes part, and who is left out and why."""

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

__all__ = ["PEER_NAMES", "Contender", "LeftOut", "LineUp", "line_up"]

PEER_NAMES = ("accelerate", "airllm", "llama.cpp")

# A model in memory also needs its interpreter and activations.
_ROOM_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contender:
    """One row of the table.

    Attributes:
        name: Of the row.
        opener: Of the worker.
        python: The interpreter that it runs under.
        cold: Whether a pass over a cold cache says anything of it.
        warm: The same of a pass right after another.
        limited: Whether it is held to the memory limit.
        prepares: It writes files of its own when it is first opened, which is neither timed nor limited.
        request: What the opener needs beside what all get.
    """

    name: str
    opener: str
    python: str = sys.executable
    cold: bool = True
    warm: bool = True
    limited: bool = True
    prepares: bool = False
    request: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """One that does not take part."""

    name: str
    why: str


@dataclass(slots=True)
class LineUp:
    """Those who take part, in the order of their turns, and those who do not."""

    contenders: list[Contender]
    left_out: list[LeftOut]

    def leave_out(self, name: str, why: str) -> None:
        """Note why ``name`` has no row."""
        self.left_out.append(LeftOut(name=name, why=why))


def line_up(
    args: argparse.Namespace, *, files: Sequence[Path], model_bytes: int, free_bytes: int
) -> LineUp:
    """Layerstream, the floors, and the peers that ``args.against`` names and this machine has.

    Args:
        args: Of the command.
        files: The checkpoint's weight files.
        model_bytes: Of the weights.
        free_bytes: Memory that a process may take now, without the limit.
    """
    found = LineUp([Contender(name="layerstream", opener="layerstream")], [])
    _add_floors(found, args, files=files, model_bytes=model_bytes, free_bytes=free_bytes)
    add = {"accelerate": _add_accelerate, "airllm": _add_airllm, "llama.cpp": _add_llama_cpp}
    for name in args.against:
        add[name](found, args)
    return found


def _add_floors(
    found: LineUp,
    args: argparse.Namespace,
    *,
    files: Sequence[Path],
    model_bytes: int,
    free_bytes: int,
) -> None:
    paths = {"files": [str(path) for path in files]}
    if args.cold or not args.warm:
        found.contenders.append(Contender(name="raw read", opener="raw", warm=False, request=paths))
    else:
        found.leave_out("raw read", "it goes past the page cache, and only warm passes are wanted")
    if args.memory_limit is not None:
        # What anybody gets who knows of no offloading: weights are mapped, and the kernel evicts them.
        found.contenders.append(Contender(name="transformers, mapped", opener="transformers"))
    if model_bytes + _ROOM_BYTES <= free_bytes:
        # Whose weights are mapped too, but never evicted: what it is when cold says nothing of memory.
        floor = "transformers, all in memory"
        found.contenders.append(
            Contender(name=floor, opener="transformers", cold=False, limited=False)
        )
    else:
        found.leave_out(
            "transformers, all in memory",
            f"{format_bytes(model_bytes + _ROOM_BYTES)} are needed, {format_bytes(free_bytes)} are free",
        )


def _add_accelerate(found: LineUp, args: argparse.Namespace) -> None:
    python = dict(args.python).get("accelerate", sys.executable)
    if not _has(python, "accelerate", "transformers"):
        found.leave_out("accelerate", _not_installed(python, "accelerate transformers"))
        return
    found.contenders.append(
        Contender(name="accelerate, all on disk", opener="accelerate-disk", python=python)
    )
    if args.memory_limit is not None:
        found.contenders.append(
            Contender(
                name="accelerate, memory filled",
                opener="accelerate-filled",
                python=python,
                request={"memory_limit_bytes": args.memory_limit},
            )
        )


def _add_airllm(found: LineUp, args: argparse.Namespace) -> None:
    python = dict(args.python).get("airllm", sys.executable)
    if not _has(python, "airllm", "transformers"):
        found.leave_out("airllm", _not_installed(python, "airllm"))
        return
    found.contenders.append(Contender(name="AirLLM", opener="airllm", python=python, prepares=True))


def _add_llama_cpp(found: LineUp, args: argparse.Namespace) -> None:
    places = ["", "bin", "build/bin"] if args.llama_cpp else []
    path = None if not places else ":".join(str(args.llama_cpp / place) for place in places)
    server = shutil.which("llama-server", path=path)
    if server is None:
        found.leave_out(
            "llama.cpp",
            "no llama-server in PATH; install llama.cpp, or say where it is with --llama-cpp FOLDER",
        )
    elif args.gguf is None:
        found.leave_out(
            "llama.cpp", "it does not read safetensors; give its weights with --gguf FILE"
        )
    else:
        request = {"llama_server": str(Path(server).resolve()), "gguf": str(args.gguf.resolve())}
        found.contenders.append(Contender(name="llama.cpp", opener="llama.cpp", request=request))


def _has(python: str, *packages: str) -> bool:
    """Whether ``python`` could import ``packages``."""
    code = "import importlib.util as u, json, sys; print(json.dumps([u.find_spec(p) is not None for p in sys.argv[1:]]))"
    ran = subprocess.run(  # noqa: S603 - the user's own interpreter
        [python, "-c", code, *packages], capture_output=True, text=True, check=False, timeout=60
    )
    return ran.returncode == 0 and all(json.loads(ran.stdout))


def _not_installed(python: str, packages: str) -> str:
    return f"not installed; {python} -m pip install {packages}, or name another interpreter with --python"
