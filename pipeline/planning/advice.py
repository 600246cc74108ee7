"""Advice: what the plan would gain from one change, found by planning again. Pure."""

import dataclasses
from collections.abc import Iterator

from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.planning.candidates import search
from layerstream.pipeline.planning.plan import Budget, ReaderKind
from layerstream.pipeline.planning.prediction import Advice
from layerstream.pipeline.planning.priced_candidate import PricedCandidate
from layerstream.pipeline.planning.problem import Problem
from layerstream.stages.errors import PlanError
from layerstream.stages.text import format_bytes

__all__ = ["advise"]

_GIB = 1 << 30


def advise(problem: Problem, best: PricedCandidate) -> tuple[Advice, ...]:
    """What ``best`` would gain from more memory, a faster disk or link, and more sequences at a time."""
    placement = best.placement
    fixed = dataclasses.replace(
        problem,
        choices=dataclasses.replace(
            problem.choices,
            reader=placement.reader,
            layer_batch_size=placement.size,
            slots=placement.slots,
            budget=_budget_in_bytes(problem, best),
        ),
        arenas=None,
    )
    found = []
    for change, changed in _changes(fixed, _one_batch_bytes(best)):
        try:
            prediction = search(changed)[0].prediction
        except PlanError:  # more sequences take more memory
            continue
        found.append(
            Advice(
                change=change,
                sweep_seconds=prediction.decode.seconds,
                tokens_per_second=prediction.tokens_per_second,
                request_seconds=prediction.request_seconds,
            )
        )
    return tuple(found)


def _one_batch_bytes(best: PricedCandidate) -> tuple[int, int]:
    """The memory that one more resident layer batch needs: in host RAM, and in VRAM."""
    streamed = sorted(
        (batch.host_bytes, batch.device_bytes) for batch in best.placement.batches if batch.streamed
    )
    return streamed[len(streamed) // 2] if streamed else (0, 0)


def _changes(problem: Problem, one_batch: tuple[int, int]) -> Iterator[tuple[str, Problem]]:
    """Each change in words, and ``problem`` with it."""
    on_host, on_device = one_batch
    if problem.on_cpu:
        on_host, on_device = on_host + on_device, 0
    for nbytes in _increases(on_host):
        yield f"{_size_text(nbytes)} more of host RAM", _with_memory(problem, host=nbytes)
    if not problem.on_cpu:
        for nbytes in _increases(on_device):
            yield f"{_size_text(nbytes)} more of VRAM", _with_memory(problem, vram=nbytes)
    hardware, rates = problem.hardware, problem.rates
    if problem.choices.throttle_bytes_per_second is None:
        faster = dataclasses.replace(
            hardware, disk_bytes_per_second=2 * rates.disk, mmap_bytes_per_second=2 * rates.mmap
        )
        yield "a disk twice as fast", dataclasses.replace(problem, hardware=faster)
    if not problem.on_cpu:
        faster = dataclasses.replace(hardware, h2d_bytes_per_second=2 * rates.h2d)
        yield "a link to the device twice as fast", dataclasses.replace(problem, hardware=faster)
    if (workload := problem.choices.workload) is not None:
        doubled = dataclasses.replace(workload, batch_size=2 * workload.batch_size)
        choices = dataclasses.replace(problem.choices, workload=doubled)
        memory = problem.memory and problem.memory.scaled(2)
        yield (
            "twice the sequences at a time",
            dataclasses.replace(problem, choices=choices, memory=memory),
        )


def _increases(one_batch: int) -> tuple[int, ...]:
    """A GiB, and what a layer batch needs if that is more: less than a layer batch may gain nothing."""
    return (_GIB, one_batch) if one_batch > _GIB else (_GIB,)


def _size_text(nbytes: int) -> str:
    return "1 GiB" if nbytes == _GIB else f"{format_bytes(nbytes)} (one layer batch)"


def _budget_in_bytes(problem: Problem, best: PricedCandidate) -> Budget:
    """The budgets in bytes, so that they can be increased."""
    host, device = best.memory
    # Mapped files without a host budget take none: there is nothing to increase.
    cached = best.placement.reader is ReaderKind.MMAP and problem.choices.budget.host is None
    return Budget(
        host=None if cached else host.budget_bytes,
        vram=None if device is None else device.budget_bytes,
    )


def _with_memory(problem: Problem, *, host: int = 0, vram: int = 0) -> Problem:
    """``problem`` with as many more bytes free, and in the budgets."""
    hardware: Hardware = dataclasses.replace(
        problem.hardware,
        host_available_bytes=problem.hardware.host_available_bytes + host,
        vram_free_bytes=None if problem.on_cpu else (problem.hardware.vram_free_bytes or 0) + vram,
    )
    given = problem.choices.budget
    budget = Budget(
        host=None if given.host is None else int(given.host) + host,
        vram=None if given.vram is None else int(given.vram) + vram,
    )
    choices = dataclasses.replace(problem.choices, budget=budget)
    return dataclasses.replace(problem, hardware=hardware, choices=choices)
