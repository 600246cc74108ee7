"""Prompts to token ids, and token ids to text as they come."""

import unicodedata
from pathlib import Path
from typing import Any

from layerstream.stages.errors import ModelError

__all__ = ["TerminalText", "TokenText", "load_tokenizer", "prompt_ids"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

# A character takes four bytes at most in UTF-8: up to three may wait for the next, and a tokenizer shows
# each of them, or all, as a replacement character.
_MAX_PENDING = 3


def load_tokenizer(path: Path) -> Any | None:
    """The transformers tokenizer beside the weights at ``path``, or None where there is none."""
    folder = path if path.is_dir() else path.parent
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelError("Text needs transformers: pip install 'layerstream[hf]'.") from error
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"The tokenizer in {folder} cannot be loaded: {error}") from error


def prompt_ids(tokenizer: Any | None, prompt: str, path: Path) -> list[int]:
    """The token ids of ``prompt``."""
    if tokenizer is None:
        raise ModelError(f"{path} has no tokenizer for a text prompt; give --prompt-ids instead.")
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ModelError("The prompt has no tokens; give one with text, or --prompt-ids.")
    return ids


class TokenText:
    """Turns tokens into text one by one, holding back what later tokens may still change.

    The pieces joined are what the tokenizer makes of all tokens at once, without special ones. An id that
    it doesn't know has no text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known = len(tokenizer)
        # The last tokens whose text is settled, and behind them those whose text is not. Decoding both
        # together keeps the spaces that a tokenizer drops at the beginning of a text.
        self._ids: list[int] = []
        self._settled = 0
        self._given = 0  # characters of the latter's text that were given out

    def add(self, token: int) -> str:
        """The text that ``token`` completes."""
        if token >= self._known:
            return ""
        self._ids.append(token)
        text = self._text()
        end = len(text) - _unfinished(text)
        if text and end == len(text):
            return self._give(text)
        piece = text[self._given : end]
        self._given += len(piece)
        return piece

    def finish(self) -> str:
        """The text of the tokens that still wait."""
        return self._give(self._text())

    def _text(self) -> str:
        before = self._decode(self._ids[: self._settled])
        return self._decode(self._ids)[len(before) :]

    def _give(self, text: str) -> str:
        piece = text[self._given :]
        self._ids = self._ids[self._settled :] or self._ids
        self._settled, self._given = len(self._ids), 0
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


class TerminalText:
    """The same for people to look at: unknown ids are shown as ``<id>``, control characters are not sent.

    Without a tokenizer, every id is unknown.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._text = None if tokenizer is None else TokenText(tokenizer)
        self._known = 0 if tokenizer is None else len(tokenizer)

    def add(self, token: int) -> str:
        """The text that ``token`` completes."""
        if self._text is None or token >= self._known:
            return f"{self.finish()}<{token}>"
        return _printable(self._text.add(token))

    def finish(self) -> str:
        """The text of the tokens that still wait."""
        return "" if self._text is None else _printable(self._text.finish())


def _unfinished(text: str) -> int:
    """How many characters at the end may be bytes of one that is not all there."""
    end = text[-_MAX_PENDING:]
    return len(end) - len(end.rstrip("\ufffd"))


def _printable(text: str) -> str:
    return "".join("\ufffd" if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    return unicodedata.category(character) == "Cc" and character not in "\n\t"
