"""The requests of one model, from their start to their end: queued, counted and logged."""

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from layerstream.pipeline.scheduling.admission import Admission, Reservation
from layerstream.pipeline.scheduling.passes import PassRunner
from layerstream.pipeline.scheduling.request_cost import RequestCost
from layerstream.pipeline.scheduling.request_memory import RequestMemory
from layerstream.pipeline.scheduling.scheduler import SweepScheduler
from layerstream.pipeline.scheduling.stats import Counters, Outcome, Stats, outcome_of
from layerstream.stages.errors import AdmissionError, ClosedError
from layerstream.stages.process.forks import refuse_fork
from layerstream.stages.readers.guard import ReadGuard
from layerstream.stages.telemetry.timings import Timings
from layerstream.stages.text import format_bytes

__all__ = ["CLOSED", "MethodOf", "Request", "Requests"]

logger = logging.getLogger(__name__)

# Returns what to call with the inputs, given a clone of the module tree.
MethodOf = Callable[[Any], Callable[..., Any]]

CLOSED = "the model was closed before this request's turn came"


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One call of ``forward`` or ``generate``, or of the module itself; or other work that takes memory of requests."""

    number: int
    method: str
    """"forward", "generate", or what else it does."""
    cost: RequestCost
    runner: PassRunner
    reservation: Reservation
    call: MethodOf = lambda model: model
    inputs: Sequence[Any] = ()
    named: dict[str, Any] = field(default_factory=dict)
    generator: torch.Generator | None = None
    """The generator that it samples from, instead of torch's default one."""
    passes_before: int = 0
    """Passes that its runner has made for earlier requests."""
    tokens: int = 0
    """Tokens generated so far; written only in the thread of its passes."""
    end_level: int = logging.INFO
    """The level at which its end is logged."""
    created_seconds: float = field(default_factory=time.perf_counter)


class Requests:
    """The requests that wait or run. For the event loop only, unless a method says otherwise.

    Args:
        scheduler: Makes the sweeps that they take part in.
        memory: That for all of them together.
        threads: The number of worker threads.
        guard: Watches over the reads.

    Attributes:
        guard: The same, for what reads beside the passes.
    """

    def __init__(
        self, scheduler: SweepScheduler, *, memory: RequestMemory, threads: int, guard: ReadGuard
    ) -> None:
        self._scheduler = scheduler
        self.guard = guard
        self._process = os.getpid()
        self._admission = Admission(memory=memory, threads=threads)
        self._counters = Counters()
        self._active: set[Request] = set()
        self._enqueued = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._numbers = itertools.count(1)
        self._refusing: str | None = None  # why no more requests are taken

    def check_open(self) -> None:
        """Refuse a new request if the model is being closed. May be called in any thread.

        Raises:
            ClosedError: The model is being closed, or is that of another process.
        """
        refuse_fork(self._process)
        if self._refusing is not None:
            self._scheduler.call_on_loop(self.refused)
            raise ClosedError(self._refusing)

    def number(self) -> int:
        """The number of a new request. May be called in any thread."""
        return next(self._numbers)

    @contextmanager
    def borrowed(self, method: str, nbytes: int) -> Iterator[None]:
        """Have ``nbytes`` of the requests' memory while the block runs, which makes no pass. Not on the event loop.

        Raises:
            AdmissionError: There is less for all requests together.
            ClosedError: As for ``check_open``.
        """
        self.check_open()
        memory = RequestMemory(shared_bytes=nbytes)
        if not memory.fits(self._admission.memory):
            self._scheduler.call_on_loop(self.refused)
            raise AdmissionError(
                f"{method} needs {format_bytes(nbytes)} for what it computes, but there are "
                f"{format_bytes(self._admission.memory.shared_bytes)} for requests; open the model with a larger budget"
            )
        cost = RequestCost(memory=memory, sequences=0, prompt_tokens=0, new_tokens=0)
        runner = PassRunner(self._scheduler)
        runner.cost = cost  # known, or decode residents would make room for an unknown prompt
        request = Request(
            number=self.number(),
            method=method,
            cost=cost,
            runner=runner,
            reservation=Reservation(memory, threads=0),
        )
        outcome: Outcome = "completed"
        try:
            self._scheduler.call_on_loop(self.enqueue, request, request.reservation)
            request.reservation.result()
            self._scheduler.call_on_loop(self.started, request)
            yield
        except BaseException as error:
            outcome = outcome_of(error)
            raise
        finally:
            self._scheduler.call_on_loop(self.ended, request, outcome)

    def refused(self) -> None:
        """Count a request that was refused."""
        self._counters.refused += 1

    def enqueue(self, request: Request, reservation: Reservation) -> None:
        """Queue ``request``; ``reservation``, its own, is done when it may begin, or has the error."""
        self._active.add(request)
        self._enqueued += 1
        self._idle.clear()
        if reservation.done():  # the model was closed meanwhile
            return
        if self._refusing is None:
            self._admission.enqueue(reservation)
        else:
            reservation.set_exception(ClosedError(self._refusing))

    def started(self, request: Request) -> None:
        """``request`` was admitted and begins."""
        self._counters.started += 1
        self._scheduler.request_began(request.runner)
        extra = {"request_id": request.number, "reserved_bytes": request.cost.memory.nbytes}
        logger.debug("request %d (%s) admitted", request.number, request.method, extra=extra)
        if request.cost.chunk_tokens is not None:
            self._counters.chunked += 1
            logger.info(
                "request %d: the activations of its prompt would not fit; it is read %d tokens at a time",
                request.number,
                request.cost.chunk_tokens,
                extra=extra,
            )

    def ended(self, request: Request, outcome: Outcome) -> None:
        """``request`` is over, whether it had begun or not: free what it has reserved, count it, log it."""
        self._scheduler.request_ended(request.runner)
        self._admission.release(request.reservation)
        self._active.discard(request)
        self._counters.ended(outcome, tokens=request.tokens)
        passes = request.runner.passes - request.passes_before
        seconds = time.perf_counter() - request.created_seconds
        logger.log(
            request.end_level,
            "request %d (%s) %s: %d tokens in %d forward passes, %.2f s",
            request.number,
            request.method,
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

    @property
    def alone(self) -> int | None:
        """If one request at most is there: how many there have been. None if there are others. May be called in any thread."""
        return self._enqueued if len(self._active) <= 1 else None

    @property
    def memory(self) -> RequestMemory:
        """That for all of them together."""
        return self._admission.memory

    @property
    def reserved(self) -> RequestMemory:
        """What those that run have of it."""
        return self._admission.reserved

    def resize(self, memory: RequestMemory) -> None:
        """Change the memory for all requests together; those that run keep what they have."""
        self._admission.resize(memory)

    async def drain(self) -> None:
        """Refuse new requests, and wait until all earlier ones have ended."""
        self._refusing = "the model is being closed and takes no more requests"
        await self._idle.wait()

    def close(self) -> None:
        """Refuse new requests, and fail those that wait for their memory."""
        self._refusing = "the model is not open; use it inside `async with`"
        self._admission.close(CLOSED)

    def stats(self, timings: Timings) -> Stats:
        """The current counters and gauges."""
        return self._counters.stats(
            timings,
            tokens=self._counters.tokens + sum(request.tokens for request in self._active),
            sweeps=self._scheduler.sweeps_begun,
            passes=self._scheduler.passes_begun,
            waiting=self._admission.waiting,
            running=sum(request.reservation.done() for request in self._active),
            in_sweep=self._scheduler.passes_in_sweep,
            reserved=self.reserved,
            reservable_bytes=self._admission.memory.nbytes,
            hanging_reads=self.guard.hanging(),
            failure=self._scheduler.failure,
            reopened=self._scheduler.reopened,
        )
