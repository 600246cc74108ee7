"""uvicorn, with an end that leaves time to close the model."""

import argparse
import asyncio
import logging
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from layerstream.tools.serving.connections import Connection

__all__ = ["Server"]

logger = logging.getLogger(__name__)

# For whoever does not even take the news that it is over, because he does not read.
_LAST_SECONDS = 3


class Server(uvicorn.Server):
    """Serves ``app`` on ``listener`` until a signal comes, and then lets what runs finish for a while."""

    def __init__(self, app: FastAPI, listener: socket.socket, args: argparse.Namespace) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                access_log=not args.no_access_log,
                http=Connection,
                lifespan="off",  # the model's life is around the server's
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
        """Begin to listen, and say where."""
        await super().startup(sockets)
        host, port = self._listener.getsockname()[:2]
        logger.info("ready on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Have signals end the server, and nothing else.

        uvicorn's own way raises the signal again when it is done: the process would end with the model open.
        So the loop keeps the handlers for as long as it runs.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        yield

    def _on_signal(self) -> None:
        if self.should_exit:  # asked twice: at once, then
            self._answers.stop()
            return
        self.should_exit = True
        logger.info("shutting down: what runs may finish for %d s", self._shutdown_seconds)
        asyncio.get_running_loop().call_later(self._shutdown_seconds, self._answers.stop)
