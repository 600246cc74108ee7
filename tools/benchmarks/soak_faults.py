"""Thousands of sweeps with faults of the disk and changing budgets: ``python -m layerstream.tools.benchmarks.soak_faults PATH``.

Requests of random lengths share the sweeps of one model, some are cancelled, left or meet a deadline. Meanwhile single reads fail or end
early, now and then the disk fails for longer than reads are repeated, after which the model is reopened, and ``replan`` gives the model
another budget. Checks that all texts are the unstreamed model's, and that memory, threads and descriptors of the idle process are the same
from round to round; tells how late the event loop is. The default takes two minutes at most; the long form is
``--sweeps 10000 --seconds 3600``.
"""

import argparse
import asyncio
import errno
import gc
import json
import logging
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerstream.pipeline import Budget, LayerstreamError, PlanError, StreamedModel, Workload
from layerstream.stages.process.usage import anonymous_bytes
from layerstream.tools.benchmarks.soak_requests import starved_seconds
from layerstream.tools.console.arguments import positive_int
from layerstream.tools.serving.loop_lag import prompt_loop

__all__ = ["main"]

_SEED = 5
_PROMPTS, _LONGEST_PROMPT = 16, 24
_WORKLOAD = Workload(batch_size=4, prompt_tokens=_LONGEST_PROMPT, new_tokens=32)
_ROUNDS = 10
_FATES = ("finish", "finish", "finish", "finish", "stream", "leave", "cancel", "deadline")
_PASSING = (errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR)
_FAULTS = 0.01  # of reads
_OUTAGE_SECONDS = 1.0  # longer than a read is repeated
_BETWEEN_OUTAGES, _BETWEEN_PLANS = 1000, 50  # sweeps, on average
_LARGEST_BUDGET = 2.0  # times the least
_MAX_LAG_SECONDS = 0.010
_SHARES = (0.5, 0.99, 0.999)
_MAX_GROWTH_BYTES = 8 << 20
_NEVER_SECONDS = 300.0
_PASS_THREADS = 16  # the library's default


@dataclass(slots=True)
class _Seen:
    """What happened so far."""

    fates: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    plans: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    # How often the loop was late by so many tenths of a millisecond; and without the time for which its thread could run and had no
    # processor. Not each lag, which would be memory that grows.
    late: Counter[int] = field(default_factory=Counter)
    late_by_itself: Counter[int] = field(default_factory=Counter)


class _FaultyDisk:
    """``os.preadv`` of weight files as it is on a bad disk."""

    def __init__(self, folder: Path, seen: _Seen) -> None:
        self._folder = f"{folder.resolve()}{os.sep}"
        self._works = os.preadv
        self._seen = seen
        self._random = random.Random(_SEED)
        self.fails_until = 0.0

    @contextmanager
    def used(self) -> Iterator[None]:
        os.preadv = self._preadv  # type: ignore[assignment]
        try:
            yield
        finally:
            os.preadv = self._works

    def _preadv(self, descriptor: int, buffers: Sequence[Any], offset: int, *flags: int) -> int:
        if not os.readlink(f"/proc/self/fd/{descriptor}").startswith(self._folder):  # noqa: PTH115 - of a descriptor
            return self._works(descriptor, buffers, offset, *flags)
        if time.monotonic() < self.fails_until:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        bad = self._random.random() < _FAULTS
        kind = self._random.choice((*_PASSING, None)) if bad else None
        if kind is not None:
            self._seen.faults[errno.errorcode[kind]] += 1
            raise OSError(kind, os.strerror(kind))
        count = self._works(descriptor, buffers, offset, *flags)
        if bad and count > 1:
            self._seen.faults["short"] += 1
            return count - count // 2
        return count


def main() -> int:
    """Run the soak and print its result; exit code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a model; it is also loaded whole")
    parser.add_argument("--sweeps", type=positive_int, default=1000, help="(default: 1000)")
    parser.add_argument(
        "--seconds", type=positive_int, default=120, help="end after these, too (default: 120)"
    )
    parser.add_argument("--at-once", type=positive_int, default=8, help="requests (default: 8)")
    parser.add_argument("--reader", choices=["direct", "mmap"], default="direct")
    args = parser.parse_args()
    logging.getLogger("layerstream").setLevel(logging.ERROR)  # each fault is a warning
    texts = _expected(args.path)
    with prompt_loop():
        result, good = asyncio.run(_soak(args, texts))
    print(json.dumps(result, indent=2))
    print("good" if good else "BAD", file=sys.stderr)
    return 0 if good else 1


def _expected(path: Path) -> list[tuple[list[int], list[int]]]:
    """Prompts, and the greedy ids of the longest answer to each."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path)
    rng = random.Random(_SEED)
    found = []
    for _ in range(_PROMPTS):
        prompt = [rng.randrange(5, 90) for _ in range(rng.randrange(1, _LONGEST_PROMPT))]
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_WORKLOAD.new_tokens,
            do_sample=False,
        )
        found.append((prompt, output[0, len(prompt) :].tolist()))
    return found


async def _soak(
    args: argparse.Namespace, texts: Sequence[tuple[list[int], list[int]]]
) -> tuple[dict[str, Any], bool]:
    least = await _least_budget(args)
    seen = _Seen()
    disk = _FaultyDisk(args.path, seen)
    began, load = time.monotonic(), os.getloadavg()
    idle: list[dict[str, Any]] = []
    with disk.used():
        async with _opened(
            args, budget=Budget(host=int(least * 1.3)), reopened_within_seconds=60.0
        ) as model:
            starved = starved_seconds(os.getpid())
            lag = asyncio.create_task(_measure_lag(seen))
            gc.collect()
            gc.freeze()  # as ``layerstream serve`` does: a full collection holds the loop for 0.2 s
            for number in range(_ROUNDS):
                await _round(model, disk, texts, seen, args, number=number, least=least)
                # As it began: what is resident differs with the budget, and so does memory.
                await model.replan(budget=Budget(host=int(least * 1.3)))
                await model.generate(**_inputs(texts[0][0]), max_new_tokens=4, do_sample=False)
                idle.append(_usage())
            lag.cancel()
            sweeps = model.stats().sweeps
            starved = starved_seconds(os.getpid()) - starved
    late, by_itself = _spread(seen.late), _spread(seen.late_by_itself)
    result = {
        "sweeps": sweeps,
        "seconds": time.monotonic() - began,
        "load": [load[0], os.getloadavg()[0]],
        "fates": dict(seen.fates),
        "faults": dict(seen.faults),
        "plans": dict(seen.plans),
        "wrong": seen.wrong[:8],
        "idle": idle,
        "loop_lag_seconds": late,
        # On a busy machine, the loop is late without being held by anything of its process.
        "loop_lag_with_a_processor_seconds": by_itself,
        "loop_waited_for_a_processor_seconds": starved,
    }
    # The first rounds fill pools; each thread of passes starts torch's helpers when it is first used.
    first, last = idle[2], idle[-1]
    flat = (
        last["threads"] <= first["threads"] + _PASS_THREADS * (len(os.sched_getaffinity(0)) - 1)
        and last["descriptors"] <= first["descriptors"]
        and last["bytes"] <= first["bytes"] + _MAX_GROWTH_BYTES
    )
    prompt = by_itself["99 %"] <= _MAX_LAG_SECONDS
    return result | {"flat": flat, "prompt": prompt}, flat and not seen.wrong


def _opened(args: argparse.Namespace, **options: Any) -> StreamedModel:
    return StreamedModel.open(
        args.path, device="cpu", reader=args.reader, workload=_WORKLOAD, measure=False, **options
    )


async def _least_budget(args: argparse.Namespace) -> int:
    """The least budget in bytes that the model opens with, once its code is loaded."""
    for _ in range(2):
        with suppress(PlanError):
            async with _opened(args):
                pass
    try:
        async with _opened(args, budget=Budget(host="1MiB")):
            raise AssertionError
    except PlanError as error:
        if error.needed_bytes is None:
            raise
        return error.needed_bytes


async def _round(
    model: StreamedModel,
    disk: _FaultyDisk,
    texts: Sequence[tuple[list[int], list[int]]],
    seen: _Seen,
    args: argparse.Namespace,
    *,
    number: int,
    least: int,
) -> None:
    """A tenth of the sweeps, or of the time, until all of its requests have ended."""
    until = args.sweeps * (number + 1) // _ROUNDS
    ends = time.monotonic() + args.seconds / _ROUNDS
    rng = random.Random(number)

    async def client(which: int) -> None:
        choose = random.Random(1000 * number + which)
        while model.stats().sweeps < until and time.monotonic() < ends:
            await _request(model, texts, seen, choose)

    async def disturb() -> None:
        sweeps = model.stats().sweeps
        while True:
            await asyncio.sleep(0.02)
            now = model.stats().sweeps
            if rng.random() < (now - sweeps) / _BETWEEN_PLANS:
                await _replan(model, seen, int(least * rng.uniform(0.95, _LARGEST_BUDGET)))
            if rng.random() < (now - sweeps) / _BETWEEN_OUTAGES:
                seen.faults["outage"] += 1
                disk.fails_until = time.monotonic() + _OUTAGE_SECONDS
            if model.failure is not None:
                with suppress(LayerstreamError):
                    await model.reopen()
                    seen.faults["reopened"] += 1
            sweeps = now

    disturbing = asyncio.create_task(disturb())
    await asyncio.gather(*map(client, range(args.at_once)))
    disturbing.cancel()
    await asyncio.wait([disturbing])
    if not disturbing.cancelled() and (error := disturbing.exception()) is not None:
        seen.wrong.append(f"replan or reopen: {error!r}")
    while model.failure is not None:
        with suppress(LayerstreamError):
            await model.reopen()


async def _replan(model: StreamedModel, seen: _Seen, nbytes: int) -> None:
    try:
        await model.replan(budget=Budget(host=nbytes))
        seen.plans["adopted"] += 1
    except PlanError:  # below the least, or below what running requests need
        seen.plans["refused"] += 1
    except LayerstreamError:
        if model.failure is None:
            raise
        seen.plans["failed, as streaming had"] += 1


async def _request(
    model: StreamedModel,
    texts: Sequence[tuple[list[int], list[int]]],
    seen: _Seen,
    choose: random.Random,
) -> None:
    """A request with a random prompt, length and end."""
    prompt, expected = choose.choice(texts)
    count = choose.randrange(1, len(expected) + 1)
    fate = choose.choice(_FATES)
    given: dict[str, Any] = {**_inputs(prompt), "max_new_tokens": count, "do_sample": False}
    seconds = choose.random() if fate in {"cancel", "deadline"} else _NEVER_SECONDS
    got: list[int] = []
    try:
        async with asyncio.timeout(seconds):
            if fate in {"stream", "leave"}:
                stream = model.stream(**given)
                async for token in stream:
                    got.append(token)
                    if fate == "leave" and len(got) == count // 2 + 1:
                        break
                await stream.aclose()  # type: ignore[attr-defined]  # a generator
            else:
                got = (await model.generate(**given))[0, len(prompt) :].tolist()
    except TimeoutError:
        seen.fates[fate] += 1
        if seconds == _NEVER_SECONDS:
            seen.wrong.append(f"a request with {count} tokens never ended")
        return
    except LayerstreamError as error:
        seen.wrong.append(f"{fate}: {error!r}")
        return
    seen.fates["left" if fate == "leave" else "finished"] += 1
    if got != expected[: len(got)] or (fate != "leave" and len(got) != count):
        seen.wrong.append(f"{fate}: {got} is not {expected[:count]}")


def _inputs(prompt: Sequence[int]) -> dict[str, Any]:
    import torch

    ids = torch.tensor([list(prompt)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


async def _measure_lag(seen: _Seen) -> None:
    loop, pid = asyncio.get_running_loop(), os.getpid()
    while True:
        due, starved = loop.time() + 0.005, starved_seconds(pid)
        await asyncio.sleep(0.005)
        lag = max(0.0, loop.time() - due)
        starved = starved_seconds(pid) - starved
        seen.late[round(1e4 * lag)] += 1
        seen.late_by_itself[round(1e4 * max(0.0, lag - starved))] += 1


def _spread(counts: Counter[int]) -> dict[str, float]:
    """Below how many seconds so many of the lags are."""
    found = {}
    for share in _SHARES:
        left = share * counts.total()
        for lag in sorted(counts):
            left -= counts[lag]
            if left <= 0:
                found[f"{100 * share:g} %"] = lag / 1e4
                break
    return found


def _usage() -> dict[str, Any]:
    return {
        "bytes": anonymous_bytes() or 0,
        "threads": len(os.listdir("/proc/self/task")),  # noqa: PTH208
        "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
    }


if __name__ == "__main__":
    sys.exit(main())
