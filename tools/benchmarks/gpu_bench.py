"""What the rows of the GPU benchmark work with, and what they give."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerstream.tools.benchmarks.copying import Accelerator, copy_rate

__all__ = ["MIB", "Bench", "GpuRow", "NotMeasuredError", "Result"]

MIB = 1 << 20


class NotMeasuredError(Exception):
    """Raised when a row cannot be measured on this machine; says why."""


@dataclass(slots=True, kw_only=True)
class Bench:
    """What the rows work with, and what later rows need of earlier ones."""

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
        """As the library names it."""
        return str(self.accelerator.device)

    @property
    def pinned_bytes_per_second(self) -> float:
        """Of the best pinned copies; measured now, where the row that does so has failed."""
        if "pinned" not in self.found:
            self.found["pinned"] = self.pinned_rate()
        return self.found["pinned"]

    def pinned_rate(self) -> float:
        """Bytes per second of the best pinned copies, measured now."""
        blocks = [block for block in self.block_bytes if block >= self.block_bytes[-1] // 8]
        return max(copy_rate(self.accelerator, block_bytes=b, pinned=True) for b in blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a row found."""

    ratio: float | None
    """None where the row has no target."""
    says: str
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRow:
    """A line of the table."""

    name: str
    target: str
    """What issue 6 asks for."""
    measure: Callable[[Bench], Result]
