"""Starts a planned model: from its plan to the pipeline, the sweeps and the engine that run it."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from layerstream.pipeline.modeling.assembly import Assembly, move_buffers
from layerstream.pipeline.modeling.binding import Binding, put_buffers
from layerstream.pipeline.modeling.host_kv_cache import check_host_cache
from layerstream.pipeline.opening import Opening, Options
from layerstream.pipeline.planning.plan import Plan
from layerstream.pipeline.scheduling.engine import Engine
from layerstream.pipeline.scheduling.request_cost import Estimator
from layerstream.pipeline.scheduling.request_memory import room_of
from layerstream.pipeline.scheduling.residency import Phases
from layerstream.pipeline.scheduling.scheduler import Sweeps
from layerstream.pipeline.streaming.pipeline import Pipeline
from layerstream.stages.devices.lookup import open_device
from layerstream.stages.devices.protocol import Device
from layerstream.stages.threads import finish_in_thread

__all__ = ["Runtime", "start_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What runs an open model."""

    pipeline: Pipeline
    sweeps: Sweeps
    engine: Engine


async def start_model(opening: Opening, options: Options, resources: AsyncExitStack) -> Runtime:
    """Start what ``opening`` has planned; ``resources`` stops it again.

    Raises:
        DeviceError: the device is not there, or does not have the memory.
        PlanError: the plan keeps KV caches on the host, and this model's cannot be.
    """
    plan, module, layout = opening.plan, opening.module, opening.layout
    if plan.kv_cache_on_host:
        check_host_cache(module)
    device = await finish_in_thread(lambda: open_device(plan.device))
    bindings = await finish_in_thread(lambda: layout.bind(plan, device.torch_device))
    for table in layout.gather(opening.checkpoint, device.torch_device):
        resources.callback(table.close)
    move_buffers(module, device.torch_device)
    config = opening.checkpoint.config
    room = room_of(plan, module, config)
    phases = Phases(plan, room_bytes=room.beside_layers_bytes)
    pipeline = await resources.enter_async_context(Pipeline(phases.first, device=device))
    kept = _pinned(layout, plan)
    await _load(kept, pipeline, bindings, module=module, device=device, resources=resources)
    sweeps = Sweeps(pipeline, bindings, device=device, kept=kept, phases=phases)
    resources.push_async_callback(sweeps.aclose)
    estimator = Estimator(
        module,
        config,
        workload=options.workload,
        room=room,
        on_cpu=plan.device_memory is None,
        reserved=plan,
    )
    engine = Engine(
        module,
        sweeps,
        device=device,
        estimator=estimator,
        room=room,
        places=options.max_requests,
        cache_on_host=plan.kv_cache_on_host,
    )
    layout.hook(engine.riders, plan)
    resources.push_async_callback(finish_in_thread, engine.threads.close)
    # Again, and before the threads are closed: closing them waits for passes under way, which this fails.
    resources.push_async_callback(sweeps.aclose)
    resources.callback(engine.requests.close)
    return Runtime(pipeline=pipeline, sweeps=sweeps, engine=engine)


def _pinned(layout: Assembly, plan: Plan) -> list[int]:
    """Indices of the layer batches that have to be bound all the time."""
    pinned = {layer.name for layer in layout.layers if layer.pinned}
    return [batch.index for batch in plan.batches if pinned.intersection(batch.layers)]


async def _load(
    kept: Sequence[int],
    pipeline: Pipeline,
    bindings: Sequence[Binding],
    *,
    module: Any,
    device: Device,
    resources: AsyncExitStack,
) -> None:
    """Load the layer batches ``kept``, and bind them until ``resources`` is closed."""
    if not kept:
        return

    def unbind(binding: Binding) -> None:
        binding.unbind()
        put_buffers(module, binding.absent_buffers())

    async for batch in pipeline.sweep(kept):
        binding = bindings[batch.index]
        # A module that outlives its model must not keep the memory of all residents.
        resources.callback(unbind, binding)
        put_buffers(module, binding.bind(batch.tensors))
    # Passes may compute on other streams, which do not wait for this thread's.
    await finish_in_thread(device.record().synchronize)
