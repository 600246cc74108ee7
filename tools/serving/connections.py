"""A client's connection: uvicorn's, with time limits, and errors in OpenAI's form."""

import asyncio
import json
import select
import socket
import sys
from http import HTTPStatus
from typing import Any

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from layerstream.tools.serving.errors import ApiError

__all__ = ["HALF_CLOSED", "Connection", "Expecting"]

HALF_CLOSED = "half_closed"
"""Names, in the state of a request's scope, the event that its client sends no more, and may have left."""

# Time limit for the header of a request, from the beginning of the connection for the first one, else from its own
# first byte; also for the rest of a body whose request has been answered, and which is dropped.
_WAIT_SECONDS = 30
# Time limit for a client that reads nothing of what waits for it: an answer that cannot be sent keeps its memory, which others
# wait for. The kernel measures it, and asks a client that has vanished meanwhile.
_UNREAD_SECONDS = 60
# How often a client that has closed its side is looked at, which nothing else tells about once it has.
_LOOK_SECONDS = 0.1


class Connection(H11Protocol):
    """Closes when expected data does not come in time, and answers invalid HTTP with an error in OpenAI's form.

    A client may close its side when it has sent its requests, as `nc -N` does, and gets its answers. Whether it has left for good
    shows only when something is sent to it: see ``HALF_CLOSED``.

    Args:
        most: Maximum number of connections. One more closes the one that has been idle for the longest, or itself if all are
            answered.
        options: See H11Protocol.
    """

    _deadline: asyncio.TimerHandle | None = None
    _look: asyncio.TimerHandle | None = None

    def __init__(self, *, most: int, **options: Any) -> None:
        super().__init__(**options)
        self._most = most
        self.idle_since_seconds = self.loop.time()

    def connection_made(self, transport: Any) -> None:
        """Start the time limit for the first header."""
        super().connection_made(transport)
        if len(self.connections) > self._most:
            self._make_room()
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            limit = round(_UNREAD_SECONDS * 1000)
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit)
        self._update_deadline()

    def data_received(self, data: bytes) -> None:
        """Handle data, and start the time limit for the rest if it is incomplete."""
        super().data_received(data)
        self._update_deadline()

    def handle_events(self) -> None:
        """Handle what has come; a request knows whether its client sends more."""
        super().handle_events()
        if self.scope is not None:
            event = self.scope["state"].setdefault(HALF_CLOSED, asyncio.Event())
            if self._look is not None:
                event.set()

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn always closes
        """Stay open if a request is complete and its answer is not."""
        if not self.answering:
            return False
        if self._look is None:
            self.scope["state"][HALF_CLOSED].set()
            self._look_again(select.poll())
        return True

    def on_response_complete(self) -> None:
        """Go on with the next request, if there is one."""
        self.idle_since_seconds = self.loop.time()
        super().on_response_complete()
        if self._look is not None and not self.answering:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the time limits."""
        self._cancel_deadline()
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer invalid or too long HTTP with an error, and close."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is being sent
            self.transport.close()
            return
        body = json.dumps(ApiError(status, f"{msg} {error}", code="invalid_http").body).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        headers.append(("Connection", "close"))
        reason = HTTPStatus(status).phrase.encode()
        answer = h11.Response(status_code=status, headers=headers, reason=reason)
        for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def answering(self) -> bool:
        """Whether a request has come whose answer is incomplete."""
        cycle = self.cycle
        return cycle is not None and not (cycle.more_body or cycle.response_complete)

    def _make_room(self) -> None:
        idle = [
            each for each in self.connections if isinstance(each, Connection) and not each.answering
        ]
        oldest = min(idle, key=lambda each: each.idle_since_seconds)  # there is this one itself
        self.connections.discard(oldest)
        oldest.transport.abort()

    def _look_again(self, poll: "select.poll") -> None:
        """Break the connection if the client has, which asyncio does not notice once it has stopped reading."""
        number = self.transport.get_extra_info("socket").fileno()
        poll.register(number, 0)  # errors only
        if number < 0 or poll.poll(0):
            self.transport.abort()
        else:
            self._look = self.loop.call_later(_LOOK_SECONDS, self._look_again, poll)

    def _update_deadline(self) -> None:
        """Start or cancel the time limit: it runs while a header, or a body that is dropped, is incomplete."""
        states = self.conn.our_state, self.conn.their_state
        if states[1] is not h11.IDLE and states != (h11.DONE, h11.SEND_BODY):
            self._cancel_deadline()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(_WAIT_SECONDS, self.transport.close)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Expecting:
    """Middleware that closes the connection after a request with "Expect: 100-continue" whose body was not asked for.

    Its client may send the body nevertheless, or the next request: nobody could tell which (RFC 9110, 10.1.1).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        waits = scope["type"] == "http" and "expect" in Headers(scope=scope)

        async def ask() -> Message:
            nonlocal waits
            waits = False
            return await receive()

        async def send_with_header(message: Message) -> None:
            if waits and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self._app(scope, ask, send_with_header)
