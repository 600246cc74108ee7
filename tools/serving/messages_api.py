"""``POST /v1/messages`` and ``/v1/messages/count_tokens``: Anthropic's API, as a thin layer over chats."""

import json
import uuid
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from layerstream.tools.serving.answer_blocks import AnswerBlock, BlockBuilder
from layerstream.tools.serving.errors import ApiError
from layerstream.tools.serving.messages import RequestModel
from layerstream.tools.serving.protocol import ChatRequest

__all__ = ["CountRequest", "MessagesBuilder", "MessagesRequest"]

_MAX_ITEMS = 2048
_TOOL_CHOICES = {"auto": "auto", "none": "none", "any": "required"}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

Content = str | list[dict[str, Any]]


class AnthropicTool(RequestModel):
    """A tool that a model may use."""

    name: str
    description: str = ""
    input_schema: dict[str, Any]
    type: str = "custom"
    cache_control: dict[str, Any] | None = None


class AnthropicMessage(RequestModel):
    """A message of a chat."""

    role: str
    content: Content


class CountRequest(RequestModel):
    """``POST /v1/messages/count_tokens``: what a model is told. Errors quote a field's description."""

    model: str = Field(description="the name of a model")
    messages: Annotated[list[AnthropicMessage], Field(fail_fast=True, max_length=_MAX_ITEMS)] = (
        Field(
            min_length=1,
            description="a list of messages with a role and text, tool_use or the like",
        )
    )
    system: Content = Field("", description="a string, or a list of blocks of type text")
    tools: list[AnthropicTool] = Field([], description="a list of tools with an input_schema")
    tool_choice: dict[str, Any] = Field(
        {"type": "auto"}, description='an object such as {"type": "auto"}'
    )

    def check(self) -> None:
        """Raise an ApiError if there is no such choice of tools."""
        if self.tool_choice.get("type") not in _TOOL_CHOICES and not self._chosen_tool:
            raise _unsupported("tool_choice", "must be of type auto, none, any or tool.")

    @property
    def _chosen_tool(self) -> str | None:
        return str(self.tool_choice.get("name")) if self.tool_choice.get("type") == "tool" else None

    def as_chat(self) -> ChatRequest:
        """The same request as OpenAI's API has it."""
        messages: list[dict[str, Any]] = []
        if system := _text(self.system, "system"):
            messages.append({"role": "system", "content": system})
        for index, message in enumerate(self.messages):
            messages += _as_chat(message, f"messages[{index}].content")
        tools = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.input_schema,
                },
            }
            for tool in self.tools
        ]
        fields = {"model": self.model, "messages": messages, "tools": tools}
        return ChatRequest.model_validate(fields | self._choice_of_tools() | self._options())

    def _choice_of_tools(self) -> dict[str, Any]:
        parallel = not self.tool_choice.get("disable_parallel_tool_use")
        if (name := self._chosen_tool) is not None:
            choice: Any = {"type": "function", "function": {"name": name}}
        else:
            choice = _TOOL_CHOICES[self.tool_choice["type"]]
        return {"tool_choice": choice, "parallel_tool_calls": parallel}

    def _options(self) -> dict[str, Any]:
        """How the answer is generated, as OpenAI's API has it."""
        return {}


class MessagesRequest(CountRequest):
    """``POST /v1/messages``."""

    max_tokens: int = Field(ge=1, description="a whole number from 1")
    stop_sequences: list[str] = Field([], description="a list of strings")
    stream: bool = Field(default=False, description="true or false")
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    top_p: float | None = Field(None, ge=0, le=1, description="a number from 0 to 1")
    top_k: int | None = Field(None, ge=0, description="a whole number from 0")
    metadata: dict[str, Any] | None = Field(None, description="an object")

    def _options(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "stop": list(self.stop_sequences),
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


def _unsupported(name: str, why: str) -> ApiError:
    return ApiError(400, f"'{name}' {why}", param=name, code="unsupported_parameter")


def _text(content: Any, path: str) -> str:
    """The text of a string, or of blocks that have nothing else."""
    if isinstance(content, str):
        return content
    for block in content or ():
        if block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise _unsupported(path, f"has a block of type {block.get('type')}, and needs text.")
    return "\n".join(block["text"] for block in content or ())


def _as_chat(message: AnthropicMessage, path: str) -> list[dict[str, Any]]:
    """The messages of a chat that ``message`` stands for: each answer of a tool is one of its own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    made: dict[str, Any] = {"role": message.role, "content": ""}
    for block in message.content:
        kind = block.get("type")
        if kind == "tool_result":
            content = _text(block.get("content"), path)
            results.append(
                {"role": "tool", "tool_call_id": str(block.get("tool_use_id")), "content": content}
            )
        elif kind == "tool_use":
            function = {"name": str(block.get("name")), "arguments": json.dumps(block.get("input"))}
            call = {"id": str(block.get("id")), "type": "function", "function": function}
            made.setdefault("tool_calls", []).append(call)
        elif kind == "thinking":
            made["reasoning_content"] = str(block.get("thinking", ""))
        elif kind != "redacted_thinking":
            texts.append(block)
    made["content"] = _text(texts, path)
    return [*results, made] if made["content"] or "tool_calls" in made or not results else results


class MessagesBuilder(BlockBuilder):
    """Builds the response to ``request``."""

    def __init__(self, request: MessagesRequest) -> None:
        super().__init__()
        self._head = {
            "id": f"msg_{uuid.uuid4().hex[:24]}",
            "type": "message",
            "role": "assistant",
            "model": request.model,
        }

    def complete(self) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        content = [_content(block) for block in self.blocks]
        return self._message(content) | self._stopped()

    @staticmethod
    def error(error: ApiError) -> dict[str, Any]:
        """The last event of a stream that fails."""
        return error.anthropic_body

    def begin(self) -> Iterator[dict[str, Any]]:
        """The chunks before the first block."""
        nothing = {"stop_reason": None, "stop_sequence": None}
        yield {"type": "message_start", "message": self._message([]) | nothing}

    def opened(self, block: AnswerBlock) -> Iterator[dict[str, Any]]:
        """The chunks of a block that begins."""
        empty = AnswerBlock(kind=block.kind, index=block.index, name=block.name, key=block.key)
        content = _content(empty)
        yield {"type": "content_block_start", "index": block.index, "content_block": content}

    def written(self, block: AnswerBlock, text: str) -> Iterator[dict[str, Any]]:
        """The chunks of text that a block has more."""
        kind, name = {
            "reasoning": ("thinking_delta", "thinking"),
            "text": ("text_delta", "text"),
            "call": ("input_json_delta", "partial_json"),
        }[block.kind]
        delta = {"type": kind, name: text}
        yield {"type": "content_block_delta", "index": block.index, "delta": delta}

    def closed(self, block: AnswerBlock) -> Iterator[dict[str, Any]]:
        """The chunks of a block that is complete."""
        yield {"type": "content_block_stop", "index": block.index}

    def end(self) -> Iterator[dict[str, Any]]:
        """The chunks after the last block."""
        usage = {"output_tokens": self.new_tokens}
        yield {"type": "message_delta", "delta": self._stopped(), "usage": usage}
        yield {"type": "message_stop"}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"input_tokens": self.prompt_tokens, "output_tokens": self.new_tokens}
        return {**self._head, "content": content, "usage": usage}

    def _stopped(self) -> dict[str, Any]:
        reason = "stop_sequence" if self.stop else _STOP_REASONS[self.finish_reason or "stop"]
        return {"stop_reason": reason, "stop_sequence": self.stop}


def _content(block: AnswerBlock) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    arguments = json.loads(block.text) if block.text else {}
    return {"type": "tool_use", "id": f"toolu_{block.key}", "name": block.name, "input": arguments}
