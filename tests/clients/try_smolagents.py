"""Tries smolagents: its model for OpenAI's API, and an agent that calls tools."""

from typing import Any

from checking import CASE, check, run_checks
from smolagents import OpenAIModel, ToolCallingAgent

CHAT, TOOLS = CASE["chat"], CASE["tools"]
MODEL = OpenAIModel(
    model_id=CASE["model"],
    api_base=f"{CASE['url']}/v1",
    api_key=CASE["key"],
    temperature=0,
    max_tokens=CHAT["max_tokens"],
)


def _agent() -> Any:
    model = OpenAIModel(
        model_id=TOOLS["model"],
        api_base=f"{TOOLS['url']}/v1",
        api_key="any",
        temperature=0,
        max_tokens=TOOLS["max_tokens"],
    )
    return ToolCallingAgent(tools=[], model=model, max_steps=1, verbosity_level=0)


@check
def chat() -> None:
    """A chat has the model's text, its usage and its finish reason."""
    done = MODEL.generate(CHAT["messages"])
    assert done.content == CHAT["text"]
    assert done.raw.choices[0].finish_reason == CHAT["finish_reason"]
    assert done.token_usage.input_tokens == CHAT["prompt_tokens"]
    assert done.token_usage.output_tokens == CHAT["new_tokens"]


@check
def streamed_chat() -> None:
    """A stream has the same."""
    deltas = list(MODEL.generate_stream(CHAT["messages"]))
    assert "".join(delta.content or "" for delta in deltas) == CHAT["text"]
    usage = [delta.token_usage for delta in deltas if delta.token_usage]
    assert sum(each.output_tokens for each in usage) == CHAT["new_tokens"]


@check
def tools() -> None:
    """An agent ends with a call of its own tool for that."""
    done = _agent().run("What is there?", return_full_result=True)
    assert done.output == TOOLS["final_answer"]
    assert done.state == "success"


run_checks()
