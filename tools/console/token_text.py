"""Text to token ids, and generated tokens to text, one by one."""

import re
import unicodedata
from pathlib import Path
from typing import Any

from layerstream.stages.errors import ModelError

__all__ = ["TerminalText", "TokenText", "has_tokenizer", "load_tokenizer", "prompt_ids"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

# A character takes at most four bytes in UTF-8: up to three may still lack their last byte. Tokenizers show each
# of them, or all together, as a replacement character.
_MAX_PENDING = 3
_REPLACEMENT = "\ufffd"

# Clean-up of spaces, where a tokenizer asks for it, changes at most so many characters at the end of a text: " n't" to "n't".
_MAX_MOVABLE = 3

# Byte-fallback tokenizers write rare characters as one token for each byte, and decode a run of such tokens as a whole:
# while a byte is missing, all of it are replacement characters.
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
# A run is held back until it ends, which few do after more characters than this: four or five.
_MAX_RUN = 16


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer is in ``folder``."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(path: Path, *, folder: Path | None = None) -> Any | None:
    """Load the transformers tokenizer of the model in ``path``: from its folder, or its GGUF file; None without one.

    ``folder``: One that has another tokenizer for it.
    """
    from layerstream.pipeline.checkpoint.files import refuse_special_files
    from layerstream.tools.running.open_checkpoint import open_checkpoint

    own = path if path.is_dir() else path.parent
    for each in {own, folder or own}:
        refuse_special_files(each)  # transformers would wait for ever
    checkpoint = open_checkpoint(path)
    in_file = checkpoint.format == "GGUF" and folder is None
    folder = folder or own
    if not in_file and not has_tokenizer(folder):
        return None
    try:
        from transformers import AutoTokenizer

        from layerstream.pipeline.modeling.gguf_reading import load_gguf_tokenizer
    except ImportError as error:
        raise ModelError("Text needs transformers: pip install 'layerstream[hf]'.") from error
    try:
        return load_gguf_tokenizer(checkpoint) if in_file else AutoTokenizer.from_pretrained(folder)
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises nothing more special
        where = path if in_file else folder
        raise ModelError(f"The tokenizer in {where} cannot be loaded: {error}") from error


def prompt_ids(tokenizer: Any | None, prompt: str, path: Path) -> list[int]:
    """The token ids of ``prompt``."""
    if tokenizer is None:
        raise ModelError(f"{path} has no tokenizer for a text prompt; give --prompt-ids instead.")
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ModelError("The prompt has no tokens; give one with text, or --prompt-ids.")
    return ids


class TokenText:
    """Turns tokens into text one by one, holding back text that later tokens may still change.

    The joined pieces equal the tokenizer's text of all tokens at once, without special tokens. Unknown ids have no
    text. Long runs of single bytes are cut between characters; what is text in one part of a run then stays text, even
    if another part is not.

    Args:
        tokenizer: A tokenizer of transformers.
        special: Special tokens have text, too.
    """

    def __init__(self, tokenizer: Any, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._vocabulary_size = len(tokenizer)
        self._special_ids = frozenset(() if special else tokenizer.all_special_ids)
        self._in_run = False  # whether the last token, special ones aside, was a byte
        # The last tokens whose text is final, followed by those whose text is not. Decoding both together
        # keeps the spaces that a tokenizer drops at the beginning of a text.
        self._ids: list[int] = []
        self._final_count = 0
        self._emitted = 0  # characters of the non-final text that were returned

    def add(self, token: int) -> str:
        """Add ``token``; returns the text that is now complete."""
        if token >= self._vocabulary_size:
            return ""
        self._ids.append(token)
        if self._goes_on_run(token):
            return self._cut_run() if len(self._ids) - self._final_count >= _MAX_RUN else ""
        text = self._pending_text()
        end = len(text) - max(_incomplete_length(text), self._movable_length(text))
        if text and end == len(text):
            return self._finalize(text)
        piece = text[self._emitted : end]
        self._emitted += len(piece)
        return piece

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._finalize(self._pending_text())

    def _goes_on_run(self, token: int) -> bool:
        """Whether a run of byte tokens begins or goes on with ``token``. Special tokens have no text, and end none."""
        if token not in self._special_ids:
            name = str(self._tokenizer.convert_ids_to_tokens(token))
            self._in_run = _BYTE_TOKEN.fullmatch(name) is not None
        return self._in_run

    def _movable_length(self, text: str) -> int:
        """The number of characters at the end from a space on that clean-up may remove when more text comes."""
        if not self._tokenizer.clean_up_tokenization_spaces:
            return 0
        end = text[-_MAX_MOVABLE:]
        return len(end) - end.find(" ") if " " in end else 0

    def _cut_run(self) -> str:
        """Return the text up to the last character that is complete; all of it if none is."""
        ids = self._ids
        for incomplete in range(_MAX_PENDING + 1):
            end = len(ids) - incomplete
            self._ids = ids[:end]
            text = self._pending_text()
            if not text.endswith(_REPLACEMENT):
                break
        else:
            end = len(ids)
            self._ids = ids
            text = self._pending_text()
        piece = text[self._emitted :]
        # The rest is decoded without the part before, which would make a replacement character of each of its bytes. But
        # it does not begin the text, where spaces would be dropped.
        before = (
            ids[: self._final_count] or self._tokenizer("a", add_special_tokens=False).input_ids
        )
        self._ids, self._final_count, self._emitted = [*before, *ids[end:]], len(before), 0
        return piece

    def _pending_text(self) -> str:
        before = self._decode(self._ids[: self._final_count])
        return self._decode(self._ids)[len(before) :]

    def _finalize(self, text: str) -> str:
        piece = text[self._emitted :]
        self._ids = self._ids[self._final_count :] or self._ids
        self._final_count, self._emitted = len(self._ids), 0
        return piece

    def _decode(self, ids: list[int]) -> str:
        return (
            str(self._tokenizer.decode(ids, skip_special_tokens=not self._special)) if ids else ""
        )


class TerminalText:
    """``TokenText`` for a terminal: shows unknown ids as ``<id>``, and replaces control characters.

    Without a tokenizer, every id is unknown.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._text = None if tokenizer is None else TokenText(tokenizer)
        self._vocabulary_size = 0 if tokenizer is None else len(tokenizer)

    def add(self, token: int) -> str:
        """Add ``token``; returns the text that is now complete."""
        if self._text is None or token >= self._vocabulary_size:
            return f"{self.finish()}<{token}>"
        return _printable(self._text.add(token))

    def finish(self) -> str:
        """Return the text that was held back."""
        return "" if self._text is None else _printable(self._text.finish())


def _incomplete_length(text: str) -> int:
    """The number of characters at the end that may be bytes of an incomplete one."""
    end = text[-_MAX_PENDING:]
    return len(end) - len(end.rstrip(_REPLACEMENT))


def _printable(text: str) -> str:
    return "".join(_REPLACEMENT if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    return unicodedata.category(character) == "Cc" and character not in "\n\t"
