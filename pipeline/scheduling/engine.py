"""Runs requests: each waits for its memory, then computes in a thread, with its own clone of the model."""

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from layerstream.pipeline.modeling.adapters import Adapters
from layerstream.pipeline.modeling.call_state import call_with_state
from layerstream.pipeline.modeling.clone import OwnBuffersOf, clone_modules
from layerstream.pipeline.modeling.edits import Edits
from layerstream.pipeline.modeling.host_kv_cache import with_host_cache
from layerstream.pipeline.scheduling.admission import Reservation
from layerstream.pipeline.scheduling.caller_context import CallerContext
from layerstream.pipeline.scheduling.passes import PassRunner
from layerstream.pipeline.scheduling.request import CLOSED, MethodOf, Request, Requests
from layerstream.pipeline.scheduling.request_cost import Estimator
from layerstream.pipeline.scheduling.request_memory import RequestMemory
from layerstream.pipeline.scheduling.sampling_rng import SamplingGenerator
from layerstream.pipeline.scheduling.scheduler import SweepScheduler
from layerstream.pipeline.scheduling.stats import Outcome, outcome_of
from layerstream.pipeline.scheduling.thread_passes import ThreadPasses
from layerstream.pipeline.scheduling.tokens import with_token_counter
from layerstream.stages.devices.protocol import Device
from layerstream.stages.errors import AdmissionError, ClosedError
from layerstream.stages.process.libraries import LibraryMemory
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.threads import Threads, wait_all, weakly

__all__ = ["Engine"]


class Engine:
    """Runs the requests of one model.

    Requests of tasks on the event loop run in worker threads. Code that calls the drop-in does so in a thread of its
    own, where its requests then run: they take memory, but no worker thread.

    Args:
        module: The transformers model; its hooks get the pass runner of their thread from ``passes``.
        scheduler: Makes the sweeps that requests take part in.
        own_buffers: Makes the buffers of a clone of the module.
        device: Where computation runs.
        estimator: Estimates the memory of requests.
        memory: The memory for all requests together.
        threads: The number of worker threads.
        guard: Watches over the reads, for the statistics.
        cache_on_host: Requests that bring no KV cache get one in host RAM.
        adapters: What requests may choose from.
    """

    def __init__(
        self,
        module: Any,
        scheduler: SweepScheduler,
        *,
        own_buffers: OwnBuffersOf,
        device: Device,
        estimator: Estimator,
        memory: RequestMemory,
        threads: int,
        guard: ReadGuard,
        cache_on_host: bool = False,
        adapters: Adapters | None = None,
    ) -> None:
        self._module = module
        self._own_buffers = own_buffers
        self._memory = memory
        self._edits: Edits | None = None
        self._cache_on_host = cache_on_host
        self._adapters = adapters or Adapters({})
        self._scheduler = scheduler
        self._device = device
        self._estimator = estimator
        self.requests = Requests(scheduler, memory=memory, threads=threads, guard=guard)
        self.passes = ThreadPasses(scheduler, module, begin_pass=self._begin_pass)
        self.threads = Threads("pass", threads)
        self._leftovers = LibraryMemory()

    # -- requests of tasks on the event loop -----------------------------------------------------

    async def forward(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """One forward pass of the model."""
        return await self._run("forward", lambda model: model, inputs, named)

    async def generate(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """One generation of the model."""
        return await self._run("generate", lambda model: model.generate, inputs, named)

    def check(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> int:
        """See ``StreamedModel.check``. With two memories, a request counts by the larger one of its shares of either."""
        self.requests.check_open()
        self._scheduler.check()
        named = self._adapters.without_choice(named)
        if self._cache_on_host:
            named = with_host_cache(self._module, "generate", inputs, named)
        needed = self._estimator.generation(inputs, named).memory
        return needed.share_of(self.requests.memory)

    async def _run(
        self, method: str, call: MethodOf, inputs: Sequence[Any], named: Mapping[str, Any]
    ) -> Any:
        context = CallerContext(self._device)
        request = self._request(method, call, inputs, named, threads=1)
        try:
            self.requests.enqueue(request, request.reservation)
            await asyncio.wrap_future(request.reservation)
            result = await self._run_admitted(request, context)
        except BaseException as error:
            self.requests.ended(request, outcome_of(error))
            raise
        self.requests.ended(request, "completed")
        return result

    async def _run_admitted(self, request: Request, context: CallerContext) -> Any:
        """Run an admitted request in a worker thread, to its end even if the waiting task is cancelled."""
        self.requests.started(request)

        def work() -> Any:
            with context.entered():
                return self._work(request)

        try:
            future = self.threads.submit(work)
        except RuntimeError as error:  # closed since it was admitted
            raise ClosedError(CLOSED) from error

        def stop(call: Future[Any]) -> None:
            if not call.cancel():  # it has begun
                self._scheduler.cancel(request.runner)

        try:
            await wait_all([future], on_cancel=stop)
            if future.cancelled():  # the threads were closed before one of them had begun it
                raise ClosedError(CLOSED)
            return future.result()
        finally:
            self._scheduler.request_ended(request.runner)
            del future  # an error that it holds would hold this frame, and so itself

    def _work(self, request: Request) -> Any:
        """Run ``request`` in the calling thread."""
        runner = request.runner
        runner.root = clone = clone_modules(self._module, self._own_buffers)
        try:
            with (
                self.passes.running(runner),
                SamplingGenerator(request.generator) as runner.sampling,
            ):
                device = self._device.torch_device
                inputs = [_on_device(each, device) for each in request.inputs]
                named = {name: _on_device(each, device) for name, each in request.named.items()}
                began = functools.partial(setattr, runner, "state")
                call = request.call(clone)
                return call_with_state(call, clone, inputs, named, on_begin=began)
        finally:
            self._scheduler.call_on_loop(self._scheduler.request_ended, runner)
            # Some arguments and the request refer to each other: without this they would live until garbage collection.
            del runner.root, clone
            runner.state = None
            request.inputs, request.named = (), {}
            self._leftovers.release()

    # -- requests of other threads ---------------------------------------------------------------

    def call_here(self, method: str, call: MethodOf, inputs: Sequence[Any], named: Any) -> Any:
        """Make a request in the calling thread: call what ``call`` returns for a clone of the model.

        Raises:
            ModelError: This is the thread of the event loop.
        """
        self.passes.refuse_on_loop()
        request = self._request(method, call, inputs, named, threads=0)
        try:
            self._admit_here(request)
            # This also makes the device current: not all kernels take it from their inputs.
            with self._device.computing_on(self._device.stream()):
                result = self._work(request)
        except BaseException as error:
            self._scheduler.call_on_loop(self.requests.ended, request, outcome_of(error))
            raise
        self._scheduler.call_on_loop(self.requests.ended, request, "completed")
        return result

    def _begin_pass(
        self, runner: PassRunner, entry: str, inputs: Sequence[Any], named: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Callable[[Outcome], None]]:
        """Make a request for a forward pass that belongs to none, and wait until it is admitted.

        Takes the pass runner of the calling thread, the path of the module that is called, and its inputs. Returns the
        keyword arguments to call it with, and what to call when the pass has ended.
        """
        self._adapters.refuse_choice(named)
        request = self._request(
            "forward",
            lambda model: model,
            inputs,
            named,
            threads=0,
            runner=runner,
            whole_model=not entry,
        )
        with_cache = request.named
        request.inputs, request.named = (), {}  # the call is made by the caller
        request.end_level = logging.DEBUG  # evaluation harnesses make thousands of them

        def end(outcome: Outcome) -> None:
            try:
                self._leftovers.release()
            finally:  # also after an interrupt: ``drain`` waits for it
                self._scheduler.call_on_loop(self.requests.ended, request, outcome)

        try:
            self._admit_here(request)
        except BaseException as error:
            end(outcome_of(error))
            raise
        return with_cache, end

    def _admit_here(self, request: Request) -> None:
        """Wait in the calling thread until ``request`` may begin. An interrupt may come before or after that."""
        self._scheduler.call_on_loop(self.requests.enqueue, request, request.reservation)
        request.reservation.result()
        self._scheduler.call_on_loop(self.requests.started, request)

    def resize(self, memory: RequestMemory) -> None:
        """Change the memory for all requests together; those that run keep what they have."""
        self._memory = memory
        if self._edits is not None:
            self._edits.available_bytes = memory.shared_bytes
            memory = memory.without(self._edits.nbytes)
            self._scheduler.residency.resize(memory.shared_bytes)
        self._estimator.resize(memory)
        self.requests.resize(memory)

    def count_edits(self, edits: Edits) -> None:
        """Let weights that the user replaces or adds take memory of requests."""
        self._edits = edits
        edits.know(self._module)
        edits.available_bytes = self._memory.shared_bytes
        # The event loop has the edits, and would keep the model of a user who has dropped it.
        edits.on_change = weakly(self._edited)

    def _edited(self) -> None:
        self._scheduler.call_on_loop(lambda: self.resize(self._memory))

    # -- a new request ---------------------------------------------------------------------------

    def _request(
        self,
        method: str,
        call: MethodOf,
        inputs: Sequence[Any],
        named: Mapping[str, Any],
        *,
        threads: int,
        runner: PassRunner | None = None,
        whole_model: bool = True,
    ) -> Request:
        self.requests.check_open()
        if self._edits is not None:
            self._edits.count_added(self._module)
        named = dict(named)
        call = self._adapters.chosen(call, named)
        generator = named.pop("generator", None) if method == "generate" else None
        if self._cache_on_host and whole_model:
            named = with_host_cache(self._module, method, inputs, named)
        estimate = self._estimator.generation if method == "generate" else self._estimator.forward
        try:
            cost = estimate(inputs, named)
        except AdmissionError:
            self._scheduler.call_on_loop(self.requests.refused)
            raise
        runner = runner or PassRunner(self._scheduler)
        runner.cost = cost
        request = Request(
            number=self.requests.number(),
            method=method,
            cost=cost,
            call=call,
            inputs=inputs,
            named=named,
            generator=generator,
            runner=runner,
            passes_before=runner.passes,
            reservation=Reservation(cost.memory, threads=threads),
        )
        if cost.chunk_tokens is not None:
            request.named["prefill_chunk_size"] = cost.chunk_tokens
        if method == "generate":
            request.named = with_token_counter(self._module, inputs, request.named, request)
        return request


def _on_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
