"""A tokenizer whose tokens are the 256 bytes, for models with random weights."""

from typing import Any

__all__ = ["BOS", "EOS", "PAD", "VOCAB_SIZE", "tokenizer_files"]

BOS, EOS, PAD = 256, 257, 258
VOCAB_SIZE = 259

_SPECIAL = {"<s>": BOS, "</s>": EOS, "<pad>": PAD}


def tokenizer_files() -> dict[str, dict[str, Any]]:
    """The contents of ``tokenizer.json`` and ``tokenizer_config.json`` by file name, as transformers reads them."""
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": index,
                    "content": token,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for token, index in _SPECIAL.items()
            ],
            "normalizer": None,
            "pre_tokenizer": _byte_level(),
            "post_processor": None,
            "decoder": _byte_level(),
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {character: byte for byte, character in enumerate(_byte_characters())}
                | _SPECIAL,
                "merges": [],
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 8192,
        },
    }


def _byte_level() -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }


def _byte_characters() -> list[str]:
    """The printable character for each byte in byte-level vocabularies, as in GPT-2.

    Printable Latin-1 bytes are represented by themselves, the others by characters from 256 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)}
    printable |= set(range(ord("®"), ord("ÿ") + 1))
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
