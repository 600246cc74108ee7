"""Runs requests: each waits for its memory and a place, then computes in a thread, with its own clone of the model."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from layerstream.pipeline.modeling.clone import clone_modules
from layerstream.pipeline.modeling.host_kv_cache import with_host_cache
from layerstream.pipeline.scheduling.admission import Reservation
from layerstream.pipeline.scheduling.passes import Rider
from layerstream.pipeline.scheduling.request import CLOSED, Call, Request, Requests
from layerstream.pipeline.scheduling.request_cost import Estimator
from layerstream.pipeline.scheduling.request_memory import Room
from layerstream.pipeline.scheduling.sampling_rng import drawing_from
from layerstream.pipeline.scheduling.scheduler import Sweeps
from layerstream.pipeline.scheduling.stats import Outcome
from layerstream.pipeline.scheduling.thread_passes import Riders
from layerstream.pipeline.scheduling.tokens import counted
from layerstream.stages.devices.protocol import Device
from layerstream.stages.errors import AdmissionError, ClosedError
from layerstream.stages.process.libraries import Leftovers
from layerstream.stages.threads import Threads, settled

__all__ = ["Engine"]


class Engine:
    """Runs the requests of one model.

    Requests of tasks on the event loop run in threads of ours, one for each place. Code that calls the drop-in
    does so in a thread of its own, where its requests then run: they take memory, but no place.

    Args:
        module: the transformers model; its hooks ask ``riders`` for the rider of their thread.
        sweeps: what requests ride.
        device: where computation runs.
        estimator: prices requests.
        room: memory for all requests together.
        places: how many requests of tasks run at once.
        cache_on_host: requests that bring no KV cache get one in host RAM.
    """

    def __init__(
        self,
        module: Any,
        sweeps: Sweeps,
        *,
        device: Device,
        estimator: Estimator,
        room: Room,
        places: int,
        cache_on_host: bool = False,
    ) -> None:
        self._module = module
        self._cache_on_host = cache_on_host
        self._sweeps = sweeps
        self._device = device
        self._estimator = estimator
        self.requests = Requests(sweeps, room_bytes=room.nbytes, places=places)
        self.riders = Riders(sweeps, module, begin_pass=self._begin_pass)
        self.threads = Threads("rider", places)
        self._leftovers = Leftovers()
        self._numbers = itertools.count(1)

    # -- requests of tasks on the event loop -----------------------------------------------------

    async def forward(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """One forward pass of the model."""
        return await self._run("forward", lambda model: model, inputs, named)

    async def generate(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """One generation of the model."""
        return await self._run("generate", lambda model: model.generate, inputs, named)

    async def _run(
        self,
        what: str,
        call: Call,
        inputs: Sequence[Any],
        named: Mapping[str, Any],
    ) -> Any:
        # The stream that is current now, so that computation is ordered with the caller's own work. When the
        # request is admitted, another one may be current on the event loop.
        stream = self._device.stream()
        request = self._request(what, call, inputs, named, places=1)
        try:
            self.requests.ask(request, request.reservation)
            await asyncio.wrap_future(request.reservation)
            result = await self._ride(request, stream)
        except BaseException as error:
            self.requests.ended(request, _outcome(error))
            raise
        self.requests.ended(request, "completed")
        return result

    async def _ride(self, request: Request, stream: Hashable) -> Any:
        """Run an admitted request in a rider's thread, to its end even if the waiting task is cancelled."""
        self.requests.started(request)

        def work() -> Any:
            with self._device.computing_on(stream):
                return self._work(request)

        try:
            future = self.threads.submit(work)
        except RuntimeError as error:  # closed since it was admitted
            raise ClosedError(CLOSED) from error
        waiting = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            if waiting.cancelled():
                raise ClosedError(CLOSED) from None
            if not future.cancel():
                self._sweeps.cancel(request.rider)
                await settled([future])
                # Mark an error as retrieved: the task that was cancelled does not want it.
                waiting.cancelled() or waiting.exception()
            raise
        finally:
            self._sweeps.ended(request.rider)
            del future, waiting  # an error that they hold would hold this frame, and so itself

    def _work(self, request: Request) -> Any:
        """Run ``request`` in the calling thread."""
        rider = request.rider
        rider.root = clone = clone_modules(self._module)
        try:
            with self.riders.riding(rider), drawing_from(request.generator):
                torch_device = self._device.torch_device
                here = [_moved(each, torch_device) for each in request.inputs]
                named = {name: _moved(each, torch_device) for name, each in request.named.items()}
                return request.call(clone)(*here, **named)
        finally:
            self._sweeps.tell(self._sweeps.ended, rider)
            # Some arguments refer to the request, and it to them: without this they would live until garbage collection.
            del rider.root, clone
            request.inputs, request.named = (), {}
            self._leftovers.release()

    # -- requests of other threads ---------------------------------------------------------------

    def generate_here(self, call: Call, inputs: Sequence[Any], named: Any) -> Any:
        """Generate in the calling thread.

        Args:
            call: returns what to call, given a clone of the model.
            inputs: positional arguments for that.
            named: keyword arguments for that.

        Raises:
            ModelError: this is the thread of the event loop.
        """
        self.riders.refuse_on_loop()
        request = self._request("generate", call, inputs, named, places=0)
        try:
            self._admit_here(request)
            # This also makes the device current: not all kernels take it from their inputs.
            with self._device.computing_on(self._device.stream()):
                result = self._work(request)
        except BaseException as error:
            self._sweeps.tell(self.requests.ended, request, _outcome(error))
            raise
        self._sweeps.tell(self.requests.ended, request, "completed")
        return result

    def _begin_pass(
        self, rider: Rider, entry: str, inputs: Sequence[Any], named: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Callable[[Outcome], None]]:
        """Make a request of a forward pass that belongs to none, and wait until it is admitted.

        Args:
            rider: of the calling thread.
            entry: path of the module that is called.
            inputs: its positional arguments.
            named: its keyword arguments.

        Returns:
            The keyword arguments to call it with, and what to call when the pass has ended.
        """
        request = self._request(
            "forward", lambda model: model, inputs, named, places=0, rider=rider, whole=not entry
        )
        given = request.named
        request.inputs, request.named = (), {}  # the call is made by the caller
        request.end_level = logging.DEBUG  # evaluation harnesses make thousands of them

        def end(outcome: Outcome) -> None:
            try:
                self._leftovers.release()
            finally:  # also after an interrupt: ``drain`` waits for it
                self._sweeps.tell(self.requests.ended, request, outcome)

        try:
            self._admit_here(request)
        except BaseException as error:
            end(_outcome(error))
            raise
        return given, end

    def _admit_here(self, request: Request) -> None:
        """Wait in the calling thread until ``request`` may begin. An interrupt may come before or after that."""
        self._sweeps.tell(self.requests.ask, request, request.reservation)
        request.reservation.result()
        self._sweeps.tell(self.requests.started, request)

    def resize(self, room: Room) -> None:
        """Change the memory for all requests together; those that run keep what they have."""
        self._estimator.resize(room)
        self.requests.resize(room.nbytes)

    # -- a new request ---------------------------------------------------------------------------

    def _request(
        self,
        what: str,
        call: Call,
        inputs: Sequence[Any],
        named: Mapping[str, Any],
        *,
        places: int,
        rider: Rider | None = None,
        whole: bool = True,  # of the model, not of a module in it
    ) -> Request:
        self.requests.check_open()
        named = dict(named)
        generator = named.pop("generator", None) if what == "generate" else None
        if self._cache_on_host and whole:
            named = with_host_cache(self._module, what, inputs, named)
        price = self._estimator.generation if what == "generate" else self._estimator.forward
        try:
            need = price(inputs, named)
        except AdmissionError:
            self._sweeps.tell(self.requests.refused)
            raise
        rider = rider or Rider(self._sweeps)
        rider.need = need
        request = Request(
            number=next(self._numbers),
            what=what,
            need=need,
            call=call,
            inputs=inputs,
            named=named,
            generator=generator,
            rider=rider,
            passes_before=rider.passes,
            reservation=Reservation(need.nbytes, places=places),
        )
        if need.chunk_tokens is not None:
            request.named["prefill_chunk_size"] = need.chunk_tokens
        if what == "generate":
            request.named = counted(self._module, inputs, request.named, request)
        return request


def _outcome(error: BaseException) -> Outcome:
    left = isinstance(error, (asyncio.CancelledError, KeyboardInterrupt))
    return "cancelled" if left else "failed"


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
