"""Tries pydantic-ai: chats and agents with tools, over both of OpenAI's APIs."""

from typing import Any

from checking import CASE, check, run_checks
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

CHAT, TOOLS = CASE["chat"], CASE["tools"]
PLAIN = OpenAIProvider(base_url=f"{CASE['url']}/v1", api_key=CASE["key"])
AGENTS = OpenAIProvider(base_url=f"{TOOLS['url']}/v1", api_key="any")
SETTINGS: Any = {"temperature": 0, "max_tokens": CHAT["max_tokens"]}
KINDS = (OpenAIChatModel, OpenAIResponsesModel)


def _chatting(kind: Any) -> Any:
    model = kind(CASE["model"], provider=PLAIN)
    system = CHAT["messages"][0]["content"]
    return Agent(model, system_prompt=system, model_settings=SETTINGS)


def _looking(kind: Any) -> tuple[Any, list[Any]]:
    """An agent with the tool, and what that is called with."""
    calls: list[Any] = []
    model = kind(TOOLS["model"], provider=AGENTS)
    settings: Any = {"temperature": 0, "max_tokens": TOOLS["max_tokens"]}
    agent: Any = Agent(model, model_settings=settings)

    @agent.tool_plain
    def look(at: str, times: int) -> str:
        """Looks."""
        calls.append({"at": at, "times": times})
        return str(TOOLS["result"])

    return agent, calls


def _is_chat(done: Any) -> None:
    assert done.response.finish_reason == CHAT["finish_reason"]
    assert done.response.usage.input_tokens == CHAT["prompt_tokens"]
    assert done.response.usage.output_tokens == CHAT["new_tokens"]


@check
def chat() -> None:
    """A chat has the model's text, its usage and its finish reason."""
    for kind in KINDS:
        done = _chatting(kind).run_sync(CHAT["messages"][1]["content"])
        assert done.output == CHAT["text"]
        _is_chat(done)


@check
async def streamed_chat() -> None:
    """A stream has the same."""
    for kind in KINDS:
        async with _chatting(kind).run_stream(CHAT["messages"][1]["content"]) as done:
            pieces = [each async for each in done.stream_text(delta=True, debounce_by=None)]
            assert "".join(pieces) == CHAT["text"]
            assert len(pieces) > 1
            _is_chat(done)


@check
def tools() -> None:
    """An agent calls its tool, and ends with what the model says to the answer."""
    for kind in KINDS:
        agent, calls = _looking(kind)
        done = agent.run_sync(TOOLS["messages"][0]["content"])
        assert done.output == TOOLS["after"]["text"]
        assert calls == [TOOLS["call"]["arguments"]]
        assert done.response.finish_reason == "stop"


@check
async def streamed_tools() -> None:
    """So does one that streams."""
    for kind in KINDS:
        agent, calls = _looking(kind)
        async with agent.iter(TOOLS["messages"][0]["content"]) as run:
            async for node in run:
                if Agent.is_model_request_node(node):
                    async with node.stream(run.ctx) as events:
                        assert [each async for each in events]
        assert run.result.output == TOOLS["after"]["text"]
        assert calls == [TOOLS["call"]["arguments"]]


run_checks()
