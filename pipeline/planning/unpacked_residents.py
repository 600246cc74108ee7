"""Residents on a CPU whose packed weights are kept unpacked as well, so that sweeps do without unpacking. Pure.

With exact kernels, that is as fast as with plain weights, for as much memory. So it is considered for memory that residents
leave: all of a budget that was given, half of what is free without one, since requests may be larger than the workload.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from layerstream.pipeline.planning.placement import ArenaBytes, Placer
from layerstream.pipeline.planning.resident_choice import evenly
from layerstream.stages.batch import LayerBatch

__all__ = ["placements"]


def placements(
    placer: Placer,
    batches: Sequence[LayerBatch],
    slots: int,
    *,
    arenas: ArenaBytes | None,
    unpacked_share: float,
) -> Iterator[list[LayerBatch]]:
    """``batches`` with different residents, which fill the rest of the budgets.

    Args:
        placer: Of the candidates.
        batches: Those of one size.
        slots: Those of each ring.
        arenas: Of a running pipeline.
        unpacked_share: Of the memory that residents leave, what may hold unpacked weights; 0: none is considered.
    """
    seen: list[list[LayerBatch]] = []
    for oversized_first in (False, True):
        placed = placer.with_residents(
            batches, slots, arenas=arenas, oversized_first=oversized_first
        )
        if placed in seen:
            continue
        seen.append(placed)
        yield placed
        if unpacked_share:
            rings = arenas or placer.arenas(placed, slots)
            unpacked = _with_unpacked(placer, placed, rings, share=unpacked_share)
            if unpacked != placed:
                yield unpacked


def _with_unpacked(
    placer: Placer, placed: Sequence[LayerBatch], arenas: ArenaBytes, *, share: float
) -> list[LayerBatch]:
    """``placed`` with as many of the batches that stay kept unpacked as fit, evenly spread. A mapping of the files stays, too."""
    once_bytes = {
        layer.name: 0 if layer.always_resident else layer.once_bytes
        for layer in placer.layouts.layers
    }
    sizes = {
        batch.index: sum(once_bytes[name] for name in batch.layers)
        for batch in placed
        if placer.maps or not batch.streamed
    }
    candidates = [index for index, nbytes in sizes.items() if nbytes]
    free = placer.host_usable_bytes - placer.overhead_bytes - placer.need(placed, arenas).host
    free = int(free * share)
    most = bisect_right(list(accumulate(sorted(sizes[index] for index in candidates))), free)
    for count in range(most, 0, -1):
        chosen = {candidates[i] for i in evenly(len(candidates), count)}
        if sum(sizes[index] for index in chosen) <= free:
            return [
                batch.with_residence(batch.residence, unpacked_bytes=sizes[batch.index])
                if batch.index in chosen
                else batch
                for batch in placed
            ]
    return list(placed)
