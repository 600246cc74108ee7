"""Tries openai-agents: chats and agents with tools, over both of OpenAI's APIs."""

from typing import Any

from agents import (
    Agent,
    ModelBehaviorError,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
)
from checking import CASE, check, run_checks
from openai import AsyncOpenAI

CHAT, TOOLS = CASE["chat"], CASE["tools"]
KINDS = (OpenAIChatCompletionsModel, OpenAIResponsesModel)


def _chatting(kind: Any) -> Any:
    client = AsyncOpenAI(base_url=f"{CASE['url']}/v1", api_key=CASE["key"], max_retries=0)
    return Agent(
        name="Chat",
        instructions=CHAT["messages"][0]["content"],
        model=kind(model=CASE["model"], openai_client=client),
        model_settings=ModelSettings(
            temperature=0, max_tokens=CHAT["max_tokens"], include_usage=True
        ),
    )


def _looking(kind: Any) -> tuple[Any, list[Any]]:
    """An agent with the tool, and what that is called with."""
    calls: list[Any] = []

    @function_tool
    def look(at: str, times: int) -> str:
        """Looks."""
        calls.append({"at": at, "times": times})
        return str(TOOLS["result"])

    client = AsyncOpenAI(base_url=f"{TOOLS['url']}/v1", api_key="any", max_retries=0)
    agent = Agent(
        name="Look",
        tools=[look],
        model=kind(model=TOOLS["model"], openai_client=client),
        model_settings=ModelSettings(temperature=0, max_tokens=TOOLS["max_tokens"]),
    )
    return agent, calls


def _is_chat(done: Any) -> None:
    assert done.final_output == CHAT["text"]
    usage = done.context_wrapper.usage
    assert usage.input_tokens == CHAT["prompt_tokens"]
    assert usage.output_tokens == CHAT["new_tokens"]


@check
async def chat() -> None:
    """A chat has the model's text and its usage."""
    _is_chat(await Runner.run(_chatting(KINDS[0]), CHAT["messages"][1]["content"]))


@check
async def cut_response() -> None:
    """It takes a response that is cut for a failure."""
    raised = ""
    try:
        await Runner.run(_chatting(KINDS[1]), CHAT["messages"][1]["content"])
    except ModelBehaviorError as error:
        raised = str(error)
    assert "max_output_tokens" in raised


@check
async def streamed_chat() -> None:
    """A stream has the same."""
    done = Runner.run_streamed(_chatting(KINDS[0]), CHAT["messages"][1]["content"])
    events = [event async for event in done.stream_events()]
    deltas = [
        event.data.delta
        for event in events
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert "".join(deltas) == CHAT["text"]
    _is_chat(done)


@check
async def tools() -> None:
    """An agent calls its tool, and ends with what the model says to the answer."""
    for kind in KINDS:
        agent, calls = _looking(kind)
        done = await Runner.run(agent, TOOLS["messages"][0]["content"], max_turns=3)
        new_tokens = TOOLS["first"]["new_tokens"] + TOOLS["after"]["new_tokens"]
        assert done.context_wrapper.usage.output_tokens == new_tokens
        assert done.final_output == TOOLS["after"]["text"]
        assert calls == [TOOLS["call"]["arguments"]]


@check
async def streamed_tools() -> None:
    """So does one that streams."""
    for kind in KINDS:
        agent, calls = _looking(kind)
        done = Runner.run_streamed(agent, TOOLS["messages"][0]["content"], max_turns=3)
        assert [event async for event in done.stream_events()]
        assert done.final_output == TOOLS["after"]["text"]
        assert calls == [TOOLS["call"]["arguments"]]


run_checks()
