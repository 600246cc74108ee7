"""Which layer batches are resident now: while no prompt is processed, more fit in the memory of its activations."""

import logging
from collections.abc import Iterable

from layerstream.pipeline.planning.plan import Plan

__all__ = ["Residency"]

logger = logging.getLogger(__name__)

_NAMED = 4  # layer batches in a log line


class Residency:
    """Chooses among the placements of a plan: that of the first sweep, the usual one, and with decode residents.

    Args:
        plan: The running one.
        request_bytes: Memory for all requests together, in addition to the layers.

    Attributes:
        first: The plan as the first sweep runs it.
    """

    def __init__(self, plan: Plan, *, request_bytes: int) -> None:
        self._first_sweep_ended = False
        self.replace(plan, request_bytes=request_bytes)

    def replace(self, plan: Plan, *, request_bytes: int) -> None:
        """Continue with another plan, and the memory that it leaves for requests."""
        self._request_bytes = request_bytes
        self.first = plan.at_first()
        self._plan = self._decoding = plan
        self._extra_bytes = 0
        if plan.decode_residents:
            self._decoding = plan.while_decoding()
            self._extra_bytes = _resident_bytes(self._decoding) - _resident_bytes(plan)

    def resize(self, request_bytes: int) -> None:
        """Change the memory for all requests together."""
        self._request_bytes = request_bytes

    def refused(self, plan: Plan, why: BaseException, *, instead: Plan) -> None:
        """The system has no memory for the residents of ``plan``. Until the next plan they are not asked for again.

        Args:
            plan: From ``plan_for``.
            why: The refusal.
            instead: The plan that is in effect.
        """
        kept = {batch.index for batch in instead.batches if not batch.streamed}
        lost = [b.label for b in plan.batches if not b.streamed and b.index not in kept]
        logger.warning(
            "%d of the layer batches that would stay %s are streamed: %s (%s)",
            len(lost),
            "in memory" if plan is self._plan else "while no prompt is processed",
            ", ".join(lost[:_NAMED]) + (" ..." if len(lost) > _NAMED else ""),
            why,
        )
        if plan is self.first:
            self.first = instead
        if plan is self._plan:
            self._plan = instead
        self._decoding, self._extra_bytes = self._plan, 0

    def plan_for(self, demands: Iterable[int | None]) -> Plan:
        """The plan for a sweep while requests run that need so many bytes each; None: unknown."""
        if not self._first_sweep_ended:
            return self.first
        return self._decoding if self._extra_bytes and self._fits(demands) else self._plan

    def first_sweep_ended(self) -> None:
        """The first sweep is over: from now on residents stay."""
        self._first_sweep_ended = True

    def allows(self, plan: Plan, demands: Iterable[int | None]) -> bool:
        """Whether requests that need so many bytes each may run while ``plan`` is in effect."""
        return plan is not self._decoding or not self._extra_bytes or self._fits(demands)

    def _fits(self, demands: Iterable[int | None]) -> bool:
        demands = list(demands)
        known = [demand for demand in demands if demand is not None]
        return len(known) == len(demands) and sum(known) + self._extra_bytes <= self._request_bytes


def _resident_bytes(plan: Plan) -> int:
    return sum(
        batch.host_bytes * batch.host_resident + batch.device_bytes * batch.device_resident
        for batch in plan.batches
    )
