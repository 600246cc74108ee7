"""A model that answers every chat with the same reasoning, text and call of a tool, as its templates mark them."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

from support.reciting import save_reciting_model

__all__ = ["CALL", "REASONING", "TEXT", "response_template_file", "save_tool_model"]

REASONING, TEXT = "They ask what is there.", "I look."
CALL = {"name": "look", "arguments": {"at": "the sea", "times": 2}}

_BEGIN, _END, _UNKNOWN = "<|assistant|>", "<|end|>", "<unk>"
# Each is one token, and has the next one as its only successor; a mark begins within a token here and there.
_ANSWER = [
    _BEGIN,
    "<think>",
    "They ask ",
    "what is there.",
    "</think>",
    "I l",
    "ook.<tool",
    "_call>",
    '{"name": "look", "arguments": ',
    '{"at": "the sea", ',
    '"times": 2}}',
    "</tool_call>",
    _END,
]
_CHAT_TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls %}{{ call.function.arguments['at'] }}{% endfor %}"
    "{{ message.reasoning_content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": _BEGIN,
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}


def save_tool_model(folder: Path, *, response_template: bool = True, broken: bool = False) -> Path:
    """Save the model; ``broken``: what it calls the tool with is no JSON."""
    answer = [piece.replace('"times": 2}}', "times}}") if broken else piece for piece in _ANSWER]
    characters = [chr(code) for code in range(32, 127)]
    names = [*answer, *(each for each in characters if each not in answer), _UNKNOWN]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {name: index for index, name in enumerate(names)}, unk_token=_UNKNOWN
        )
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    core.add_special_tokens([_BEGIN, _END, "<think>", "</think>"])
    options: dict[str, Any] = {"response_template": _RESPONSE_TEMPLATE} if response_template else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token=_UNKNOWN, eos_token=_END, **options
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    save_reciting_model(folder, vocab_size=len(names), pad_token_id=0, eos_token_id=len(answer) - 1)
    tokenizer.save_pretrained(folder)
    return folder


def response_template_file(folder: Path) -> Path:
    """A file with the model's response template."""
    path = folder / "response.json"
    path.write_text(json.dumps(_RESPONSE_TEMPLATE))
    return path
