"""Which layer batches a forward pass is expected to visit."""

from collections.abc import Iterable

from layerstream.pipeline.scheduling.passes import Rider

__all__ = ["PassRoutes"]


class PassRoutes:
    """Expects that a pass visits what the last pass visited that was entered through the same module.

    A rider's own last pass counts first, then anybody's; before any, all layer batches are expected.

    Args:
        batches: indices of all layer batches that sweeps bring, in execution order.
    """

    def __init__(self, batches: Iterable[int]) -> None:
        self._all = tuple(batches)
        self._visited: dict[tuple[Rider | None, str], tuple[int, ...]] = {}
        self._entries: dict[Rider, str] = {}

    def begin(self, rider: Rider, entry: str) -> None:
        """``rider`` begins a pass through the module at ``entry``."""
        self._entries[rider] = entry

    def end(self, rider: Rider) -> None:
        """``rider`` has ended its pass."""
        self._entries.pop(rider, None)

    def remember(self, rider: Rider | None, entry: str, visited: tuple[int, ...]) -> None:
        """A pass of ``rider``, or of anybody, visited these batches."""
        self._visited[rider, entry] = visited

    def forget(self, rider: Rider) -> None:
        """Nothing more comes from ``rider``."""
        for key in [key for key in self._visited if key[0] is rider]:
            del self._visited[key]

    def expected(self, rider: Rider, index: int) -> list[int]:
        """What the pass of ``rider`` will visit from layer batch ``index`` on."""
        entry = self._entries[rider]
        route = self._visited.get((rider, entry)) or self._visited.get((None, entry), self._all)
        return sorted({index, *(other for other in route if other > index)})
