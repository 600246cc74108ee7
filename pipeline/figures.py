"""How fast a machine is, and how each rate is known. Plain data."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

__all__ = ["ComputeRate", "Figure", "Origin", "Rate"]


class Origin(StrEnum):
    """Where a figure comes from."""

    MEASURED = "measured"  # on this machine, just now
    CONTENDED = "contended"  # lately, while other processes kept the processors busy
    CACHED = "cached"  # on this machine, at an earlier time
    ASSUMED = "assumed"  # nobody has measured it
    GIVEN = "given"  # by the caller: a what-if
    LEARNT = "learnt"  # from sweeps of this model on this machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """How one rate is known.

    The rate itself is the median of the samples; that of a contended processor is the best of them.
    """

    origin: Origin
    least: float | None = None  # of the samples, in the unit of the rate
    most: float | None = None
    samples: int = 0
    age_seconds: float | None = None  # since it was measured; None where it was not


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeRate:
    """How fast weights are computed with, in passes of one size."""

    tokens: int  # in one pass: the rows that each weight matrix is multiplied with
    bytes_per_second: float  # of weights, in the checkpoint's main dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """The samples of one measurement, in short."""

    median: float
    least: float
    most: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """At least one sample."""
        return cls(
            median=statistics.median(samples),
            least=min(samples),
            most=max(samples),
            samples=len(samples),
        )
