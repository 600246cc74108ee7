"""One connection of a client, as uvicorn reads it, but for those who would hold it for ever or say nonsense."""

import asyncio
import json
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from layerstream.tools.serving.errors import ApiError

__all__ = ["Connection"]

# The head of a request is there within this time: of the connection's beginning if it is the first, else of its own.
# So is the rest of a body that nobody reads, since its request has had an answer.
_WAIT_SECONDS = 30


class Connection(H11Protocol):
    """Closes when what it waits for does not come in time; answers what is not HTTP with an error like any other."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has come."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """He has said something."""
        super().data_received(data)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """He has left."""
        self._expect_nothing()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What has come is not HTTP, or too much of it: say so, and close."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is under way
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

    def _expect(self) -> None:
        """Have the connection closed if the rest of a head, or of what is dropped, is long in coming."""
        states = self.conn.our_state, self.conn.their_state
        if states[1] is not h11.IDLE and states != (h11.DONE, h11.SEND_BODY):
            self._expect_nothing()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(_WAIT_SECONDS, self.transport.close)

    def _expect_nothing(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
