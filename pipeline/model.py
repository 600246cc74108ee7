"""A transformers model whose weights stream."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from layerstream.pipeline.assembly import Assembly, move_buffers
from layerstream.pipeline.binding import Binding, put_buffers
from layerstream.pipeline.checkpoint import Checkpoint
from layerstream.pipeline.clones import clone_modules
from layerstream.pipeline.conversion import (
    TracedModel,
    load_config,
    resolve_model_class,
    trace_model,
)
from layerstream.pipeline.hardware import Hardware
from layerstream.pipeline.hub import resolve_model_path_async
from layerstream.pipeline.pipeline import Pipeline
from layerstream.pipeline.plan import Budget, Plan, ReaderKind, Workload
from layerstream.pipeline.planner import make_plan
from layerstream.pipeline.rider import Rider
from layerstream.pipeline.sweeps import Sweeps
from layerstream.stages.devices import Device, open_device
from layerstream.stages.errors import ClosedError, ModelError
from layerstream.stages.threads import Once, Threads, finish_in_thread, settled
from layerstream.stages.timings import Timings
from layerstream.stages.usage import anonymous_bytes

__all__ = ["StreamedModel"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Requests take turns: sharing sweeps between them is not built yet.
_RIDERS = 1


class StreamedModel:
    """A transformers model that computes with weights as they stream past. Made by ``open``.

    Attributes:
        plan: how its weights stream.
        module: the transformers model itself. Call it in a thread, not on the event loop.
    """

    plan: Plan
    module: Any

    def __init__(self, source: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
        self._source = source
        self._options = dict(options)
        self._resources = AsyncExitStack()
        self._sweeps: Sweeps | None = None
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
        return cls(
            source,
            {
                "device": device,
                "budget": budget,
                "workload": workload or Workload(),
                "reader": reader,
                "throttle_bytes_per_second": throttle_bytes_per_second,
                "layer_batch_size": layer_batch_size,
                "model_class": model_class,
                "dtype": dtype,
                "revision": revision,
                "model_options": model_options,
            },
        )

    # -- life ------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._sweeps is not None or self._closed:
            raise ClosedError("a model is opened once; call StreamedModel.open again")
        try:
            await self._open()
        except BaseException:
            await self._resources.aclose()
            raise
        return self

    async def _open(self) -> None:
        options = self._options
        before = anonymous_bytes()
        path = await resolve_model_path_async(self._source, revision=options["revision"])
        checkpoint = await Checkpoint.open_async(path)
        traced, layout = await finish_in_thread(lambda: _trace(checkpoint, options))
        hardware = await Hardware.probe(checkpoint, device=options["device"])
        # transformers' code for the model, and the module tree: 100 MB where they are new here.
        held = max(0, (anonymous_bytes() or 0) - (before or 0))
        self.plan = await finish_in_thread(
            lambda: make_plan(
                checkpoint,
                hardware,
                budget=options["budget"],
                workload=options["workload"],
                layers=layout.planned(checkpoint),
                memory=layout.memory,
                reader=options["reader"],
                throttle_bytes_per_second=options["throttle_bytes_per_second"],
                layer_batch_size=options["layer_batch_size"],
                held_bytes=held,
            )
        )
        if traced.unused:
            logger.info(
                "%s: the model does not use %d tensors: %s",
                checkpoint.path,
                len(traced.unused),
                ", ".join(traced.unused[:8]),
            )
        self.module = traced.module
        device = open_device(self.plan.device)
        self._device = device.torch_device
        self._computes = device
        bindings = await finish_in_thread(lambda: layout.bind(self.plan, self._device))
        for table in layout.gather(checkpoint, self._device):
            self._resources.callback(table.close)
        move_buffers(self.module, self._device)
        pipeline = await self._resources.enter_async_context(Pipeline(self.plan, device=device))
        kept = await self._keep(pipeline, layout, bindings, device)
        self._pipeline = pipeline
        self._sweeps = Sweeps(pipeline, self.module, bindings, device=device, kept=kept)
        self._resources.push_async_callback(self._sweeps.aclose)
        layout.hook(self._sweeps, self.plan)
        self._threads = Threads("rider", _RIDERS)
        self._resources.push_async_callback(finish_in_thread, self._threads.close)
        # Passes under way are failed before their threads are waited for.
        self._resources.push_async_callback(self._sweeps.aclose)

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

    def abandon_pass(self) -> None:
        """End the pass of the calling thread that an interrupt has left open: nobody else would."""
        rider = self._sweeps.current() if self._sweeps is not None else None
        if rider is not None:
            rider.abandon()

    # -- use -------------------------------------------------------------------------------------

    async def forward(self, *inputs: Any, **named: Any) -> Any:
        """One forward pass, without gradients; takes and returns what the model's own ``forward`` does.

        Tensors among the inputs are moved to the device where computation runs. If the waiting task is cancelled, the pass is unwound at its next layer batch.
        """
        return await self._ride(lambda model: model, inputs, named)

    async def generate(self, *inputs: Any, **named: Any) -> Any:
        """Generate, by whatever strategy; takes and returns what the model's own ``generate`` does.

        Tensors among the inputs are moved to the device where computation runs. If the waiting task is cancelled, generation is unwound at its next layer batch.
        """
        return await self._ride(lambda model: model.generate, inputs, named)

    async def stream(self, *inputs: Any, **named: Any) -> AsyncIterator[int]:
        """Generate one sequence, and yield each new token's id when it is there.

        Closing the generator, or cancelling the task that waits for it, ends the generation.
        """
        tokens: asyncio.Queue[int | None] = asyncio.Queue()
        streamer = _token_streamer(asyncio.get_running_loop(), tokens)
        generating = asyncio.create_task(self.generate(*inputs, **named, streamer=streamer))
        generating.add_done_callback(lambda _: tokens.put_nowait(None))
        try:
            while (token := await tokens.get()) is not None:
                yield token
            await generating
        finally:
            generating.cancel()
            await asyncio.wait([generating])

    def timings(self) -> Timings:
        """What the stages have done since the model was opened."""
        return self._open_pipeline().timings()

    async def _ride(
        self,
        function: Callable[[Any], Callable[..., T]],
        inputs: Sequence[Any],
        named: Mapping[str, Any],
    ) -> T:
        """Call what ``function`` makes of a clone of the module tree with the inputs, in a rider's thread."""
        self._open_pipeline()
        sweeps = self._sweeps
        assert sweeps is not None  # noqa: S101
        rider = Rider(sweeps)
        # The caller's own stream, so that inputs are read after, and results before, what else he puts on it.
        stream = self._computes.stream()

        def work() -> T:
            rider.root = clone = clone_modules(self.module)
            with self._computes.computing_on(stream), sweeps.riding(rider):
                here = [_moved(each, self._device) for each in inputs]
                named_here = {name: _moved(each, self._device) for name, each in named.items()}
                return function(clone)(*here, **named_here)

        future = self._threads.submit(work)
        waiting = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            if self._closed and waiting.cancelled():
                raise ClosedError("the model was closed before this request's turn came") from None
            if not future.cancel():
                sweeps.cancel(rider)
                await settled([future])
                # Taken note of: it is no news to whoever has cancelled it.
                waiting.cancelled() or waiting.exception()
            raise
        finally:
            del future, waiting  # an error that they hold would hold this frame, and so itself

    def _open_pipeline(self) -> Pipeline:
        if self._sweeps is None or self._closed:
            raise ClosedError("the model is not open; use it inside `async with`")
        return self._pipeline


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _token_streamer(loop: asyncio.AbstractEventLoop, tokens: asyncio.Queue[int | None]) -> Any:
    from transformers.generation.streamers import BaseStreamer

    class TokenStreamer(BaseStreamer):
        """Hands each new token to the event loop; the first call brings the prompt."""

        prompt_seen = False

        def put(self, value: torch.Tensor) -> None:
            if not self.prompt_seen:
                self.prompt_seen = True
                if value.dim() > 1 and value.shape[0] > 1:
                    raise ModelError(
                        f"stream() yields the tokens of one sequence, but {value.shape[0]} were given; use generate()"
                    )
                return
            for token in value.flatten().tolist():
                loop.call_soon_threadsafe(tokens.put_nowait, token)

        def end(self) -> None:
            """Nothing to do: the generation's task tells when it is done."""

    return TokenStreamer()


def _trace(checkpoint: Checkpoint, options: Mapping[str, Any]) -> tuple[TracedModel, Assembly]:
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    config = load_config(folder)
    traced = trace_model(
        checkpoint,
        config=config,
        model_class=resolve_model_class(config, options["model_class"]),
        dtype=options["dtype"],
        **options["model_options"],
    )
    return traced, Assembly(traced, checkpoint, options["workload"])
