"""Tries langchain-openai: chats, tools, log probabilities, text and embeddings."""

from typing import Any

from checking import CASE, check, run_checks
from langchain_core.messages import AIMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

CHAT, TEXT, TOOLS = CASE["chat"], CASE["completion"], CASE["tools"]
SERVER: dict[str, Any] = {
    "model": CASE["model"],
    "base_url": f"{CASE['url']}/v1",
    "api_key": CASE["key"],
}
MODEL = ChatOpenAI(**SERVER, temperature=0, max_tokens=CHAT["max_tokens"], stream_usage=True)
AGENT = ChatOpenAI(
    model=TOOLS["model"],
    base_url=f"{TOOLS['url']}/v1",
    api_key="any",
    temperature=0,
    max_tokens=TOOLS["max_tokens"],
    stream_usage=True,
).bind_tools([TOOLS["tool"]])
MESSAGES = [(each["role"], each["content"]) for each in CHAT["messages"]]
ASKED = [(each["role"], each["content"]) for each in TOOLS["messages"]]


def _is_chat(done: Any) -> None:
    assert done.content == CHAT["text"]
    assert done.response_metadata["finish_reason"] == CHAT["finish_reason"]
    assert done.usage_metadata["input_tokens"] == CHAT["prompt_tokens"]
    assert done.usage_metadata["output_tokens"] == CHAT["new_tokens"]


def _is_call(done: Any) -> None:
    assert done.content == TOOLS["text"]
    (call,) = done.tool_calls
    assert (call["name"], call["args"]) == (TOOLS["call"]["name"], TOOLS["call"]["arguments"])
    assert done.response_metadata["finish_reason"] == "tool_calls"
    assert done.usage_metadata["input_tokens"] == TOOLS["first"]["prompt_tokens"]


def _joined(chunks: Any) -> Any:
    first, *rest = chunks
    for chunk in rest:
        first += chunk
    return first


@check
def chat() -> None:
    """A chat has the model's text, its usage and its finish reason."""
    _is_chat(MODEL.invoke(MESSAGES))


@check
def streamed_chat() -> None:
    """A stream has the same."""
    _is_chat(_joined(MODEL.stream(MESSAGES)))


@check
def logprobs() -> None:
    """Log probabilities are the model's."""
    done = MODEL.bind(logprobs=True, top_logprobs=2).invoke(MESSAGES)
    tokens = done.response_metadata["logprobs"]["content"]
    for token, expected in zip(tokens, CHAT["logprobs"], strict=True):
        assert abs(token["logprob"] - expected) < 1e-4


@check
def text_completion() -> None:
    """A completion goes on with its prompt."""
    model = OpenAI(**SERVER, temperature=0, max_tokens=TEXT["max_tokens"])
    assert model.invoke(TEXT["prompt"]) == TEXT["text"]


@check
def embeddings() -> None:
    """An embedding is the model's last hidden state."""
    # Its default counts tokens with tiktoken, which loads a vocabulary from the network.
    model = OpenAIEmbeddings(**SERVER, check_embedding_ctx_length=False)
    expected = CASE["embedding"]
    pairs = zip(model.embed_query(expected["input"]), expected["vector"], strict=True)
    assert all(abs(a - b) < 1e-5 for a, b in pairs)


@check
def tools() -> None:
    """A call of a tool, and what the model says to its answer."""
    done = AGENT.invoke(ASKED)
    _is_call(done)
    answer = ToolMessage(TOOLS["result"], tool_call_id=done.tool_calls[0]["id"])
    after = AGENT.invoke([*ASKED, AIMessage(done.content, tool_calls=done.tool_calls), answer])
    assert after.content == TOOLS["after"]["text"]
    assert after.response_metadata["finish_reason"] == "stop"


@check
def streamed_tools() -> None:
    """A call comes in deltas, which the client puts together."""
    _is_call(_joined(AGENT.stream(ASKED)))


run_checks()
