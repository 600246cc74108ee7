"""Tries OpenAI's client for Python: chats, tools, log probabilities, text, embeddings and responses."""

import json
from typing import Any

import openai
from checking import CASE, check, run_checks

CLIENT = openai.OpenAI(base_url=f"{CASE['url']}/v1", api_key=CASE["key"], max_retries=0)
CHAT, TEXT, TOOLS = CASE["chat"], CASE["completion"], CASE["tools"]
AGENT = openai.OpenAI(base_url=f"{TOOLS['url']}/v1", api_key="any", max_retries=0)
OPTIONS: dict[str, Any] = {
    "model": CASE["model"],
    "messages": CHAT["messages"],
    "max_tokens": CHAT["max_tokens"],
    "temperature": 0,
}
TOOL_OPTIONS: dict[str, Any] = {
    "model": TOOLS["model"],
    "tools": [TOOLS["tool"]],
    "max_tokens": TOOLS["max_tokens"],
    "temperature": 0,
}


def _usage_is(usage: Any, expected: dict[str, Any]) -> None:
    assert usage.prompt_tokens == expected["prompt_tokens"]
    assert usage.completion_tokens == expected["new_tokens"]


@check
def chat() -> None:
    """A chat has the model's text, its usage and its finish reason."""
    done = CLIENT.chat.completions.create(**OPTIONS)
    assert done.choices[0].message.content == CHAT["text"]
    assert done.choices[0].finish_reason == CHAT["finish_reason"]
    _usage_is(done.usage, CHAT)


@check
def streamed_chat() -> None:
    """A stream has the same."""
    options = {**OPTIONS, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = CLIENT.chat.completions.create(**options)
    assert len(chunks) > 2
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == CHAT["text"]
    assert chunks[-1].choices[0].finish_reason == CHAT["finish_reason"]
    _usage_is(last.usage, CHAT)


@check
def logprobs() -> None:
    """Log probabilities are the model's, streamed and whole."""
    more = {"logprobs": True, "top_logprobs": 2}
    whole = CLIENT.chat.completions.create(**OPTIONS, **more).choices[0].logprobs.content
    chunks = CLIENT.chat.completions.create(**OPTIONS, **more, stream=True)
    streamed = [
        each
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for each in choice.logprobs.content
    ]
    for tokens in (whole, streamed):
        pairs = zip(tokens, CHAT["logprobs"], CHAT["second"], strict=True)
        for token, expected, second in pairs:
            assert abs(token.logprob - expected) < 1e-4
            assert abs(token.top_logprobs[1].logprob - second) < 1e-4


@check
def text_completion() -> None:
    """A completion goes on with its prompt."""
    done = CLIENT.completions.create(
        model=CASE["model"], prompt=TEXT["prompt"], max_tokens=TEXT["max_tokens"], temperature=0
    )
    assert done.choices[0].text == TEXT["text"]
    assert done.choices[0].finish_reason == TEXT["finish_reason"]
    _usage_is(done.usage, TEXT)


@check
def embeddings() -> None:
    """An embedding is the model's last hidden state."""
    expected = CASE["embedding"]
    done = CLIENT.embeddings.create(model=CASE["model"], input=[expected["input"]])
    pairs = zip(done.data[0].embedding, expected["vector"], strict=True)
    assert all(abs(a - b) < 1e-5 for a, b in pairs)
    assert done.usage.prompt_tokens == expected["tokens"]


@check
def tools() -> None:
    """A call of a tool, and what the model says to its answer."""
    messages = TOOLS["messages"]
    done = AGENT.chat.completions.create(messages=messages, **TOOL_OPTIONS)
    message = done.choices[0].message
    assert message.content == TOOLS["text"]
    assert message.reasoning_content == TOOLS["reasoning"]
    assert done.choices[0].finish_reason == "tool_calls"
    _usage_is(done.usage, TOOLS["first"])
    (call,) = message.tool_calls
    assert call.function.name == TOOLS["call"]["name"]
    assert json.loads(call.function.arguments) == TOOLS["call"]["arguments"]
    answer = {"role": "tool", "tool_call_id": call.id, "content": TOOLS["result"]}
    after = AGENT.chat.completions.create(messages=[*messages, message, answer], **TOOL_OPTIONS)
    assert after.choices[0].message.content == TOOLS["after"]["text"]
    assert after.choices[0].finish_reason == "stop"
    _usage_is(after.usage, TOOLS["after"])


@check
def streamed_tools() -> None:
    """A call comes in deltas, which the client puts together."""
    with AGENT.chat.completions.stream(messages=TOOLS["messages"], **TOOL_OPTIONS) as stream:
        done = stream.get_final_completion()
    assert done.choices[0].message.content == TOOLS["text"]
    assert done.choices[0].finish_reason == "tool_calls"
    (call,) = done.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == TOOLS["call"]["arguments"]


@check
def responses() -> None:
    """The newer API has the same text."""
    options = {
        "model": CASE["model"],
        "instructions": CHAT["messages"][0]["content"],
        "input": CHAT["messages"][1]["content"],
        "max_output_tokens": CHAT["max_tokens"],
        "temperature": 0,
    }
    whole = CLIENT.responses.create(**options)
    *events, last = CLIENT.responses.create(**options, stream=True)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == CHAT["text"]
    for done in (whole, last.response):
        assert done.output_text == CHAT["text"]
        assert done.incomplete_details.reason == "max_output_tokens"
        assert done.usage.input_tokens == CHAT["prompt_tokens"]
        assert done.usage.output_tokens == CHAT["new_tokens"]


run_checks()
