"""Puts measurements together: the fields of Hardware, with the origin of each."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from layerstream.pipeline.machine.measurement import (
    ComputeRate,
    Figure,
    Origin,
    Rate,
    UnpackingRate,
)
from layerstream.pipeline.machine.probe_cache import PER_BYTE, MeasuredRates
from layerstream.pipeline.machine.probe_compute import TOKENS
from layerstream.pipeline.machine.probe_unpacking import FUSED_TOKENS, rate_names

__all__ = ["UNPACKING", "FoundRates", "ProbedRates", "combined"]

logger = logging.getLogger(__name__)

# If the volumes with a known rate hold at least this share of the checkpoint, that is its rate: one small file on
# another volume does not matter.
_MIN_SHARE = 0.9
# If the rates of several volumes have different origins, the last one of them counts.
_BY_INCREASING_DOUBT = (Origin.MEASURED, Origin.CACHED, Origin.CONTENDED)
# What measurements of unpacking are called, before the encoding: as the inputs of a plan.
UNPACKING = "unpacking "


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedRates:
    """Values for fields of Hardware, with the origin of each."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _VolumeRate:
    """A rate, and for which share of the checkpoint it holds."""

    rate: Rate
    share: float
    origin: Origin
    age_seconds: float


class FoundRates(NamedTuple):
    """The results of one measurement."""

    of: str
    """What was measured."""
    share: float
    """Of the checkpoint's bytes, for which the rates hold."""
    measured: MeasuredRates
    origin: Origin


def combined(found: Sequence[FoundRates]) -> ProbedRates:
    """The fields of Hardware that the measurements give."""
    fields: dict[str, Any] = {}
    figures: dict[str, Figure] = {}
    parts_by_name: dict[str, list[_VolumeRate]] = {}
    unpacking: list[UnpackingRate] = []
    for of, share, measured, origin in found:
        age = measured.age_seconds
        if of == "compute":
            fields["compute"] = tuple(
                ComputeRate(
                    tokens=tokens,
                    bytes_per_second=_representative_value(measured.rates[str(tokens)], origin),
                )
                for tokens in TOKENS
                if str(tokens) in measured.rates
            )
            samples = sum(rate.samples for rate in measured.rates.values())
            figures["compute"] = Figure(origin=origin, samples=samples, age_seconds=age)
            continue
        if of.startswith(UNPACKING):
            encoding = of.removeprefix(UNPACKING)
            if (rate := measured.rates.get(encoding)) is not None:
                unpacking.append(_unpacking_rate(encoding, measured.rates, origin))
                figures[of] = Figure(
                    origin=origin,
                    least=rate.least,
                    most=rate.most,
                    samples=rate.samples,
                    age_seconds=age,
                )
            continue
        for name, rate in measured.rates.items():
            part = _VolumeRate(rate=rate, share=share, origin=origin, age_seconds=age)
            parts_by_name.setdefault(name, []).append(part)
    for name, parts in parts_by_name.items():
        if sum(part.share for part in parts) < _MIN_SHARE:
            logger.info("%s is not known: it was measured on some of the volumes only", name)
            continue
        values = [(_representative_value(part.rate, part.origin), part.share) for part in parts]
        fields[name] = _mean_over_volumes(name, values)
        figures[name] = Figure(
            origin=max((part.origin for part in parts), key=_BY_INCREASING_DOUBT.index),
            least=_mean_over_volumes(name, [(part.rate.least, part.share) for part in parts]),
            most=_mean_over_volumes(name, [(part.rate.most, part.share) for part in parts]),
            samples=sum(part.rate.samples for part in parts),
            age_seconds=max(part.age_seconds for part in parts),
        )
    if unpacking:
        fields["unpacking"] = tuple(unpacking)
    return ProbedRates(fields=fields, figures=figures)


def _unpacking_rate(encoding: str, rates: Mapping[str, Rate], origin: Origin) -> UnpackingRate:
    unpacked, *products = rate_names(encoding)
    return UnpackingRate(
        encoding=encoding,
        bytes_per_second=_representative_value(rates[unpacked], origin),
        multiplied=tuple(
            ComputeRate(tokens=tokens, bytes_per_second=_representative_value(rates[name], origin))
            for name, tokens in zip(products, FUSED_TOKENS, strict=True)
            if name in rates
        ),
    )


def _representative_value(rate: Rate, origin: Origin) -> float:
    """Return the median, or one of the best samples if processors were contended: then that is closer to the machine.

    Not the very best: of a hundred, it is up to a fifth above what a quiet machine has.
    """
    return rate.high if origin is Origin.CONTENDED else rate.median


def _mean_over_volumes(name: str, values: Sequence[tuple[float, float]]) -> float:
    """Return the rate of reading all volumes one after another, as a sweep does.

    Args:
        name: The field's name, whose ending says whether it is a rate or a cost per byte.
        values: Pairs of a volume's value and its share of the bytes.
    """
    if len(values) == 1:
        return values[0][0]  # without rounding
    shares = sum(share for _, share in values)
    if name.endswith(PER_BYTE):
        return sum(value * share for value, share in values) / shares
    return shares / sum(share / value for value, share in values)
