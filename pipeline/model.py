"""A transformers model whose weights stream."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Self

import torch

from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.opening import open_model
from layerstream.pipeline.options import MAX_REQUESTS, BudgetLike, Options, as_budget, as_workload
from layerstream.pipeline.planning.kernels import Kernels
from layerstream.pipeline.planning.plan import Budget, Plan, ReaderKind, Workload
from layerstream.pipeline.planning.prediction import Objective
from layerstream.pipeline.planning.replan import hardware_without, learn
from layerstream.pipeline.pretrained import Pretrained
from layerstream.pipeline.scheduling.engine import Engine
from layerstream.pipeline.scheduling.request_memory import request_memory_of
from layerstream.pipeline.scheduling.stats import Stats
from layerstream.pipeline.scheduling.tokens import token_streamer
from layerstream.pipeline.starting import start_model
from layerstream.stages.errors import ClosedError
from layerstream.stages.telemetry.timings import Timings
from layerstream.stages.threads import Lifetime, finish_in_thread

__all__ = ["StreamedModel"]


class StreamedModel:
    """A transformers model that computes with weights as they stream past. Made by ``open``.

    Attributes:
        plan: How its weights stream.
        hardware: The machine that the plan was made for.
        module: The transformers model itself. Call it in a thread, not on the event loop.
    """

    plan: Plan
    hardware: Hardware
    module: Any

    def __init__(self, options: Options) -> None:
        self._options = options
        self._resources = AsyncExitStack()
        self._engine: Engine | None = None
        self._lifetime = Lifetime(
            "the model",
            again="call StreamedModel.open again",
            opens=self._open,
            closes=self._resources.aclose,
        )

    # Longer than 60 lines: it names, explains and hands on each option.
    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str],
        *,
        device: str = "auto",
        budget: BudgetLike = None,
        workload: Workload | Mapping[str, Any] | None = None,
        reader: ReaderKind | str | None = None,
        throttle_bytes_per_second: float | None = None,
        layer_batch_size: int | None = None,
        slots: int | None = None,
        kernels: Kernels | str = Kernels.EXACT,
        max_requests: int = MAX_REQUESTS,
        objective: Objective | str = Objective.LATENCY,
        hardware: Hardware | None = None,
        measure: bool = True,
        model_class: type[Any] | None = None,
        dtype: torch.dtype | str = "auto",
        revision: str | None = None,
        hanging_read_seconds: float = 30.0,
        base: str | os.PathLike[str] | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        **model_options: Any,
    ) -> Self:
        """The model in ``source``, for ``async with``, which opens it and raises the errors of ``__aenter__``.

        Args:
            source: A folder, a safetensors or GGUF file, or a hub id such as "org/name" or "org/name:file.gguf".
            device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
            budget: Memory that may be used, also as a dictionary, or on a CPU "8GiB"; by default what is free, less a tenth.
            workload: The expected requests (or a dictionary); memory for their KV cache and activations is reserved.
            reader: "direct", "mmap" or "throttled"; by default the planner's choice.
            throttle_bytes_per_second: Rate of the throttled reader.
            layer_batch_size: Blocks per layer batch, instead of the planner's choice.
            slots: Slots on the host and on the device each, instead of the planner's choice.
            kernels: For packed weights: "exact", "fused" (faster, other bits), or "auto": see ``planning.kernels.Kernels``.
            max_requests: Requests that share sweeps at the same time; more of them wait.
            objective: What the plan optimises: "latency" of a single, first request, or "throughput".
            hardware: The machine; by default it is probed.
            measure: False plans with cached rates and assumptions, which saves a second or two on a new machine.
            model_class: The transformers class; by default the config's ``architectures[0]``.
            dtype: As in ``from_pretrained``.
            revision: The revision of a hub id.
            hanging_read_seconds: A read that takes longer is logged, and among ``stats().hanging_reads``.
            base: The model, if ``source`` is an adapter alone; by default the one that its config names.
            adapters: Folders or hub ids of adapters, by the names by which requests choose them.
            model_options: Other arguments of ``from_pretrained``, such as ``variant`` or ``attn_implementation``.

        Raises:
            ModelError: An argument of ``from_pretrained`` cannot be honoured; it is named, with the reason.
        """
        options = Options(
            budget=budget,
            workload=as_workload(workload),
            reader=reader,
            throttle_bytes_per_second=throttle_bytes_per_second,
            layer_batch_size=layer_batch_size,
            slots=slots,
            kernels=kernels,
            max_requests=max_requests,
            objective=objective,
            hardware=hardware,
            measure=measure,
            model_class=model_class,
            hanging_read_seconds=hanging_read_seconds,
            pretrained=Pretrained.of(
                source,
                {**model_options, "base": base, "adapters": adapters, "revision": revision},
                device=device,
                dtype=dtype,
            ),
        )
        return cls(options)

    # -- opening and closing ---------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Open the model.

        Raises:
            CheckpointError: Files are missing or corrupt.
            ModelError: The model cannot be built, or the checkpoint does not match it.
            PlanError: The budget is too small.
            DeviceError: The device is not there.
            ClosedError: The model was opened before, or is closed meanwhile.
        """
        await self._lifetime.open()
        return self

    async def _open(self) -> None:
        self._opening = opening = await open_model(self._options, self._resources)
        self.plan, self.hardware, self.module = opening.plan, opening.hardware, opening.module
        self._budget = opening.budget
        running = await start_model(opening, self._options, self._resources)
        self._pipeline, self._scheduler = running.pipeline, running.scheduler
        self._engine = running.engine

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Fail the requests under way, or end the opening, and free everything. May be called again, and by several tasks."""
        await self._lifetime.close()

    async def drain(self) -> None:
        """Refuse new requests, and wait for all others to end, so that ``aclose`` fails none."""
        await self._open_engine().requests.drain()

    def abandon_pass(self) -> None:
        """End the pass of the calling thread if an interrupt has left it unfinished. For the drop-in."""
        if self._engine is not None and (runner := self._engine.passes.current()) is not None:
            runner.abandon()

    async def forward(self, *inputs: Any, **named: Any) -> Any:
        """One forward pass, without gradients; takes and returns what the model's own ``forward`` does.

        Tensors among the inputs are moved to the device where computation runs. If the waiting task is
        cancelled, the pass is unwound at its next layer batch. ``adapter`` is as in ``generate``.

        Raises:
            AdmissionError, ClosedError, ModelError: As for ``generate``.
        """
        return await self._open_engine().forward(inputs, named)

    async def generate(self, *inputs: Any, **named: Any) -> Any:
        """Generate with any strategy; takes and returns what the model's own ``generate`` does.

        Requests share sweeps. Each reserves memory for its KV cache and activations, and waits, first come, first
        served, until that is free; what the caller keeps of the result is not counted. ``generator``, a
        ``torch.Generator``, is what this request samples from; all share torch's default one. Inputs are moved, and
        a cancelled generation is unwound, as in ``forward``.
        ``adapter`` names the adapter of this request (None: the base model), instead of the one in the model's folder.

        Raises:
            AdmissionError: It needs more memory than there is for requests.
            ClosedError: The model is not open, or is being closed.
            ModelError: There is no adapter of that name.
        """
        return await self._open_engine().generate(inputs, named)

    def check(self, *inputs: Any, **named: Any) -> int:
        """Bytes that such a ``generate`` would reserve; raises what it would before it begins. May be called in any thread."""
        return self._open_engine().check(inputs, named)

    async def stream(
        self, *inputs: Any, on_begin: Callable[[], None] | None = None, **named: Any
    ) -> AsyncIterator[int]:
        """Generate one sequence, and yield the id of each new token as soon as it is made.

        Closing the generator, or cancelling the task that waits for it, ends the generation. A slow consumer does
        not slow generation down: ids are queued for it, at most ``max_new_tokens`` of them. ``on_begin`` is called when
        it has its memory and begins.

        Raises:
            AdmissionError, ClosedError: As for ``generate``.
        """
        tokens: asyncio.Queue[int | None] = asyncio.Queue()
        streamer = token_streamer(asyncio.get_running_loop(), tokens, on_begin)
        generating = asyncio.create_task(self.generate(*inputs, **named, streamer=streamer))
        generating.add_done_callback(lambda _: tokens.put_nowait(None))
        try:
            while (token := await tokens.get()) is not None:
                yield token
            await generating
        finally:
            generating.cancel()
            await asyncio.wait([generating])
            # Mark an error as retrieved: a caller that leaves early does not use it.
            generating.cancelled() or generating.exception()

    async def replan(self, *, budget: BudgetLike = None) -> Plan:
        """Make a new plan with the rates measured so far, and switch to it between two sweeps.

        Layer batches, slots and reader stay, and with them what was read ahead and all KV caches. Which layers are
        resident may change; with a smaller budget the memory of some is freed. Running requests continue, and keep
        what they have reserved until they end, even if the new budget is smaller. Waiting requests that need more than
        there is now are refused.

        Args:
            budget: The new budget; by default that of the last plan.

        Raises:
            PlanError: No plan fits that budget; the old one stays.
            DeviceError: There is not enough memory; the old plan stays, and loads its residents again.
            ClosedError: The model is not open.
        """
        engine = self._open_engine()
        hardware = learn(self.hardware, self.plan, self._pipeline.timings())
        now = await Hardware.probe(self._opening.checkpoint, device=self.plan.device, measure=False)
        hardware = hardware_without(self.plan, hardware, now=now, as_budgeted=budget is None)
        # The plan's is in bytes: what is not touched yet seems free.
        new = as_budget(budget, on_cpu=self.plan.device_memory is None) or self.plan.budget
        plan = await finish_in_thread(lambda: self.plan_with(hardware, budget=new))

        async def adopt() -> None:
            await self._pipeline.adopt(plan)
            await finish_in_thread(self._scheduler.device.trim)  # for other processes
            memory = request_memory_of(plan, self.module, self._opening.checkpoint.config)
            self._scheduler.residency.replace(
                plan, request_bytes=memory.shared_with_residents_bytes
            )
            engine.resize(memory)
            self.plan, self.hardware = plan, hardware
            self._budget = new

        await self._scheduler.between(adopt)
        return plan

    def plan_with(self, hardware: Hardware, *, budget: Budget | None = None) -> Plan:
        """The running plan as it would be on ``hardware``, with other residents and predictions.

        Args:
            hardware: A machine, with as much free memory as it would have without this model.
            budget: The budget; by default that of the running plan.

        Raises:
            PlanError: No plan fits that budget.
        """
        self._open_engine()
        return self._opening.make_plan(hardware, budget=budget or self._budget, running=self.plan)

    def timings(self) -> Timings:
        """What the stages have done since the model was opened."""
        self._open_engine()
        return self._pipeline.timings()

    def stats(self) -> Stats:
        """The current counters and gauges of requests, sweeps and stages."""
        return self._open_engine().requests.stats(self._pipeline.timings())

    def in_request(self) -> bool:
        """Whether the calling thread runs a request, whose memory is reserved."""
        return self._engine is not None and self._engine.passes.in_request()

    def call_here(
        self, method: str, call: Callable[[Any], Any], inputs: Sequence[Any], named: Any
    ) -> Any:
        """Call what ``call`` returns for a clone of the module tree, in the calling thread. For the drop-in."""
        return self._open_engine().call_here(method, call, inputs, named)

    def _open_engine(self) -> Engine:
        if self._engine is None or self._lifetime.closed:
            raise ClosedError("the model is not open; use it inside `async with`")
        return self._engine
