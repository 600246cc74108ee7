"""What is wrong with the files of a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerstream.stages.errors import CheckpointError

__all__ = ["Problems"]


class Problems:
    """Collects errors: of several broken shards all are named, not the first alone."""

    def __init__(self) -> None:
        self._found: list[CheckpointError] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note a CheckpointError of the block, and go on."""
        try:
            yield
        except CheckpointError as error:
            self._found.append(error)

    def raise_all(self, path: Path) -> None:
        """Raise what was noted, if anything was.

        Raises:
            CheckpointError: The one that was noted, or one that says what all of them say.
        """
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            each = "; ".join(str(error).rstrip(".") for error in self._found)
            raise CheckpointError(f"{len(self._found)} files of {path} cannot be used: {each}.")
