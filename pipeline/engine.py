"""Runs requests: each waits for its memory and a place, then rides sweeps in a thread, in a clone of the model."""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from layerstream.pipeline.admission import Admission, Reservation
from layerstream.pipeline.clones import clone_modules
from layerstream.pipeline.drawing import drawing_from
from layerstream.pipeline.host_cache import with_host_cache
from layerstream.pipeline.requests import Estimator, Need
from layerstream.pipeline.rider import Rider
from layerstream.pipeline.riders import Riders
from layerstream.pipeline.room import Room
from layerstream.pipeline.stats import Counters, Outcome, Stats
from layerstream.pipeline.sweeps import Sweeps
from layerstream.pipeline.tokens import counted
from layerstream.stages.devices import Device
from layerstream.stages.errors import AdmissionError, ClosedError
from layerstream.stages.libraries import Leftovers
from layerstream.stages.threads import Threads, settled
from layerstream.stages.timings import Timings

__all__ = ["Engine", "Request"]

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One call of ``forward`` or ``generate``, or of the module itself, from when it asks to when it has ended."""

    number: int
    what: str
    need: Need
    call: Callable[[Any], Callable[..., Any]]  # of a clone of the module tree, what to call
    inputs: Sequence[Any]
    named: dict[str, Any]
    rider: Rider
    reservation: Reservation
    generator: torch.Generator | None  # what it samples from, instead of torch's own
    tokens: int = 0  # written in the rider's thread alone
    passes_before: int = 0  # that its rider has made for others
    end_level: int = logging.INFO  # at which its end is logged
    asked_seconds: float = field(default_factory=time.perf_counter)


class Engine:
    """The requests of one model.

    Args:
        module: the transformers model; its hooks ask ``riders`` for the rider of their thread.
        sweeps: what requests ride.
        device: where computation runs.
        estimator: prices requests.
        room: memory for all requests together.
        places: threads for riders.
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
        self._admission = Admission(room_bytes=room.nbytes, places=places)
        self.riders = Riders(sweeps, module, begin_pass=self._begin_pass)
        self.threads = Threads("rider", places)
        self._leftovers = Leftovers()
        self._counters = Counters()
        self._numbers = itertools.count(1)
        self._active: set[Request] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._refusing: str | None = None  # why no more requests are taken

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
        call: Callable[[Any], Callable[..., Any]],
        inputs: Sequence[Any],
        named: Mapping[str, Any],
    ) -> Any:
        # The caller's own stream, so that inputs are read after, and results before, what else he puts on it. By the
        # time that the request is admitted, another one may be current on the event loop.
        stream = self._device.stream()
        request = self._request(what, call, inputs, named, places=1)
        self._begin(request)
        try:
            self._admission.ask(request.reservation)
            await asyncio.wrap_future(request.reservation)
            result = await self._ride(request, stream)
        except BaseException as error:
            self._end(request, _outcome(error))
            raise
        self._end(request, "completed")
        return result

    async def _ride(self, request: Request, stream: Hashable) -> Any:
        """Run an admitted request in a rider's thread, to its end even if the waiting task is cancelled."""
        self._started(request)

        def work() -> Any:
            with self._device.computing_on(stream):
                return self._work(request)

        try:
            future = self.threads.submit(work)
        except RuntimeError as error:  # closed since it was admitted
            raise ClosedError(_CLOSED) from error
        waiting = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            if waiting.cancelled():
                raise ClosedError(_CLOSED) from None
            if not future.cancel():
                self._sweeps.cancel(request.rider)
                await settled([future])
                # Taken note of: it is no news to whoever has cancelled it.
                waiting.cancelled() or waiting.exception()
            raise
        finally:
            self._sweeps.ended(request.rider)
            del future, waiting  # an error that they hold would hold this frame, and so itself

    def _work(self, request: Request) -> Any:
        """What a request does in the thread that it has."""
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
            # A request knows its arguments, and some of them know it: what hangs on it would wait for the collector.
            del rider.root, clone
            request.inputs, request.named = (), {}
            self._leftovers.release()

    # -- requests of other threads ---------------------------------------------------------------

    def generate_here(
        self, call: Callable[[Any], Callable[..., Any]], inputs: Sequence[Any], named: Any
    ) -> Any:
        """Generate in the calling thread; ``call`` makes of a clone of the model what to call.

        Raises:
            ModelError: this is the thread of the event loop.
        """
        self.riders.refuse_on_loop()
        request = self._request("generate", call, inputs, named, places=0)
        try:
            self._admit_here(request)
            # Makes the device current, too: not all kernels ask their inputs for it.
            with self._device.computing_on(self._device.stream()):
                result = self._work(request)
        except BaseException as error:
            self._sweeps.tell(self._end, request, _outcome(error))
            raise
        self._sweeps.tell(self._end, request, "completed")
        return result

    def _begin_pass(
        self, rider: Rider, entry: str, inputs: Sequence[Any], named: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Callable[[Outcome], None]]:
        """Make a request of a pass that belongs to none, which begins in the module at ``entry``.

        Returns, when it is admitted, the keyword arguments to make it with, and what ends it.
        """
        request = self._request(
            "forward", lambda model: model, inputs, named, places=0, rider=rider, whole=not entry
        )
        given = request.named
        request.inputs, request.named = (), {}  # whoever has asked makes the call himself
        request.end_level = logging.DEBUG  # a harness makes thousands of them

        def end(outcome: Outcome) -> None:
            try:
                self._leftovers.release()
            finally:  # also behind an interrupt: whoever drains the model waits for it
                self._sweeps.tell(self._end, request, outcome)

        try:
            self._admit_here(request)
        except BaseException as error:
            end(_outcome(error))
            raise
        return given, end

    def _admit_here(self, request: Request) -> None:
        """Wait in the calling thread until ``request`` may begin. An interrupt may come before or after that."""
        self._sweeps.tell(self._ask, request, request.reservation)
        request.reservation.result()
        self._sweeps.tell(self._started, request)

    def _ask(self, request: Request, reservation: Reservation) -> None:
        """Let the request of another thread wait for its turn, unless no more are taken by now."""
        self._begin(request)
        if reservation.done():  # the model was closed meanwhile
            return
        if self._refusing is None:
            self._admission.ask(reservation)
        else:
            reservation.set_exception(ClosedError(self._refusing))

    def resize(self, room: Room) -> None:
        """From now on there is so much for all requests together; those that run keep what they have."""
        self._estimator.resize(room)
        self._admission.resize(room.nbytes)

    # -- life ------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Refuse new requests, and wait for those that were asked for before, in tasks and threads."""
        self._refusing = "the model is being closed and takes no more requests"
        await self._idle.wait()

    def close(self) -> None:
        """Refuse new requests, and fail those that wait for their memory."""
        self._refusing = "the model is not open; use it inside `async with`"
        self._admission.close(_CLOSED)

    def stats(self, timings: Timings) -> Stats:
        """What requests have done, and are doing now."""
        counted = self._counters.tokens + sum(request.tokens for request in self._active)
        return self._counters.stats(
            timings,
            tokens=counted,
            sweeps=self._sweeps.departures,
            passes=self._sweeps.passes,
            waiting=self._admission.waiting,
            riding=sum(request.reservation.done() for request in self._active),
            aboard=self._sweeps.aboard,
            reserved_bytes=self._admission.reserved_bytes,
            reservable_bytes=self._admission.room_bytes,
        )

    # -- one request's life ----------------------------------------------------------------------

    def _request(
        self,
        what: str,
        call: Callable[[Any], Callable[..., Any]],
        inputs: Sequence[Any],
        named: Mapping[str, Any],
        *,
        places: int,
        rider: Rider | None = None,
        whole: bool = True,  # of the model, not of a module in it
    ) -> Request:
        if self._refusing is not None:
            self._sweeps.tell(self._refused)
            raise ClosedError(self._refusing)
        named = dict(named)
        generator = named.pop("generator", None) if what == "generate" else None
        if self._cache_on_host and whole:
            named = with_host_cache(self._module, what, inputs, named)
        price = self._estimator.generation if what == "generate" else self._estimator.forward
        try:
            need = price(inputs, named)
        except AdmissionError:
            self._sweeps.tell(self._refused)
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

    def _refused(self) -> None:
        self._counters.refused += 1

    def _begin(self, request: Request) -> None:
        self._active.add(request)
        self._idle.clear()

    def _started(self, request: Request) -> None:
        self._counters.started += 1
        self._sweeps.began(request.rider)
        extra = {"request_id": request.number, "reserved_bytes": request.need.nbytes}
        logger.debug("request %d (%s) admitted", request.number, request.what, extra=extra)
        if request.need.chunk_tokens is not None:
            self._counters.chunked += 1
            logger.info(
                "request %d: the activations of its prompt would not fit; it is read %d tokens at a time",
                request.number,
                request.need.chunk_tokens,
                extra=extra,
            )

    def _end(self, request: Request, outcome: Outcome) -> None:
        """``request`` is over; all that is counted, freed and told of it."""
        self._sweeps.ended(request.rider)
        self._admission.give_back(request.reservation)
        self._active.discard(request)
        self._counters.ended(outcome, tokens=request.tokens)
        passes = request.rider.passes - request.passes_before
        seconds = time.perf_counter() - request.asked_seconds
        logger.log(
            request.end_level,
            "request %d (%s) %s: %d tokens in %d forward passes, %.2f s",
            request.number,
            request.what,
            outcome,
            request.tokens,
            passes,
            seconds,
            extra={
                "request_id": request.number,
                "outcome": outcome,
                "tokens": request.tokens,
                "passes": passes,
                "seconds": seconds,
            },
        )
        if not self._active:
            self._idle.set()


_CLOSED = "the model was closed before this request's turn came"


def _outcome(error: BaseException) -> Outcome:
    left = isinstance(error, (asyncio.CancelledError, KeyboardInterrupt))
    return "cancelled" if left else "failed"


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
