"""The HTTP server: uvicorn, with a shutdown that leaves time to close the model."""

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

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Time limit for clients that do not read the final error.
_FINAL_ERROR_SECONDS = 3


class Server(uvicorn.Server):
    """Serves ``app`` on ``listener`` until a signal comes, and then gives running requests some time."""

    def __init__(self, app: FastAPI, listener: socket.socket, args: argparse.Namespace) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                access_log=not args.no_access_log,
                http=Connection,
                lifespan="off",  # the model is opened and closed outside the server
                log_config=None,
                server_header=False,
                timeout_graceful_shutdown=args.shutdown_seconds + _FINAL_ERROR_SECONDS,
                ws="none",
            )
        )
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self._answers = app.state.answers
        self._listener = listener
        self._shutdown_seconds = args.shutdown_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and log the address."""
        await super().startup(sockets)
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
        asyncio.get_running_loop().call_later(self._shutdown_seconds, self._answers.stop)
