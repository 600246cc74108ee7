"""The HTTP server: uvicorn, with a shutdown that leaves time to close the model."""

import argparse
import asyncio
import errno
import functools
import logging
import resource
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from layerstream.tools.serving.connections import Connection

__all__ = ["Server"]

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Time limit for clients that do not read the final error; uvicorn's own, which ends in an error in the log, is longer.
_FINAL_ERROR_SECONDS = 2
_LAST_SECONDS = 5

# So many connections are accepted at a time. asyncio accepts as many as it queues, and an error for want of descriptors as often:
# with uvicorn's 2048, seventy thousand lines came in three seconds, and no answer.
_ACCEPTED_AT_ONCE = 2
_QUEUED = 2048
# Descriptors that connections leave for files of the model that are reopened, and for connections that are being accepted and closed.
_SPARE_DESCRIPTORS = 64
_FEWEST_CONNECTIONS = 8
# Between two lines on descriptors in the log.
_QUIET_SECONDS = 60
# asyncio tries to accept again after a second, and shortens the queue.
_QUEUE_AGAIN_SECONDS = 1.5


class Server(uvicorn.Server):
    """Serves ``app`` on ``listener`` until a signal comes, and then gives running requests some time."""

    def __init__(self, app: FastAPI, listener: socket.socket, args: argparse.Namespace) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                access_log=not args.no_access_log,
                backlog=_ACCEPTED_AT_ONCE,
                http=functools.partial(Connection, most=_most_connections()),  # type: ignore[arg-type]  # makes one
                lifespan="off",  # the model is opened and closed outside the server
                log_config=None,
                server_header=False,
                timeout_graceful_shutdown=args.shutdown_seconds + _LAST_SECONDS,
                ws="none",
            )
        )
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self._answers = app.state.answers
        self._listener = listener
        self._shutdown_seconds = args.shutdown_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and log the address."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_LoopErrors(self._listener))
        await super().startup(sockets)
        self._listener.listen(_QUEUED)
        host, port = self._listener.getsockname()[:2]
        logger.info("ready on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Make signals end the server only.

        uvicorn raises the signal again at the end, which would end the process with the model open.
        """
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        yield

    def _on_signal(self) -> None:
        self.should_exit = True
        # A second signal ends the process, also if a read hangs for ever, which no code of ours could end.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        logger.info(
            "shutting down: running requests may finish for %d s; a second signal ends them at once",
            self._shutdown_seconds,
        )
        loop = asyncio.get_running_loop()
        loop.call_later(self._shutdown_seconds, self._answers.stop)
        loop.call_later(self._shutdown_seconds + _FINAL_ERROR_SECONDS, self._break_connections)

    def _break_connections(self) -> None:
        """Leave clients that have not read what was sent to them."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _most_connections() -> int:
    """The number of connections for which there are descriptors, with those that are open now."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    limit = 1 << 20 if limit == resource.RLIM_INFINITY else limit
    taken = sum(1 for _ in Path("/dev/fd").iterdir())
    return max(limit - taken - _SPARE_DESCRIPTORS, _FEWEST_CONNECTIONS)


class _LoopErrors:
    """An event loop's exception handler: when no connection can be accepted, it has one line, once in a while."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._quiet_until_seconds = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        out = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
        if not isinstance(error, OSError) or error.errno not in out or "socket" not in context:
            loop.default_exception_handler(context)
            return
        loop.call_later(_QUEUE_AGAIN_SECONDS, self._queue_again)
        if loop.time() >= self._quiet_until_seconds:
            self._quiet_until_seconds = loop.time() + _QUIET_SECONDS
            logger.warning("connections wait, since none can be accepted: %s", error.strerror)

    def _queue_again(self) -> None:
        if self._listener.fileno() >= 0:  # it is open
            self._listener.listen(_QUEUED)
