"""The pipeline of a model, and what it brings once and for all; reopened in place after it has failed."""

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import Any

from layerstream.pipeline.modeling.binding import Binding, put_buffers
from layerstream.pipeline.planning.plan import Plan
from layerstream.pipeline.streaming.pipeline import Pipeline
from layerstream.stages.compute import Batch
from layerstream.stages.devices.protocol import Device
from layerstream.stages.errors import ClosedError
from layerstream.stages.experts.usage import ExpertUsage
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.readers.throttled import Throttle
from layerstream.stages.telemetry.spans import StageTimings
from layerstream.stages.threads import finish_in_thread

__all__ = ["WeightStream"]


class WeightStream:
    """The pipeline of a model, with the layer batches that are bound all the time.

    Args:
        plan: What the first pipeline streams; later ones go on with the plan of the one before.
        bindings: What each layer batch puts into the module tree.
        always_bound: The indices of batches that stay bound as long as this is open.
        module: The module tree.
        device: Where computation runs.
        guard: Watches over the reads.
        unpacking: How much was unpacked so far, for the pipeline's timings.
        throttle: What throttled reads wait for.

    Attributes:
        pipeline: The current one.
    """

    pipeline: Pipeline

    def __init__(
        self,
        plan: Plan,
        bindings: Sequence[Binding],
        *,
        always_bound: Sequence[int],
        module: Any,
        device: Device,
        guard: ReadGuard,
        unpacking: Callable[[], StageTimings | None] = lambda: None,
        throttle: Throttle | None = None,
    ) -> None:
        self._bindings = bindings
        self._always_bound = tuple(always_bound)
        self._module = module
        self._device = device
        self._guard = guard
        self._unpacking = unpacking
        self._throttle = throttle
        self._bound: list[Binding] = []
        self._changing = asyncio.Lock()
        self._closed = False
        self.pipeline = self._pipeline(plan)

    def _pipeline(self, plan: Plan) -> Pipeline:
        return Pipeline(
            plan,
            device=self._device,
            guard=self._guard,
            unpacking=self._unpacking,
            throttle=self._throttle,
        )

    async def open(self) -> None:
        """Open the pipeline, and bind what stays bound. Whatever comes of it, it has to be closed."""
        await self.pipeline.open()
        if self._always_bound:
            async for batch in self.pipeline.sweep(self._always_bound):
                # A module that outlives its model must not keep the memory of all residents.
                self._bound.append(binding := self._bindings[batch.index])
                # Binding may compute: casts, transposes.
                await finish_in_thread(functools.partial(self._bind, binding, batch))
        for experts in self.pipeline.plan.experts:
            access = vars(self._module.get_submodule(experts.module)).get("layerstream_experts")
            if access is not None:  # reopened: shared with the clones of requests under way
                access.store = self.pipeline.experts

    def _bind(self, binding: Binding, batch: Batch) -> None:
        put_buffers(self._module, binding.bind(batch.tensors))
        # Passes may compute on other streams, which do not wait for this thread's.
        self._device.record().synchronize()

    def expert_usage(self) -> dict[str, ExpertUsage]:
        """How tokens have chosen experts so far, by the paths of modules."""
        return {} if self.pipeline.experts is None else self.pipeline.experts.usage()

    def free_unpacked(self, plan: Plan) -> None:
        """Free what was kept unpacked and ``plan`` does not keep, before its residents need the memory. Between two sweeps."""
        for binding, batch in zip(self._bindings, plan.batches, strict=True):
            if not batch.unpacked_bytes:
                binding.kept.free()

    def keep_unpacked(self, plan: Plan) -> None:
        """Keep unpacked from now on what ``plan``, which is in effect, keeps so."""
        for binding, batch in zip(self._bindings, plan.batches, strict=True):
            binding.kept.keep(is_kept=batch.unpacked_bytes > 0)

    async def reopen(self, plan: Plan | None = None) -> None:
        """Close the pipeline, and open another one, for ``plan`` or its own. Nothing may be using it; may be called again if it fails.

        Raises:
            ClosedError: It was closed for good.
        """
        async with self._changing:
            if not self._closed:
                await self._close_pipeline()
                before = self.pipeline.plan
                self.pipeline = self._pipeline(plan or before)
                try:
                    await self.open()
                except BaseException:
                    self.pipeline.plan = before  # for the next one
                    raise
            if self._closed:
                raise ClosedError("the model was closed while it was being reopened")

    async def aclose(self) -> None:
        """Unbind what is bound, and close the pipeline, for good."""
        self._closed = True
        async with self._changing:
            await self._close_pipeline()
            for binding in self._bindings:
                binding.kept.keep(is_kept=False)

    async def _close_pipeline(self) -> None:
        while self._bound:
            binding = self._bound.pop()
            binding.unbind()
            put_buffers(self._module, binding.absent_buffers())
        await self.pipeline.aclose()
