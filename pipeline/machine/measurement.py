"""Plain data: the rates of a machine, and their origin."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

__all__ = ["ComputeRate", "Figure", "Input", "Origin", "Rate", "UnpackingRate"]


class Origin(StrEnum):
    """Where a figure comes from."""

    MEASURED = "measured"
    """Measured on this machine, just now."""
    CONTENDED = "contended"
    """Measured recently, while other processes kept the processors busy."""
    CACHED = "cached"
    """Measured on this machine, at an earlier time."""
    ASSUMED = "assumed"
    """Not measured at all."""
    GIVEN = "given"
    """Set by the caller: a what-if."""
    LEARNT = "learnt"
    """Derived from sweeps of this model on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """The origin of one rate.

    The rate itself is the median of the samples, or the best one if processors were contended.
    """

    origin: Origin
    least: float | None = None
    """The smallest sample, in the unit of the rate."""
    most: float | None = None
    """The largest sample."""
    samples: int = 0
    age_seconds: float | None = None
    """Time since it was measured; None if it was not."""

    def input(self, name: str, value: float) -> "Input":
        """The rate of this origin as a plan records it."""
        return Input(
            name=name,
            value=value,
            origin=self.origin,
            least=self.least,
            most=self.most,
            age_seconds=self.age_seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeRate:
    """The rate of computing with weights, in passes of one size."""

    tokens: int
    """In one pass: the number of rows that each weight matrix is multiplied with."""
    bytes_per_second: float
    """Bytes of weights, in the checkpoint's main dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpackingRate:
    """The rate of unpacking weights of one encoding, in all threads that compute."""

    encoding: str
    """"fp8", "Q4_K"."""
    bytes_per_second: float
    """Packed bytes."""
    multiplied: tuple[ComputeRate, ...] = ()
    """Packed bytes that are multiplied with per second without being unpacked, by ascending tokens; empty if unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A summary of the samples of one measurement."""

    median: float
    least: float
    high: float
    """Of ten samples, nine are no greater."""
    most: float
    samples: int

    @classmethod
    def from_samples(cls, samples: Sequence[float]) -> Self:
        """Summarize ``samples``, of which there is at least one."""
        return cls(
            median=statistics.median(samples),
            least=min(samples),
            high=sorted(samples)[len(samples) * 9 // 10],
            most=max(samples),
            samples=len(samples),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A figure that a plan is based on, and its origin."""

    name: str
    """The name of the field of Hardware."""
    value: float
    origin: Origin
    least: float | None = None
    """The smallest sample."""
    most: float | None = None
    """The largest sample."""
    age_seconds: float | None = None
