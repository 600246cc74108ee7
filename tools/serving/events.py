"""An answer that is sent while it is generated, as server-sent events."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from starlette import types
from starlette.responses import Response

from layerstream.tools.serving.errors import ApiError

__all__ = ["Events", "Send"]

_LAST_EVENT_SECONDS = 1

Send = Callable[[Any], Awaitable[None]]  # its argument is sent as JSON


class Events(Response):
    """The events that ``produce`` sends, and "[DONE]".

    The status is sent with the first event, so an error before that is an ordinary answer. A later one is an event of
    its own, and the last.
    """

    media_type = "text/event-stream"

    def __init__(self, produce: Callable[[Send], Awaitable[None]]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._produce = produce

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        """Send the answer."""
        del scope, receive
        started = False

        async def event(data: str, *, more: bool = True) -> None:
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
            await self._produce(lambda content: event(_json(content)))
        except ApiError as error:
            if not started:
                raise
            with suppress(TimeoutError):  # a client that does not read is not waited for
                async with asyncio.timeout(_LAST_EVENT_SECONDS):
                    await event(_json(error.body), more=False)
        else:
            await event("[DONE]", more=False)


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
