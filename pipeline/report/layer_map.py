"""Where each layer batch of a plan is, and what memory is for: for maps and bars of any kind. Pure."""

from enum import StrEnum

from layerstream.pipeline.planning.plan import MemoryUse, Plan
from layerstream.stages.batch import LayerBatch

__all__ = ["LayerPlace", "legend", "memory_parts", "place_of"]


class LayerPlace(StrEnum):
    """Where a layer batch is between two sweeps."""

    DISK = "disk"
    DECODING = "decoding"
    """In memory while no prompt is processed."""
    UNPACKED = "unpacked"
    """Its packed weights in memory, unpacked."""
    HOST = "host"
    DEVICE = "device"


def place_of(plan: Plan, batch: LayerBatch) -> LayerPlace:
    """Where ``batch`` of ``plan`` is."""
    if batch.unpacked_bytes:
        return LayerPlace.UNPACKED
    if batch.streamed:
        decoding = batch.index in plan.decode_residents
        return LayerPlace.DECODING if decoding else LayerPlace.DISK
    on_gpu = not plan.on_cpu and batch.device_resident
    return LayerPlace.DEVICE if on_gpu else LayerPlace.HOST


def legend(plan: Plan) -> dict[LayerPlace, str]:
    """What each place means in words."""
    return {
        LayerPlace.DISK: "read in every sweep",
        LayerPlace.DECODING: f"in {'RAM' if plan.on_cpu else 'VRAM'} while decoding",
        LayerPlace.UNPACKED: "stays in host RAM, unpacked",
        LayerPlace.HOST: "stays in host RAM",
        LayerPlace.DEVICE: "stays in VRAM",
    }


def memory_parts(memory: MemoryUse) -> dict[str, int]:
    """What one side's memory is for, in bytes."""
    parts = {"slots": memory.arena_bytes, "residents": memory.resident_bytes}
    if memory.expert_bytes:
        parts["experts"] = memory.expert_bytes
    if memory.adapter_bytes:
        parts["adapters"] = memory.adapter_bytes
    return parts | {"workload": memory.reserved_bytes}
