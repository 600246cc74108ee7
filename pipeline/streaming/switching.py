"""Which plans a running pipeline can switch to, and its plan after residents were removed. Pure."""

from collections.abc import Collection
from dataclasses import replace

from layerstream.pipeline.planning.plan import Plan, ReaderKind
from layerstream.stages.errors import PlanError

__all__ = ["check_alike", "without_residents"]


def without_residents(plan: Plan, gone: Collection[int]) -> Plan:
    """``plan`` with the layer batches of these indices streamed."""
    return replace(
        plan,
        batches=tuple(
            replace(batch, host_resident=False, device_resident=False)
            if batch.index in gone
            else batch
            for batch in plan.batches
        ),
    )


def check_alike(old: Plan, new: Plan) -> None:
    """Refuse a plan that would need other memory, files or batches than the pipeline has."""

    def shape(plan: Plan) -> object:
        streamed = without_residents(plan, range(len(plan.batches)))
        return plan.files, plan.device, plan.reader, streamed.batches

    if shape(old) != shape(new):
        raise PlanError(
            "the running plan and the new one differ in more than their residents; open the model anew"
        )
    in_place = new.reader is ReaderKind.MMAP and new.device_memory is None
    passing = [
        (
            0 if in_place or batch.host_resident else batch.host_bytes,
            0 if batch.device_resident else batch.device_bytes,
        )
        for batch in new.batches
    ]
    rings = (old.host_arena_bytes, old.device_arena_bytes)
    if any(a > rings[0] or b > rings[1] for a, b in passing):
        raise PlanError(
            "the new plan moves a layer batch that is larger than the running pipeline's slots; "
            "open the model anew"
        )
