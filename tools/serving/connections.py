"""uvicorn's connection of a client, with limits on how long a client may hold it, and errors in OpenAI's form."""

import asyncio
import json
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from layerstream.tools.serving.errors import ApiError

__all__ = ["Connection"]

# Time for the header of a request: from the beginning of the connection for the first one, else from its own beginning.
# Also for the rest of a body that is not read any more, since its request has been answered.
_WAIT_SECONDS = 30


class Connection(H11Protocol):
    """Closes when expected data does not come in time, and answers what is not HTTP with an error in OpenAI's form."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first header."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Handle data, and wait for the rest if it is incomplete."""
        super().data_received(data)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._expect_nothing()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer data that is not HTTP, or too long, with an error, and close."""
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

    def _expect(self) -> None:
        """Close the connection if the rest of a header, or of a dropped body, takes too long."""
        states = self.conn.our_state, self.conn.their_state
        if states[1] is not h11.IDLE and states != (h11.DONE, h11.SEND_BODY):
            self._expect_nothing()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(_WAIT_SECONDS, self.transport.close)

    def _expect_nothing(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
