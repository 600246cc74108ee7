"""Starts a planned model: from its plan to the pipeline, the scheduler and the engine that run it."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from layerstream.pipeline.entrances import guard_entrances, with_methods
from layerstream.pipeline.modeling.assembly import Assembly, move_buffers
from layerstream.pipeline.modeling.binding import Binding
from layerstream.pipeline.modeling.edits import guard_conversions
from layerstream.pipeline.modeling.experts import stream_experts
from layerstream.pipeline.modeling.host_kv_cache import check_host_cache
from layerstream.pipeline.modeling.own_buffers import OwnBuffers
from layerstream.pipeline.modeling.tied_parameters import list_tied_once
from layerstream.pipeline.opening import Opening
from layerstream.pipeline.options import Options
from layerstream.pipeline.planning.plan import Plan, Workload
from layerstream.pipeline.resizing import resizing_method
from layerstream.pipeline.saving import saving_method
from layerstream.pipeline.scheduling.engine import Engine
from layerstream.pipeline.scheduling.hooks import hook_modules, modules_around
from layerstream.pipeline.scheduling.out_of_memory import OutOfMemory
from layerstream.pipeline.scheduling.request_cost import Estimator
from layerstream.pipeline.scheduling.request_memory import RequestMemory, request_memory_of
from layerstream.pipeline.scheduling.residency import Residency
from layerstream.pipeline.scheduling.scheduler import SweepScheduler
from layerstream.pipeline.streaming.resources import throttle_of
from layerstream.pipeline.verifying import ContentCheck
from layerstream.pipeline.weight_stream import WeightStream
from layerstream.stages.devices.lookup import open_device
from layerstream.stages.devices.protocol import Device
from layerstream.stages.errors import LayerstreamError
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.readers.interruptible import InterruptibleReads
from layerstream.stages.threads import finish_in_thread, weakly

__all__ = ["Runtime", "start_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What runs an open model."""

    opening: Opening
    stream: WeightStream
    scheduler: SweepScheduler
    engine: Engine
    out_of_memory: OutOfMemory
    content: ContentCheck | None
    """None if nothing is checked."""
    _reopening: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def adopt(self, plan: Plan, *, then: Callable[[], None]) -> None:
        """Switch to ``plan`` between two sweeps, or by reopening what has failed, and call ``then``."""

        async def adopt() -> None:
            self.stream.free_unpacked(plan)
            if _arenas(self.stream.pipeline.plan) != _arenas(plan):
                # There are no slots, or others than the new plan has.
                try:
                    await self.stream.reopen(plan)
                except LayerstreamError:
                    await self.stream.reopen()  # the old plan stays
                    self.scheduler.go_on_with(self.stream.pipeline)
                    raise
                self.scheduler.go_on_with(self.stream.pipeline)
            else:
                await self.stream.pipeline.adopt(plan)
            await self._put_into_effect(plan, then)

        if self.scheduler.failure is None:
            await self.scheduler.between(adopt)
        elif not await self.reopen(plan, then):
            await self.adopt(plan, then=then)  # somebody else has reopened it

    async def reopen(
        self, plan: Plan | None = None, then: Callable[[], None] = lambda: None
    ) -> bool:
        """See ``StreamedModel.reopen``. With ``plan``, continue with that one; False if there was nothing to reopen."""
        async with self._reopening:
            if self.content is not None:  # it may have failed alone
                self.content.start_again()
            if self.scheduler.failure is None:
                return False
            if plan is not None:
                self.stream.free_unpacked(plan)
            await self.stream.reopen(plan)
            if plan is not None:
                await self._put_into_effect(plan, then)
            if self.content is not None:  # which may have found something meanwhile
                self.content.start_again()
            self.scheduler.resume(self.stream.pipeline)
            return True

    async def _put_into_effect(self, plan: Plan, then: Callable[[], None]) -> None:
        await finish_in_thread(self.scheduler.device.trim)  # for other processes
        self.stream.keep_unpacked(plan)
        opening = self.opening
        memory = request_memory_of(plan, opening.module, opening.checkpoint.config)
        self.scheduler.residency.replace(plan, request_bytes=memory.shared_bytes)
        self.engine.resize(memory)
        then()


def _arenas(plan: Plan) -> tuple[int, int]:
    return plan.host_arena_bytes, plan.device_arena_bytes


# Longer than 60 lines: it makes each part of a running model, and names how they depend on one another.
async def start_model(
    opening: Opening, options: Options, resources: AsyncExitStack, guard: ReadGuard
) -> Runtime:
    """Start what ``opening`` has planned; ``resources`` stops it again.

    Raises:
        DeviceError: The device is not there, or does not have the memory.
        PlanError: The plan keeps KV caches on the host, and this model's cannot be.
    """
    plan, module, assembly = opening.plan, opening.module, opening.assembly
    kind = type(module)
    if plan.kv_cache_on_host:
        check_host_cache(module)
    device = await finish_in_thread(lambda: open_device(plan.device))
    reads = InterruptibleReads(guard)
    resources.push_async_callback(finish_in_thread, reads.close, without_thread=True)
    bindings = await _prepare(opening, device, resources, guard, reads)
    buffers = await finish_in_thread(lambda: OwnBuffers(module, assembly.written_buffers))
    resources.callback(buffers.close)
    memory = request_memory_of(plan, module, opening.checkpoint.config)
    residency = Residency(plan, request_bytes=memory.shared_bytes)
    always_bound = _always_bound(assembly, plan)
    throttle = throttle_of(plan)
    stream = WeightStream(
        residency.first,
        bindings,
        always_bound=always_bound,
        module=module,
        device=device,
        guard=guard,
        # Not of the assembly, which has the module: the scheduler must not, see ``StreamedModel._open``.
        unpacking=(lambda: None) if assembly.tiles is None else assembly.tiles.times,
        throttle=throttle,
    )
    resources.push_async_callback(stream.aclose)
    await stream.open()
    scheduler = SweepScheduler(
        stream.pipeline,
        bindings,
        device=device,
        always_bound=always_bound,
        residency=residency,
        reopened_within_seconds=options.reopened_within_seconds,
    )
    resources.push_async_callback(scheduler.aclose)
    engine = Engine(
        module,
        scheduler,
        own_buffers=buffers.of_clone,
        device=device,
        estimator=_estimator(opening, options, memory),
        memory=memory,
        threads=options.max_requests,
        guard=guard,
        cache_on_host=plan.kv_cache_on_host,
        adapters=assembly.adapters,
    )
    if plan.maps_in_place:
        for calls in (scheduler, engine.threads):
            guard.give_up_when_stopped(calls, in_page_faults=True)
    reads.wait = weakly(engine.passes.wait)  # tables have the reads: see ``Engine.count_edits``
    if stream.pipeline.experts is not None:
        stream_experts(
            module,
            plan.experts,
            stream.pipeline.experts,
            waiting=engine.passes.waiting,
            packed=assembly.packed_experts,
            tiles=assembly.tiles,
            fused_tokens=plan.fused_tokens,
        )
    engine.count_edits(assembly.edits)
    out_of_memory = OutOfMemory(device, lambda: scheduler.pipeline.plan)
    methods = {
        "resize_token_embeddings": resizing_method(kind, opening, engine),
        "save_pretrained": saving_method(kind, opening, engine),
    }
    module.__class__ = with_methods(type(module), methods)
    batches = assembly.batch_of_module(plan)
    if not plan.on_cpu:
        scheduler.out_of_memory = out_of_memory
        resources.push_async_callback(out_of_memory.aclose)
        for path in modules_around(batches):  # passes may begin at a part: those of an encoder do
            part = module.get_submodule(path)
            forward = out_of_memory.forward_of(
                type(part), engine.passes, scheduler, lambda: engine.requests.alone
            )
            part.__class__ = with_methods(type(part), {"forward": forward})
    hook_modules(module, batches, engine.passes)
    guard_conversions(module, engine.passes.undo_at_release)
    resources.push_async_callback(finish_in_thread, engine.threads.close, without_thread=True)
    # Again, and before the threads are closed: closing them waits for passes under way, which this fails.
    resources.push_async_callback(scheduler.aclose)
    resources.callback(engine.requests.close)
    content = None
    if opening.digests is not None:
        content = ContentCheck(
            opening.checkpoint,
            opening.digests,
            plan,
            guard=guard,
            throttle=throttle,
            on_failure=scheduler.stop,
        )
        resources.push_async_callback(content.aclose)
        content.start()
    return Runtime(
        opening=opening,
        stream=stream,
        scheduler=scheduler,
        engine=engine,
        out_of_memory=out_of_memory,
        content=content,
    )


def _estimator(opening: Opening, options: Options, memory: RequestMemory) -> Estimator:
    return Estimator(
        opening.module,
        opening.checkpoint.config,
        workload=options.choices.workload or Workload(),
        memory=memory,
        on_cpu=opening.plan.on_cpu,
        plan=opening.plan,
        measured=opening.assembly.memory,
        own_buffer_bytes=opening.assembly.own_buffer_bytes,
    )


async def _prepare(
    opening: Opening,
    device: Device,
    resources: AsyncExitStack,
    guard: ReadGuard,
    reads: InterruptibleReads,
) -> list[Binding]:
    """Put placeholders and tables into the module tree; returns what puts weights in their place."""
    assembly, plan = opening.assembly, opening.plan

    def prepare() -> list[Binding]:
        bindings = assembly.bind(plan, device.torch_device)
        if assembly.tiles is not None:
            resources.callback(assembly.tiles.close)
        if table := assembly.gather(opening.checkpoint, device.torch_device, guard, reads):
            resources.callback(table.close)
        assembly.adapters.load()
        move_buffers(opening.module, device.torch_device)
        guard_entrances(opening.module)
        list_tied_once(opening.module, assembly.traced.aliases)
        return bindings

    return await finish_in_thread(prepare)


def _always_bound(assembly: Assembly, plan: Plan) -> list[int]:
    """Indices of the layer batches that have to be bound all the time."""
    always_resident = {layer.name for layer in assembly.layers if layer.always_resident}
    return [batch.index for batch in plan.batches if always_resident.intersection(batch.layers)]
