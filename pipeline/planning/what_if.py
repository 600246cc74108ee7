"""What-ifs: the hardware of another machine, or of this one with some figures replaced. Pure."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.machine.measurement import Figure, Origin
from layerstream.pipeline.planning.plan import Budget
from layerstream.stages.errors import PlanError
from layerstream.stages.text import format_bytes

__all__ = ["WhatIf"]

# Rates that depend on this machine's processor.
_PROCESSOR_RATES = (
    "host_copy_bytes_per_second",
    "attention_flops_per_second",
    "step_attention_flops_per_second",
    "kv_growth_bytes_per_second",
    "blocks_per_second",
    "direct_read_cpu_seconds_per_byte",
    "mmap_read_cpu_seconds_per_byte",
    "h2d_bytes_per_second",
    "pageable_h2d_bytes_per_second",
    "overhead_seconds_per_batch",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """Figures that are given for a machine; None: as on this one."""

    missing_device: str | None = None
    """Such as "cuda:0", for a GPU that this machine lacks; its VRAM is the budget's."""
    ram_bytes: int | None = None
    """Free host RAM."""
    disk_bytes_per_second: float | None = None
    """Of direct reads."""
    h2d_bytes_per_second: float | None = None
    """Host to device, from page-locked memory."""

    @property
    def is_given(self) -> bool:
        """Whether any figure is given."""
        return any(getattr(self, field.name) is not None for field in dataclasses.fields(self))

    def complete(self, hardware: Hardware, budget: Budget) -> Hardware:
        """``hardware`` with the given figures.

        If a size of memory is not given but a budget for it is, it is as large as the budget. Rates measured with one
        disk or processor are not used for another one.

        Args:
            hardware: This machine, as a CPU device if the GPU is missing.
            budget: The budget on the other machine.

        Raises:
            PlanError: A GPU of unknown size, a bandwidth to a device on a CPU, or an invalid figure.
        """
        if not self.is_given:
            return hardware
        changes: dict[str, Any] = {"cached_bytes": 0}  # nothing is cached
        host = self.ram_bytes
        if host is None:
            available = hardware.host_available_bytes
            budgeted = budget.host_bytes(available) or 0
            host = budgeted if budgeted > available else None
        if host is not None:
            changes["host_available_bytes"] = host
        if self.missing_device is not None:
            changes |= {
                "device": self.missing_device,
                "vram_free_bytes": self._vram_bytes(budget),
                **dict.fromkeys(_PROCESSOR_RATES),
                "compute": (),
                "unpacking": (),
            }
        if self.disk_bytes_per_second is not None:
            changes["disk_bytes_per_second"] = self.disk_bytes_per_second
            changes["mmap_bytes_per_second"] = None
        if self.h2d_bytes_per_second is not None:
            if changes.get("device", hardware.device) == "cpu":
                raise PlanError(
                    "a host-to-device bandwidth was given, but the device is the CPU; leave it out or choose a GPU"
                )
            changes["h2d_bytes_per_second"] = self.h2d_bytes_per_second
        given = dict.fromkeys(changes, Figure(origin=Origin.GIVEN))
        return dataclasses.replace(hardware, **changes, figures={**hardware.figures, **given})

    def notes(self, hardware: Hardware) -> tuple[str, ...]:
        """Notes that a report for such ``hardware`` must have."""
        if not self.is_given:
            return ()
        notes = [
            "this is a what-if: figures marked as given hold for the machine that was asked about"
        ]
        if self.missing_device is not None:
            notes.append(
                f"there is no {self.missing_device} here: {format_bytes(hardware.vram_free_bytes or 0)} of its "
                "VRAM are taken as free beside the CUDA context, which takes some hundred MiB"
            )
        return tuple(notes)

    def _vram_bytes(self, budget: Budget) -> int:
        name = self.missing_device
        if budget.vram is None:
            raise PlanError(
                f"there is no {name} here to be asked for its memory; say how much VRAM it has, such as --vram 24GiB"
            )
        # A share such as 80% depends on the total; a size does not.
        if budget.vram_bytes(1 << 30) != budget.vram_bytes(1 << 40):
            raise PlanError(
                f"there is no {name} here to take {budget.vram} of; give its VRAM as a size, such as --vram 24GiB"
            )
        return budget.vram_bytes(1) or 0
