"""Decoding one GGUF by layerstream and by llama.cpp, alternating, each in a memory cgroup.

    python -m layerstream.tools.benchmarks.decoding FILE.gguf --llama-cpp FOLDER --memory-limit 1.2GiB
    python -m layerstream.tools.benchmarks.decoding CHECKPOINT --write-gguf FILE.gguf   # BF16, for llama-quantize

Each turn is a new process with a cold page cache. The first pass is from the opened model to the first token, with a prompt of
``--prompt-tokens``; steady decoding is the median of the later tokens. llama.cpp runs with its defaults, which map the file
but repack weights into memory of their own: set LLAMA_ARG_REPACK=0 in the environment if there is none. layerstream gets the path
alone: its planner finds the limit. With ``--random-text`` both continue with the same random tokens, as real text would move
them over many experts of a mixture: greedy tokens of random weights go round in a circle.
"""

import argparse
import asyncio
import itertools
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from layerstream.stages.errors import ModelError
from layerstream.tools.compare.cgroups import MemoryCgroup, memory_cgroup
from layerstream.tools.compare.llama_server import llama_server
from layerstream.tools.compare.page_cache import drop_from_cache
from layerstream.tools.console.arguments import byte_count, positive_int

__all__ = ["main"]

# The first steps still fill what is kept.
_SKIPPED_STEPS = 3


def main(argv: list[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF, or a folder with safetensors")
    parser.add_argument(
        "--write-gguf", type=Path, metavar="FILE", help="write the model anew, and end"
    )
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="where llama-server is")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same weights for llama.cpp")
    parser.add_argument("--memory-limit", type=byte_count, metavar="SIZE")
    parser.add_argument("--prompt-tokens", type=positive_int, default=16)
    parser.add_argument("--new-tokens", type=positive_int, default=24)
    parser.add_argument("--random-text", action="store_true", help="not greedy tokens")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.write_gguf:
        from layerstream.tools.benchmarks.gguf_files import write_gguf

        write_gguf(args.model, args.write_gguf)
        return 0
    if args.turn:
        print(json.dumps(asyncio.run(_our_tokens(args))))
        return 0
    ways = {"layerstream": _layerstream}
    if args.llama_cpp is not None:
        ways["llama.cpp"] = _llama_cpp
    results: dict[str, list[list[float]]] = {name: [] for name in ways}
    for number in range(args.rounds):
        for name, way in ways.items():
            drop_from_cache([each for each in (args.model, args.gguf) if each])
            with memory_cgroup(args.memory_limit) if args.memory_limit else nullcontext() as group:
                seconds = way(args, group)
            results[name].append(seconds)
            line = f"first {seconds[0]:.2f} s, then {_steady(seconds):.3f} s a token"
            print(f"round {number + 1}, {name}: {line}", file=sys.stderr, flush=True)
    print("| | first token s | then s a token | tokens/s |")
    print("|---|---|---|---|")
    for name, rounds in results.items():
        first = [each[0] for each in rounds]
        steady = [_steady(each) for each in rounds]
        median = statistics.median(steady)
        print(
            f"| {name} | {statistics.median(first):.2f} ({min(first):.2f} to {max(first):.2f}) | "
            f"{median:.3f} ({min(steady):.3f} to {max(steady):.3f}) | {1 / median:.2f} |"
        )
    return 0


def _steady(seconds: list[float]) -> float:
    return statistics.median(seconds[1 + min(_SKIPPED_STEPS, len(seconds) - 2) :])


def _prompt_ids(count: int) -> list[int]:
    return [3 + index % 200 for index in range(count)]


def _random_text(args: argparse.Namespace) -> list[int]:
    """The same ones in each process and for each program."""
    return [random.Random(number).randrange(3, 2000) for number in range(args.new_tokens)]


def _layerstream(args: argparse.Namespace, group: MemoryCgroup | None) -> list[float]:
    command = [sys.executable, "-m", "layerstream.tools.benchmarks.decoding", str(args.model)]
    command += ["--turn", "--kernels", args.kernels, "--new-tokens", str(args.new_tokens)]
    command += ["--prompt-tokens", str(args.prompt_tokens)]
    command += ["--random-text"] if args.random_text else []
    inside = group.inside(command) if group else command
    ran = subprocess.run(inside, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 - ourselves
    if ran.returncode:
        raise ModelError(f"layerstream ended with exit code {ran.returncode}")
    found: dict[str, Any] = json.loads(ran.stdout)
    print(found["plan"], file=sys.stderr)
    return list(found["seconds"])


async def _our_tokens(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from layerstream.pipeline import StreamedModel, Workload

    workload = Workload(prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens)
    text = iter(_random_text(args))

    def following(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill_(1, ids.new_tensor([next(text)]), 0.0)

    async with StreamedModel.open(
        args.model, device="cpu", kernels=args.kernels, dtype=torch.bfloat16, workload=workload
    ) as model:
        times = [time.perf_counter()]
        tokens = model.stream(
            input_ids=torch.tensor([_prompt_ids(args.prompt_tokens)]),
            max_new_tokens=args.new_tokens,
            do_sample=False,
            eos_token_id=None,
            logits_processor=[following] if args.random_text else [],
        )
        times += [time.perf_counter() async for _ in tokens]
        return {"seconds": _differences(times), "plan": model.plan.describe()}


def _llama_cpp(args: argparse.Namespace, group: MemoryCgroup | None) -> list[float]:
    server = str((args.llama_cpp / "llama-server").resolve())
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    weights, prompt = args.gguf or args.model, _prompt_ids(args.prompt_tokens)
    context = args.prompt_tokens + args.new_tokens
    with llama_server(
        server, weights=weights, context_tokens=context, port=port, group=group
    ) as running:
        if args.random_text:
            text = _random_text(args)
            return [
                running.prompt_seconds(prompt + text[:count], new_tokens=1 if count else None)
                for count in range(args.new_tokens)
            ]
        times = [time.perf_counter()]
        times += [time.perf_counter() for _ in running.tokens(prompt, args.new_tokens)]
    return _differences(times)


def _differences(times: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(times)]


if __name__ == "__main__":
    sys.exit(main())
