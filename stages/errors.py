"""The exceptions of layerstream.

    LayerstreamError
    ├── CheckpointError     weight files missing, truncated, corrupt or inconsistent
    │   └── ReadError       a read of weights failed while they were streamed
    ├── PlanError           no plan fits the budget, or a plan cannot be used here
    ├── DeviceError         a device is not there, or refuses memory
    ├── ModelError          the model cannot be built, or does not match its checkpoint
    ├── AdmissionError      a request needs more memory than there is for requests
    ├── BusyError           a second sweep was requested while one is under way
    └── ClosedError         used before it was opened or after it was closed

Every message names what was needed, what was available and what to do, in one sentence or two. Errors that
arise inside a stage leave it as themselves, with a note that names the stage and the layer batch.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from layerstream.stages.batch import layers_label

__all__ = [
    "AdmissionError",
    "BusyError",
    "CheckpointError",
    "ClosedError",
    "DeviceError",
    "LayerstreamError",
    "ModelError",
    "PlanError",
    "ReadError",
]


class LayerstreamError(Exception):
    """The base of every exception that layerstream raises on purpose."""


class CheckpointError(LayerstreamError):
    """Raised when weight files are missing, truncated, corrupt or contradict one another."""


class ReadError(CheckpointError):
    """Raised when reading weights fails while they are streamed: an I/O error, or a file that shrank."""


class PlanError(LayerstreamError):
    """Raised when no plan fits the budget, or when a plan does not fit the machine or the files.

    Args:
        message: What is wrong, and what to do.
        needed_bytes: The least budget that a plan fits, of the memory that is too small; None if that is not the reason.
    """

    def __init__(self, message: str = "", *, needed_bytes: int | None = None) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class DeviceError(LayerstreamError):
    """Raised when a device is not there or does not give the memory that the plan counts on."""


class ModelError(LayerstreamError):
    """Raised when a model cannot be built, or when it does not match its checkpoint."""


class AdmissionError(LayerstreamError):
    """Raised when a request can never be served: it needs more memory than the plan leaves for requests."""


class BusyError(LayerstreamError):
    """Raised when a second sweep is requested while one is under way on the same pipeline."""


class ClosedError(LayerstreamError):
    """Raised when a pipeline or model is used before it was opened or after it was closed."""


def copy_of(error: BaseException) -> BaseException:
    """``error`` for one more caller: one object that is raised repeatedly collects tracebacks, notes, and what they refer to."""
    try:
        copied = copy.copy(error)
    except Exception:  # noqa: BLE001 - it cannot be made from the arguments that it keeps
        return ClosedError(f"streaming has failed before: {error}")
    copied.__cause__ = error.__cause__
    if notes := getattr(error, "__notes__", ()):
        copied.__notes__ = [*notes]
    return copied


def echo_of(error: BaseException) -> ClosedError:
    """A new error for each caller that comes after ``error``, which was not raised itself and has no traceback."""
    if isinstance(error, ClosedError):
        return ClosedError(*error.args)
    echo = ClosedError(f"streaming has failed before: {error}")
    echo.__cause__ = error
    return echo


class _AnyBatch(Protocol):
    """A layer batch, planned or arrived."""

    @property
    def index(self) -> int: ...
    @property
    def layers(self) -> tuple[str, ...]: ...


@contextmanager
def annotated(stage: str, batch: _AnyBatch) -> Iterator[None]:
    """Add the stage and the layer batch to an error raised in the body, as a note."""
    try:
        yield
    except Exception as error:
        where = f"layer batch {batch.index} ({layers_label(batch.layers)})"
        error.add_note(f"layerstream: in the {stage} stage, at {where}")
        raise
