"""A model that answers every chat with the same reasoning, text and call of a tool, as its templates mark them.

Agents get other answers: see ``save_agent_model``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

from support.reciting import save_reciting_model

__all__ = [
    "AFTER",
    "CALL",
    "REASONING",
    "TEXT",
    "response_template_file",
    "save_agent_model",
    "save_tool_model",
]

# What an agent gets after the answer of a tool.
AFTER = "The sea is blue."
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
    return _save(folder, [answer], template=_CHAT_TEMPLATE, response_template=response_template)


def save_agent_model(
    folder: Path, calls: Mapping[str, Mapping[str, Any]], *, forced: Mapping[str, Any] = CALL
) -> Path:
    """Save the model with an end to its calls: after the answer of a tool it says ``AFTER``.

    Where one of the tools in ``calls`` is offered, it calls that one at once, with these arguments. If it has to call one,
    it makes the call ``forced``.
    """
    chains = [_ANSWER, ["<|after|>", AFTER[:8], AFTER[8:], "<|end|>0"]]
    chains.append(["<tool_call>", f"{json.dumps(forced)}</tool_call>", "<|end|>1"])
    template = "{% if messages[-1].role == 'tool' %}<|after|>"
    for number, (name, arguments) in enumerate(calls.items(), 1):
        made = json.dumps({"name": name, "arguments": arguments})
        mark, call = f"<|call {number}|>", f"<tool_call>{made}</tool_call>"
        chains.append([mark, call, f"<|end|>{number + 1}"])
        names = "tools | map(attribute='function') | map(attribute='name')"
        template += f"{{% elif tools and '{name}' in {names} %}}{mark}"
    template = f"{{% if add_generation_prompt %}}{template}{{% endif %}}{{% endif %}}"
    return _save(folder, chains, template=_CHAT_TEMPLATE + template)


def _save(
    folder: Path, chains: Sequence[Sequence[str]], *, template: str, response_template: bool = True
) -> Path:
    """Save the model with a chain of tokens for each answer: a mark that ends a prompt, and what comes after it."""
    answers = [piece for chain in chains for piece in chain]
    characters = [chr(code) for code in range(32, 127)]
    names = [*answers, *(each for each in characters if each not in answers), _UNKNOWN]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {name: index for index, name in enumerate(names)}, unk_token=_UNKNOWN
        )
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    marks = [mark for chain in chains for mark in (chain[0], chain[-1])]
    core.add_special_tokens([*marks, "<think>", "</think>"])
    options: dict[str, Any] = {"response_template": _RESPONSE_TEMPLATE} if response_template else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token=_UNKNOWN, eos_token=_END, **options
    )
    tokenizer.chat_template = template
    save_reciting_model(
        folder,
        circle=len(answers),
        vocab_size=len(names),
        pad_token_id=0,
        eos_token_id=[answers.index(chain[-1]) for chain in chains],
        max_position_embeddings=1 << 16,
    )
    tokenizer.save_pretrained(folder)
    return folder


def response_template_file(folder: Path) -> Path:
    """A file with the model's response template."""
    path = folder / "response.json"
    path.write_text(json.dumps(_RESPONSE_TEMPLATE))
    return path
