"""Tries Anthropic's client for Python: messages, tools, and counts of tokens."""

from typing import Any

import anthropic
from checking import CASE, check, run_checks

CLIENT = anthropic.Anthropic(base_url=CASE["url"], api_key=CASE["key"], max_retries=0)
CHAT, TOOLS = CASE["chat"], CASE["tools"]
AGENT = anthropic.Anthropic(base_url=TOOLS["url"], api_key="any", max_retries=0)
PROMPT: dict[str, Any] = {
    "model": CASE["model"],
    "system": CHAT["messages"][0]["content"],
    "messages": CHAT["messages"][1:],
}
GREEDY = {"temperature": 0}  # the newest client has no argument for it
OPTIONS: dict[str, Any] = {"max_tokens": CHAT["max_tokens"], "extra_body": GREEDY}
TOOL_PROMPT: dict[str, Any] = {
    "model": TOOLS["model"],
    "tools": [
        {
            "name": TOOLS["tool"]["function"]["name"],
            "description": TOOLS["tool"]["function"]["description"],
            "input_schema": TOOLS["tool"]["function"]["parameters"],
        }
    ],
}
TOOL_OPTIONS: dict[str, Any] = {"max_tokens": TOOLS["max_tokens"], "extra_body": GREEDY}


def _is_chat(done: Any) -> None:
    assert done.content[0].text == CHAT["text"]
    assert done.stop_reason == {"length": "max_tokens", "stop": "end_turn"}[CHAT["finish_reason"]]
    assert done.usage.input_tokens == CHAT["prompt_tokens"]
    assert done.usage.output_tokens == CHAT["new_tokens"]


def _is_call(done: Any) -> Any:
    thinking, text, use = done.content
    assert (thinking.thinking, text.text) == (TOOLS["reasoning"], TOOLS["text"])
    assert (use.name, use.input) == (TOOLS["call"]["name"], TOOLS["call"]["arguments"])
    assert done.stop_reason == "tool_use"
    assert done.usage.input_tokens == TOOLS["first"]["prompt_tokens"]
    assert done.usage.output_tokens == TOOLS["first"]["new_tokens"]
    return use


@check
def message() -> None:
    """A message has the model's text, its usage and its reason to stop."""
    _is_chat(CLIENT.messages.create(**PROMPT, **OPTIONS))


@check
def streamed_message() -> None:
    """A stream has the same."""
    with CLIENT.messages.stream(**PROMPT, **OPTIONS) as stream:
        assert "".join(stream.text_stream) == CHAT["text"]
        _is_chat(stream.get_final_message())


@check
def tools() -> None:
    """A use of a tool, and what the model says to its result."""
    messages = TOOLS["messages"]
    done = AGENT.messages.create(messages=messages, **TOOL_PROMPT, **TOOL_OPTIONS)
    use = _is_call(done)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": TOOLS["result"]}
    messages = [
        *messages,
        {"role": "assistant", "content": done.content},
        {"role": "user", "content": [result]},
    ]
    after = AGENT.messages.create(messages=messages, **TOOL_PROMPT, **TOOL_OPTIONS)
    assert after.content[0].text == TOOLS["after"]["text"]
    assert after.stop_reason == "end_turn"
    assert after.usage.input_tokens == TOOLS["after"]["prompt_tokens"]


@check
def streamed_tools() -> None:
    """A use of a tool comes in pieces, which the client puts together."""
    with AGENT.messages.stream(messages=TOOLS["messages"], **TOOL_PROMPT, **TOOL_OPTIONS) as stream:
        _is_call(stream.get_final_message())


@check
def counts() -> None:
    """The tokens of a prompt are counted without an answer."""
    assert CLIENT.messages.count_tokens(**PROMPT).input_tokens == CHAT["prompt_tokens"]
    counted = AGENT.messages.count_tokens(messages=TOOLS["messages"], **TOOL_PROMPT)
    assert counted.input_tokens == TOOLS["first"]["prompt_tokens"]


run_checks()
