"""Which layer batches are resident now: while no prompt is processed, more fit in the memory of its activations."""

import dataclasses
import logging
from collections.abc import Iterable

from layerstream.pipeline.planning.plan import Plan

__all__ = ["Residency"]

logger = logging.getLogger(__name__)


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

    def drop_decode_residents(self, why: BaseException) -> None:
        """Continue without decode residents, for which there is no memory after all."""
        logger.warning("layers that would stay while decoding are streamed: %s", why)
        self.replace(
            dataclasses.replace(self._plan, decode_residents=()), request_bytes=self._request_bytes
        )

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
