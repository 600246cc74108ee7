"""How many experts of each layer stay in memory, and what a pass then reads. Pure."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from layerstream.pipeline.planning.expert_source import ExpertSource, lay_out_experts
from layerstream.pipeline.planning.placement import DEVICE_BLOCK_BYTES
from layerstream.pipeline.planning.planned_layer import PlannedLayer
from layerstream.stages.experts.expert_set import ExpertSet, request_bytes
from layerstream.stages.experts.usage import ExpertUsage

__all__ = [
    "COPIED_BYTES",
    "ExpertCells",
    "ExpertMemory",
    "cells_by_use",
    "cells_bytes",
    "copied_bytes",
    "expert_sets",
    "fewest_cells",
    "filled_cells",
    "read_buffer_bytes",
    "sources_of",
]

# What a prompt that needs more experts than a layer keeps passes through: one half is read while the other one is computed
# with. As many as a few requests in flight fill; more bring nothing.
_SHARED_CELLS = 16
_FEWEST_SHARED_CELLS = 2
# On a GPU, matrices of so many bytes are copied together to be multiplied with, or one; each of two streams may do so.
COPIED_BYTES = 64 << 20
_STREAMS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCells:
    """The cells of the expert store."""

    own: tuple[int, ...] = ()
    """For each source, its share of the cells of that size."""
    shared: int = 0
    """How many more there are of each size, so that experts of a long prompt can pass through."""


def fewest_cells(sources: Sequence[ExpertSource]) -> ExpertCells:
    """The fewest cells: enough to compute with experts one by one."""
    if not sources:
        return ExpertCells()
    return ExpertCells(own=(0,) * len(sources), shared=_FEWEST_SHARED_CELLS)


def cells_bytes(sources: Sequence[ExpertSource], cells: ExpertCells) -> int:
    """Bytes of the store with so many cells."""
    own = sum(n * source.cell_bytes for n, source in zip(cells.own, sources, strict=True))
    return own + cells.shared * sum({source.cell_bytes for source in sources})


def filled_cells(
    sources: Sequence[ExpertSource], cells: ExpertCells, *, free_bytes: int
) -> ExpertCells:
    """``cells`` and as many more as fit into ``free_bytes``, the same number of each layer, for all are as likely to be needed.

    First the experts of one token, since otherwise every token reads them; then what prompts are faster with, which pass
    through; then all others. More memory never means fewer of anything.
    """
    whole = ExpertCells(own=tuple(source.experts for source in sources))
    if cells_bytes(sources, whole) <= cells_bytes(sources, cells) + free_bytes:
        return whole
    of_token = [min(source.per_token, source.experts) for source in sources]
    own, free_bytes = _grown(sources, cells.own, most=of_token, free_bytes=free_bytes)
    each_size = sum({source.cell_bytes for source in sources})
    more = min(_SHARED_CELLS - cells.shared, free_bytes // each_size)
    free_bytes -= more * each_size
    shared = cells.shared + more
    if shared == _SHARED_CELLS:
        own, _ = _grown(sources, own, most=whole.own, free_bytes=free_bytes)
    return ExpertCells(own=own, shared=shared)


def _grown(
    sources: Sequence[ExpertSource], own: Sequence[int], *, most: Sequence[int], free_bytes: int
) -> tuple[tuple[int, ...], int]:
    """``own`` cells with as many more for each layer, up to ``most``, and what is left of ``free_bytes``: 0 if not all fit."""
    grown = list(own)
    growing = [i for i in range(len(grown)) if grown[i] < most[i]]
    while growing:
        step = sum(sources[i].cell_bytes for i in growing)
        wanted = min(most[i] - grown[i] for i in growing)
        added = min(wanted, free_bytes // step)
        for i in growing:
            grown[i] += added
        free_bytes -= added * step
        if added < wanted:
            break
        growing = [i for i in growing if grown[i] < most[i]]
    for i in growing:  # the rest: one more for the first layers
        if free_bytes < sources[i].cell_bytes:
            break  # no smaller one instead: more memory shall never mean fewer cells
        free_bytes -= sources[i].cell_bytes
        grown[i] += 1
    return tuple(grown), 0 if growing else free_bytes


def cells_by_use(
    sources: Sequence[ExpertSource], cells: ExpertCells, usage: Mapping[str, ExpertUsage]
) -> ExpertCells:
    """``cells`` in all, where they are expected to bring the most hits.

    Cells are not tied to layers: this is about where least recently used experts of all layers are found. From as many for
    each layer as a token needs, or an equal part, cells go a few at a time to whoever hits the most more with them.
    """
    known = [usage.get(source.module) for source in sources]
    if not all(known) or len({source.cell_bytes for source in sources}) != 1:
        return cells
    equal = sum(cells.own) // len(sources)
    own = [min(equal, max(source.per_token, 1), source.experts) for source in sources]
    step = max(1, max(source.experts for source in sources) // 32)
    left = sum(cells.own) - sum(own)

    def gain(index: int) -> tuple[float, int]:
        """Hits for one more cell, as a sort key: the largest first."""
        found = known[index]
        more = min(step, left, sources[index].experts - own[index])
        if found is None or more <= 0:
            return 1.0, index
        shares = found.hit_shares
        return -(shares[own[index] + more] - shares[own[index]]) / more, index

    gains = [gain(index) for index in range(len(sources))]
    heapq.heapify(gains)
    while left > 0:
        _, index = heapq.heappop(gains)
        more = min(step, left, sources[index].experts - own[index])
        own[index] += more
        left -= more
        heapq.heappush(gains, gain(index))
    return ExpertCells(own=tuple(own), shared=cells.shared)


def expert_sets(
    layers: Sequence[PlannedLayer],
    cells: ExpertCells,
    device_cells: ExpertCells,
    usage: Mapping[str, ExpertUsage],
) -> tuple[ExpertSet, ...]:
    """The experts of ``layers`` with their places in files and cells."""
    found = [(layer.name, source) for layer in layers for source in layer.experts]
    on_device = device_cells.own or (0,) * len(found)
    return tuple(
        lay_out_experts(
            source, layer=name, cells=count, device_cells=more, usage=usage.get(source.module)
        )
        for (name, source), count, more in zip(found, cells.own, on_device, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class ExpertMemory:
    """The choices of cells for the experts of ``layers`` in one memory, and what each takes."""

    layers: Sequence[PlannedLayer]
    given: ExpertCells | None
    """Those of a running pipeline, which cannot change."""
    usage: Mapping[str, ExpertUsage]
    """How tokens choose experts, by the paths of modules; of others, evenly is assumed."""
    more_bytes: int
    """What is taken beside the cells."""

    @cached_property
    def sources(self) -> tuple[ExpertSource, ...]:
        """In execution order."""
        return sources_of(self.layers)

    @property
    def fewest(self) -> ExpertCells:
        """The least cells that a plan needs."""
        return self.given or fewest_cells(self.sources)

    def filled(self, *, free_bytes: int) -> ExpertCells:
        """The fewest, and what fits into ``free_bytes``."""
        if not self.sources:
            return ExpertCells()
        cells = self.given or filled_cells(self.sources, self.fewest, free_bytes=max(0, free_bytes))
        return cells_by_use(self.sources, cells, self.usage)

    def holds_all(self, cells: ExpertCells) -> bool:
        """Whether there are experts, and ``cells`` for each."""
        each = zip(self.sources, cells.own, strict=True)
        return bool(self.sources) and all(n >= source.experts for source, n in each)

    def nbytes(self, cells: ExpertCells) -> int:
        """Bytes of the store with ``cells``, and of what is beside them."""
        return cells_bytes(self.sources, cells) + self.more_bytes if self.sources else 0

    def sets_by_layer(
        self, cells: ExpertCells, device_cells: ExpertCells
    ) -> dict[str, list[ExpertSet]]:
        """The experts of each layer, by its name."""
        found: dict[str, list[ExpertSet]] = {}
        for experts in expert_sets(self.layers, cells, device_cells, self.usage):
            found.setdefault(experts.layer, []).append(experts)
        return found


def sources_of(layers: Iterable[PlannedLayer]) -> tuple[ExpertSource, ...]:
    """The experts of ``layers``, in execution order."""
    return tuple(source for layer in layers for source in layer.experts)


def read_buffer_bytes(
    sources: Iterable[ExpertSource], *, request_bytes_at_most: int, reads_in_flight: int
) -> int:
    """The buffers that experts are read into."""
    sizes = [source.expert_bytes for source in sources]
    return reads_in_flight * request_bytes(sizes, most=request_bytes_at_most) if sizes else 0


def copied_bytes(sources: Iterable[ExpertSource]) -> int:
    """What a GPU needs beside the cells: for matrices that are copied together, and in blocks of its allocator."""
    of_layers = [
        min(max(COPIED_BYTES, tensor.nbytes), source.experts * tensor.nbytes)
        for source in sources
        for tensor in source.tensors
    ]
    return _STREAMS * max(of_layers) + DEVICE_BLOCK_BYTES if of_layers else 0
