"""Runs one contender in its own process: ``python -m layerstream.tools.compare.worker``.

The first line on stdin names the contender, each further line an action; every line is answered with one line on
stdout, both in JSON. Output of libraries goes to stderr. Only what the contender needs is imported: the interpreter
may lack the packages of layerstream.
"""

import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["OPENERS", "main"]

_PACKAGES = ("torch", "transformers", "accelerate", "airllm", "safetensors")
# Memory of Python with torch and transformers without any weights, and of two layers being copied.
_SPARE_BYTES = 768 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """A contender with its model open."""

    forward: Callable[[], float | None]
    """Evaluates the prompt; returns the seconds that it measured, or None to have the call timed."""
    logits: Callable[[], Any] | None = None
    """Returns the latest float32 logits ``[prompt tokens, vocabulary]`` on the CPU; None if it provides none."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Details about how it runs, for the report."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the interpreter and of packages."""
    children: tuple[int, ...] = ()
    """Ids of its child processes."""


def _from_forward(request: Mapping[str, Any], forward: Callable[[Any], Any]) -> OpenedModel:
    """Wrap a function from ids ``[1, prompt tokens]`` to logits ``[1, prompt tokens, vocabulary]``."""
    import torch

    ids = torch.tensor([request["prompt_ids"]])
    kept: list[Any] = []

    def evaluate() -> None:
        kept[:] = [forward(ids)]

    return OpenedModel(
        forward=evaluate,
        logits=lambda: kept[0][0].detach().float().contiguous(),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def _layerstream(request: Mapping[str, Any]) -> Iterator[OpenedModel]:
    """Layerstream gets only the path: its planner finds out which memory it may use."""
    import asyncio
    from dataclasses import replace

    from layerstream.pipeline import StreamedModel

    with asyncio.Runner() as runner:
        streamed = StreamedModel.open(request["model"], device="cpu")
        model = runner.run(streamed.__aenter__())
        try:
            opened = _from_forward(
                request,
                lambda ids: runner.run(model.forward(input_ids=ids, use_cache=False)).logits,
            )
            plan = model.plan
            notes = {
                "reader": str(plan.reader),
                "layer_batches": len(plan.batches),
                "streamed_layer_batches": sum(batch.streamed for batch in plan.batches),
                "disk_bytes_per_sweep": plan.disk_bytes_per_sweep,
                "host_budget_bytes": plan.host_memory.budget_bytes,
                "plan": plan.describe(),
            }
            yield replace(opened, notes=notes)
        finally:
            runner.run(streamed.aclose())


@contextmanager
def _transformers(request: Mapping[str, Any]) -> Iterator[OpenedModel]:
    import torch

    from layerstream.tools.compare.peers import in_memory

    scratch = Path(request["scratch"])
    yield _from_forward(request, in_memory(Path(request["model"]), torch.device("cpu"), scratch))


@contextmanager
def _accelerate_disk(request: Mapping[str, Any]) -> Iterator[OpenedModel]:
    yield _accelerate(request, ram_bytes=0)


@contextmanager
def _accelerate_filled(request: Mapping[str, Any]) -> Iterator[OpenedModel]:
    yield _accelerate(request, ram_bytes=max(request["memory_limit_bytes"] - _SPARE_BYTES, 1))


def _accelerate(request: Mapping[str, Any], *, ram_bytes: int) -> OpenedModel:
    from dataclasses import replace

    from layerstream.tools.compare.peers import accelerate_mapped

    forward = accelerate_mapped(
        Path(request["model"]), Path(request["scratch"]), ram_bytes=ram_bytes
    )
    return replace(_from_forward(request, forward), notes={"max_memory_cpu_bytes": ram_bytes})


@contextmanager
def _airllm(request: Mapping[str, Any]) -> Iterator[OpenedModel]:
    import torch

    from layerstream.tools.compare.peers import airllm

    scratch = Path(request["scratch"])
    yield _from_forward(request, airllm(Path(request["model"]), torch.device("cpu"), scratch))


@contextmanager
def _llama_cpp(request: Mapping[str, Any]) -> Iterator[OpenedModel]:
    from layerstream.tools.compare.llama_server import llama_server, server_version

    weights, prompt = Path(request["gguf"]), request["prompt_ids"]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    server = request["llama_server"]
    with llama_server(server, weights=weights, context_tokens=len(prompt), port=port) as running:
        yield OpenedModel(
            forward=lambda: running.prompt_seconds(prompt),
            notes={"weights_bytes": weights.stat().st_size},
            versions={"llama.cpp": server_version(server)},
            children=(running.pid,),
        )


@contextmanager
def _raw(request: Mapping[str, Any]) -> Iterator[OpenedModel]:
    """Raw reads of all files, with the block size and number of threads that are fastest on a part of them."""
    from layerstream.tools.benchmarks.raw_read import GRID, raw_read

    paths, sample_bytes = [Path(path) for path in request["files"]], 256 << 20
    rates = {
        each: raw_read(paths, block_bytes=each[0], threads=each[1], limit_bytes=sample_bytes)
        for each in GRID
    }
    block_bytes, threads = max(rates, key=lambda each: rates[each])
    nbytes = sum(path.stat().st_size for path in paths)
    yield OpenedModel(
        forward=lambda: nbytes / raw_read(paths, block_bytes=block_bytes, threads=threads),
        notes={"block_bytes": block_bytes, "threads": threads},
    )


OPENERS = {
    "layerstream": _layerstream,
    "transformers": _transformers,
    "accelerate-disk": _accelerate_disk,
    "accelerate-filled": _accelerate_filled,
    "airllm": _airllm,
    "llama.cpp": _llama_cpp,
    "raw": _raw,
}


def main() -> None:
    """Serve one contender until stdin ends."""
    # Answers go to the original stdout; what libraries print to stdout goes to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    request = json.loads(sys.stdin.readline())
    began = time.perf_counter()
    with OPENERS[request["contender"]](request) as opened:
        answer(
            open_seconds=time.perf_counter() - began,
            children=opened.children,
            notes=dict(opened.notes),
            versions=dict(opened.versions),
        )
        for line in sys.stdin:
            message = json.loads(line)
            if message["do"] == "forward":
                began = time.perf_counter()
                seconds = opened.forward()
                answer(seconds=time.perf_counter() - began if seconds is None else seconds)
            elif opened.logits is None:
                answer(shape=None)
            else:
                logits = opened.logits()
                Path(message["to"]).write_bytes(logits.numpy().tobytes())
                answer(shape=list(logits.shape))


if __name__ == "__main__":
    main()
