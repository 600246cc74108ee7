"""Which layer batches a forward pass is expected to visit."""

from collections.abc import Hashable, Iterable

__all__ = ["RoutePrediction"]


class RoutePrediction:
    """Expects that a pass visits what the last pass visited that was entered through the same module.

    The last pass with the same key counts first, then anybody's; before any, all layer batches are expected. A key
    stands for whoever makes passes one after the other, such as a request.

    Args:
        batches: Indices of all layer batches that sweeps bring, in execution order.
    """

    def __init__(self, batches: Iterable[int]) -> None:
        self._all = tuple(batches)
        self._visited: dict[tuple[Hashable | None, str], tuple[int, ...]] = {}
        self._entries: dict[Hashable, str] = {}

    def begin(self, key: Hashable, entry: str) -> None:
        """A pass of ``key`` begins through the module at ``entry``."""
        self._entries[key] = entry

    def end(self, key: Hashable) -> None:
        """The pass of ``key`` has ended."""
        self._entries.pop(key, None)

    def remember(self, key: Hashable | None, entry: str, visited: tuple[int, ...]) -> None:
        """A pass of ``key``, or of anybody, visited these batches."""
        self._visited[key, entry] = visited

    def forget(self, key: Hashable) -> None:
        """No more passes come from ``key``."""
        for known in [known for known in self._visited if known[0] is key]:
            del self._visited[known]

    def expected(self, key: Hashable, index: int) -> list[int]:
        """What the pass of ``key`` will visit from layer batch ``index`` on."""
        entry = self._entries[key]
        route = self._visited.get((key, entry)) or self._visited.get((None, entry), self._all)
        return sorted({index, *(other for other in route if other > index)})
