"""Responses that are sent while their answer is generated, and show meanwhile that they are alive.

With weights from disk a token may take minutes, and clients, like proxies between, give up on a connection where nothing comes.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from starlette import types
from starlette.responses import Response

from layerstream.tools.serving.connections import HALF_CLOSED
from layerstream.tools.serving.errors import ApiError
from layerstream.tools.serving.json_text import json_in_thread, json_text

__all__ = ["Emit", "EventStream", "KeepAlive", "LateJson", "client_left", "discard"]

logger = logging.getLogger(__name__)

_LAST_EVENT_SECONDS = 1
# So long after a client has closed its side, it is sent something. If it has left for good, the connection breaks. An error that
# comes at once has a status of its own also then.
_PROBE_SECONDS = 0.2


class Emit(Protocol):
    """Sends chunks of an answer; without any, it only tells that the answer begins."""

    def __call__(self, chunks: Sequence[Any], /, *, large: bool = False) -> Awaitable[None]:
        """Send ``chunks``, each of which may be megabytes if they are ``large``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepAlive:
    """When something is sent while there is nothing to send."""

    seconds: float
    """The longest silence."""
    describe: Callable[[], str]
    """Says in one line how far the answer is."""


class _Body:
    """Sends the pieces of a body whose length is not known in advance."""

    def __init__(self, response: Response, scope: types.Scope, send: types.Send) -> None:
        self._response = response
        self._half_closed: asyncio.Event | None = scope.get("state", {}).get(HALF_CLOSED)
        self._send = send
        self.started = False
        self._sent = False  # whether anything was sent since ``keep_alive`` looked last

    async def start(self) -> None:
        """Send the status and the headers, once."""
        if self.started:
            return
        self.started = True
        await self._send(
            {
                "type": "http.response.start",
                "status": self._response.status_code,
                "headers": self._response.raw_headers,
            }
        )

    async def send(self, text: str, *, more: bool = True) -> None:
        """Send ``text``."""
        await self.start()
        self._sent = True
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": more})

    @asynccontextmanager
    async def kept_alive(
        self, filler: Callable[[], str], *, seconds: float, first: float
    ) -> AsyncIterator[None]:
        """Send fillers during the block, the first after ``first`` seconds, while nothing else is sent."""
        tasks = [
            asyncio.create_task(self._fill(filler, seconds=seconds, first=first)),
            asyncio.create_task(self._probe(filler)),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _fill(self, filler: Callable[[], str], *, seconds: float, first: float) -> None:
        await asyncio.sleep(first)
        while True:
            if not self._sent and (text := filler()):
                await self.send(text)
            self._sent = False
            await asyncio.sleep(seconds)

    async def _probe(self, filler: Callable[[], str]) -> None:
        if self._half_closed is not None:
            await self._half_closed.wait()
            await asyncio.sleep(_PROBE_SECONDS)
            if text := filler():
                await self.send(text)


class EventStream(Response):
    """Sends the events that ``produce`` passes on, followed by ``ending``, with comments in between that say how far it is.

    The status is sent when ``produce`` emits first. An error before that becomes an ordinary response, a later one is sent
    as the last event, which ``failed`` makes.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        produce: Callable[[Emit], Awaitable[None]],
        *,
        keep_alive: KeepAlive,
        ending: str,
        failed: Callable[[ApiError], Any],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._produce = produce
        self._keep_alive = keep_alive
        self._ending = ending
        self._failed = failed

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        """Send the response."""
        del receive
        body = _Body(self, scope, send)

        async def emit(chunks: Sequence[Any], *, large: bool = False) -> None:
            await body.start()
            for chunk in chunks:
                text = await json_in_thread(chunk) if large else json_text(chunk)
                await body.send(_event(chunk, text))

        def comment() -> str:
            # Not before the first chunk: until then, an error has a status of its own.
            return f": {self._keep_alive.describe()}\n\n" if body.started else ""

        seconds = self._keep_alive.seconds
        try:
            async with body.kept_alive(comment, seconds=seconds, first=seconds):
                await self._produce(emit)
        except ApiError as error:
            if not body.started:
                raise
            with suppress(TimeoutError):  # a client that does not read must not block
                async with asyncio.timeout(_LAST_EVENT_SECONDS):
                    failed = self._failed(error)
                    await body.send(_event(failed, json_text(failed)), more=False)
        else:
            await body.send(self._ending, more=False)


class LateJson(Response):
    """Sends the JSON that ``produce`` makes; if that takes long, blanks before it, which JSON allows.

    An error before the first blank becomes an ordinary response. A later one breaks the connection before the body's end, so
    that clients raise an error.
    """

    media_type = "application/json"

    def __init__(self, produce: Callable[[], Awaitable[Any]], *, keep_alive: KeepAlive) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._produce = produce
        self._keep_alive = keep_alive

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        """Send the response."""
        body = _Body(self, scope, send)
        seconds = self._keep_alive.seconds
        try:
            # Not as early as a stream: an error that comes soon has a status of its own.
            async with body.kept_alive(lambda: " ", seconds=seconds, first=1.5 * seconds):
                text = await json_in_thread(await self._produce())
        except ApiError as error:
            if not body.started:
                raise
            logger.info("an answer that had begun was broken off: %s", error)
            return
        if body.started:
            await body.send(text, more=False)
        else:
            response = Response(text, headers=dict(self.headers), media_type=self.media_type)
            await response(scope, receive, send)


def _event(content: Any, text: str) -> str:
    """The event of ``content``, whose JSON is ``text``. Those of APIs that have several types carry theirs as a name, too."""
    name = f"event: {content['type']}\n" if "type" in content else ""
    return f"{name}data: {text}\n\n"


async def client_left(receive: types.Receive) -> None:
    """Return when the client breaks the connection; its request has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def discard(_: Sequence[Any], /, *, large: bool = False) -> None:
    """Discard chunks: the answer is sent when it is complete."""
