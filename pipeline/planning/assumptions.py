"""The rates that predictions are made with: those known of the machine, and assumptions for the others. Pure."""

import itertools
import math
from dataclasses import dataclass

from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.machine.measurement import ComputeRate, Figure, Input, Origin

__all__ = ["Rates", "rates_of", "sizes_of"]

# Assumptions for rates that were neither measured nor given; each is marked as assumed wherever it is shown.
_DISK = 1.5e9  # an ordinary, older NVMe disk
_MMAP_SHARE = 0.5  # of the direct rate: page faults cost processor time
_H2D = 12e9  # 16 lanes of PCIe 3, from page-locked memory
_PAGEABLE_SHARE = 0.4  # of that: such copies go through a buffer of the driver
_HOST_COPY = 5e9  # one thread
_CPU_WEIGHTS = 5e9  # bytes per second and core, up to the memory bandwidth
_CPU_FLOPS = 50e9  # per core, bfloat16 with AVX-512
_GPU_WEIGHTS = 300e9  # memory bandwidth of a small GPU
_GPU_FLOPS = 30e12
_DIRECT_CPU = 0.05e-9  # processor seconds per byte; 0.1 to 0.2 s for 3.18 GB were measured
_MMAP_CPU = 0.5e-9  # 1.1 to 5.4 s for 3.18 GB were measured
# What operations per element (norms, rotations, activation functions) take besides multiplications: 0.2 to 0.35 of
# their time was measured for prompts of 256 and 1024 tokens on models of 0.1 to 3 GB.
_ELEMENTWISE = 0.25
# Blocks of transformers took 1.2 (gpt2) to 2.5 (Mixtral) times as long as the probe's plain block, and hooks come on top.
_TRANSFORMERS = 2.0
# Plain blocks per second, as fast as Python runs and kernels are launched.
_CPU_BLOCKS, _GPU_BLOCKS = 5000.0, 3000.0
# Of the operations per second of matrix products.
_CPU_ATTENTION, _GPU_ATTENTION = 0.3, 0.5
# Operations of one token's attention, per byte of weights that products go through.
_CPU_STEP, _GPU_STEP = 0.5, 1.0
# Of copies in host RAM, and of the GPU's weights: half is read, half is written.
_CPU_GROWTH, _GPU_GROWTH = 0.2, 0.5
# Computing with mapped weights took this much longer than with residents on huge pages: 0.24 s instead of 0.18 for
# 3.1 GB. Part of that was asking for pages, which has become rarer since: a later run took 0.16 to 0.18 s, so that this
# errs on the slow side. Not measured again.
_MAPPED = 0.3
# Of one batch through three stages: some switches between threads and the event loop.
_OVERHEAD = 0.5e-3

_ASSUMED_AT = (1, 16, 256, 4096)  # tokens
_ITEM_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """All rates that a prediction needs, in bytes per second unless the name says otherwise."""

    disk: float
    """Direct reads."""
    mmap: float
    """Faulting in files that are not in the page cache."""
    host_copy: float
    h2d: float
    pageable_h2d: float
    """From memory that is not page-locked, and assumed for the way back."""
    compute: tuple[ComputeRate, ...]
    elementwise: float
    """Time of operations per element divided by that of multiplications."""
    attention_flops_per_second: float
    step_attention_flops_per_second: float
    kv_growth_bytes_per_second: float
    blocks_per_second: float
    """Plain ones, as far as Python and launches allow."""
    launches_ahead: bool
    """Computation goes on meanwhile: on a GPU."""
    mapped_seconds_per_byte: float
    """Additional time of computation with weights in the page cache."""
    direct_cpu_seconds_per_byte: float
    mmap_cpu_seconds_per_byte: float
    overhead_seconds_per_batch: float
    inputs: tuple[Input, ...]

    def used(self, *, kv_on_host: bool) -> tuple[Input, ...]:
        """The inputs that the prediction depends on: pageable copies only with a KV cache on the host."""
        return tuple(
            each
            for each in self.inputs
            if kv_on_host or each.name != "pageable_h2d_bytes_per_second"
        )

    @property
    def block_seconds(self) -> float:
        """Of the Python and the launches of a block of transformers, whatever its size."""
        return _TRANSFORMERS / self.blocks_per_second

    def weights_per_second(self, tokens: float) -> float:
        """Bytes of weights that a pass of so many tokens computes with per second.

        Between two known sizes of a pass, and beyond the largest, its time is interpolated linearly in the number
        of tokens: first the time to read the weights dominates, then that of multiplications.
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
    """Free memory of ``hardware``, and how much of the files is in memory already, in bytes."""
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
    """The rates of ``hardware``, with assumptions for unknown ones."""
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
    on_cpu = hardware.device == "cpu"
    multiplied = compute[-1].bytes_per_second * compute[-1].tokens
    attention = rate(
        "attention_flops_per_second",
        multiplied * (_CPU_ATTENTION if on_cpu else _GPU_ATTENTION),
    )
    weights = compute[0].bytes_per_second
    step_attention = rate(
        "step_attention_flops_per_second", weights * (_CPU_STEP if on_cpu else _GPU_STEP)
    )
    blocks = rate("blocks_per_second", _CPU_BLOCKS if on_cpu else _GPU_BLOCKS)
    direct_cpu = rate("direct_read_cpu_seconds_per_byte", _DIRECT_CPU)
    mmap_cpu = rate("mmap_read_cpu_seconds_per_byte", _MMAP_CPU)
    figure = hardware.figures.get("compute")
    probed = figure is not None and figure.origin not in {Origin.GIVEN, Origin.ASSUMED}
    mmap = rate("mmap_bytes_per_second", disk * _MMAP_SHARE)
    host_copy = rate("host_copy_bytes_per_second", _HOST_COPY)
    growth = rate(
        "kv_growth_bytes_per_second", host_copy * _CPU_GROWTH if on_cpu else weights * _GPU_GROWTH
    )
    h2d = pageable = math.inf
    if not on_cpu:
        h2d = rate("h2d_bytes_per_second", _H2D)
        pageable = rate("pageable_h2d_bytes_per_second", h2d * _PAGEABLE_SHARE)
    return Rates(
        disk=disk,
        mmap=mmap,
        host_copy=host_copy,
        h2d=h2d,
        pageable_h2d=pageable,
        compute=compute,
        elementwise=_ELEMENTWISE,
        attention_flops_per_second=attention,
        step_attention_flops_per_second=step_attention,
        kv_growth_bytes_per_second=growth,
        blocks_per_second=blocks,
        launches_ahead=not on_cpu,
        mapped_seconds_per_byte=_MAPPED / compute[0].bytes_per_second if probed else 0.0,
        direct_cpu_seconds_per_byte=direct_cpu,
        mmap_cpu_seconds_per_byte=mmap_cpu,
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
