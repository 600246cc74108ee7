"""Generates the answers to requests, for as long as the client is connected."""

import asyncio
import logging
import math
from collections.abc import Coroutine, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive

from layerstream.pipeline import (
    ClosedError,
    DeviceError,
    LayerstreamError,
    ReadError,
    StreamedModel,
)
from layerstream.tools.serving.choices import ApiRequest, Choices
from layerstream.tools.serving.embeddings import EmbeddingRequest, Pooling, embed
from layerstream.tools.serving.errors import STOPPED, ApiError, api_error
from layerstream.tools.serving.event_stream import (
    Emit,
    EventStream,
    KeepAlive,
    LateJson,
    client_left,
    discard,
)
from layerstream.tools.serving.generation import Choice, generate_text
from layerstream.tools.serving.limits import Limits
from layerstream.tools.serving.messages_api import MessagesBuilder
from layerstream.tools.serving.monitoring import Metrics, Movement, Timeline
from layerstream.tools.serving.progress import Progress
from layerstream.tools.serving.prompts import Prompts
from layerstream.tools.serving.responses import ResponseBuilder
from layerstream.tools.serving.responses_api import ResponsesBuilder

__all__ = ["Answers"]

logger = logging.getLogger(__name__)

# How long the beginning of a response waits for the first token: an error that comes at once has a status of its own.
_EARLY_ERROR_SECONDS = 0.2
# Those of more tokens are converted in a thread: they are of a prompt, and may be megabytes.
_MANY_LOGPROBS = 8
# Limit for Retry-After, which is estimated: fewer tokens may come than a request allows.
_MAX_RETRY_SECONDS = 600

Builder = ResponseBuilder | MessagesBuilder | ResponsesBuilder


class Answers:
    """Answers requests with text that a model generates.

    Args:
        model: The model, open.
        tokenizer: The model's tokenizer.
        prompts: Turns requests into token ids; closed by ``stop``.
        limits: How many tokens a request may have.
        choices: Makes what is generated for a request.
        max_answers: Maximum of answers that run or wait; requests for more are refused.
        keep_alive_seconds: The longest time in which nothing is sent to a client that waits.

    Attributes:
        failure: Why streaming failed last, or that the server is shutting down; None if it works.
        open: Number of answers that run or wait.
        movement: Tells how long nothing has moved.
        metrics: For Prometheus.
        stopping: Set by ``stop``.
    """

    def __init__(
        self,
        model: StreamedModel,
        tokenizer: Any,
        prompts: Prompts,
        limits: Limits,
        *,
        choices: Choices,
        max_answers: int,
        keep_alive_seconds: float,
    ) -> None:
        self.failure: str | None = None
        self.movement = Movement(model)
        self.metrics = Metrics(model, self.movement, open_answers=lambda: self.open)
        self.stopping = asyncio.Event()
        self._model = model
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._limits = limits
        self._choices = choices
        self._max_answers = max_answers
        self._keep_alive_seconds = keep_alive_seconds
        self._running: set[Progress] = set()  # one for each request that is counted in ``open``
        self.open = 0
        self._tasks: set[asyncio.Task[None]] = set()  # one for each request

    def stop(self) -> None:
        """End running requests, and refuse new ones, with an error that the server is shutting down."""
        self.stopping.set()
        self.failure = STOPPED
        for task in self._tasks:
            task.cancel()
        self._prompts.close()

    def streaming_failed(self, error: BaseException | None) -> None:
        """Have /health report ``error``; None if tokens come, or can come again."""
        if not self.stopping.is_set():
            self.failure = None if error is None else f"Streaming has failed: {error}"

    async def answer(
        self, request: ApiRequest, receive: Receive, response: Builder | None = None
    ) -> Response:
        """Answer a request whose body has been read from ``receive``, with what ``response`` builds.

        Raises:
            ApiError: The request cannot be answered. A streamed answer may raise it while it is sent.
        """
        response = ResponseBuilder(request) if response is None else response
        progress = Progress(self._model)
        keep_alive = KeepAlive(seconds=self._keep_alive_seconds, describe=progress.describe)

        async def complete() -> dict[str, Any]:
            generating = self._generate(request, response, progress, discard)
            await self._run_while_connected(generating, receive)
            return await asyncio.to_thread(response.complete)

        async def stream(emit: Emit) -> None:
            generating = self._generate(request, response, progress, emit)
            await self._run_while_connected(generating, receive)
            await emit(response.last_chunks())

        if request.stream:
            return EventStream(
                stream, keep_alive=keep_alive, ending=response.ending, failed=response.error
            )
        return LateJson(complete, keep_alive=keep_alive)

    async def complete(self, request: ApiRequest) -> dict[str, Any]:
        """The answer to a request that came without a connection."""
        response = ResponseBuilder(request)
        await self._generate(request, response, Progress(self._model), discard)
        return response.complete()

    async def embed(
        self, request: EmbeddingRequest, receive: Receive, pooling: Pooling
    ) -> Response:
        """Answer a request for embeddings whose body has been read from ``receive``.

        Raises:
            ApiError: The request cannot be answered.
        """
        progress = Progress(self._model)
        adapter = self._choices.adapter(request.model)
        options = {} if adapter is None else {"adapter": adapter}
        made: dict[str, Any] = {}
        at_once = min(request.answers, self._max_answers)

        async def compute() -> None:
            with self._counted_as_open(at_once, progress):
                prompts = await self._prompts.token_ids(request)
                for prompt in prompts:
                    self._limits.new_tokens(len(prompt), asked=0, param="input")
                try:
                    made.update(
                        await embed(
                            self._model, request, prompts, pooling, options, at_once=at_once
                        )
                    )
                except BaseExceptionGroup as errors:
                    raise errors.exceptions[0] from None

        async def complete() -> dict[str, Any]:
            await self._run_while_connected(compute(), receive)
            return made

        keep_alive = KeepAlive(seconds=self._keep_alive_seconds, describe=progress.describe)
        return LateJson(complete, keep_alive=keep_alive)

    async def _run_while_connected(
        self, generating: Coroutine[Any, Any, None], receive: Receive
    ) -> None:
        """Run ``generating`` to its end, or until the client leaves or the server stops."""
        task = asyncio.create_task(generating)
        disconnect = asyncio.create_task(client_left(receive))
        self._tasks.add(task)
        try:
            await asyncio.wait([task, disconnect], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                # For the log: the client does not get it.
                raise ApiError(499, "The client has left.")
            if task.cancelled():
                raise ApiError(503, STOPPED)
            if (error := task.exception()) is not None:
                raise self._client_error(error) from error
        finally:
            self._tasks.discard(task)
            task.cancel()
            disconnect.cancel()
            await asyncio.wait([task, disconnect])

    def _client_error(self, error: BaseException) -> ApiError:
        """The error that the client gets for ``error``, which is logged if the client did not cause it."""
        client_error = api_error(error)
        if client_error.status >= 500 and error is not client_error:  # noqa: PLR2004
            # The message of a LayerstreamError is sufficient; others are logged with a traceback.
            unexpected = None if isinstance(error, LayerstreamError) else error
            logger.error("a request failed: %s", error, exc_info=unexpected)
        if isinstance(error, ReadError | ClosedError | DeviceError):
            self.streaming_failed(error)
        return client_error

    async def _generate(
        self, request: ApiRequest, response: Builder, progress: Progress, emit: Emit
    ) -> None:
        """Generate all answers to a request, and pass the chunks of each token to ``emit``."""
        came = asyncio.Event()

        async def begin(count: int) -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_EARLY_ERROR_SECONDS):
                    await came.wait()
            await emit(response.start(prompts, choices=count))

        async def generate(choice: Choice, begun: asyncio.Task[None]) -> None:
            timeline = Timeline(self.metrics)
            pieces = generate_text(self._model, self._tokenizer, choice, on_begin=timeline.begun)
            async with aclosing(pieces):
                async for piece in pieces:
                    came.set()
                    await begun
                    self.streaming_failed(None)
                    if piece.tokens:
                        timeline.token()
                        self.metrics.tokens.labels(request.model).inc(piece.tokens)
                    progress.count(choice.index, piece.tokens)
                    if len(piece.logprobs) <= _MANY_LOGPROBS:
                        await emit(response.add(piece))
                    else:
                        await emit(await asyncio.to_thread(response.add, piece), large=True)

        with self._counted_as_open(request.answers, progress):
            prompts = await self._prompts.token_ids(request)
            choices = await self._prompts.in_thread(self._choices, request, prompts)
            progress.start([choice.new_tokens for choice in choices])
            try:
                async with asyncio.TaskGroup() as group:
                    begun = group.create_task(begin(len(choices)))
                    for choice in choices:
                        group.create_task(generate(choice, begun))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None

    @contextmanager
    def _counted_as_open(self, count: int, progress: Progress) -> Iterator[None]:
        """Count ``count`` more answers as open while the block runs; ``progress`` is that of their request."""
        if self.stopping.is_set():
            raise ApiError(503, STOPPED)
        if count > self._max_answers:
            raise ApiError(
                400, f"{count} answers are asked for; this server takes {self._max_answers}."
            )
        if self.open + count > self._max_answers:
            seconds = min((each.seconds_to_end for each in self._running), default=0.0)
            seconds = min(max(math.ceil(seconds), 1), _MAX_RETRY_SECONDS)
            raise ApiError(
                429,
                f"The server has {self.open} answers under way or waiting, and takes {self._max_answers}; "
                f"the next one is expected to end within {seconds} s.",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )
        self.open += count
        self._running.add(progress)
        try:
            yield
        finally:
            self.open -= count
            self._running.discard(progress)
