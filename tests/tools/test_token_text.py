"""Text comes token by token, and joined it is the text of all tokens at once."""

import sys
import unicodedata
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstream.tools.console.token_text import TokenText

tokenizers = pytest.importorskip("tokenizers", reason="needs layerstream[hf]")
transformers = pytest.importorskip("transformers", reason="needs layerstream[hf]")

WORDS = ["▁", "a", "▁a", "n", "t", "m", "ve", "▁ein", "é", "\ufffd", "'", "s", "."]
_ASSIGNED = [
    chr(code)
    for code in range(sys.maxunicode + 1)
    if unicodedata.category(chr(code)) not in {"Cn", "Cs"}
]


def fallback_tokenizer(**options: Any) -> Any:
    """A tokenizer like Llama 2's: characters that are no words are written as one token for each byte."""
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    decoders = tokenizers.decoders
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {name: index for index, name in enumerate(names)}, [], byte_fallback=True
        )
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    options = {"unk_token": "<unk>", "eos_token": "</s>"} | options
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **options)


FALLBACK = fallback_tokenizer()
CLEANING = fallback_tokenizer(
    clean_up_tokenization_spaces=True,
    clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
)
END = FALLBACK.convert_tokens_to_ids("</s>")


def tokens_of(text: str) -> list[int]:
    """The token of each byte of ``text``."""
    return [FALLBACK.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]


def pieces_of(tokenizer: Any, tokens: list[int]) -> list[str]:
    stream = TokenText(tokenizer)
    return [*map(stream.add, tokens), stream.finish()]


flat = chain.from_iterable
characters = st.sampled_from(_ASSIGNED)
words = st.sampled_from(WORDS).map(lambda word: [FALLBACK.convert_tokens_to_ids(word)])


@given(characters, characters, st.lists(words, max_size=2), st.lists(words, max_size=2))
def test_any_two_characters_that_are_written_as_bytes_come_out_as_themselves(
    first: str, second: str, before: list[list[int]], after: list[list[int]]
) -> None:
    tokens = [*flat(before), *tokens_of(first + second), *flat(after)]
    text = "".join(pieces_of(FALLBACK, tokens))
    assert text == FALLBACK.decode(tokens, skip_special_tokens=True)
    assert (first + second).lstrip(" ") in text


some = st.one_of(characters.map(tokens_of), words, st.just([END]), st.just([len(FALLBACK)]))


@pytest.mark.parametrize("tokenizer", [FALLBACK, CLEANING], ids=["plain", "cleaning up"])
# Of at most 16 bytes: longer runs come in parts, of which only one is lost to a byte that is no text.
@given(parts=st.lists(some, max_size=4), cut=st.integers(0, 3))
def test_joined_pieces_are_the_text_of_all_tokens_at_once(
    tokenizer: Any, parts: list[list[int]], cut: int
) -> None:
    tokens = list(flat(parts))
    tokens = tokens[: max(0, len(tokens) - cut)]
    known = [token for token in tokens if token < len(tokenizer)]
    whole = tokenizer.decode(known, skip_special_tokens=True)
    assert "".join(pieces_of(tokenizer, tokens)) == whole


def test_a_long_text_of_bytes_comes_in_parts_of_a_few_tokens() -> None:
    text = "한국어 문장은 여기에서 길게 이어집니다" * 4
    pieces = pieces_of(FALLBACK, tokens_of(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 16
    # A byte that is no text costs only its part of the run.
    broken = tokens_of(text) + tokens_of("é")[:1] + tokens_of(text)
    assert "".join(pieces_of(FALLBACK, broken)).replace("\ufffd", "").count("한국어") >= 7
