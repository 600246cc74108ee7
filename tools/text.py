"""Prompts to token ids, and token ids to text as they come."""

import unicodedata
from pathlib import Path
from typing import Any

from layerstream.stages.errors import ModelError

__all__ = ["TokenText", "load_tokenizer", "prompt_ids"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

# A character takes four bytes at most in UTF-8; what is not one by then never will be.
_MAX_PENDING = 4


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
    """Turns tokens into text one by one, holding back a character until all its bytes are there.

    An id that the tokenizer doesn't know, or any id where there is no tokenizer, is shown as
    ``<id>``; control characters never reach the terminal.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._known = 0 if tokenizer is None else len(tokenizer)
        # The last tokens whose text was given out, and behind them those that wait. Decoding both
        # together keeps the spaces that a tokenizer drops at the beginning of a text.
        self._ids: list[int] = []
        self._given = 0

    def add(self, token: int) -> str:
        """The text that ``token`` completes."""
        if token >= self._known:
            return f"{self.finish()}<{token}>"
        self._ids.append(token)
        text = self._text()
        if text.endswith("\ufffd") and len(self._ids) - self._given < _MAX_PENDING:
            return ""
        return self._give(text)

    def finish(self) -> str:
        """The text of the tokens that still wait."""
        return self._give(self._text()) if len(self._ids) > self._given else ""

    def _text(self) -> str:
        before, now = self._decode(self._ids[: self._given]), self._decode(self._ids)
        return now[len(before) :]

    def _give(self, text: str) -> str:
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return "".join("\ufffd" if _is_control(character) else character for character in text)

    def _decode(self, ids: list[int]) -> str:
        if self._tokenizer is None or not ids:
            return ""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _is_control(character: str) -> bool:
    return unicodedata.category(character) == "Cc" and character not in "\n\t"
