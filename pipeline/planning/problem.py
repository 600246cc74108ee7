"""What a plan is made for: choices, machine and model, with the budgets and rates derived from them. Pure."""

from dataclasses import dataclass
from functools import cached_property

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.layers import LayerKind
from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.planning.adapter_size import AdapterSize
from layerstream.pipeline.planning.assumptions import Rates, rates_of
from layerstream.pipeline.planning.choices import PlanChoices
from layerstream.pipeline.planning.expert_cells import ExpertCells
from layerstream.pipeline.planning.kernels import most_fused_tokens
from layerstream.pipeline.planning.layout import Layouts
from layerstream.pipeline.planning.overheads import overheads
from layerstream.pipeline.planning.placement import ArenaBytes
from layerstream.pipeline.planning.plan import ReaderKind
from layerstream.pipeline.planning.planned_layer import PlannedLayer
from layerstream.pipeline.planning.tiles import SharedLayers, unpacked_once
from layerstream.pipeline.planning.workload_memory import WorkloadMemory
from layerstream.stages.errors import PlanError
from layerstream.stages.process.headroom import MARGIN
from layerstream.stages.text import format_bytes

__all__ = ["READS_IN_FLIGHT", "READ_REQUEST_BYTES", "Problem"]

# The kernel's caches of files that a process has just read count in its cgroup until the memory is needed: 15 MB were
# measured after loading torch's libraries. That is no reason to refuse a budget.
_HOST_UNCERTAIN_BYTES = 16 << 20

# The best, within noise, on all disks tried, from a virtual one to NVMe; a larger size only delays the last block of
# a batch.
READ_REQUEST_BYTES = 8 << 20
READS_IN_FLIGHT = 4

# Layers of a KV cache in host RAM that are in VRAM at a time: one in use, one being copied.
_KV_LAYERS_ON_DEVICE = 2


# Without a budget, requests may be much larger than the workload, and should not find all memory taken.
_UNPACKED_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a plan is made for."""

    checkpoint: Checkpoint
    hardware: Hardware
    choices: PlanChoices
    layouts: Layouts
    memory: WorkloadMemory | None
    loaded_code_bytes: int
    code_to_load_bytes: int
    adapters: AdapterSize
    # Of a running pipeline; they cannot change.
    arenas: ArenaBytes | None = None
    kv_on_host: bool | None = None
    expert_cells: ExpertCells | None = None
    running_fused_tokens: int | None = None
    running_once_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise PlanError(f"{self.checkpoint.path}: holds no tensors to stream")
        vram = self.hardware.vram_free_bytes
        if (vram is None) != (self.hardware.device == "cpu"):
            raise PlanError(
                f"hardware: vram_free_bytes is {vram}, but the device is {self.hardware.device}; "
                "give the free VRAM of a GPU, and None for the CPU"
            )
        if self.choices.budget.vram is not None and self.on_cpu:
            raise PlanError(
                "a VRAM budget was given, but the device is the CPU; leave it out or choose a GPU"
            )
        if self.choices.reader is ReaderKind.MMAP and not self.mappable and self.arenas is None:
            raise PlanError(
                f"reader is mmap, but the files of {format_bytes(self.checkpoint.total_bytes)} do not fit into the "
                "address space of this process (ulimit -v); raise that limit, or leave the reader out"
            )

    @property
    def layers(self) -> tuple[PlannedLayer, ...]:
        """What is streamed, in execution order."""
        return self.layouts.layers

    @property
    def block_count(self) -> int:
        """How many layers are blocks."""
        return sum(layer.kind is LayerKind.BLOCK for layer in self.layers)

    @property
    def on_cpu(self) -> bool:
        """Whether computation runs on the host's own processor."""
        return self.hardware.device == "cpu"

    @property
    def mappable(self) -> bool:
        """Whether the address space can hold a mapping of the files."""
        free = self.hardware.address_space_bytes
        nbytes = sum(file.size_bytes for file in self.checkpoint.files)
        return free is None or nbytes <= free * (1 - MARGIN)

    @property
    def workload_bytes(self) -> int:
        """Memory of the workload's requests besides weights."""
        return 0 if self.memory is None else self.memory.reserved_bytes

    def kv_on_device_bytes(self, kv_on_host_bytes: int) -> int:
        """What is in VRAM of a KV cache in host RAM while its layers compute."""
        layers = min(_KV_LAYERS_ON_DEVICE, max(self.block_count, 1))
        return kv_on_host_bytes * layers // max(self.block_count, 1)

    @cached_property
    def request_overhead_bytes(self) -> int:
        """Memory of the workload's requests on a CPU besides tensors."""
        if not self.on_cpu or self.choices.workload is None:
            return 0
        # Most modules have a weight; blocks and the model itself are a few more. Experts that are separate tensors in
        # the files are one module: counted separately, those of a large mixture would be 200 MB for each request.
        modules = sum(len(layer.tensors) for layer in self.layers) + self.adapters.modules
        rows = self.choices.workload.prompt_tokens
        found = overheads(self.checkpoint.config, modules=modules, rows=rows)
        return found.of(self.choices.workload.batch_size)

    @cached_property
    def rates(self) -> Rates:
        """The rates of the machine."""
        return rates_of(self.hardware)

    @cached_property
    def unpacked_once(self) -> SharedLayers:
        """What is unpacked once for all passes of a sweep."""
        if not self.on_cpu:
            return SharedLayers(0, 0)
        if self.running_once_bytes is not None:
            return SharedLayers(0, self.running_once_bytes)
        return unpacked_once(
            (layer.once_bytes for layer in self.layers if layer.once_bytes),
            sequences=0 if self.choices.workload is None else self.choices.workload.batch_size,
            budget_bytes=self.host_budget_bytes,
        )

    @cached_property
    def fused_tokens(self) -> int:
        """The most tokens of a pass that multiplies packed weights without unpacking them."""
        if self.running_fused_tokens is not None:
            return self.running_fused_tokens
        return most_fused_tokens(self.choices.kernels, self.rates, self.layers, on_cpu=self.on_cpu)

    @property
    def unpacked_share(self) -> float:
        """Of the memory that residents leave, what may hold their packed weights unpacked, too."""
        packs = any(layer.once_bytes for layer in self.layers)
        if not self.on_cpu or not packs or self.fused_tokens or self.choices.workload is None:
            return 0.0
        return _UNPACKED_SHARE if self.choices.budget.host is None else 1.0

    @property
    def code_bytes(self) -> int:
        """Host memory of code for the model, and of its module tree."""
        return self.loaded_code_bytes + self.code_to_load_bytes

    @cached_property
    def host_budget_bytes(self) -> int:
        """Host memory that may be used."""
        # Memory that loading code for this model took is not free any more, but counts in its budget.
        free = self.hardware.host_available_bytes + self.loaded_code_bytes
        given = self.choices.budget.host_bytes(free)
        if given is None:
            return self.host_usable_bytes + self.code_bytes
        return _budget(given, free, "host RAM", uncertain=_HOST_UNCERTAIN_BYTES)

    @cached_property
    def host_usable_bytes(self) -> int:
        """Of the host budget, what a plan may take: there is no more than is free."""
        free = max(0, self.hardware.host_available_bytes - self.code_to_load_bytes)
        if self.choices.budget.host is None:
            return int(free * (1 - MARGIN))
        return min(self.host_budget_bytes, free + _HOST_UNCERTAIN_BYTES)

    @property
    def left_free_bytes(self) -> int:
        """Of the usable host memory, what residents leave free, since what code takes counts in the budget."""
        return max(0, self.code_bytes + self.host_usable_bytes - self.host_budget_bytes)

    @cached_property
    def vram_budget_bytes(self) -> int | None:
        """VRAM that may be used; None on the CPU."""
        free = self.hardware.vram_free_bytes
        return None if free is None else _budget(self.choices.budget.vram_bytes(free), free, "VRAM")


def _budget(given: int | None, free: int, side: str, *, uncertain: int = 0) -> int:
    if given is None:
        return int(free * (1 - MARGIN))
    if given > free + uncertain:
        raise PlanError(
            f"the budget of {format_bytes(given)} is more than the {format_bytes(free)} of {side} that are "
            "free; lower it or free memory"
        )
    return given
