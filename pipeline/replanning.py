"""The machine as it would be without a model that runs on it: what its next plan is made for. Pure."""

from dataclasses import replace

from layerstream.pipeline.hardware import Hardware
from layerstream.pipeline.plan import Plan

__all__ = ["hardware_without"]


def hardware_without(
    plan: Plan, hardware: Hardware, *, now: Hardware, as_budgeted: bool
) -> Hardware:
    """``hardware`` with as much memory free as there would be if ``plan`` did not run.

    Args:
        plan: that runs.
        hardware: with the rates to plan by.
        now: with what is free while it runs.
        as_budgeted: at least what ``plan`` was given is taken to be free: requests under way, too, have some
            of it, which is no reason to refuse as much once more.
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
