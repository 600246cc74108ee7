"""What would help: plans again with one thing changed. Pure."""

import dataclasses
from collections.abc import Iterator

from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.planning.candidates import Choice, search
from layerstream.pipeline.planning.plan import Budget, ReaderKind
from layerstream.pipeline.planning.prediction import Advice
from layerstream.pipeline.planning.problem import Asked
from layerstream.stages.errors import PlanError
from layerstream.stages.text import format_bytes

__all__ = ["advise"]

_GIB = 1 << 30


def advise(asked: Asked, best: Choice) -> tuple[Advice, ...]:
    """What ``best`` would gain from more memory, a faster disk or link, and more sequences at a time."""
    placement = best.placement
    fixed = dataclasses.replace(
        asked,
        reader=placement.reader,
        layer_batch_size=placement.size,
        slots=placement.slots,
        rings=None,
        budget=_absolute(asked, best),
    )
    found = []
    for change, changed in _changes(fixed, _one_batch(best)):
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


def _one_batch(best: Choice) -> tuple[int, int]:
    """The memory that one more resident layer batch needs: in host RAM, and in VRAM."""
    streamed = sorted(
        (batch.host_bytes, batch.device_bytes) for batch in best.placement.batches if batch.streamed
    )
    return streamed[len(streamed) // 2] if streamed else (0, 0)


def _changes(asked: Asked, one_batch: tuple[int, int]) -> Iterator[tuple[str, Asked]]:
    on_host, on_device = one_batch
    if asked.on_cpu:
        on_host, on_device = on_host + on_device, 0
    # Less than a layer batch may bring nothing.
    for nbytes in (_GIB, *(size for size in (on_host,) if size > _GIB)):
        yield f"{_much(nbytes)} more of host RAM", _more(asked, host=nbytes)
    if not asked.on_cpu:
        for nbytes in (_GIB, *(size for size in (on_device,) if size > _GIB)):
            yield f"{_much(nbytes)} more of VRAM", _more(asked, vram=nbytes)
    hardware, rates = asked.hardware, asked.rates
    if asked.throttle_bytes_per_second is None:
        faster = dataclasses.replace(
            hardware, disk_bytes_per_second=2 * rates.disk, mmap_bytes_per_second=2 * rates.mmap
        )
        yield "a disk twice as fast", dataclasses.replace(asked, hardware=faster)
    if not asked.on_cpu:
        faster = dataclasses.replace(hardware, h2d_bytes_per_second=2 * rates.h2d)
        yield "a link to the device twice as fast", dataclasses.replace(asked, hardware=faster)
    if asked.workload is not None:
        more = dataclasses.replace(asked.workload, batch_size=2 * asked.workload.batch_size)
        memory = asked.memory and asked.memory.scaled(2)
        yield (
            "twice the sequences at a time",
            dataclasses.replace(asked, workload=more, memory=memory),
        )


def _much(nbytes: int) -> str:
    return "1 GiB" if nbytes == _GIB else f"{format_bytes(nbytes)} (one layer batch)"


def _absolute(asked: Asked, best: Choice) -> Budget:
    """The budgets in bytes, so that they can be increased."""
    host, device = best.memory
    # Without a host budget the page cache is used as well; setting one would forbid that.
    cached = best.placement.reader is ReaderKind.MMAP and asked.budget.host is None
    return Budget(
        host=None if cached else host.budget_bytes,
        vram=None if device is None else device.budget_bytes,
    )


def _more(asked: Asked, *, host: int = 0, vram: int = 0) -> Asked:
    hardware: Hardware = dataclasses.replace(
        asked.hardware,
        host_available_bytes=asked.hardware.host_available_bytes + host,
        vram_free_bytes=None if asked.on_cpu else (asked.hardware.vram_free_bytes or 0) + vram,
    )
    was = asked.budget
    budget = Budget(
        host=None if was.host is None else int(was.host) + host,
        vram=None if was.vram is None else int(was.vram) + vram,
    )
    return dataclasses.replace(asked, hardware=hardware, budget=budget)
