"""A response of server-sent events, sent while the answer is generated."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from starlette import types
from starlette.responses import Response

from layerstream.tools.serving.errors import ApiError

__all__ = ["EventStream", "Send"]

_LAST_EVENT_SECONDS = 1

Send = Callable[[Any], Awaitable[None]]  # its argument is sent as JSON


class EventStream(Response):
    """Sends the events that ``produce`` passes on, followed by "[DONE]".

    The status is sent with the first event, so an error before that becomes an ordinary response. A later error is sent
    as the last event.
    """

    media_type = "text/event-stream"

    def __init__(self, produce: Callable[[Send], Awaitable[None]]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._produce = produce

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        """Send the response."""
        del scope, receive
        started = False

        async def send_event(data: str, *, more: bool = True) -> None:
            nonlocal started
            if not started:
                started = True
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
            body = f"data: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            await self._produce(lambda content: send_event(_json(content)))
        except ApiError as error:
            if not started:
                raise
            with suppress(TimeoutError):  # a client that does not read must not block
                async with asyncio.timeout(_LAST_EVENT_SECONDS):
                    await send_event(_json(error.body), more=False)
        else:
            await send_event("[DONE]", more=False)


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
