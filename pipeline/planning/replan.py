"""The machine as it would be without the model that runs on it, for which the next plan is made. Pure."""

from dataclasses import replace

from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.planning.plan import Plan

__all__ = ["hardware_without"]


def hardware_without(
    plan: Plan, hardware: Hardware, *, now: Hardware, as_budgeted: bool
) -> Hardware:
    """``hardware`` with as much memory free as there would be if ``plan`` did not run.

    Args:
        plan: the running one.
        hardware: with the rates for the new plan.
        now: with the memory that is free while ``plan`` runs.
        as_budgeted: count at least the budget of ``plan`` as free: some of it is used by running requests, but that
            is no reason to refuse the same budget again.
    """
    vram = None
    if now.vram_free_bytes is not None and plan.device_memory is not None:
        vram = now.vram_free_bytes + plan.device_memory.taken_bytes
        if as_budgeted:
            vram = max(vram, plan.device_memory.budget_bytes)
    host = now.host_available_bytes + plan.host_memory.taken_bytes
    if as_budgeted:
        host = max(host, plan.host_memory.budget_bytes)
    return replace(
        hardware, cached_bytes=now.cached_bytes, host_available_bytes=host, vram_free_bytes=vram
    )
