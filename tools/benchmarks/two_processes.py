"""Two processes that stream one checkpoint, beside raw reads: ``python -m layerstream.tools.benchmarks.two_processes PATH``.

Raw direct reads by one process and by two alternate with forward passes of one token by one process and by two, all of the same files,
with requests of the plan's size and as many in flight. Bytes are what the kernel counts for each process in a fixed time.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from layerstream.pipeline import Budget, Checkpoint, Hardware, StreamedModel, Workload
from layerstream.tools.benchmarks.raw_read import raw_read
from layerstream.tools.console.arguments import byte_count, positive_int

__all__ = ["main"]

_WORKLOAD = Workload(prompt_tokens=1, new_tokens=1)
_SETTLING_SECONDS = 0.3  # until what was read ahead is used up


def main() -> int:
    """Run the benchmark and print its result; exit code 1 if two processes together do not reach the share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a model")
    parser.add_argument("--host", type=byte_count, default=512 << 20, help="budget of each process")
    parser.add_argument("--seconds", type=positive_int, default=6, help="of each part (default: 6)")
    parser.add_argument("--rounds", type=positive_int, default=5, help="alternations (default: 5)")
    parser.add_argument("--share", type=float, default=0.8, help="to be reached (default: 0.8)")
    parser.add_argument("--worker", choices=["raw", "streamed"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        asyncio.run(_work(args))
        return 0
    result = _measure(args)
    print(json.dumps(result, indent=2))
    return 0 if result["two_streamed_to_one_raw"] >= args.share else 1


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as started:
        workers = {
            kind: [_start(args, kind, started) for _ in range(2)] for kind in ("raw", "streamed")
        }
        rounds = [
            {
                f"{count}_{kind}": _rate(workers[kind][:count], args.seconds)
                for count, kind in itertools.product((1, 2), ("raw", "streamed"))
            }
            for _ in range(args.rounds)
        ]

    def ratio(above: str, below: str) -> float:
        return statistics.median(each[above] / each[below] for each in rounds)

    return {
        "bytes_per_second": rounds,
        "one_streamed_to_one_raw": ratio("1_streamed", "1_raw"),
        "two_streamed_to_one_raw": ratio("2_streamed", "1_raw"),
        "two_streamed_to_two_raw": ratio("2_streamed", "2_raw"),
    }


def _start(args: argparse.Namespace, kind: str, started: ExitStack) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "layerstream.tools.benchmarks.two_processes", str(args.path)]
    command += ["--host", str(args.host), "--worker", kind]
    worker = started.enter_context(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own
    )
    started.callback(worker.kill)
    _told(worker)
    return worker


def _rate(workers: "list[subprocess.Popen[str]]", seconds: float) -> float:
    """Bytes per second that all ``workers`` read together."""
    for worker in workers:
        _tell(worker)
    time.sleep(_SETTLING_SECONDS)
    read, began = sum(_bytes_read(each.pid) for each in workers), time.perf_counter()
    time.sleep(seconds)
    read = sum(_bytes_read(each.pid) for each in workers) - read
    took = time.perf_counter() - began
    for worker in workers:
        _tell(worker)
    for worker in workers:
        _told(worker)
    return read / took


def _tell(worker: "subprocess.Popen[str]") -> None:
    assert worker.stdin is not None  # noqa: S101
    worker.stdin.write("\n")
    worker.stdin.flush()


def _told(worker: "subprocess.Popen[str]") -> None:
    assert worker.stdout is not None  # noqa: S101
    if not worker.stdout.readline():
        raise SystemExit("a process did not start")


def _bytes_read(pid: int) -> int:
    """What a process has read from disk, as the kernel counts it."""
    lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


async def _work(args: argparse.Namespace) -> None:
    """Read from one line of stdin to the next, over and over."""
    import torch

    paths = [file.path for file in Checkpoint.open(args.path).files]
    hardware = await Hardware.probe(Checkpoint.open(args.path), device="cpu")
    options: dict[str, Any] = {"budget": Budget(host=args.host), "workload": _WORKLOAD}
    async with StreamedModel.open(
        args.path, hardware=hardware, reader="direct", device="cpu", **options
    ) as model:
        plan = model.plan
        print(
            f"{plan.read_request_bytes} bytes, {plan.reads_in_flight} in flight",
            file=sys.stderr,
        )

        async def read() -> None:
            if args.worker == "streamed":
                await model.forward(input_ids=torch.tensor([[1]]))
            else:
                await asyncio.to_thread(
                    raw_read,
                    paths,
                    block_bytes=plan.read_request_bytes,
                    threads=plan.reads_in_flight,
                )

        await model.forward(input_ids=torch.tensor([[1]]))  # also loads residents
        while True:
            print(flush=True)
            if not await asyncio.to_thread(sys.stdin.readline):
                return
            stopped = threading.Event()
            waiting = asyncio.ensure_future(asyncio.to_thread(sys.stdin.readline))
            waiting.add_done_callback(lambda _: stopped.set())  # noqa: B023
            while not stopped.is_set():
                await read()


if __name__ == "__main__":
    sys.exit(main())
