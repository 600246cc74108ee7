"""Which batches are resident at the moment: while no prompt is processed, the memory of its activations is used for more."""

import dataclasses
import logging
from collections.abc import Iterable

from layerstream.pipeline.planning.plan import Plan
from layerstream.pipeline.scheduling.passes import Rider

__all__ = ["Phases"]

logger = logging.getLogger(__name__)


class Phases:
    """Chooses among the placements of a plan: that of the first sweep, the usual one, and with decode residents.

    Args:
        plan: the running one.
        room_bytes: memory for what all requests together take beside the layers.

    Attributes:
        first: the plan as the first sweep runs it.
    """

    def __init__(self, plan: Plan, *, room_bytes: int) -> None:
        self._swept = False
        self.replace(plan, room_bytes=room_bytes)

    def replace(self, plan: Plan, *, room_bytes: int) -> None:
        """Go on with another plan, and the memory that it leaves for requests."""
        self._room = room_bytes
        self.first = plan.at_first()
        self._plan = self._decoding = plan
        self._extra = 0
        if plan.decode_residents:
            self._decoding = plan.while_decoding()
            self._extra = _resident_bytes(self._decoding) - _resident_bytes(plan)

    def give_up(self, why: BaseException) -> None:
        """Go on without decode residents, for which there is no memory after all."""
        logger.warning("layers that would stay while decoding are streamed: %s", why)
        self.replace(dataclasses.replace(self._plan, decode_residents=()), room_bytes=self._room)

    def plan_for(self, riders: Iterable[Rider]) -> Plan:
        """The plan for a sweep while the requests of these riders run."""
        if not self._swept:
            return self.first
        return self._decoding if self._extra and self._leaves_room(riders) else self._plan

    def swept(self) -> None:
        """The first sweep is over: from now on residents stay."""
        self._swept = True

    def allows(self, plan: Plan, riders: Iterable[Rider]) -> bool:
        """Whether the requests of these riders may run while ``plan`` is in effect."""
        return plan is not self._decoding or not self._extra or self._leaves_room(riders)

    def _leaves_room(self, riders: Iterable[Rider]) -> bool:
        demands = [rider.demand_bytes for rider in riders]
        known = [demand for demand in demands if demand is not None]
        return len(known) == len(demands) and sum(known) + self._extra <= self._room


def _resident_bytes(plan: Plan) -> int:
    return sum(
        batch.host_bytes * batch.host_resident + batch.device_bytes * batch.device_resident
        for batch in plan.batches
    )
