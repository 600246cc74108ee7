"""What an expert store fills its cells with."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from layerstream.stages.experts.cells import Cell
from layerstream.stages.experts.expert_set import ExpertSet

__all__ = ["ExpertLoader"]


class ExpertLoader(Protocol):
    """Brings experts into cells. Its methods may be called from any thread."""

    @property
    def nbytes(self) -> int:
        """How many bytes have been read from files so far."""

    def demand(self, set_index: int, experts: Sequence[int]) -> None:
        """A pass needs ``experts``, ascending, of which no cell holds any; it takes them in groups."""

    def begin(self, cell: Cell, experts: ExpertSet, expert: int) -> Sequence[Future[None]]:
        """Begin to bring ``expert`` into ``cell``, which nobody else writes to until all of the result is done."""

    def abandon(self, error: Callable[[], BaseException]) -> bool:
        """Fail what is in progress, and wait for none of it any more; whether there is any. See ``Threads``."""

    def close(self) -> None:
        """Wait for what has begun and was not abandoned."""
