"""Which kernels multiply with packed weights on a CPU: exact ones, or faster ones whose sums have another order. Pure."""

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum

from layerstream.pipeline.planning.assumptions import Rates
from layerstream.pipeline.planning.planned_layer import PlannedLayer
from layerstream.stages.errors import PlanError

__all__ = ["Kernels", "kernels_of", "most_fused_tokens"]

# Passes of more tokens are faster if weights are unpacked once for all of them.
_FUSED_TOKENS = 4


class Kernels(StrEnum):
    """How packed weights are multiplied with."""

    EXACT = "exact"
    """They are unpacked, tile by tile, for torch's own products: the bits of ``from_pretrained``."""
    FUSED = "fused"
    """In passes of a few tokens products are summed while weights are unpacked, in float32, in another order."""
    AUTO = "auto"
    """Whichever of the two is faster at measured rates; exact if they were not measured."""


def kernels_of(given: Kernels | str) -> Kernels:
    """``given`` as a ``Kernels``.

    Raises:
        PlanError: There are no such ones.
    """
    try:
        return Kernels(given)
    except ValueError as error:
        raise PlanError(
            f"there are no kernels {given!r}; give one of {', '.join(Kernels)}"
        ) from error


def most_fused_tokens(
    kernels: Kernels, rates: Rates, layers: Iterable[PlannedLayer], *, on_cpu: bool
) -> int:
    """The most tokens of a pass that multiplies packed weights without unpacking them; 0: none does.

    Args:
        kernels: What was asked for.
        rates: Of the machine.
        layers: What is computed with.
        on_cpu: There are none for a GPU.
    """
    packed, unpacked = Counter[str](), Counter[str]()
    if on_cpu and kernels is not Kernels.EXACT:
        for layer in layers:
            packed += layer.weights.packed
            unpacked += layer.weights.unpacked
            if layer.weights.unpacked_experts:
                packed += layer.weights.packed_experts
                unpacked += layer.weights.unpacked_experts
    if not packed:
        return 0
    if kernels is Kernels.FUSED:
        return _FUSED_TOKENS
    exact = fused = 0.0
    for encoding, packed_bytes in packed.items():
        multiplied = rates.multiplied_per_second(encoding, 1)
        if multiplied is None:
            continue
        fused += packed_bytes / multiplied
        exact += packed_bytes / rates.unpacked_per_second(encoding)
        exact += unpacked[encoding] / rates.weights_per_second(1)
    return _FUSED_TOKENS if fused < exact else 0
