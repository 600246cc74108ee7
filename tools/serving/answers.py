"""From requests to answers, which are generated as long as the client is connected."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive

from layerstream.pipeline import (
    ClosedError,
    DeviceError,
    LayerstreamError,
    ReadError,
    StreamedModel,
)
from layerstream.tools.serving.errors import STOPPED, ApiError, api_error
from layerstream.tools.serving.events import Events, Send
from layerstream.tools.serving.generation import Choice, generate_text
from layerstream.tools.serving.prompts import Prompts
from layerstream.tools.serving.protocol import ChatRequest, CompletionRequest
from layerstream.tools.serving.replies import Reply
from layerstream.tools.serving.sampling import sampling_options

__all__ = ["Answers"]

logger = logging.getLogger(__name__)

# Retry-After of a refused request: the time of some tokens, at the speed of a disk.
_RETRY_AFTER_SECONDS = 5

Asked = ChatRequest | CompletionRequest


class Answers:
    """Answers requests with what a model generates.

    Args:
        model: Open.
        tokenizer: Its own.
        prompts: Turns requests into token ids; closed by ``stop``.
        max_answers: Running or waiting at any time; requests for more are refused.

    Attributes:
        failure: Why streaming failed when it was last tried, or that the server stops; None if all is well.
        open: How many answers run or wait.
    """

    def __init__(
        self, model: StreamedModel, tokenizer: Any, prompts: Prompts, *, max_answers: int
    ) -> None:
        self.failure: str | None = None
        self._stopped = False
        self._model = model
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._max_answers = max_answers
        self.open = 0
        self._tasks: set[asyncio.Task[None]] = set()  # one for each request

    def stop(self) -> None:
        """End running requests, and refuse new ones, with an error: the server is shutting down."""
        self._stopped = True
        self.failure = STOPPED
        for task in self._tasks:
            task.cancel()
        self._prompts.close()

    async def answer(self, asked: Asked, receive: Receive) -> Response:
        """The answer to a request whose body has been read from ``receive``.

        Raises:
            ApiError: The request cannot be answered. A streamed answer may raise it while it is sent.
        """
        reply = Reply(asked)
        if not asked.stream:
            await self._attended(self._generate(asked, reply, _ignore), receive)
            return JSONResponse(reply.whole())

        async def stream(send: Send) -> None:
            async def emit(chunks: Sequence[dict[str, Any]]) -> None:
                for chunk in chunks:
                    await send(chunk)

            await self._attended(self._generate(asked, reply, emit), receive)
            await emit(reply.last())

        return Events(stream)

    async def _attended(self, generating: Coroutine[Any, Any, None], receive: Receive) -> None:
        """Run ``generating`` to its end, or until the client leaves or the server stops."""
        task = asyncio.create_task(generating)
        leaving = asyncio.create_task(_client_left(receive))
        self._tasks.add(task)
        try:
            await asyncio.wait([task, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ApiError(
                    499, "The client has left."
                )  # for the log: the client does not get it
            if task.cancelled():
                raise ApiError(503, STOPPED)
            if (error := task.exception()) is not None:
                raise self._told(error) from error
        finally:
            self._tasks.discard(task)
            task.cancel()
            leaving.cancel()
            await asyncio.wait([task, leaving])

    def _told(self, error: BaseException) -> ApiError:
        """The error that the client gets for ``error``, which is logged if the client did not cause it."""
        told = api_error(error)
        if told.status >= 500 and error is not told:  # noqa: PLR2004
            # The message of an error of ours is sufficient.
            ours = isinstance(error, LayerstreamError)
            logger.error("a request failed: %s", error, exc_info=None if ours else error)
        if not self._stopped and isinstance(error, ReadError | ClosedError | DeviceError):
            # Usually permanent: whatever monitors /health then restarts the server.
            self.failure = f"Streaming has failed: {error}"
        return told

    async def _generate(self, asked: Asked, reply: Reply, emit: "Emit") -> None:
        """Generate all answers to a request; pass the chunks of each token to ``emit``."""

        async def one(choice: Choice) -> None:
            pieces = generate_text(self._model, self._tokenizer, choice)
            async with aclosing(pieces):
                async for piece in pieces:
                    if not self._stopped:
                        self.failure = None
                    await emit(reply.add(piece))

        with self._places(asked.answers):
            prompts = await self._prompts.of(asked)
            choices = self._choices(asked, prompts)
            reply.expect(prompts, choices=len(choices))
            try:
                async with asyncio.TaskGroup() as group:
                    for choice in choices:
                        group.create_task(one(choice))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None

    @contextmanager
    def _places(self, count: int) -> Iterator[None]:
        """Occupy ``count`` of the places for answers."""
        if self._stopped:
            raise ApiError(503, STOPPED)
        if count > self._max_answers:
            raise ApiError(
                400, f"{count} answers are asked for; this server takes {self._max_answers}."
            )
        if self.open + count > self._max_answers:
            raise ApiError(
                429,
                f"The server has {self.open} answers under way or waiting, and takes {self._max_answers}; "
                "try again later.",
                code="queue_full",
                headers={"Retry-After": str(_RETRY_AFTER_SECONDS)},
            )
        self.open += count
        try:
            yield
        finally:
            self.open -= count

    def _choices(self, asked: Asked, prompts: Sequence[Sequence[int]]) -> list[Choice]:
        """The answers to generate, ordered by prompt."""
        wanted = [(prompt, number) for prompt in prompts for number in range(asked.n)]
        return [
            Choice(
                index=index,
                prompt=prompt,
                new_tokens=self._prompts.new_tokens(asked, prompt),
                stops=asked.stops,
                sampling=sampling_options(
                    asked,
                    self._model.module.generation_config,
                    device=self._model.plan.device,
                    number=number,
                    prompt_tokens=len(prompt),
                ),
            )
            for index, (prompt, number) in enumerate(wanted)
        ]


Emit = Callable[[Sequence[dict[str, Any]]], Awaitable[None]]


async def _ignore(_: Sequence[dict[str, Any]]) -> None:
    """Send nothing before the whole answer is there."""


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
