"""Switches a running model to another plan: at the user's word, or because its device is out of memory."""

from dataclasses import replace

from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.options import BudgetLike, as_budget
from layerstream.pipeline.planning.plan import Budget, Plan
from layerstream.pipeline.planning.replan import hardware_without, learn
from layerstream.pipeline.starting import Runtime
from layerstream.stages.errors import DeviceError, PlanError
from layerstream.stages.text import format_bytes
from layerstream.stages.threads import finish_in_thread

__all__ = ["Replanning"]

# What has to be freed is not known if a stage was out of memory: this share of the budget.
_LEAST_SHARE_FREED = 1 / 8


class Replanning:
    """The plan of a running model, and the change to another one.

    Args:
        runtime: What runs the model.

    Attributes:
        plan: The one in effect.
        hardware: The machine that it was made for.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._opening = opening = runtime.opening
        self.plan, self.hardware = opening.plan, opening.hardware
        self._budget = opening.choices.budget

    def plan_with(self, hardware: Hardware, *, budget: Budget | None = None) -> Plan:
        """See ``StreamedModel.plan_with``."""
        return self._opening.replan(hardware, budget or self._budget, running=self.plan)

    async def replan(self, budget: BudgetLike) -> Plan:
        """See ``StreamedModel.replan``."""
        # The plan's is in bytes: what is not touched yet seems free.
        new = as_budget(budget, on_cpu=self.plan.on_cpu) or self.plan.budget
        hardware = await self._learnt(as_budgeted=budget is None)
        plan = await finish_in_thread(lambda: self.plan_with(hardware, budget=new))
        await self._switch(plan, hardware, new)
        return plan

    async def make_room(self, nbytes: int) -> str:
        """Switch to a plan whose layers take so many bytes less of the device's memory, or as few as possible.

        Returns:
            What that changes.

        Raises:
            DeviceError: No plan takes less.
            PlanError: No plan fits.
        """
        before, memory = self.plan, self.plan.device_memory
        if memory is None:
            raise DeviceError("computation runs in host memory")
        hardware = await self._learnt(as_budgeted=True)
        least = max(nbytes, int(memory.budget_bytes * _LEAST_SHARE_FREED))
        budget = replace(before.budget, vram=max(memory.used_bytes - least, 1))

        def smaller() -> tuple[Plan, Budget]:
            try:
                return self.plan_with(hardware, budget=budget), budget
            except PlanError as error:
                if error.needed_bytes is None or error.needed_bytes >= memory.used_bytes:
                    raise
                least = replace(budget, vram=error.needed_bytes)
                return self.plan_with(hardware, budget=least), least

        plan, budget = await finish_in_thread(smaller)
        assert plan.device_memory is not None  # noqa: S101 - it is one for the same device
        taken = plan.device_memory.taken_bytes
        if taken >= memory.taken_bytes:
            raise DeviceError(f"layers cannot take less than {format_bytes(taken)}")
        await self._switch(plan, hardware, budget)
        return (
            f"its layers take {format_bytes(taken)} of it from now on, instead of {format_bytes(memory.taken_bytes)}; each "
            f"sweep reads {format_bytes(plan.disk_bytes_per_sweep)}, instead of {format_bytes(before.disk_bytes_per_sweep)}"
        )

    async def _learnt(self, *, as_budgeted: bool) -> Hardware:
        """The machine with the rates measured so far, and with the memory that it has without this model."""
        stream = self._runtime.stream
        timings, usage = stream.pipeline.timings(), stream.expert_usage()
        # There are tens of thousands of spans.
        hardware = await finish_in_thread(lambda: learn(self.hardware, self.plan, timings, usage))
        now = await Hardware.probe(self._opening.checkpoint, device=self.plan.device, measure=False)
        return hardware_without(self.plan, hardware, now=now, as_budgeted=as_budgeted)

    async def _switch(self, plan: Plan, hardware: Hardware, budget: Budget) -> None:
        def adopted() -> None:
            self.plan, self.hardware, self._budget = plan, hardware, budget

        await self._runtime.adopt(plan, then=adopted)
