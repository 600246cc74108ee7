"""Which layer batches a forward pass is expected to visit."""

from collections.abc import Hashable, Iterable

import torch

__all__ = ["RoutePrediction", "route_name"]


class RoutePrediction:
    """Expects that a pass visits the same batches as the last pass that began in the same module.

    The last pass with the same key counts first, then the last one of any key; before any, all layer batches are
    expected. So they are for the rest of a pass that has wanted another batch than expected: which ones it will want is
    unknown by then, and a sweep for each would take far longer. A key identifies the source of a series of passes, such as a
    request.

    Args:
        batches: Indices of all layer batches that sweeps bring, in execution order.
    """

    def __init__(self, batches: Iterable[int]) -> None:
        self._all = tuple(batches)
        self._visited: dict[tuple[Hashable | None, str], tuple[int, ...]] = {}

    def remember(self, key: Hashable | None, entry: str, visited: tuple[int, ...]) -> None:
        """A pass of ``key``, or of any key if that is None, visited these batches."""
        self._visited[key, entry] = visited

    def forget(self, key: Hashable) -> None:
        """No more passes come from ``key``."""
        for known in [known for known in self._visited if known[0] is key]:
            del self._visited[known]

    def expected(self, key: Hashable, entry: str, index: int, *, is_surprising: bool) -> list[int]:
        """Indices of the batches that a pass of ``key`` will visit, from layer batch ``index`` on.

        ``is_surprising``: It has wanted a batch that was not expected.
        """
        known = self._visited.get((key, entry)) or self._visited.get((None, entry), self._all)
        route = self._all if is_surprising else known
        return sorted({index, *(other for other in route if other > index)})


def route_name(module: torch.nn.Module, entry: str) -> str:
    """What passes have in common that visit the same batches: where they begin, and how many layers they go through.

    transformers drafts tokens with a model's first layers by setting this number in its config for a while.
    """
    base = getattr(module, "base_model", module)
    layers = getattr(getattr(base, "config", None), "num_hidden_layers", None)
    return entry if layers is None else f"{entry} of {layers} layers"
