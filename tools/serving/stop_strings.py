"""Finds the strings that end a text while it is generated in pieces."""

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Passes text on up to the first stop string, holding back a possible beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.string: str | None = None  # the one that was found

    @property
    def found(self) -> bool:
        """Whether the text has a stop string."""
        return self.string is not None

    def add(self, piece: str) -> str:
        """Add ``piece``; returns the text that cannot be part of a stop string."""
        text = self._held + piece
        found = [(position, stop) for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            position, self.string = min(found)
            self._held = ""
            return text[:position]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return the text that was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of ``text`` that are a proper prefix of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
