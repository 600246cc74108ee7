"""The plan and its parts: frozen data."""

from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Self

from layerstream.pipeline.machine.measurement import Input
from layerstream.pipeline.planning.plan_json import dump, load
from layerstream.pipeline.planning.prediction import Advice, Candidate, Prediction
from layerstream.stages.batch import LayerBatch, Residence
from layerstream.stages.errors import PlanError
from layerstream.stages.experts.expert_set import ExpertSet
from layerstream.stages.readers.files import FileVersion
from layerstream.stages.text import parse_size

__all__ = ["Budget", "MemoryUse", "Plan", "PlannedFile", "ReaderKind", "Workload"]

# Raised when the meaning of a field changes, so that an old plan is refused instead of misread.
_VERSION = 4

# An arbitrary amount of free memory, to check whether a share such as "80%" can be parsed.
_SOME_FREE_BYTES = 1 << 40


class ReaderKind(StrEnum):
    """How weights are read."""

    DIRECT = "direct"
    """O_DIRECT, past the page cache."""
    MMAP = "mmap"
    """A mapping of the files, through the page cache."""
    THROTTLED = "throttled"
    """Direct, at a given rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The memory that a pipeline may use: bytes, "4GiB", or "80%" of what is free.

    None: what is free, less a tenth.

    The host budget counts what the pipeline adds in anonymous and page-locked memory: slots, residents, and
    on a CPU device the KV cache and activations of the workload. The page cache does not count.

    Raises:
        PlanError: Not a size.
    """

    vram: int | str | None = None
    host: int | str | None = None

    def vram_bytes(self, free_bytes: int) -> int | None:
        """The VRAM budget in bytes, given how much is free."""
        return _budget_bytes(self.vram, "VRAM", free_bytes)

    def host_bytes(self, free_bytes: int) -> int | None:
        """The host budget in bytes, given how much is free."""
        return _budget_bytes(self.host, "host", free_bytes)

    def __post_init__(self) -> None:
        # Raise here, where the mistake was made.
        self.vram_bytes(_SOME_FREE_BYTES)
        self.host_bytes(_SOME_FREE_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The expected requests; the plan reserves memory for their KV cache and activations."""

    batch_size: int = 1
    prompt_tokens: int = 512
    new_tokens: int = 128

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(
                    f"workload: {field.name} is {value!r}, but must be a whole number from 1"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """A weight file as it was when the plan was made."""

    path: str
    nbytes: int
    version: FileVersion | None = None
    """When its header was read; None in plans that were written before this was recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """What a plan uses of one side's budget, in bytes."""

    budget_bytes: int
    arena_bytes: int
    """The ring of slots."""
    resident_bytes: int
    """Resident layer batches."""
    reserved_bytes: int
    """KV cache, activations and scratch of the workload, and what libraries take for its requests."""
    expert_bytes: int = 0
    """Cells of experts that are read on demand, and the buffers that they are read into."""
    adapter_bytes: int = 0
    """Weights of adapters, which are resident."""

    @property
    def taken_bytes(self) -> int:
        """The memory that a running pipeline takes even without requests."""
        return self.arena_bytes + self.resident_bytes + self.expert_bytes + self.adapter_bytes

    @property
    def used_bytes(self) -> int:
        """The total."""
        return self.taken_bytes + self.reserved_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which layers form a batch, what is resident where, and the memory for that. Running it decides nothing more.

    Raises:
        PlanError: Its parts contradict one another.
    """

    checkpoint: str
    """The folder or file that was opened."""
    files: tuple[PlannedFile, ...]
    device: str
    """"cpu" or "cuda:0"."""
    reader: ReaderKind
    throttle_bytes_per_second: float | None
    """Of a throttled reader."""
    read_request_bytes: int
    reads_in_flight: int
    layer_batch_size: int
    host_slots: int
    device_slots: int
    host_arena_bytes: int
    device_arena_bytes: int
    host_memory: MemoryUse
    device_memory: MemoryUse | None
    """None on a CPU device, where all memory is the host's."""
    batches: tuple[LayerBatch, ...]
    workload: Workload | None
    workload_bytes: int
    """The part of the reserved memory for KV cache and activations of requests."""
    kv_cache_bytes: int
    """Of that, the KV cache."""
    overhead_bytes: int
    """Host memory not counted above: code that was loaded for the model, for which no plan is refused."""
    kv_cache_on_host: bool
    """Whether the KV cache is in host RAM, and is copied to the device layer by layer."""
    always_resident: tuple[int, ...]
    """Batches that must be resident."""
    decode_residents: tuple[int, ...]
    """Batches that are resident only while no prompt is processed."""
    prediction: Prediction
    inputs: tuple[Input, ...]
    """The figures that it was made with, and their origin."""
    candidates: tuple[Candidate, ...]
    """The alternatives, the fastest first."""
    advice: tuple[Advice, ...]
    """Changes that would make it faster."""
    notes: tuple[str, ...]
    """Assumptions and explanations."""
    experts: tuple[ExpertSet, ...] = ()
    """Experts that are read when tokens are routed to them; those of other layers are in their batches."""
    shared_expert_cells: int = 0
    """Further cells of each size, so that experts of a long prompt can pass through."""
    kv_cache_device_bytes: int = 0
    """Of a KV cache in host RAM: what is in VRAM while its layers compute; of the reserved memory."""
    unpacked_once_bytes: int = 0
    """Memory for packed weights that are unpacked once for several passes; of the reserved memory."""
    fused_tokens: int = 0
    """Passes of up to so many tokens multiply packed weights without unpacking them; 0: none does."""

    def __post_init__(self) -> None:
        for name, memory in self.memories.items():
            if memory.used_bytes > memory.budget_bytes:
                raise PlanError(
                    f"the plan uses {memory.used_bytes} bytes of a {name} budget of "
                    f"{memory.budget_bytes}; make it anew"
                )
        if [batch.index for batch in self.batches] != list(range(len(self.batches))):
            raise PlanError("the plan's layer batches are not numbered in order; make it anew")

    @property
    def on_cpu(self) -> bool:
        """Whether computation runs on the host's own processor, in the host's memory."""
        return self.device_memory is None

    @property
    def memories(self) -> dict[str, MemoryUse]:
        """The use of each memory, by its name: first of the one where computation runs."""
        sides = {"VRAM": self.device_memory, "host RAM": self.host_memory}
        return {name: memory for name, memory in sides.items() if memory is not None}

    @property
    def budget(self) -> Budget:
        """Its budgets, in bytes."""
        device = self.device_memory
        return Budget(
            host=self.host_memory.budget_bytes, vram=None if device is None else device.budget_bytes
        )

    @property
    def disk_bytes_per_sweep(self) -> int:
        """Bytes that every sweep but the first reads from disk."""
        return sum(batch.read_bytes for batch in self.batches if batch.streamed)

    @property
    def expert_bytes_per_step(self) -> float:
        """Bytes of experts that a decoding step of the workload reads once cells are filled."""
        sequences = 1 if self.workload is None else self.workload.batch_size
        return sum(each.missed_bytes(sequences) for each in self.experts)

    @property
    def predicted_sweep_seconds(self) -> float:
        """The time of a sweep while decoding."""
        return self.prediction.decode.seconds

    @property
    def first_sweep_bytes(self) -> int:
        """Bytes that the first sweep reads from disk, including residents."""
        return sum(batch.read_bytes for batch in self.batches)

    def at_first(self) -> Self:
        """The plan for the first sweep on a CPU: with as few residents as its rings allow.

        The system needs up to two seconds per GiB to provide new memory. So that the first token does not wait for that,
        the second sweep loads the residents. On a GPU, their memory is page-locked before the pipeline is open.
        """
        if not self.on_cpu or self.reader is ReaderKind.MMAP:
            return self
        always_resident = set(self.always_resident)

        def streamed(batch: LayerBatch) -> LayerBatch:
            fits = (
                batch.host_bytes <= self.host_arena_bytes
                and batch.device_bytes <= self.device_arena_bytes
            )
            if batch.index in always_resident or not fits:
                return batch
            return batch.with_residence(Residence.STREAMED)

        return replace(self, batches=tuple(map(streamed, self.batches)))

    @property
    def maps_in_place(self) -> bool:
        """Whether computation uses the mapped files themselves."""
        return self.on_cpu and self.reader is ReaderKind.MMAP

    def while_decoding(self) -> Self:
        """The plan while no prompt is processed: with its decode residents."""
        decode_residents = set(self.decode_residents)

        def resident(batch: LayerBatch) -> LayerBatch:
            if batch.index not in decode_residents:
                return batch
            on_cpu = batch.residence_on_cpu(mapped=self.maps_in_place)
            return batch.with_residence(on_cpu if self.on_cpu else Residence.DEVICE)

        return replace(self, batches=tuple(map(resident, self.batches)))

    def describe(self) -> str:
        """The plan as text."""
        from layerstream.pipeline.report.plan_report import describe_plan

        return describe_plan(self)

    def to_json(self) -> str:
        """The plan as JSON. Each key carries its unit."""
        return dump(self, version=_VERSION)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The plan that ``to_json`` wrote.

        Raises:
            PlanError: The text is not a plan, or was written by another version.
        """
        return load(cls, text, version=_VERSION)


def _budget_bytes(given: int | str | None, side: str, free_bytes: int) -> int | None:
    if given is None:
        return None
    if isinstance(given, str):
        try:
            return parse_size(given, of_bytes=free_bytes)
        except ValueError as error:
            raise PlanError(f"{side} budget: {error}") from error
    if not isinstance(given, int) or isinstance(given, bool) or given <= 0:
        raise PlanError(
            f'{side} budget {given!r} is not a size above nothing; write it like "4GiB" or "80%"'
        )
    return given
