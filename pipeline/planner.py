"""Checkpoint + Hardware + Workload + Budget -> Plan. Pure: no file and no device is touched."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from layerstream.pipeline.checkpoint import Checkpoint
from layerstream.pipeline.hardware import Hardware
from layerstream.pipeline.layers import LayerKind, group_layers
from layerstream.pipeline.layout import PlannedLayer, layout_batch, planned_layers
from layerstream.pipeline.plan import Budget, MemoryUse, Plan, PlannedFile, ReaderKind, Workload
from layerstream.pipeline.workload import workload_bytes
from layerstream.stages.arena import ring_bytes
from layerstream.stages.batch import LayerBatch
from layerstream.stages.errors import PlanError
from layerstream.stages.units import format_bytes

__all__ = ["make_plan"]

# Depth covers jitter, not bandwidth: one slot is computed with, one is ready, one is being read.
_SLOTS = 3
# Below this, the fixed cost of a batch (about a millisecond of hand-offs) shows beside the time to read it.
_BATCH_BYTES = 64 << 20
# Mapped batches take no slots; handing one over costs a millisecond or two where all cores compute.
_MAPPED_BATCH_BYTES = 256 << 20
# Best or within noise of it on the disks tried, from one virtual disk to NVMe; larger only delays the last
# block of a batch.
_REQUEST_BYTES = 8 << 20
_REQUESTS = 4
# Left alone of what is free, for everybody else and for the allocators' own waste.
_MARGIN = 0.1
# Workspaces of cuBLAS: 32 MiB on current GPUs for each of the two streams that may compute. Assumed.
_VRAM_FIXED_BYTES = 64 << 20
# Stacks of our threads, queues, and the tables of a few thousand tensors.
_FIXED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """What all candidates for one plan have in common."""

    checkpoint: Checkpoint
    layers: Sequence[PlannedLayer]
    on_cpu: bool
    reader: ReaderKind
    host_budget: int
    vram_budget: int | None
    host_reserved: int
    vram_reserved: int

    @property
    def maps(self) -> bool:
        """Whether computation uses the mapped files where they are."""
        return self.on_cpu and self.reader is ReaderKind.MMAP


def make_plan(
    checkpoint: Checkpoint,
    hardware: Hardware,
    *,
    budget: Budget | None = None,
    workload: Workload | None = None,
    layers: Sequence[PlannedLayer] | None = None,
    reader: ReaderKind | str | None = None,
    throttle_bytes_per_second: float | None = None,
    layer_batch_size: int | None = None,
    held_bytes: int = 0,
) -> Plan:
    """Decide how ``checkpoint`` is streamed on ``hardware``.

    The rule is plain for now: batches of blocks just large enough that their fixed cost does not show, three
    slots (fewer if the budget is tight), and what is left of the budget to residents, spread evenly.

    Args:
        checkpoint: the weight files.
        hardware: the machine, probed or written by hand.
        budget: what may be used; by default what is free, less a tenth.
        workload: what the model will be asked for; None reserves nothing for it.
        layers: what to stream, in execution order; by default all tensors, grouped by their names.
        reader: "direct", "mmap" or "throttled"; by default mappings where computation runs on the CPU, no
            host budget is given and the files fit the free memory, else direct.
        throttle_bytes_per_second: the rate of the throttled reader.
        layer_batch_size: blocks per layer batch, instead of the planner's choice.
        held_bytes: host memory that loading code for this model took. It is not the pipeline's, so it refuses
            no plan; but residents leave room for it.

    Raises:
        PlanError: no plan fits the budget, or an argument makes no sense.
    """
    budget = budget or Budget()
    if layers is None:
        layers = planned_layers(checkpoint, group_layers(checkpoint))
    if not layers:
        raise PlanError(f"{checkpoint.path}: holds no tensors to stream")
    kind, notes = _choose_reader(checkpoint, hardware, budget, reader, throttle_bytes_per_second)
    on_cpu = hardware.vram_free_bytes is None
    if on_cpu != (hardware.device == "cpu"):
        raise PlanError(
            f"hardware: vram_free_bytes is {hardware.vram_free_bytes}, but the device is {hardware.device}; "
            "give the free VRAM of a GPU, and None for the CPU"
        )
    reserved, reserved_notes = workload_bytes(checkpoint.config, workload)
    frame = _Frame(
        checkpoint=checkpoint,
        layers=layers,
        on_cpu=on_cpu,
        reader=kind,
        # What was taken for this model is not free any more, but within its budget.
        host_budget=_budget(
            budget.host_bytes, hardware.host_available_bytes + held_bytes, "host RAM"
        ),
        vram_budget=None
        if hardware.vram_free_bytes is None
        else _budget(budget.vram_bytes, hardware.vram_free_bytes, "VRAM"),
        host_reserved=_FIXED_BYTES + (reserved if on_cpu else 0),
        vram_reserved=0 if on_cpu else _VRAM_FIXED_BYTES + reserved,
    )
    if budget.vram is not None and on_cpu:
        raise PlanError(
            "a VRAM budget was given, but the device is the CPU; leave it out or choose a GPU"
        )
    pinned = {layer.name for layer in layers if layer.pinned}
    for size, slots in _candidates(frame, layer_batch_size):
        batches = [
            _made_resident(frame, batch) if pinned.intersection(batch.layers) else batch
            for batch in _batches(frame, size)
        ]
        need = _need(frame, batches, slots)
        if _fits(frame, need):
            break
    else:
        raise PlanError(_too_small(frame, need))
    roomy = dataclasses.replace(frame, host_budget=frame.host_budget - held_bytes)
    batches = _with_residents(roomy, batches, slots)
    host_arena, device_arena = _arenas(frame, batches, slots)
    host_memory, device_memory = _memory(frame, batches, slots)
    return Plan(
        checkpoint=str(checkpoint.path),
        files=tuple(
            PlannedFile(path=str(file.path), nbytes=file.size_bytes) for file in checkpoint.files
        ),
        device=hardware.device,
        reader=kind,
        disk_bytes_per_second=hardware.disk_bytes_per_second,
        throttle_bytes_per_second=throttle_bytes_per_second,
        read_request_bytes=_REQUEST_BYTES,
        reads_in_flight=_REQUESTS,
        layer_batch_size=size,
        host_slots=slots,
        device_slots=slots,
        host_arena_bytes=host_arena,
        device_arena_bytes=device_arena,
        host_memory=host_memory,
        device_memory=device_memory,
        batches=tuple(batches),
        workload=workload,
        notes=(*notes, *reserved_notes),
    )


def _choose_reader(
    checkpoint: Checkpoint,
    hardware: Hardware,
    budget: Budget,
    asked: ReaderKind | str | None,
    rate: float | None,
) -> tuple[ReaderKind, tuple[str, ...]]:
    if rate is not None and not rate > 0:  # so that NaN is refused too
        raise PlanError(f"throttle_bytes_per_second is {rate}, but must be more than nothing")
    if asked is not None:
        if asked not in list(ReaderKind):
            raise PlanError(f"reader {asked!r} is unknown; use one of {', '.join(ReaderKind)}")
        kind = ReaderKind(asked)
        if (kind is ReaderKind.THROTTLED) != (rate is not None):
            raise PlanError("the throttled reader and throttle_bytes_per_second go together")
        return kind, ()
    if rate is not None:
        return ReaderKind.THROTTLED, ()
    room = hardware.host_available_bytes * (1 - _MARGIN)
    if hardware.vram_free_bytes is None and budget.host is None and checkpoint.total_bytes <= room:
        note = (
            "the files fit the free memory and no host budget was given: they are mapped, and the page "
            "cache will hold them"
        )
        return ReaderKind.MMAP, (note,)
    return ReaderKind.DIRECT, ()


def _budget(given: int | None, free: int, what: str) -> int:
    if given is None:
        return int(free * (1 - _MARGIN))
    if given > free:
        raise PlanError(
            f"the budget of {format_bytes(given)} is more than the {format_bytes(free)} of {what} that are "
            "free; lower it or free memory"
        )
    return given


def _candidates(frame: _Frame, size: int | None) -> list[tuple[int, int]]:
    """Pairs of blocks per batch and slots, the preferred one first."""
    blocks = [layer.nbytes for layer in frame.layers if layer.kind is LayerKind.BLOCK]
    if size is not None:
        if size < 1:
            raise PlanError(f"layer_batch_size is {size}, but must be a whole number from 1")
        sizes = [size]
    else:
        wanted = _MAPPED_BATCH_BYTES if frame.maps else _BATCH_BYTES
        typical = sorted(blocks)[len(blocks) // 2] if blocks else wanted
        largest = min(-(-wanted // max(typical, 1)), max(len(blocks), 1))
        sizes = sorted({max(largest >> halvings, 1) for halvings in range(largest.bit_length())})[
            ::-1
        ]
    # A smaller batch before a missing slot: without a slot to spare, the stages wait for one another.
    return [(each, _SLOTS) for each in sizes] + [
        (sizes[-1], slots) for slots in range(_SLOTS - 1, 0, -1)
    ]


def _batches(frame: _Frame, size: int) -> list[LayerBatch]:
    groups: list[list[PlannedLayer]] = []
    for layer in frame.layers:
        joins = (
            groups
            and layer.kind is groups[-1][0].kind is LayerKind.BLOCK
            and layer.pinned == groups[-1][0].pinned
            and len(groups[-1]) < size
        )
        if joins:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return [
        layout_batch(
            group,
            index=index,
            file_bytes=[file.size_bytes for file in frame.checkpoint.files],
            reads_host_images=frame.on_cpu,
        )
        for index, group in enumerate(groups)
    ]


def _made_resident(frame: _Frame, batch: LayerBatch, *, on_host: bool = False) -> LayerBatch:
    """``batch`` kept where computation reads it; ``on_host`` keeps a GPU's batch in host RAM instead."""
    if frame.on_cpu:
        return dataclasses.replace(
            batch,
            host_resident=batch.uses_host_image and not frame.maps,
            device_resident=batch.device_bytes > 0,
        )
    return dataclasses.replace(batch, host_resident=on_host, device_resident=not on_host)


def _arenas(frame: _Frame, batches: Sequence[LayerBatch], slots: int) -> tuple[int, int]:
    """Bytes of the host ring and of the device ring."""
    # A device resident that is not kept on the host too passes the host ring once, on its way in.
    passing = [b.host_bytes for b in batches if b.device_resident and not b.host_resident]
    host = max(
        ring_bytes([b.host_bytes for b in batches if b.streamed], slots=slots), *passing, 0, 0
    )
    device = ring_bytes([b.device_bytes for b in batches if not b.device_resident], slots=slots)
    return (0 if frame.maps else host), device


class _Need(NamedTuple):
    """Bytes that a choice takes on either side; on the CPU all of it is the host's."""

    host: int
    vram: int


def _need(frame: _Frame, batches: Sequence[LayerBatch], slots: int) -> _Need:
    host, device = _memory(frame, batches, slots)
    return _Need(host.used_bytes, 0 if device is None else device.used_bytes)


def _fits(frame: _Frame, need: _Need) -> bool:
    return need.host <= frame.host_budget and need.vram <= (frame.vram_budget or 0)


def _memory(
    frame: _Frame, batches: Sequence[LayerBatch], slots: int
) -> tuple[MemoryUse, MemoryUse | None]:
    """What a choice uses of the host budget and of the VRAM budget."""
    arenas = _arenas(frame, batches, slots)
    residents = (
        sum(batch.host_bytes for batch in batches if batch.host_resident),
        sum(batch.device_bytes for batch in batches if batch.device_resident),
    )
    reserved = (frame.host_reserved, frame.vram_reserved + _scratch(frame, batches))
    if frame.vram_budget is None:  # the device's memory is the host's
        return (
            MemoryUse(
                budget_bytes=frame.host_budget,
                arena_bytes=sum(arenas),
                resident_bytes=sum(residents),
                reserved_bytes=sum(reserved),
            ),
            None,
        )
    host, device = (
        MemoryUse(budget_bytes=budget, arena_bytes=arena, resident_bytes=stays, reserved_bytes=kept)
        for budget, arena, stays, kept in zip(
            (frame.host_budget, frame.vram_budget), arenas, residents, reserved, strict=True
        )
    )
    return host, device


def _scratch(frame: _Frame, batches: Sequence[LayerBatch]) -> int:
    """What computation makes out of weights: for good out of pinned ones, else for one batch at a time."""
    pinned = {layer.name for layer in frame.layers if layer.pinned}
    for_good = [b.scratch_bytes for b in batches if pinned.intersection(b.layers)]
    for_now = [b.scratch_bytes for b in batches if not pinned.intersection(b.layers)]
    return sum(for_good) + max(for_now, default=0)


def _with_residents(frame: _Frame, batches: Sequence[LayerBatch], slots: int) -> list[LayerBatch]:
    """Give what is left of the budgets to residents: VRAM first, then host RAM."""
    placed = list(batches)
    for on_host in (True,) if frame.on_cpu else (False, True):
        streamed = [b.index for b in placed if b.streamed]
        for count in range(len(streamed), 0, -1):
            chosen = {streamed[i] for i in _evenly(len(streamed), count)}
            tried = [
                _made_resident(frame, b, on_host=on_host) if b.index in chosen else b
                for b in placed
            ]
            if _fits(frame, _need(frame, tried, slots)):
                placed = tried
                break
    return placed


def _evenly(among: int, count: int) -> list[int]:
    """``count`` of the numbers below ``among``, evenly spread, so that neither disk nor compute bunches up."""
    return [(2 * i + 1) * among // (2 * count) for i in range(count)]


def _too_small(frame: _Frame, need: _Need) -> str:
    nbytes, name = max((layer.nbytes, layer.name) for layer in frame.layers)
    side, needed, have = (
        ("host", need.host, frame.host_budget)
        if need.host > frame.host_budget
        else ("VRAM", need.vram, frame.vram_budget or 0)
    )
    reserved = format_bytes(frame.host_reserved + frame.vram_reserved)
    return (
        f"the {side} budget of {format_bytes(have)} cannot hold one layer at a time: at least "
        f"{format_bytes(needed)} are needed (the largest layer, {name}, has {format_bytes(nbytes)}; "
        f"{reserved} are reserved for the workload); raise the budget, or ask for fewer tokens at a time"
    )
