"""Processes that were forked from the one in which a model was opened."""

import os

from layerstream.stages.errors import ClosedError

__all__ = ["refuse_fork"]


def refuse_fork(owner: int) -> None:
    """Refuse to go on in a process that was forked from process ``owner``, whose threads are not in this one.

    Raises:
        ClosedError: This is another process.
    """
    if os.getpid() != owner:
        raise ClosedError(
            f"the model was opened in process {owner}, and this one was forked from it, without the threads that stream; "
            "open a model in each process, or start workers with multiprocessing's 'spawn'"
        )
