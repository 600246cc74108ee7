"""The rates of a machine, and their origin. Plain data."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

__all__ = ["ComputeRate", "Figure", "Input", "Origin", "Rate"]


class Origin(StrEnum):
    """The origin of a figure."""

    MEASURED = "measured"
    """On this machine, just now."""
    CONTENDED = "contended"
    """Recently, while other processes kept the processors busy."""
    CACHED = "cached"
    """On this machine, at an earlier time."""
    ASSUMED = "assumed"
    """Not measured at all."""
    GIVEN = "given"
    """By the caller: a what-if."""
    LEARNT = "learnt"
    """From sweeps of this model on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """The origin of one rate.

    The rate itself is the median of the samples, or the best one if processors were contended.
    """

    origin: Origin
    least: float | None = None
    """Of the samples, in the unit of the rate."""
    most: float | None = None
    samples: int = 0
    age_seconds: float | None = None
    """Since it was measured; None if it was not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeRate:
    """The rate of computing with weights, in passes of one size."""

    tokens: int
    """In one pass: the rows that each weight matrix is multiplied with."""
    bytes_per_second: float
    """Of weights, in the checkpoint's main dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A summary of the samples of one measurement."""

    median: float
    least: float
    most: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """The summary of ``samples``, of which there is at least one."""
        return cls(
            median=statistics.median(samples),
            least=min(samples),
            most=max(samples),
            samples=len(samples),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A figure that a plan was made with, and its origin."""

    name: str
    """Of the field of Hardware."""
    value: float
    origin: Origin
    least: float | None = None
    """Of the samples."""
    most: float | None = None
    age_seconds: float | None = None
