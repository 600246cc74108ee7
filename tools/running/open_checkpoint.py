"""Opens a checkpoint for a command, which signals can still end."""

import threading
from concurrent.futures import Future
from pathlib import Path

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint

__all__ = ["open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """``Checkpoint.open`` in another thread.

    Python handles signals in the main thread, and not while that is in a system call which a signal does not interrupt, such as a
    read of a network or FUSE filesystem that hangs. Waiting for another thread is interrupted.
    """
    opened: Future[Checkpoint] = Future()

    def read() -> None:
        try:
            opened.set_result(Checkpoint.open(path))
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            opened.set_exception(error)

    # A daemon, which Python does not wait for at exit.
    threading.Thread(target=read, name="layerstream-open", daemon=True).start()
    return opened.result()
