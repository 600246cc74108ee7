"""The arguments of ``StreamedModel.open``: taken in the forms that users know, where their meaning is plain."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar

import torch

from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.planning.choices import PlanChoices, reader_kind
from layerstream.pipeline.planning.kernels import Kernels, kernels_of
from layerstream.pipeline.planning.plan import Budget, ReaderKind, Workload
from layerstream.pipeline.planning.prediction import Objective
from layerstream.pipeline.pretrained import Pretrained
from layerstream.stages.devices.lookup import open_device
from layerstream.stages.errors import PlanError

__all__ = ["MAX_REQUESTS", "BudgetLike", "Options", "as_budget", "as_workload"]

T = TypeVar("T", Budget, Workload)

# Memory bounds them anyway. Each that runs costs a thread and a clone of the module tree: a megabyte or two.
MAX_REQUESTS = 16

BudgetLike = Budget | int | str | Mapping[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of ``StreamedModel.open``."""

    budget: BudgetLike
    choices: PlanChoices
    """Without the budget."""
    max_requests: int
    hardware: Hardware | None
    measure: bool
    model_class: type[Any] | None
    hanging_read_seconds: float
    reopened_within_seconds: float
    verify: bool | str | os.PathLike[str]
    pretrained: Pretrained
    """What ``from_pretrained``'s arguments say."""

    # What each of them is stands in ``StreamedModel.open``, which also has their defaults.
    @classmethod
    def of(
        cls,
        *,
        workload: Workload | Mapping[str, Any] | None,
        objective: Objective | str,
        reader: ReaderKind | str | None,
        throttle_bytes_per_second: float | None,
        layer_batch_size: int | None,
        slots: int | None,
        kernels: Kernels | str,
        budget: BudgetLike,
        max_requests: int,
        hardware: Hardware | None,
        measure: bool,
        model_class: type[Any] | None,
        hanging_read_seconds: float,
        reopened_within_seconds: float,
        verify: bool | str | os.PathLike[str],
        source: str | os.PathLike[str],
        device: str,
        dtype: torch.dtype | str,
        **model_options: Any,
    ) -> Self:
        """Understand the arguments of ``StreamedModel.open``.

        Raises:
            ModelError: An argument of ``from_pretrained`` cannot be honoured.
            PlanError: The workload is none.
        """
        return cls(
            budget=budget,
            choices=PlanChoices(
                workload=as_workload(workload),
                objective=Objective.of(objective),
                reader=reader_kind(reader, throttle_bytes_per_second),
                throttle_bytes_per_second=throttle_bytes_per_second,
                layer_batch_size=layer_batch_size,
                slots=slots,
                kernels=kernels_of(kernels),
            ),
            max_requests=max_requests,
            hardware=hardware,
            measure=measure,
            model_class=model_class,
            hanging_read_seconds=hanging_read_seconds,
            reopened_within_seconds=reopened_within_seconds,
            verify=verify,
            pretrained=Pretrained.of(source, model_options, device=device, dtype=dtype),
        )

    def on_cpu(self) -> bool:
        """Whether computation will run on the host's own processor. Opens the device."""
        name = self.pretrained.device if self.hardware is None else self.hardware.device
        return open_device(name).reads_host_images


def as_budget(value: BudgetLike, *, on_cpu: bool) -> Budget | None:
    """A budget given as one, as a dictionary of its sides, or as a size, which is the host's where that computes.

    Raises:
        PlanError: It is none of these, or one size for a machine with two memories.
    """
    if value is None or isinstance(value, Budget):
        return value
    if isinstance(value, Mapping):
        return _from_mapping(Budget, value, "budget")
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise PlanError(
            f"budget is {value!r:.80}; give Budget(host=..., vram=...), a size such as '8GiB', or a dictionary"
        )
    if not on_cpu:
        raise PlanError(
            f"budget={value!r} does not say of which memory; give Budget(vram=...), Budget(host=...) or both"
        )
    return Budget(host=value)


def as_workload(value: Workload | Mapping[str, Any] | None) -> Workload:
    """A workload given as one, or as a dictionary of its fields.

    Raises:
        PlanError: It is neither.
    """
    if value is None or isinstance(value, Workload):
        return value or Workload()
    if isinstance(value, Mapping):
        return _from_mapping(Workload, value, "workload")
    raise PlanError(f"workload is {value!r:.80}; give Workload(prompt_tokens=...) or a dictionary")


def _from_mapping(kind: type[T], value: Mapping[str, Any], argument: str) -> T:
    known = [each.name for each in fields(kind)]
    if unknown := [name for name in value if name not in known]:
        raise PlanError(f"{argument} has no {unknown[0]!r}; it takes {', '.join(known)}")
    return kind(**value)
