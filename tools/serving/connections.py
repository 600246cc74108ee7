"""A client's connection: uvicorn's, with time limits, and errors in OpenAI's form."""

import asyncio
import json
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from layerstream.tools.serving.errors import ApiError

__all__ = ["Connection"]

# Time limit for the header of a request, from the beginning of the connection for the first one, else from its own
# first byte; also for the rest of a body whose request has been answered, and which is dropped.
_WAIT_SECONDS = 30


class Connection(H11Protocol):
    """Closes when expected data does not come in time, and answers invalid HTTP with an error in OpenAI's form."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the time limit for the first header."""
        super().connection_made(transport)
        self._update_deadline()

    def data_received(self, data: bytes) -> None:
        """Handle data, and start the time limit for the rest if it is incomplete."""
        super().data_received(data)
        self._update_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the time limit."""
        self._cancel_deadline()
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
