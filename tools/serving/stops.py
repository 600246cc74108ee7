"""Strings that end a text, found while it comes in pieces."""

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Gives text on up to the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """The text that is sure to be no part of a stop string, now that ``piece`` has come."""
        text = self._held + piece
        at = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if at is not None:
            self.found, self._held = True, ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What is held back, where nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``stop``, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
