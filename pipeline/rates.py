"""The rates that a plan is priced with: what is known of the machine, and an assumption for what is not. Pure."""

import itertools
import math
from dataclasses import dataclass

from layerstream.pipeline.figures import ComputeRate, Figure, Origin
from layerstream.pipeline.hardware import Hardware

__all__ = ["Input", "Rates", "rates_of", "sizes_of"]

# What stands in for a rate that nobody measured or gave; each is marked as assumed wherever it shows.
_DISK = 1.5e9  # a plain NVMe disk of some years ago
_MMAP_SHARE = 0.5  # of the direct rate: page faults cost processor time
_H2D = 12e9  # 16 lanes of PCIe 3, as copies from page-locked memory reach it
_PAGEABLE_SHARE = 0.4  # of that: such copies go through a buffer of the driver's
_HOST_COPY = 5e9  # one thread
_CPU_WEIGHTS = 5e9  # bytes per second and core, as far as memory allows
_CPU_FLOPS = 50e9  # per core, bfloat16 with AVX-512
_GPU_WEIGHTS = 300e9  # memory bandwidth of a small GPU
_GPU_FLOPS = 30e12
_DIRECT_CPU = 0.05e-9  # processor seconds per byte; 0.1 to 0.2 s for 3.18 GB were measured
_MMAP_CPU = 0.5e-9  # 1.1 to 5.4 s for 3.18 GB were measured
# A layer takes longer than its matrices alone: norms, rotations, activation functions and Python. 1.0 to 1.3 was
# measured for passes of 1 to 512 tokens.
_BESIDE_MATRICES = 1.2
# Computing with mapped weights took this much longer than with residents on huge pages: 0.24 s instead of 0.18 for
# 3.1 GB. Part of that was asking for pages, which has become rarer since: a later run took 0.16 to 0.18 s, so that this
# errs on the slow side. Not measured again.
_MAPPED = 0.3
# What the host takes to ask a GPU for a block's kernels, some eighty operations from Python, however little the GPU has to
# compute. Assumed: torch's own code, on a runtime that plays a GPU, took 0.38 ms for a block of a llama.
_ASKING = 0.4e-3
# Of one batch through three stages: some hops between threads and the loop.
_OVERHEAD = 0.5e-3

_ASSUMED_AT = (1, 16, 256, 4096)  # tokens
_ITEM_BYTES = 2
_PROBED = {Origin.MEASURED, Origin.CONTENDED, Origin.CACHED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A figure that a plan was made with, and how it is known."""

    name: str  # of the field of Hardware
    value: float
    origin: Origin
    least: float | None = None  # of the samples
    most: float | None = None
    age_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """All rates that a price needs, none missing. Bytes per second, where the name says nothing else."""

    disk: float  # direct reads
    mmap: float  # faulting in files that are not in the page cache
    host_copy: float
    h2d: float
    pageable_h2d: float  # from memory that is not page-locked; the same is taken for the way back
    compute: tuple[ComputeRate, ...]
    beside_matrices: float  # times what products with matrices take, a layer takes
    asking_seconds_per_block: float  # at least so long a GPU computes with a block
    mapped_seconds_per_byte: float  # that computation takes longer with weights in the page cache
    direct_cpu_seconds_per_byte: float
    mmap_cpu_seconds_per_byte: float
    overhead_seconds_per_batch: float
    inputs: tuple[Input, ...]

    def used(self, *, kv_on_host: bool) -> tuple[Input, ...]:
        """The inputs that a plan was priced with: pageable copies are those of a KV cache on the host."""
        return tuple(
            each
            for each in self.inputs
            if kv_on_host or each.name != "pageable_h2d_bytes_per_second"
        )

    def weights_per_second(self, tokens: float) -> float:
        """Bytes of weights that a pass of so many tokens computes with per second.

        Between two known sizes of a pass, and beyond the largest, its time is a straight line in the number
        of tokens: it is what reading the weights takes, and then what multiplying takes.
        """
        known = [(rate.tokens, 1 / rate.bytes_per_second) for rate in self.compute]
        first, last = known[0], known[-1]
        if tokens <= first[0]:
            return 1 / first[1]
        if tokens >= last[0]:
            return 1 / (last[1] * tokens / last[0])
        for (few, little), (many, much) in itertools.pairwise(known):
            if tokens <= many:
                return 1 / (little + (much - little) * (tokens - few) / (many - few))
        raise AssertionError(tokens)


def sizes_of(hardware: Hardware) -> tuple[Input, ...]:
    """How much memory ``hardware`` has free, and how much of the files it has in memory already; in bytes."""
    return tuple(
        Input(
            name=name,
            value=float(value),
            origin=hardware.figures.get(name, Figure(origin=Origin.GIVEN)).origin,
        )
        for name in ("host_available_bytes", "vram_free_bytes", "cached_bytes")
        if (value := getattr(hardware, name)) is not None
    )


def rates_of(hardware: Hardware) -> Rates:
    """``hardware``'s rates, with assumptions for those that are not known."""
    inputs: list[Input] = []

    def rate(name: str, assumed: float) -> float:
        value: float | None = getattr(hardware, name)
        known = hardware.figures.get(name, Figure(origin=Origin.GIVEN))
        if value is None:
            value, known = assumed, Figure(origin=Origin.ASSUMED)
        inputs.append(
            Input(
                name=name,
                value=value,
                origin=known.origin,
                least=known.least,
                most=known.most,
                age_seconds=known.age_seconds,
            )
        )
        return value

    disk = rate("disk_bytes_per_second", _DISK)
    compute = _compute(hardware, inputs)
    processor = (
        rate("direct_read_cpu_seconds_per_byte", _DIRECT_CPU),
        rate("mmap_read_cpu_seconds_per_byte", _MMAP_CPU),
    )
    figure = hardware.figures.get("compute")
    if figure is not None and figure.origin is Origin.LEARNT:
        processor = (0.0, processor[1])  # reads went on beside the computation that was learnt from
    probed = figure is not None and figure.origin in _PROBED
    mmap = rate("mmap_bytes_per_second", disk * _MMAP_SHARE)
    host_copy = rate("host_copy_bytes_per_second", _HOST_COPY)
    h2d = pageable = math.inf
    if hardware.device != "cpu":
        h2d = rate("h2d_bytes_per_second", _H2D)
        pageable = rate("pageable_h2d_bytes_per_second", h2d * _PAGEABLE_SHARE)
    return Rates(
        disk=disk,
        mmap=mmap,
        host_copy=host_copy,
        h2d=h2d,
        pageable_h2d=pageable,
        compute=compute,
        beside_matrices=_BESIDE_MATRICES if probed else 1.0,
        asking_seconds_per_block=_ASKING if probed and hardware.device != "cpu" else 0.0,
        mapped_seconds_per_byte=_MAPPED / compute[0].bytes_per_second if probed else 0.0,
        direct_cpu_seconds_per_byte=processor[0],
        mmap_cpu_seconds_per_byte=processor[1],
        overhead_seconds_per_batch=rate("overhead_seconds_per_batch", _OVERHEAD),
        inputs=tuple(inputs),
    )


def _compute(hardware: Hardware, inputs: list[Input]) -> tuple[ComputeRate, ...]:
    known = hardware.figures.get("compute", Figure(origin=Origin.GIVEN))
    compute = hardware.compute
    if not compute:
        known = Figure(origin=Origin.ASSUMED)
        on_cpu = hardware.device == "cpu"
        weights = _CPU_WEIGHTS * hardware.cores if on_cpu else _GPU_WEIGHTS
        flops = _CPU_FLOPS * hardware.cores if on_cpu else _GPU_FLOPS
        compute = tuple(
            ComputeRate(
                tokens=tokens, bytes_per_second=min(weights, flops * _ITEM_BYTES / (2 * tokens))
            )
            for tokens in _ASSUMED_AT
        )
    inputs += [
        Input(
            name=f"compute at {rate.tokens} tokens",
            value=rate.bytes_per_second,
            origin=known.origin,
            age_seconds=known.age_seconds,
        )
        for rate in compute
    ]
    return compute
