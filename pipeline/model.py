"""A transformers model whose weights stream."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from layerstream.pipeline.assembly import Assembly, move_buffers
from layerstream.pipeline.binding import Binding, put_buffers
from layerstream.pipeline.engine import Engine
from layerstream.pipeline.estimator import Estimator
from layerstream.pipeline.hardware import Hardware
from layerstream.pipeline.host_cache import check_host_cache
from layerstream.pipeline.opening import Options, open_model
from layerstream.pipeline.phases import Phases
from layerstream.pipeline.pipeline import Pipeline
from layerstream.pipeline.plan import Budget, Plan, ReaderKind, Workload
from layerstream.pipeline.prediction import Objective
from layerstream.pipeline.replanning import hardware_without
from layerstream.pipeline.room import room_of
from layerstream.pipeline.stats import Stats
from layerstream.pipeline.sweeps import Sweeps
from layerstream.pipeline.tokens import token_streamer
from layerstream.stages.devices import Device, open_device
from layerstream.stages.errors import ClosedError
from layerstream.stages.threads import Once, finish_in_thread
from layerstream.stages.timings import Timings

__all__ = ["StreamedModel"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A sweep costs the same for one request and for twenty. What bounds them is memory; a place costs a thread, and a
# clone of the module tree while it is taken, which is a megabyte or two.
_REQUESTS = 16


class StreamedModel:
    """A transformers model that computes with weights as they stream past. Made by ``open``.

    Attributes:
        plan: how its weights stream.
        hardware: what the plan was made for.
        module: the transformers model itself. Call it in a thread, not on the event loop.
    """

    plan: Plan
    hardware: Hardware
    module: Any

    def __init__(self, source: str | os.PathLike[str], options: Options) -> None:
        self._source = source
        self._options = options
        self._resources = AsyncExitStack()
        self._engine: Engine | None = None
        self._closed = False
        self._closing = Once()

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str],
        *,
        device: str = "auto",
        budget: Budget | None = None,
        workload: Workload | None = None,
        reader: ReaderKind | str | None = None,
        throttle_bytes_per_second: float | None = None,
        layer_batch_size: int | None = None,
        slots: int | None = None,
        max_requests: int = _REQUESTS,
        objective: Objective | str = Objective.LATENCY,
        hardware: Hardware | None = None,
        measure: bool = True,
        model_class: type[Any] | None = None,
        dtype: torch.dtype | str = "auto",
        revision: str | None = None,
        **model_options: Any,
    ) -> Self:
        """The model in ``source``, for ``async with``; nothing happens before that.

        Args:
            source: a folder, a safetensors file, or a hub id such as "org/name".
            device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
            budget: memory that may be used; by default what is free, less a tenth.
            workload: what will be asked for; its KV cache and activations are reserved.
            reader: "direct", "mmap" or "throttled"; by default the planner's choice.
            throttle_bytes_per_second: rate of the throttled reader.
            layer_batch_size: blocks per layer batch, instead of the planner's choice.
            slots: on either side, instead of the planner's choice.
            objective: what the plan is the fastest at: "latency" of one request that comes first, or "throughput".
            hardware: the machine, if it is known; by default it is probed.
            measure: False plans with what is known of this machine from before, and assumptions: opening takes
                a second or two less where a machine is new.
            max_requests: requests that share sweeps at the same time; more wait their turn.
            model_class: the transformers class; by default the config's ``architectures[0]``.
            dtype: as in ``from_pretrained``.
            revision: of a hub id.
            model_options: what else ``from_pretrained`` takes, such as ``attn_implementation``.

        Entering raises:
            CheckpointError: files are missing or corrupt.
            ModelError: the model cannot be built, or the checkpoint is not its own.
            PlanError: the budget is too small.
            DeviceError: the device is not there.
        """
        options = Options(
            device=device,
            budget=budget,
            workload=workload or Workload(),
            reader=reader,
            throttle_bytes_per_second=throttle_bytes_per_second,
            layer_batch_size=layer_batch_size,
            slots=slots,
            max_requests=max_requests,
            objective=objective,
            hardware=hardware,
            measure=measure,
            model_class=model_class,
            dtype=dtype,
            revision=revision,
            model_options=model_options,
        )
        return cls(source, options)

    # -- life ------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._engine is not None or self._closed:
            raise ClosedError("a model is opened once; call StreamedModel.open again")
        try:
            await self._open()
        except BaseException:
            await self._resources.aclose()
            raise
        return self

    async def _open(self) -> None:
        self._opening = opening = await open_model(self._source, self._options, self._resources)
        self.plan, self.hardware = opening.plan, opening.hardware
        self._budget = self._options.budget
        layout, checkpoint = opening.layout, opening.checkpoint
        self.module = opening.module
        if self.plan.kv_cache_on_host:
            check_host_cache(self.module)
        device = await finish_in_thread(lambda: open_device(self.plan.device))
        bindings = await finish_in_thread(lambda: layout.bind(self.plan, device.torch_device))
        for table in layout.gather(checkpoint, device.torch_device):
            self._resources.callback(table.close)
        move_buffers(self.module, device.torch_device)
        room = room_of(self.plan, self.module, checkpoint.config)
        phases = Phases(self.plan, room_bytes=room.beside_layers_bytes)
        pipeline = await self._resources.enter_async_context(Pipeline(phases.first, device=device))
        kept = await self._keep(pipeline, layout, bindings, device)
        self._pipeline = pipeline
        self._sweeps = sweeps = Sweeps(
            pipeline,
            bindings,
            device=device,
            kept=kept,
            phases=phases,
        )
        self._resources.push_async_callback(sweeps.aclose)
        self._engine = engine = Engine(
            self.module,
            sweeps,
            device=device,
            estimator=Estimator(
                self.module,
                checkpoint.config,
                workload=self._options.workload,
                room=room,
                on_cpu=self.plan.device_memory is None,
                reserved=self.plan,
            ),
            room=room,
            places=self._options.max_requests,
            cache_on_host=self.plan.kv_cache_on_host,
        )
        layout.hook(engine.riders, self.plan)
        self._resources.push_async_callback(finish_in_thread, engine.threads.close)
        # Passes under way are failed before their threads are waited for.
        self._resources.push_async_callback(sweeps.aclose)
        self._resources.callback(engine.requests.close)

    async def _keep(
        self, pipeline: Pipeline, layout: Assembly, bindings: Sequence[Binding], device: Device
    ) -> list[int]:
        """Load what has to be there all the time, and bind it for good."""
        pinned = {layer.name for layer in layout.layers if layer.pinned}
        kept = [batch.index for batch in self.plan.batches if pinned.intersection(batch.layers)]
        if kept:
            async for batch in pipeline.sweep(kept):
                binding = bindings[batch.index]
                # A module that outlives its model must not keep all residents' memory.
                self._resources.callback(self._let_go, binding)
                put_buffers(self.module, binding.bind(batch.tensors))
            # Passes may compute on other streams, which know nothing of this thread's.
            await finish_in_thread(device.record().synchronize)
        return kept

    def _let_go(self, binding: Binding) -> None:
        binding.unbind()
        put_buffers(self.module, binding.absent_buffers())

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Fail the requests under way and give everything back. May be called again, and by several."""
        self._closed = True
        await self._closing.run(self._resources.aclose)

    async def drain(self) -> None:
        """Refuse new requests, and wait for those that run or wait. ``aclose`` then has nobody to fail."""
        await self._open_engine().requests.drain()

    def abandon_pass(self) -> None:
        """End the pass of the calling thread that an interrupt has left open: nobody else would."""
        rider = self._engine.riders.current() if self._engine is not None else None
        if rider is not None:
            rider.abandon()

    # -- use -------------------------------------------------------------------------------------

    async def forward(self, *inputs: Any, **named: Any) -> Any:
        """One forward pass, without gradients; takes and returns what the model's own ``forward`` does.

        Tensors among the inputs are moved to the device where computation runs. If the waiting task is
        cancelled, the pass is unwound at its next layer batch.

        Raises:
            AdmissionError: it needs more memory than there is for requests.
            ClosedError: the model is not open, or is being closed.
        """
        return await self._open_engine().forward(inputs, named)

    async def generate(self, *inputs: Any, **named: Any) -> Any:
        """Generate, by whatever strategy; takes and returns what the model's own ``generate`` does.

        Requests share sweeps. Each reserves the KV cache and the activations that it may come to need, and
        waits, first come, first served, until there is room for them; what the caller keeps of the result
        is his own. ``generator``, a ``torch.Generator``, is what this request samples from: torch's default source
        is shared by all. Tensors among the inputs are moved to the device where computation runs. If the waiting
        task is cancelled, generation is unwound at its next layer batch.

        Raises:
            AdmissionError: it needs more memory than there is for requests.
            ClosedError: the model is not open, or is being closed.
        """
        return await self._open_engine().generate(inputs, named)

    async def stream(self, *inputs: Any, **named: Any) -> AsyncIterator[int]:
        """Generate one sequence, and yield each new token's id when it is there.

        Closing the generator, or cancelling the task that waits for it, ends the generation. Nobody waits for
        a slow consumer: ids queue up for it, and there are no more of them than were asked for.

        Raises:
            AdmissionError, ClosedError: as for ``generate``.
        """
        tokens: asyncio.Queue[int | None] = asyncio.Queue()
        streamer = token_streamer(asyncio.get_running_loop(), tokens)
        generating = asyncio.create_task(self.generate(*inputs, **named, streamer=streamer))
        generating.add_done_callback(lambda _: tokens.put_nowait(None))
        try:
            while (token := await tokens.get()) is not None:
                yield token
            await generating
        finally:
            generating.cancel()
            await asyncio.wait([generating])
            # Taken note of: who has left before the end does not want to hear of it.
            generating.cancelled() or generating.exception()

    async def replan(self, *, budget: Budget | None = None) -> Plan:
        """Plan anew with the rates that the sweeps so far have shown, and go on by the new plan.

        Layer batches, slots and reader stay, so that what was read ahead and all KV caches do too; which
        layers are resident may change, and with a smaller budget their memory is given back. Requests
        that run go on: the change is made between two sweeps. They keep what they have reserved until they
        end, also of a larger budget than the new one; those that wait for more than there is now are refused.

        Args:
            budget: what may be used from now on; by default what the last plan had.

        Raises:
            PlanError: no plan fits that budget; the old one stays.
            DeviceError: the memory is not there; the old plan stays, and gets its residents back.
            ClosedError: the model is not open.
        """
        engine = self._open_engine()
        hardware = self.hardware.learn(self.plan, self._pipeline.timings())
        now = await Hardware.probe(self._opening.checkpoint, device=self.plan.device, measure=False)
        hardware = hardware_without(self.plan, hardware, now=now, as_budgeted=budget is None)
        plan = await finish_in_thread(lambda: self.plan_with(hardware, budget=budget))

        async def adopt() -> None:
            await self._pipeline.adopt(plan)
            await finish_in_thread(self._sweeps.device.trim)  # what went is everybody's
            room = room_of(plan, self.module, self._opening.checkpoint.config)
            self._sweeps.phases.replace(plan, room_bytes=room.beside_layers_bytes)
            engine.resize(room)
            self.plan, self.hardware = plan, hardware
            self._budget = budget or self._budget

        await self._sweeps.between(adopt)
        return plan

    def plan_with(self, hardware: Hardware, *, budget: Budget | None = None) -> Plan:
        """What the running plan would be on ``hardware``: other residents and predictions, all else alike.

        Args:
            hardware: with as much free as it would have without this model.
            budget: what may be used; by default what the running plan has.

        Raises:
            PlanError: no plan fits that budget.
        """
        self._open_engine()
        return self._opening.make_plan(hardware, budget=budget or self._budget, running=self.plan)

    def timings(self) -> Timings:
        """What the stages have done since the model was opened."""
        self._open_engine()
        return self._pipeline.timings()

    def stats(self) -> Stats:
        """Counters and gauges of requests, sweeps and stages, as they are now."""
        return self._open_engine().requests.stats(self._pipeline.timings())

    def in_request(self) -> bool:
        """Whether the calling thread is that of a request, whose memory is reserved."""
        return self._engine is not None and self._engine.riders.in_request()

    def generate_here(
        self, call: Callable[[Any], Callable[..., T]], inputs: Sequence[Any], named: Any
    ) -> T:
        """Generate in the calling thread, which is not that of the event loop. For the drop-in.

        Args:
            call: makes of a clone of the module tree what to call with the inputs.
            inputs: positional arguments of that.
            named: keyword arguments of that.
        """
        assert self._engine is not None  # noqa: S101
        result: T = self._engine.generate_here(call, inputs, named)
        return result

    def _open_engine(self) -> Engine:
        if self._engine is None or self._closed:
            raise ClosedError("the model is not open; use it inside `async with`")
        return self._engine
