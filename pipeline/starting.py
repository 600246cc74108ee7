"""Starts a planned model: from its plan to the pipeline, the scheduler and the engine that run it."""

import functools
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from layerstream.pipeline.modeling.assembly import Assembly, move_buffers
from layerstream.pipeline.modeling.binding import Binding, put_buffers
from layerstream.pipeline.modeling.edits import guard_conversions
from layerstream.pipeline.modeling.experts import stream_experts
from layerstream.pipeline.modeling.host_kv_cache import check_host_cache
from layerstream.pipeline.modeling.tied_parameters import list_tied_once
from layerstream.pipeline.opening import Opening
from layerstream.pipeline.options import Options
from layerstream.pipeline.planning.plan import Plan
from layerstream.pipeline.scheduling.engine import Engine
from layerstream.pipeline.scheduling.hooks import hook_modules
from layerstream.pipeline.scheduling.request_cost import Estimator
from layerstream.pipeline.scheduling.request_memory import request_memory_of
from layerstream.pipeline.scheduling.residency import Residency
from layerstream.pipeline.scheduling.scheduler import SweepScheduler
from layerstream.pipeline.streaming.pipeline import Pipeline
from layerstream.stages.compute import Batch
from layerstream.stages.devices.lookup import open_device
from layerstream.stages.devices.protocol import Device
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.threads import finish_in_thread

__all__ = ["Runtime", "start_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What runs an open model."""

    pipeline: Pipeline
    scheduler: SweepScheduler
    engine: Engine


async def start_model(opening: Opening, options: Options, resources: AsyncExitStack) -> Runtime:
    """Start what ``opening`` has planned; ``resources`` stops it again.

    Raises:
        DeviceError: The device is not there, or does not have the memory.
        PlanError: The plan keeps KV caches on the host, and this model's cannot be.
    """
    plan, module, assembly = opening.plan, opening.module, opening.assembly
    config = opening.checkpoint.config
    if plan.kv_cache_on_host:
        check_host_cache(module)
    device = await finish_in_thread(lambda: open_device(plan.device))
    resources.callback((guard := ReadGuard(options.hanging_read_seconds)).close)
    bindings = await _prepare(opening, device, resources, guard)
    memory = request_memory_of(plan, module, config)
    residency = Residency(plan, request_bytes=memory.shared_with_residents_bytes)
    pipeline = await resources.enter_async_context(
        Pipeline(residency.first, device=device, guard=guard)
    )
    always_bound = _always_bound(assembly, plan)
    await _load(always_bound, pipeline, bindings, module=module, device=device, resources=resources)
    scheduler = SweepScheduler(
        pipeline, bindings, device=device, always_bound=always_bound, residency=residency
    )
    resources.push_async_callback(scheduler.aclose)
    estimator = Estimator(
        module,
        config,
        workload=options.workload,
        memory=memory,
        on_cpu=plan.device_memory is None,
        plan=plan,
    )
    engine = Engine(
        module,
        scheduler,
        device=device,
        estimator=estimator,
        memory=memory,
        threads=options.max_requests,
        guard=guard,
        cache_on_host=plan.kv_cache_on_host,
        adapters=assembly.adapters,
    )
    if (experts := pipeline.experts) is not None:
        stream_experts(
            module,
            plan.experts,
            experts,
            waiting=engine.passes.waiting,
            packed=assembly.packed_experts,
            tiles=assembly.tiles,
        )
    engine.count_edits(assembly.edits)
    hook_modules(module, assembly.batch_of_module(plan), engine.passes)
    resources.push_async_callback(finish_in_thread, engine.threads.close, without_thread=True)
    # Again, and before the threads are closed: closing them waits for passes under way, which this fails.
    resources.push_async_callback(scheduler.aclose)
    resources.callback(engine.requests.close)
    return Runtime(pipeline=pipeline, scheduler=scheduler, engine=engine)


async def _prepare(
    opening: Opening, device: Device, resources: AsyncExitStack, guard: ReadGuard
) -> list[Binding]:
    """Put placeholders and tables into the module tree; returns what puts weights in their place."""
    assembly, plan = opening.assembly, opening.plan

    def prepare() -> list[Binding]:
        bindings = assembly.bind(plan, device.torch_device)
        if assembly.tiles is not None:
            resources.callback(assembly.tiles.close)
        for table in assembly.gather(opening.checkpoint, device.torch_device, guard):
            resources.callback(table.close)
        assembly.adapters.load()
        move_buffers(opening.module, device.torch_device)
        guard_conversions(opening.module)
        list_tied_once(opening.module, assembly.traced.aliases)
        return bindings

    return await finish_in_thread(prepare)


def _always_bound(assembly: Assembly, plan: Plan) -> list[int]:
    """Indices of the layer batches that have to be bound all the time."""
    always_resident = {layer.name for layer in assembly.layers if layer.always_resident}
    return [batch.index for batch in plan.batches if always_resident.intersection(batch.layers)]


async def _load(
    indices: Sequence[int],
    pipeline: Pipeline,
    bindings: Sequence[Binding],
    *,
    module: Any,
    device: Device,
    resources: AsyncExitStack,
) -> None:
    """Load the layer batches of these indices, and bind them until ``resources`` is closed."""
    if not indices:
        return

    def unbind(binding: Binding) -> None:
        binding.unbind()
        put_buffers(module, binding.absent_buffers())

    def bind(binding: Binding, batch: Batch) -> None:
        put_buffers(module, binding.bind(batch.tensors))
        # Passes may compute on other streams, which do not wait for this thread's.
        device.record().synchronize()

    async for batch in pipeline.sweep(indices):
        binding = bindings[batch.index]
        # A module that outlives its model must not keep the memory of all residents.
        resources.callback(unbind, binding)
        # Binding may compute: casts, transposes.
        await finish_in_thread(functools.partial(bind, binding, batch))
