"""A transformers model whose weights stream."""

import functools
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import Any, Self

import torch

from layerstream.pipeline.machine.hardware import Hardware
from layerstream.pipeline.opening import open_model
from layerstream.pipeline.options import MAX_REQUESTS, BudgetLike, Options
from layerstream.pipeline.planning.kernels import Kernels
from layerstream.pipeline.planning.plan import Budget, Plan, ReaderKind, Workload
from layerstream.pipeline.planning.prediction import Objective
from layerstream.pipeline.replanning import Replanning
from layerstream.pipeline.scheduling.engine import Engine
from layerstream.pipeline.scheduling.scheduler import SweepScheduler
from layerstream.pipeline.scheduling.stats import Stats
from layerstream.pipeline.scheduling.tokens import stream_tokens
from layerstream.pipeline.starting import Runtime, start_model
from layerstream.stages.errors import ClosedError
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.telemetry.timings import Timings
from layerstream.stages.threads import Lifetime, weakly

__all__ = ["StreamedModel"]


class StreamedModel:
    """A transformers model that computes with weights as they stream past. Made by ``open``."""

    module: Any
    """The transformers model itself. Call it in a thread, not on the event loop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._resources = AsyncExitStack()
        self._guard = ReadGuard(options.hanging_read_seconds, options.reopened_within_seconds)
        self._running: Runtime | None = None
        self._lifetime = Lifetime(
            "the model",
            again="call StreamedModel.open again",
            opens=self._open,
            closes=self._close,
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
        reopened_within_seconds: float = 0.0,
        verify: bool | str | os.PathLike[str] = False,
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
            hanging_read_seconds: A read that takes longer is logged, and among ``stats().hanging_reads``; opening fails
                with it, and closing does not wait for it.
            reopened_within_seconds: After an I/O error, requests wait so long for ``reopen``, or for their own reads to succeed.
            verify: Check the weight files against the digests in this file while the model runs (``verified``); True: against those
                that ``layerstream verify --record``, or the hub, has recorded.
            base: The model, if ``source`` is an adapter alone; by default the one that its config names.
            adapters: Folders or hub ids of adapters, by the names by which requests choose them.
            model_options: Others of ``from_pretrained``; and ``initialize_missing=True``: make weights new that no file holds.

        Raises:
            ModelError: An argument of ``from_pretrained`` cannot be honoured; it is named, with the reason.
        """
        options = Options.of(
            workload=workload,
            objective=objective,
            reader=reader,
            throttle_bytes_per_second=throttle_bytes_per_second,
            layer_batch_size=layer_batch_size,
            slots=slots,
            kernels=kernels,
            budget=budget,
            max_requests=max_requests,
            hardware=hardware,
            measure=measure,
            model_class=model_class,
            hanging_read_seconds=hanging_read_seconds,
            reopened_within_seconds=reopened_within_seconds,
            verify=verify,
            source=source,
            device=device,
            dtype=dtype,
            **{**model_options, "base": base, "adapters": adapters, "revision": revision},
        )
        return cls(options)

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

    async def _open(self) -> SweepScheduler:
        self._resources.callback(self._guard.close)
        parts = self._options, self._resources, self._guard
        opening = await open_model(*parts)
        self.module = opening.module
        self._running = running = await start_model(opening, *parts)
        self._replanning = Replanning(running)
        running.out_of_memory.make_room = weakly(self._replanning.make_room)
        return running.scheduler  # which does not refer to the module

    async def _close(self) -> None:
        self._guard.stop()
        await self._resources.aclose()

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Fail the requests under way, or end the opening, and free all but what a read that hangs has. May be called again."""
        await self._lifetime.close()

    async def drain(self) -> None:
        """Refuse new requests, and wait for all others to end, so that ``aclose`` fails none."""
        await self.engine.requests.drain()

    async def forward(self, *inputs: Any, **named: Any) -> Any:
        """One forward pass, without gradients; takes and returns what the model's own ``forward`` does.

        Tensors among the inputs are moved to the device where computation runs. If the waiting task is
        cancelled, the pass is unwound at its next layer batch. ``adapter`` is as in ``generate``.

        Raises:
            AdmissionError, ClosedError, ModelError: As for ``generate``.
        """
        return await self.engine.forward(inputs, named)

    async def generate(self, *inputs: Any, **named: Any) -> Any:
        """Generate with any strategy; takes and returns what the model's own ``generate`` does.

        Requests share sweeps. Each reserves memory for its KV cache and activations, and waits, first come, first served,
        until that is free; what the caller keeps of the result is not counted. ``generator``, a ``torch.Generator``, is what
        this request samples from; all share torch's default one. Inputs are moved, and a cancelled generation is unwound, as in ``forward``.
        ``adapter`` names the adapter of this request (None: the base model), instead of the one in the model's folder.

        Raises:
            AdmissionError: It needs more memory than there is for requests.
            ClosedError: The model is not open, or is being closed.
            ModelError: There is no adapter of that name.
        """
        return await self.engine.generate(inputs, named)

    def check(self, *inputs: Any, **named: Any) -> int:
        """Bytes that such a ``generate`` reserves (n fit in n times that); raises what it would first. For any thread."""
        return self.engine.check(inputs, named)

    async def stream(
        self, *inputs: Any, on_begin: Callable[[], None] | None = None, **named: Any
    ) -> AsyncIterator[int]:
        """Generate one sequence, and yield the id of each new token as soon as it is made.

        Closing the generator, or cancelling the task that waits for it, ends the generation. A slow consumer slows
        nothing down: ids are queued for it. ``on_begin`` is called when the request has its memory and begins.

        Raises:
            AdmissionError, ClosedError: As for ``generate``.
        """
        generate = functools.partial(self.generate, *inputs, **named)
        async with aclosing(stream_tokens(generate, on_begin)) as tokens:
            async for token in tokens:
                yield token

    async def replan(self, *, budget: BudgetLike = None) -> Plan:
        """Make a new plan with the rates measured so far, and switch to it between two sweeps.

        Layer batches and reader stay, and with them all KV caches; so do slots and what was read ahead, but where nothing fits beside
        them, there are other slots, and ``timings()`` begin anew. Which layers are resident may change. Running requests continue, and keep
        what they have reserved until they end, even if the new budget is smaller. Waiting requests that need more than
        there is now are refused.

        Args:
            budget: The new budget; by default that of the last plan.

        Raises:
            PlanError: No plan fits that budget; the old one stays.
            DeviceError: There is not enough memory; the old plan stays, and loads its residents again.
            ClosedError: The model is not open.
        """
        self._runtime()
        return await self._replanning.replan(budget)

    @property
    def plan(self) -> Plan:
        """How its weights stream."""
        return self._replanning.plan

    @property
    def hardware(self) -> Hardware:
        """The machine that the plan was made for."""
        return self._replanning.hardware

    @property
    def failure(self) -> BaseException | None:
        """The error that has ended streaming, until the model is reopened; None while it works."""
        return self._runtime().scheduler.failure

    async def reopen(self) -> None:
        """Open the files again after streaming has failed, and go on with the same plan. May be called again if that fails.

        Requests under way wait for it, if ``reopened_within_seconds`` allow, and go on where they were, with equal results: a pass
        that waits for a layer batch holds no weights, and its KV cache lies elsewhere. Embedding rows and experts, which a pass
        reads for itself, need no reopening. ``timings()`` begin anew. What a hung read may still write into stays taken until it returns.

        Raises:
            CheckpointError: The files cannot be opened, or have changed: then open another model.
            DeviceError: The device does not work, or does not have the memory.
            ClosedError: The model is not open.
        """
        await self._runtime().reopen()

    async def verified(self) -> None:
        """Wait until all files are checked (``verify``). A CheckpointError names file, tensor, offset; then all requests fail with it."""
        if (content := self._runtime().content) is not None:
            await content.finished()

    def plan_with(self, hardware: Hardware, *, budget: Budget | None = None) -> Plan:
        """The running plan as it would be on ``hardware``, with other residents and predictions.

        Args:
            hardware: A machine, with as much free memory as it would have without this model.
            budget: The budget; by default that of the running plan.

        Raises:
            PlanError: No plan fits that budget.
        """
        self._runtime()
        return self._replanning.plan_with(hardware, budget=budget)

    def timings(self) -> Timings:
        """What the stages have done since the model was opened."""
        return self._runtime().stream.pipeline.timings()

    def stats(self) -> Stats:
        """The current counters and gauges of requests, sweeps and stages."""
        return self.engine.requests.stats(self.timings())

    @property
    def engine(self) -> Engine:
        """What runs requests. For the drop-in."""
        return self._runtime().engine

    def _runtime(self) -> Runtime:
        if self._running is None or self._lifetime.closed:
            raise ClosedError("the model is not open; use it inside `async with`")
        return self._running
