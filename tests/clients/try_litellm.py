"""Tries litellm: chats, tools, log probabilities, text, embeddings and responses."""

import json
from typing import Any

import litellm
from checking import CASE, check, run_checks

CHAT, TEXT, TOOLS = CASE["chat"], CASE["completion"], CASE["tools"]
SERVER: dict[str, Any] = {
    "model": f"openai/{CASE['model']}",
    "api_base": f"{CASE['url']}/v1",
    "api_key": CASE["key"],
}
OPTIONS: dict[str, Any] = {
    **SERVER,
    "messages": CHAT["messages"],
    "max_tokens": CHAT["max_tokens"],
    "temperature": 0,
}
TOOL_OPTIONS: dict[str, Any] = {
    "model": f"openai/{TOOLS['model']}",
    "api_base": f"{TOOLS['url']}/v1",
    "api_key": "any",
    "messages": TOOLS["messages"],
    "tools": [TOOLS["tool"]],
    "max_tokens": TOOLS["max_tokens"],
    "temperature": 0,
}


def _is_chat(done: Any) -> None:
    assert done.choices[0].message.content == CHAT["text"]
    assert done.choices[0].finish_reason == CHAT["finish_reason"]
    assert done.usage.prompt_tokens == CHAT["prompt_tokens"]
    assert done.usage.completion_tokens == CHAT["new_tokens"]


def _is_call(done: Any) -> None:
    message = done.choices[0].message
    assert message.content == TOOLS["text"]
    assert message.reasoning_content == TOOLS["reasoning"]
    (call,) = message.tool_calls
    assert call.function.name == TOOLS["call"]["name"]
    assert json.loads(call.function.arguments) == TOOLS["call"]["arguments"]
    assert done.choices[0].finish_reason == "tool_calls"


@check
def chat() -> None:
    """A chat has the model's text, its usage and its finish reason."""
    _is_chat(litellm.completion(**OPTIONS))


@check
def streamed_chat() -> None:
    """A stream has the same."""
    options = {**OPTIONS, "stream": True, "stream_options": {"include_usage": True}}
    _is_chat(litellm.stream_chunk_builder(list(litellm.completion(**options))))


@check
def logprobs() -> None:
    """Log probabilities are the model's."""
    done = litellm.completion(**OPTIONS, logprobs=True, top_logprobs=2)
    tokens = done.choices[0].logprobs.content
    for token, expected in zip(tokens, CHAT["logprobs"], strict=True):
        assert abs(token.logprob - expected) < 1e-4


@check
def text_completion() -> None:
    """A completion goes on with its prompt."""
    options = {**SERVER, "model": f"text-completion-openai/{CASE['model']}", "temperature": 0}
    done = litellm.text_completion(prompt=TEXT["prompt"], max_tokens=TEXT["max_tokens"], **options)
    assert done.choices[0].text == TEXT["text"]
    assert done.usage.completion_tokens == TEXT["new_tokens"]


@check
def embeddings() -> None:
    """An embedding is the model's last hidden state."""
    expected = CASE["embedding"]
    done = litellm.embedding(**SERVER, input=[expected["input"]])
    pairs = zip(done.data[0]["embedding"], expected["vector"], strict=True)
    assert all(abs(a - b) < 1e-5 for a, b in pairs)


@check
def tools() -> None:
    """A call of a tool."""
    _is_call(litellm.completion(**TOOL_OPTIONS))


@check
def streamed_tools() -> None:
    """A call comes in deltas, which the client puts together."""
    chunks = list(litellm.completion(**TOOL_OPTIONS, stream=True))
    _is_call(litellm.stream_chunk_builder(chunks))


@check
def responses() -> None:
    """The newer API has the same text."""
    done = litellm.responses(
        **SERVER,
        instructions=CHAT["messages"][0]["content"],
        input=CHAT["messages"][1]["content"],
        max_output_tokens=CHAT["max_tokens"],
        temperature=0,
    )
    assert done.output[0].content[0].text == CHAT["text"]
    assert done.usage.output_tokens == CHAT["new_tokens"]


run_checks()
