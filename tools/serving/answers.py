"""Requests to answers: each is generated for as long as somebody is there to read it."""

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

# What a client that was turned away is told to wait: some tokens' time, at the speed of a disk.
_RETRY_AFTER_SECONDS = 5

Asked = ChatRequest | CompletionRequest


class Answers:
    """Answers requests with what a model generates.

    Args:
        model: open.
        tokenizer: its own.
        prompts: turns requests into token ids; closed with ``stop``.
        max_answers: under way or waiting at any time; more are turned away.

    Attributes:
        failure: why streaming failed when it was last tried, or that the server stops; None while all is well.
        open: how many answers are under way or waiting.
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
        """Answer what runs, and whatever still comes, with an error: the server is shutting down."""
        self._stopped = True
        self.failure = STOPPED
        for task in self._tasks:
            task.cancel()
        self._prompts.close()

    async def answer(self, asked: Asked, receive: Receive) -> Response:
        """The answer to a request whose body has been read from ``receive``.

        Raises:
            ApiError: there is none. An answer that is streamed may raise it when it is sent.
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
                raise ApiError(499, "The client has left.")  # for the log: nobody is there
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
        """What the client is told of ``error``; what is not his fault is logged."""
        told = api_error(error)
        if told.status >= 500 and error is not told:  # noqa: PLR2004
            # An error of ours says all there is to say.
            ours = isinstance(error, LayerstreamError)
            logger.error("a request failed: %s", error, exc_info=None if ours else error)
        if not self._stopped and isinstance(error, ReadError | ClosedError | DeviceError):
            # Mostly for good: whoever watches /health then starts the server anew.
            self.failure = f"Streaming has failed: {error}"
        return told

    async def _generate(self, asked: Asked, reply: Reply, emit: "Emit") -> None:
        """Generate all answers that are asked for; give ``emit`` the chunks of each token."""

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
        """Take ``count`` of the places for answers."""
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
        """The answers to generate: those to the first prompt first."""
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
    """Send nothing before all is there."""


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
