"""Measures the rates of this machine that are not cached yet, off the event loop, and caches them."""

import logging
from collections.abc import Mapping
from functools import partial
from itertools import pairwise

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.machine.combined_rates import (
    FoundRates,
    ProbedRates,
    combined,
)
from layerstream.pipeline.machine.contention import Contention
from layerstream.pipeline.machine.measurement import (
    Origin,
    Rate,
)
from layerstream.pipeline.machine.probe_cache import (
    PER_BYTE,
    MeasuredRates,
    MeasurementCache,
)
from layerstream.pipeline.machine.probe_compute import (
    TOKENS,
)
from layerstream.pipeline.machine.probe_disk import (
    MIN_BYTES,
)
from layerstream.pipeline.machine.probes import Probe, probes_of
from layerstream.stages.devices.protocol import Device
from layerstream.stages.errors import LayerstreamError
from layerstream.stages.process.headroom import host_available_bytes
from layerstream.stages.text import format_bytes
from layerstream.stages.threads import finish_in_thread

__all__ = ["ProbedRates", "probe_rates"]

logger = logging.getLogger(__name__)

# Best sample to median. On a quiet machine it is below 1.5; next to other work, 10 has been seen.
_DISTURBED_RATIO = 2.0
# A measurement may take so much of the host memory that is free: in a cgroup, the kernel kills a process that takes more.
_MEMORY_SHARE = 0.8


async def probe_rates(
    checkpoint: Checkpoint,
    device: Device,
    *,
    dtype: str | None,
    fresh: bool,
    measure: bool,
    cache: MeasurementCache,
    most_bytes: int | None,
) -> ProbedRates:
    """Load or measure the rates of this machine that a plan for ``checkpoint`` depends on.

    For a checkpoint below 64 MiB, nothing is measured and only cached rates of larger ones are used: it is too small to
    measure a rate, and streams in less time than a measurement takes.

    Args:
        checkpoint: The files that will be read.
        device: Where computation will run.
        dtype: What is computed in; by default what most weights are, or are unpacked to.
        fresh: Measure again, even rates that are cached.
        measure: If False, nothing is measured.
        cache: The results of earlier measurements.
        most_bytes: Host memory that measuring may take, if that is less than what is free.
    """
    free_bytes = await finish_in_thread(host_available_bytes)
    limit = None
    if most_bytes is not None and 0 < most_bytes < free_bytes:
        limit = (
            1 << most_bytes.bit_length() - 1
        )  # so that another limit of about the size finds what is kept
    probes = await finish_in_thread(
        lambda: probes_of(checkpoint, device, dtype, free_bytes=free_bytes, limit=limit)
    )
    measure = measure and checkpoint.total_bytes >= MIN_BYTES
    found = []
    # One after another: concurrent measurements would disturb each other.
    for probe in probes:
        # One thread call for each, so that a cancellation takes effect between two of them.
        result = await finish_in_thread(
            partial(
                _load_or_measure,
                probe,
                cache,
                fresh=fresh and measure,
                measure=measure,
                most_bytes=most_bytes,
            )
        )
        if result is not None:
            found.append((probe, *result))
    return combined(
        [
            FoundRates(of=probe.key["of"], share=probe.share, measured=measured, origin=origin)
            for probe, measured, origin in found
        ]
    )


def _load_or_measure(
    probe: Probe,
    cache: MeasurementCache,
    *,
    fresh: bool,
    measure: bool,
    most_bytes: int | None,
) -> tuple[MeasuredRates, Origin] | None:
    if not fresh:
        kept = (cache.load(key, names=probe.names) for key in probe.keys)
        cached = next((each for each in kept if each is not None), None)
        if cached is not None:
            return cached, Origin.CONTENDED if cached.contended else Origin.CACHED
    if not measure:
        return None
    what = probe.key["of"]
    free_bytes = _MEMORY_SHARE * host_available_bytes()
    if probe.takes_bytes > (free_bytes if most_bytes is None else min(free_bytes, most_bytes)):
        logger.info(
            "%s: not measured, since that takes %s of memory", what, format_bytes(probe.takes_bytes)
        )
        return None
    try:
        with Contention() as contention:
            rates = probe.measure()
    except (LayerstreamError, OSError, RuntimeError) as error:  # RuntimeError: torch's
        logger.warning("measuring %s failed, the rate is not known: %s", what, error)
        return None
    if not rates:
        return None
    for name, rate in rates.items():
        logger.info("%s: %s is %.3g (%.3g to %.3g)", what, name, rate.median, rate.least, rate.most)
    contended = probe.affected_by_contention and contention.matters
    if contended:
        logger.info("%s: other processes kept %.1f processors busy", what, contention.processors)
    if _was_disturbed(rates) and not contended:
        logger.info("%s: the samples differ so much that they are not cached", what)
    else:
        cache.store(probe.keys[-1], rates, contended=contended)
    found = MeasuredRates(rates=rates, age_seconds=0.0, contended=contended)
    return found, Origin.CONTENDED if contended else Origin.MEASURED


def _was_disturbed(rates: Mapping[str, Rate]) -> bool:
    """Return whether something else seems to have slowed some samples, so that they should not be cached."""
    # More tokens never make products with weights faster: if they seem to, the smaller pass was disturbed.
    sizes = [rates[str(tokens)].median for tokens in TOKENS if str(tokens) in rates]
    if any(more > 2 * _DISTURBED_RATIO * fewer for fewer, more in pairwise(sizes)):
        return True
    return any(
        rate.most > _DISTURBED_RATIO * rate.median
        for name, rate in rates.items()
        if not name.endswith(PER_BYTE)
    )
