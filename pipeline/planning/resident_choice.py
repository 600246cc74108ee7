"""Which of many layer batches become resident. Pure."""

from collections.abc import Sequence

from layerstream.stages.batch import LayerBatch

__all__ = ["evenly", "oversized_batches"]

# A batch this many times as large as most decides the size of the ring for all.
_OVERSIZED = 2


def evenly(among: int, count: int) -> list[int]:
    """``count`` of the numbers below ``among``, evenly spread, so that disk and compute are loaded evenly."""
    return [(2 * i + 1) * among // (2 * count) for i in range(count)]


def oversized_batches(batches: Sequence[LayerBatch]) -> list[int]:
    """Indices of streamed batches that are much larger than most, the largest first."""
    streamed = sorted(b.host_bytes for b in batches if b.streamed)
    if not streamed:
        return []
    typical = streamed[len(streamed) // 2]
    large = [b for b in batches if b.streamed and b.host_bytes > _OVERSIZED * typical]
    return [b.index for b in sorted(large, key=lambda b: -b.host_bytes)]
