"""Switches a running pipeline to a plan with other residents: which plans are possible, and how memory is swapped."""

from collections.abc import Callable, Collection
from dataclasses import replace

from layerstream.pipeline.planning.plan import Plan
from layerstream.pipeline.streaming.resources import Resources
from layerstream.stages.batch import Residence
from layerstream.stages.channel import Channel
from layerstream.stages.errors import PlanError
from layerstream.stages.route import InFlight, Route
from layerstream.stages.threads import finish_in_thread

__all__ = ["check_compatible", "swap_residents"]


def check_compatible(old: Plan, new: Plan) -> None:
    """Refuse a plan that would need other memory, files or batches than the pipeline has."""

    def shape(plan: Plan) -> object:
        streamed = _without_residents(plan, range(len(plan.batches)))
        arenas = plan.host_arena_bytes, plan.device_arena_bytes  # allocated once
        return plan.files, plan.device, plan.reader, arenas, streamed.batches

    if shape(old) != shape(new):
        raise PlanError(
            "the running plan and the new one differ in more than their residents; open the model anew"
        )
    slot_bytes = [
        (
            0 if new.maps_in_place or batch.host_resident else batch.host_bytes,
            0 if batch.device_resident else batch.device_bytes,
        )
        for batch in new.batches
    ]
    if any(
        host > old.host_arena_bytes or device > old.device_arena_bytes
        for host, device in slot_bytes
    ):
        raise PlanError(
            "the new plan moves a layer batch that is larger than the running pipeline's slots; "
            "open the model anew"
        )


async def swap_residents(
    old: Plan,
    new: Plan,
    *,
    resources: Resources,
    route: Route,
    ready: Channel[InFlight],
    put_into_effect: Callable[[Plan], None],
) -> None:
    """Free the residents of ``old`` that are not in ``new``, then allocate those that only ``new`` has.

    Args:
        old: The plan in effect.
        new: A compatible plan.
        resources: The memory of residents, and the device.
        route: The route of the pipeline's stages.
        ready: The channel behind the transfer stage.
        put_into_effect: Makes a plan that of the pipeline and its route: ``old`` without what is freed, then ``new``.

    Raises:
        DeviceError: There is no memory for the new residents: none was added.
    """
    residents = resources.residents
    # Not by comparing the plans: an earlier change that failed half-way may have left other residents.
    removed = residents.superseded(new.batches)
    if removed:
        # In effect from here on, even if the rest fails.
        put_into_effect(_without_residents(old, removed))
        route.recall()
        # Wait until the recalled batches have passed the stages, whose threads may be copying from this memory.
        while not (await ready.peek()).wanted:
            route.drop(await ready.get())
        await finish_in_thread(resources.device.drain)
        await finish_in_thread(lambda: residents.remove(removed))
    added = False

    def add() -> None:
        nonlocal added
        residents.add(new.batches)
        added = True

    try:
        await finish_in_thread(add)
    finally:
        if added:  # also if the waiting task was cancelled meanwhile
            put_into_effect(new)


def _without_residents(plan: Plan, indices: Collection[int]) -> Plan:
    """``plan`` with the layer batches of these indices streamed."""
    return replace(
        plan,
        batches=tuple(
            batch.with_residence(Residence.STREAMED) if batch.index in indices else batch
            for batch in plan.batches
        ),
    )
