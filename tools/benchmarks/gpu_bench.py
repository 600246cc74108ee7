"""Inputs and results of the rows of the GPU benchmark."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerstream.tools.benchmarks.accelerator import Accelerator
from layerstream.tools.benchmarks.copying import measure_copy_rate

__all__ = ["MIB", "Bench", "GpuRow", "NotMeasuredError", "RowResult"]

MIB = 1 << 20


class NotMeasuredError(Exception):
    """Raised when a row cannot be measured on this machine; says why."""


@dataclass(slots=True, kw_only=True)
class Bench:
    """Inputs of the rows, and values that later rows need from earlier ones."""

    accelerator: Accelerator
    folder: Path
    """The checkpoint."""
    out: Path
    sweeps: int
    block_bytes: tuple[int, ...]
    pin_bytes: int
    found: dict[str, float] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """The device's name for the library."""
        return str(self.accelerator.device)

    @property
    def pinned_bytes_per_second(self) -> float:
        """Bytes per second of the best pinned copies; measured now if the row that does so has failed."""
        if "pinned" not in self.found:
            self.found["pinned"] = self.measure_pinned_rate()
        return self.found["pinned"]

    def measure_pinned_rate(self) -> float:
        """Measure bytes per second of the best pinned copies."""
        blocks = [block for block in self.block_bytes if block >= self.block_bytes[-1] // 8]
        return max(
            measure_copy_rate(self.accelerator, block_bytes=block, pinned=True) for block in blocks
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """The result of a row."""

    ratio: float | None
    """None if the row has no target."""
    says: str
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRow:
    """A row of the table."""

    name: str
    target: str
    """The ratio required by issue 6."""
    measure: Callable[[Bench], RowResult]
