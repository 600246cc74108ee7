"""The state of one runner and its pass, and each change of it; what the changes mean to others: see ``pass_states``."""

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from layerstream.pipeline.modeling.binding import Bound
from layerstream.pipeline.scheduling.passes import PassRunner

__all__ = ["PassPhase", "PassState", "fail_future"]


class PassPhase(Enum):
    """What a runner is doing."""

    IDLE = auto()
    """None of these: its pass is between two batches, or it has none."""
    EXPECTED = auto()
    """It is between two passes, and the next one is expected shortly."""
    WAITING = auto()
    """Its pass waits for a layer batch."""
    COMPUTING = auto()
    """Its pass holds a layer batch, and computes with it."""
    AWAITING_EXPERTS = auto()
    """Its pass holds a layer batch, but waits for experts."""


_HOLDING = (PassPhase.COMPUTING, PassPhase.AWAITING_EXPERTS)


@dataclass(slots=True, eq=False)
class PassState:
    """The state of a runner, and of its pass if one is under way."""

    runner: PassRunner
    phase: PassPhase = PassPhase.IDLE
    has_request: bool = False
    """Whether its request has begun, and not ended."""
    entry: str = ""
    """Where the pass began."""
    is_surprising: bool = False
    """Whether the pass has wanted a batch that was not expected."""
    index: int = -1
    """The layer batch that the pass waits for."""
    future: Future[Bound] | None = None
    """Gets that batch."""
    route: list[int] | None = None
    """The batches of the sweep under way that the pass may still want; None if it takes no part in the sweep."""

    @property
    def holds(self) -> bool:
        """Whether the pass holds a layer batch."""
        return self.phase in _HOLDING

    def expect(self) -> None:
        """Expect the next pass shortly, unless it has to wait for its turn, which may take sweeps."""
        if self.has_request and self.runner.turn is None and not self.runner.cancelled:
            self.phase = PassPhase.EXPECTED

    def expect_no_more(self) -> None:
        """The next pass is not expected shortly any more."""
        if self.phase is PassPhase.EXPECTED:
            self.phase = PassPhase.IDLE

    def begin(self, entry: str) -> None:
        """A pass begins."""
        self.entry, self.is_surprising = entry, False

    def wait(self, index: int, future: Future[Bound]) -> None:
        """Wait for layer batch ``index``, which ``future`` gets."""
        self.phase, self.index, self.future = PassPhase.WAITING, index, future
        if self.route is not None and index in self.route:
            self.route = [other for other in self.route if other >= index]
        elif self.route is not None:
            self.route = None  # this sweep does not bring it: join the next one
            self.is_surprising = True

    def compute(self, bound: Bound) -> None:
        """Get the layer batch."""
        assert self.future is not None and self.route is not None  # noqa: PT018, S101 - it waits in the sweep
        self.phase = PassPhase.COMPUTING
        self.route.remove(self.index)
        self.future.set_result(bound)

    def await_experts(self) -> None:
        """Keep the batch, but do not compute."""
        if self.phase is PassPhase.COMPUTING:
            self.phase = PassPhase.AWAITING_EXPERTS

    def go_on(self) -> None:
        """Compute again."""
        if self.phase is PassPhase.AWAITING_EXPERTS:
            self.phase = PassPhase.COMPUTING

    def release(self) -> None:
        """Give the batch back."""
        if self.holds:
            self.phase = PassPhase.IDLE

    def leave(self) -> None:
        """Neither wait for a batch nor hold one, nor want one in this sweep."""
        self.phase, self.future, self.route = PassPhase.IDLE, None, None

    def fail(self, error: BaseException) -> None:
        """Fail while waiting for a batch."""
        assert self.future is not None  # noqa: S101 - it waits
        fail_future(self.future, error)
        self.leave()


def fail_future(future: Future[Any], error: BaseException) -> None:
    """Let ``future`` end with ``error``, unless it has ended."""
    with suppress(InvalidStateError):
        future.set_exception(error)
