"""What clients ask, and what transformers' own ``generate`` answers for the same models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from support.service import KEY, MESSAGES, Reference
from support.tool_model import AFTER, CALL, REASONING, TEXT, save_agent_model

__all__ = ["agent_case", "plain_case", "save_model_for_agents"]

_PROMPT = "The quick brown fox"
_NEW_TOKENS = 16
_ASKED = [{"role": "user", "content": "What is there?"}]
_RESULT = "Water."
_TOOL = {
    "type": "function",
    "function": {
        "name": CALL["name"],
        "description": "Looks.",
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "string"}, "times": {"type": "integer"}},
            "required": ["at", "times"],
        },
    },
}
# Tools that agents offer on their own, and what the model calls them with; that of smolagents if it has to call one.
_FINAL_ANSWER = {"name": "final_answer", "arguments": {"answer": AFTER}}
_AGENTS_CALLS = {
    "exec_command": {"cmd": "cat note.txt"},
}


def save_model_for_agents(folder: Path) -> Path:
    """Save a model that calls the tools of the clients that are tried."""
    return save_agent_model(folder, _AGENTS_CALLS, forced=_FINAL_ANSWER)


def _generated(reference: Reference, text: str, count: int) -> dict[str, Any]:
    """What the model makes of ``text``, with the log probability of each token and the likeliest ones."""
    ids = reference.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    output = reference.model.generate(
        ids,
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = output.sequences[0, ids.shape[1] :].tolist()
    rows = [row[0].log_softmax(-1) for row in output.logits]
    return {
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "max_tokens": count,
        "text": reference.tokenizer.decode(new, skip_special_tokens=True),
        "finish_reason": "stop" if new[-1] in _ends(reference) else "length",
        "tokens": [reference.tokenizer.decode([token]) for token in new],
        "logprobs": [float(row[token]) for row, token in zip(rows, new, strict=True)],
        "second": [float(row.topk(2).values[1]) for row in rows],
    }


def _ends(reference: Reference) -> Sequence[int]:
    ends = reference.model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def _loglikelihood(reference: Reference, context: str, text: str) -> float:
    """The log likelihood of ``text`` after ``context``, or after the token that begins a text if that is empty."""
    tokenizer = reference.tokenizer
    before, new = (tokenizer(each, add_special_tokens=False).input_ids for each in (context, text))
    before = before or [tokenizer.bos_token_id]
    with torch.inference_mode():
        logits = reference.model(torch.tensor([before + new])).logits[0, len(before) - 1 : -1]
    rows = logits.log_softmax(-1)
    return float(rows.gather(1, torch.tensor(new)[:, None]).sum())


def _evaluation(reference: Reference) -> dict[str, Any]:
    """Questions and texts for an evaluation, and its figures."""
    choices = ["a stone", "the sea", "an old bridge"]
    questions = [
        {"question": f"{_PROMPT} {number}:", "choices": choices, "answer": number % 3}
        for number in range(6)
    ]
    likelihoods = [
        [_loglikelihood(reference, each["question"], f" {choice}") for choice in choices]
        for each in questions
    ]
    right = sum(
        each.index(max(each)) == question["answer"]
        for each, question in zip(likelihoods, questions, strict=True)
    )
    texts = ["The sea is wide.", "A small boat goes out to look for fish, and comes back."]
    return {
        "questions": questions,
        "loglikelihoods": likelihoods,
        "accuracy": right / len(questions),
        "texts": texts,
        "text_loglikelihoods": [_loglikelihood(reference, "", text) for text in texts],
    }


def plain_case(reference: Reference, url: str) -> dict[str, Any]:
    """Of a model that generates varied text, served at ``url``."""
    ids = reference.tokenizer(_PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        states = reference.model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
    asked = reference.chat([{"role": "user", "content": _PROMPT}])
    chat = _generated(reference, reference.chat(MESSAGES), _NEW_TOKENS)
    return {
        "url": url,
        "key": KEY,
        "model": "tiny",
        "folder": reference.model.name_or_path,
        "chat": chat | {"messages": MESSAGES},
        "asked": _generated(reference, asked, _NEW_TOKENS) | {"prompt": _PROMPT},
        "completion": _generated(reference, _PROMPT, _NEW_TOKENS) | {"prompt": _PROMPT},
        "evaluation": _evaluation(reference),
        "embedding": {
            "input": _PROMPT,
            "tokens": ids.shape[1],
            "vector": torch.nn.functional.normalize(states, dim=0).tolist(),
        },
    }


def agent_case(folder: Path, url: str) -> dict[str, Any]:
    """Of the model for agents in ``folder``, served at ``url``."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    reference = Reference(model, tokenizer)
    options = {"tokenize": False, "add_generation_prompt": True}
    call = {"type": "function", "function": CALL}
    answered = [
        *_ASKED,
        {
            "role": "assistant",
            "content": TEXT,
            "reasoning_content": REASONING,
            "tool_calls": [call],
        },
        {"role": "tool", "content": _RESULT},
    ]
    first, after = (
        _generated(reference, tokenizer.apply_chat_template(messages, tools=[_TOOL], **options), 40)
        for messages in (_ASKED, answered)
    )
    # What the templates make of the model's text is known.
    assert first["text"].startswith(f"They ask what is there.{TEXT}<tool_call>")
    assert after["text"] == AFTER
    return {
        "url": url,
        "model": "tools",
        "messages": _ASKED,
        "tool": _TOOL,
        "result": _RESULT,
        "call": CALL,
        "reasoning": REASONING,
        "text": TEXT,
        "max_tokens": 40,
        "first": first,
        "after": after,
        "final_answer": AFTER,
    }
