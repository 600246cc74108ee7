"""The rates that predictions are made with: the known ones of the machine, and assumptions for the others. Pure."""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.machine.measurement import ComputeRate, Figure, Input, Origin

__all__ = ["Rates", "memory_inputs", "rates_of"]

# Assumptions for rates that were neither measured nor given; each is marked as assumed wherever it is shown.
_DISK_BYTES_PER_SECOND = 1.5e9  # an ordinary, older NVMe disk
_MMAP_SHARE = 0.5  # of direct reads: page faults cost processor time
_H2D_BYTES_PER_SECOND = 12e9  # 16 lanes of PCIe 3, from page-locked memory
_PAGEABLE_SHARE = 0.4  # of page-locked copies: these go through a buffer of the driver
_HOST_COPY_BYTES_PER_SECOND = 5e9  # one thread
_CPU_WEIGHT_BYTES_PER_SECOND = 5e9  # per core, up to the memory bandwidth
_CPU_FLOPS_PER_SECOND = 50e9  # per core, bfloat16 with AVX-512
_GPU_WEIGHT_BYTES_PER_SECOND = 300e9  # memory bandwidth of a small GPU
_GPU_FLOPS_PER_SECOND = 30e12
_DIRECT_CPU_SECONDS_PER_BYTE = 0.05e-9  # 0.1 to 0.2 s for 3.18 GB were measured
_MMAP_CPU_SECONDS_PER_BYTE = 0.5e-9  # 1.1 to 5.4 s for 3.18 GB were measured
# Time of operations per element (norms, rotations, activation functions), as a share of that of multiplications: 0.2 to
# 0.35 was measured for prompts of 256 and 1024 tokens on models of 0.1 to 3 GB.
_ELEMENTWISE_SHARE = 0.25
# Blocks of transformers took 1.2 (gpt2) to 2.5 (Mixtral) times as long as the probe's plain block; hooks take more.
_TRANSFORMERS_FACTOR = 2.0
# Of the time of a plain block, Python takes so much more for a packed matrix than for a plain one: 0.06 ms where a block had 0.36.
_PACKED_MATRIX_SHARE = 0.17
# Plain blocks per second, as fast as Python runs and kernels are launched.
_CPU_BLOCKS_PER_SECOND, _GPU_BLOCKS_PER_SECOND = 5000.0, 3000.0
# Operations per second of attention, as a share of those of matrix products.
_CPU_ATTENTION_SHARE, _GPU_ATTENTION_SHARE = 0.3, 0.5
# Operations of one token's attention, per byte of weights in matrix products.
_CPU_STEP_FLOPS_PER_BYTE, _GPU_STEP_FLOPS_PER_BYTE = 0.5, 1.0
# Rate of appending to KV caches, as a share of copies in host RAM, and of reading a GPU's weights: half is read, half
# is written.
_CPU_GROWTH_SHARE, _GPU_GROWTH_SHARE = 0.2, 0.5
# Computing with mapped weights took this much longer than with residents on huge pages: 0.24 s instead of 0.18 for
# 3.1 GB. Part of that was page faults, which have become rarer since: a later run took 0.16 to 0.18 s, so this errs on
# the slow side. Not measured again.
_MAPPED_SHARE = 0.3
# One batch through three stages: some switches between threads and the event loop.
_OVERHEAD_SECONDS_PER_BATCH = 0.5e-3

# Packed bytes; per core with a compiled kernel. Some tensor operations, each of which reads and writes memory, on a GPU.
_CPU_UNPACKED_BYTES_PER_SECOND, _GPU_UNPACKED_BYTES_PER_SECOND = 2e9, 30e9

_ASSUMED_AT_TOKENS = (1, 16, 256, 4096)
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
    """From memory that is not page-locked; the same is assumed for copies from the device."""
    compute: tuple[ComputeRate, ...]
    elementwise: float
    """Time of operations per element divided by that of multiplications."""
    attention_flops_per_second: float
    step_attention_flops_per_second: float
    """Of a pass with one token per sequence."""
    kv_growth_bytes_per_second: float
    """Of appending to KV caches."""
    blocks_per_second: float
    """Of plain blocks, as far as Python and launches allow."""
    launches_ahead: bool
    """The device computes while Python launches further kernels: a GPU."""
    mapped_seconds_per_byte: float
    """Additional time of computation with weights in the page cache."""
    direct_cpu_seconds_per_byte: float
    mmap_cpu_seconds_per_byte: float
    overhead_seconds_per_batch: float
    unpacking: Mapping[str, Input]
    """Of packed bytes, by encoding; for those that are not in it, a rate is assumed."""
    assumed_unpacking: float
    multiplied: Mapping[str, tuple[ComputeRate, ...]]
    """Packed bytes per second that are multiplied with without being unpacked, by encoding."""
    inputs: tuple[Input, ...]

    def used_inputs(self, *, kv_on_host: bool, encodings: Collection[str]) -> tuple[Input, ...]:
        """The inputs that the prediction depends on.

        Args:
            kv_on_host: Whether pageable copies matter.
            encodings: Those of packed weights.
        """
        unpacking = (
            self.unpacking.get(each)
            or Figure(origin=Origin.ASSUMED).input(_unpacking(each), self.assumed_unpacking)
            for each in sorted(encodings)
        )
        return (
            *(
                each
                for each in self.inputs
                if kv_on_host or each.name != "pageable_h2d_bytes_per_second"
            ),
            *unpacking,
        )

    @property
    def block_seconds(self) -> float:
        """Time of the Python and the launches of a block of transformers, whatever its size."""
        return _TRANSFORMERS_FACTOR / self.blocks_per_second

    @property
    def packed_matrix_seconds(self) -> float:
        """Time of the Python of multiplying with a packed matrix on a CPU, besides that for a plain one."""
        return 0.0 if self.launches_ahead else _PACKED_MATRIX_SHARE / self.blocks_per_second

    def unpacked_per_second(self, encoding: str) -> float:
        """Packed bytes of ``encoding`` that are unpacked per second."""
        known = self.unpacking.get(encoding)
        return self.assumed_unpacking if known is None else known.value

    def multiplied_per_second(self, encoding: str, tokens: int) -> float | None:
        """Packed bytes of ``encoding`` that are multiplied with a few tokens per second; None if that is unknown."""
        known = self.multiplied.get(encoding)
        return _interpolated(known, tokens) if known else None

    def weights_per_second(self, tokens: float) -> float:
        """Bytes of weights that a pass of ``tokens`` computes with per second.

        Between two known sizes of a pass, and beyond the largest, its time is interpolated linearly in the number
        of tokens: first the time to read the weights dominates, then that of multiplications.
        """
        return _interpolated(self.compute, tokens)


def _interpolated(rates: Sequence[ComputeRate], tokens: float) -> float:
    """The rate for ``tokens``, between and beyond known ones: see ``Rates.weights_per_second``."""
    # Pairs of tokens and seconds per byte.
    known = [(rate.tokens, 1 / rate.bytes_per_second) for rate in rates]
    first, last = known[0], known[-1]
    if tokens <= first[0]:
        return 1 / first[1]
    if tokens >= last[0]:
        return 1 / (last[1] * tokens / last[0])
    for (fewer, shorter), (more, longer) in itertools.pairwise(known):
        if tokens <= more:
            return 1 / (shorter + (longer - shorter) * (tokens - fewer) / (more - fewer))
    raise AssertionError(tokens)


def _unpacking(encoding: str) -> str:
    return f"unpacking {encoding}"


def memory_inputs(hardware: Hardware) -> tuple[Input, ...]:
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
    lookup = _RateLookup(hardware)
    rate = lookup.rate
    on_cpu = hardware.device == "cpu"
    disk = rate("disk_bytes_per_second", _DISK_BYTES_PER_SECOND)
    compute, probed = lookup.compute()
    multiplied = compute[-1].bytes_per_second * compute[-1].tokens
    weights = compute[0].bytes_per_second
    attention = rate(
        "attention_flops_per_second",
        multiplied * (_CPU_ATTENTION_SHARE if on_cpu else _GPU_ATTENTION_SHARE),
    )
    step_attention = rate(
        "step_attention_flops_per_second",
        weights * (_CPU_STEP_FLOPS_PER_BYTE if on_cpu else _GPU_STEP_FLOPS_PER_BYTE),
    )
    blocks = rate("blocks_per_second", _CPU_BLOCKS_PER_SECOND if on_cpu else _GPU_BLOCKS_PER_SECOND)
    direct_cpu = rate("direct_read_cpu_seconds_per_byte", _DIRECT_CPU_SECONDS_PER_BYTE)
    mmap_cpu = rate("mmap_read_cpu_seconds_per_byte", _MMAP_CPU_SECONDS_PER_BYTE)
    mmap = rate("mmap_bytes_per_second", disk * _MMAP_SHARE)
    host_copy = rate("host_copy_bytes_per_second", _HOST_COPY_BYTES_PER_SECOND)
    growth = rate(
        "kv_growth_bytes_per_second",
        host_copy * _CPU_GROWTH_SHARE if on_cpu else weights * _GPU_GROWTH_SHARE,
    )
    h2d = pageable = math.inf
    if not on_cpu:
        h2d = rate("h2d_bytes_per_second", _H2D_BYTES_PER_SECOND)
        pageable = rate("pageable_h2d_bytes_per_second", h2d * _PAGEABLE_SHARE)
    return Rates(
        disk=disk,
        mmap=mmap,
        host_copy=host_copy,
        h2d=h2d,
        pageable_h2d=pageable,
        compute=compute,
        elementwise=_ELEMENTWISE_SHARE,
        attention_flops_per_second=attention,
        step_attention_flops_per_second=step_attention,
        kv_growth_bytes_per_second=growth,
        blocks_per_second=blocks,
        launches_ahead=not on_cpu,
        mapped_seconds_per_byte=_MAPPED_SHARE / weights if probed else 0.0,
        direct_cpu_seconds_per_byte=direct_cpu,
        mmap_cpu_seconds_per_byte=mmap_cpu,
        overhead_seconds_per_batch=rate("overhead_seconds_per_batch", _OVERHEAD_SECONDS_PER_BATCH),
        unpacking={
            each.encoding: lookup.input(_unpacking(each.encoding), each.bytes_per_second)
            for each in hardware.unpacking
        },
        multiplied={each.encoding: each.multiplied for each in hardware.unpacking},
        assumed_unpacking=(
            _CPU_UNPACKED_BYTES_PER_SECOND * hardware.cores
            if on_cpu
            else _GPU_UNPACKED_BYTES_PER_SECOND
        ),
        inputs=tuple(lookup.inputs),
    )


class _RateLookup:
    """Looks up rates of ``hardware``, and records each with its origin in ``inputs``."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self.inputs: list[Input] = []

    def rate(self, name: str, assumed: float) -> float:
        """The rate of this name, or ``assumed`` if it is unknown."""
        value: float | None = getattr(self._hardware, name)
        figure = self._figure(name)
        if value is None:
            value, figure = assumed, Figure(origin=Origin.ASSUMED)
        self.inputs.append(figure.input(name, value))
        return value

    def input(self, name: str, value: float) -> Input:
        """The rate ``value`` with the origin of the figure of this name."""
        return self._figure(name).input(name, value)

    def compute(self) -> tuple[tuple[ComputeRate, ...], bool]:
        """The rates of computation, and whether this library measured them."""
        compute, figure = self._hardware.compute, self._figure("compute")
        probed = figure.origin not in {Origin.GIVEN, Origin.ASSUMED}
        if not compute:
            compute, figure = self._assumed_compute(), Figure(origin=Origin.ASSUMED)
        self.inputs += [
            # One figure for all of them: its extremes are not those of each.
            replace(figure, least=None, most=None).input(
                f"compute at {rate.tokens} tokens", rate.bytes_per_second
            )
            for rate in compute
        ]
        return compute, probed

    def _figure(self, name: str) -> Figure:
        return self._hardware.figures.get(name, Figure(origin=Origin.GIVEN))

    def _assumed_compute(self) -> tuple[ComputeRate, ...]:
        on_cpu, cores = self._hardware.device == "cpu", self._hardware.cores
        weights = _CPU_WEIGHT_BYTES_PER_SECOND * cores if on_cpu else _GPU_WEIGHT_BYTES_PER_SECOND
        flops = _CPU_FLOPS_PER_SECOND * cores if on_cpu else _GPU_FLOPS_PER_SECOND
        return tuple(
            ComputeRate(
                tokens=tokens, bytes_per_second=min(weights, flops * _ITEM_BYTES / (2 * tokens))
            )
            for tokens in _ASSUMED_AT_TOKENS
        )
