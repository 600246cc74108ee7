"""``POST /v1/responses``: OpenAI's newer API, as a thin layer over chats. Nothing is stored."""

import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from pydantic import Field

from layerstream.tools.serving.answer_blocks import AnswerBlock, BlockBuilder
from layerstream.tools.serving.errors import ApiError
from layerstream.tools.serving.messages import RequestModel
from layerstream.tools.serving.protocol import ChatRequest

__all__ = ["ResponsesBuilder", "ResponsesRequest"]

_MAX_ITEMS = 2048
_TEXT_TYPES = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_PLAIN_TEXT = {"type": "text"}


class ReasoningOptions(RequestModel):
    """How a model reasons."""

    effort: str | None = None
    summary: str | None = None


class TextOptions(RequestModel):
    """What kind of text an answer is."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponseTool(RequestModel):
    """A tool that a model may use."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def without_effect(self) -> Iterable[str]:
        """What only OpenAI's service can do: agents offer its tools beside their own, and ask for strict arguments."""
        if self.type != "function":
            return ["type"]
        return ["strict"] if self.strict else []


class ResponsesRequest(RequestModel):
    """``POST /v1/responses``. Errors quote a field's description."""

    model: str = Field(description="the name of a model")
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=_MAX_ITEMS)] = (
        Field(description=f"a string, or a list of up to {_MAX_ITEMS} items")
    )
    instructions: str = Field("", description="a string")
    max_output_tokens: int | None = Field(None, ge=1, description="a whole number from 1")
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    top_p: float | None = Field(None, ge=0, le=1, description="a number from 0 to 1")
    stream: bool = Field(default=False, description="true or false")
    tools: list[ResponseTool] = Field([], description="a list of functions with names")
    tool_choice: str | dict[str, Any] = Field(
        "auto", description='"auto", "none", "required", or an object that names a function'
    )
    parallel_tool_calls: bool = Field(default=True, description="true or false")
    reasoning: ReasoningOptions | None = Field(None, description="an object")
    text: TextOptions | None = Field(None, description='an object with {"type": "text"} as format')
    previous_response_id: str | None = Field(None, description="a string")
    # These have no effect on the answer.
    store: bool | None = Field(None, description="true or false")
    include: list[str] = Field([], description="a list of strings")
    metadata: dict[str, str] | None = Field(None, description="an object of strings")
    user: str | None = Field(None, description="a string")
    safety_identifier: str | None = Field(None, description="a string")
    prompt_cache_key: str | None = Field(None, description="a string")
    truncation: str | None = Field(None, description='"disabled"')

    def check(self) -> None:
        """Raise an ApiError for what would change the answer and is not supported."""
        if self.previous_response_id is not None:
            raise _unsupported("previous_response_id", "needs answers to be stored, which none is.")
        if self.truncation not in (None, "disabled"):
            raise _unsupported("truncation", "must be disabled: no input is left out.")
        if self.text is not None and (self.text.format or _PLAIN_TEXT) != _PLAIN_TEXT:
            raise _unsupported("text.format", "must be of type text: no form is forced.")
        if self.tools and not any(tool.type == "function" for tool in self.tools):
            raise _unsupported(
                "tools[0].type", "must be function: nothing else can be called here."
            )

    def as_chat(self) -> ChatRequest:
        """The same request for the older API."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        items = self.input
        if isinstance(items, str):
            items = [{"role": "user", "content": items}]
        for index, item in enumerate(items):
            _add_item(messages, item, f"input[{index}]")
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "tool_choice": _tool_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": tool.name,
                        "description": tool.description,
                        "parameters": tool.parameters,
                    },
                }
                for tool in self.tools
                if tool.type == "function"
            ],
        }
        return ChatRequest.model_validate(fields)


def _tool_choice(choice: str | dict[str, Any]) -> Any:
    """As the older API has it, where a function's name is further inside."""
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _unsupported(name: str, why: str) -> ApiError:
    return ApiError(400, f"'{name}' {why}", param=name, code="unsupported_parameter")


def _add_item(messages: list[dict[str, Any]], item: dict[str, Any], path: str) -> None:
    """Add an item of the input to the messages of a chat: calls and reasoning belong to the assistant's last one."""
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise _unsupported(f"{path}.role", "must be user, assistant, system or developer.")
        text = _text(item.get("content"), f"{path}.content")
        if role == "assistant":
            _assistant(messages)["content"] += text
        else:
            messages.append({"role": role, "content": text})
    elif kind == "reasoning":
        text = _text(item.get("content") or item.get("summary") or [], f"{path}.content")
        messages.append({"role": "assistant", "content": "", "reasoning_content": text})
    elif kind == "function_call":
        function = {"name": str(item.get("name")), "arguments": str(item.get("arguments", "{}"))}
        call = {"id": str(item.get("call_id")), "type": "function", "function": function}
        _assistant(messages).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        text = _text(item.get("output"), f"{path}.output")
        call_id = str(item.get("call_id"))
        messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
    else:
        raise _unsupported(f"{path}.type", f"{kind} is not supported.")


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message at the end, a new one if there is none."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _text(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [{}]
    for part in parts:
        if part.get("type") not in _TEXT_TYPES or not isinstance(part.get("text"), str):
            raise _unsupported(path, f"has a part of type {part.get('type')}, and needs text.")
    return "\n".join(part["text"] for part in parts)


class ResponsesBuilder(BlockBuilder):
    """Builds the response to ``request``."""

    def __init__(self, request: ResponsesRequest) -> None:
        super().__init__()
        self._request = request
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._number = 0

    def complete(self) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        cut = self.finish_reason == "length"
        usage = {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": self.new_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + self.new_tokens,
        }
        return self._response("incomplete" if cut else "completed") | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [_item(block, "completed") for block in self.blocks],
            "usage": usage,
        }

    def error(self, error: ApiError) -> dict[str, Any]:
        """The last event of a stream that fails."""
        body = error.body["error"]
        failed = {"code": body["code"] or body["type"], "message": body["message"]}
        response = self._response("failed") | {"error": failed}
        return next(self._events({"type": "response.failed", "response": response}))

    def begin(self) -> Iterator[dict[str, Any]]:
        """The chunks before the first block."""
        response = self._response("in_progress")
        yield from self._events(
            {"type": "response.created", "response": response},
            {"type": "response.in_progress", "response": response},
        )

    def opened(self, block: AnswerBlock) -> Iterator[dict[str, Any]]:
        """The chunks of a block that begins."""
        item = _item(block, "in_progress")
        if block.kind != "call":
            item["content"] = []
        where = {"output_index": block.index}
        yield from self._events({"type": "response.output_item.added", **where, "item": item})
        if block.kind != "call":
            yield from self._events(
                {"type": "response.content_part.added", **_place(block), "part": _part(block)}
            )

    def written(self, block: AnswerBlock, text: str) -> Iterator[dict[str, Any]]:
        """The chunks of text that a block has more."""
        more: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        yield from self._events(
            {"type": f"{_event(block)}.delta", **_place(block), "delta": text, **more}
        )

    def closed(self, block: AnswerBlock) -> Iterator[dict[str, Any]]:
        """The chunks of a block that is complete."""
        if block.kind == "call":
            done: dict[str, Any] = {"arguments": block.text, "name": block.name}
        else:
            done = {"text": block.text} | ({"logprobs": []} if block.kind == "text" else {})
        yield from self._events({"type": f"{_event(block)}.done", **_place(block), **done})
        if block.kind != "call":
            yield from self._events(
                {"type": "response.content_part.done", **_place(block), "part": _part(block)}
            )
        where = {"output_index": block.index}
        item = _item(block, "completed")
        yield from self._events({"type": "response.output_item.done", **where, "item": item})

    def end(self) -> Iterator[dict[str, Any]]:
        """The chunks after the last block."""
        response = self.complete()
        yield from self._events({"type": f"response.{response['status']}", "response": response})

    def _events(self, *events: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for event in events:
            yield event | {"sequence_number": self._number}
            self._number += 1

    def _response(self, status: str) -> dict[str, Any]:
        request = self._request
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions or None,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": _PLAIN_TEXT},
            "tool_choice": request.tool_choice,
            "tools": [tool.model_dump() for tool in request.tools],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
        }


def _event(block: AnswerBlock) -> str:
    """The beginning of the names of a block's events."""
    return {
        "reasoning": "response.reasoning_text",
        "text": "response.output_text",
        "call": "response.function_call_arguments",
    }[block.kind]


def _item_id(block: AnswerBlock) -> str:
    return {"reasoning": "rs_", "text": "msg_", "call": "fc_"}[block.kind] + block.key


def _place(block: AnswerBlock) -> dict[str, Any]:
    where = {"item_id": _item_id(block), "output_index": block.index}
    return where if block.kind == "call" else where | {"content_index": 0}


def _part(block: AnswerBlock) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


def _item(block: AnswerBlock, status: str) -> dict[str, Any]:
    head = {"id": _item_id(block), "status": status}
    if block.kind == "reasoning":
        return {**head, "type": "reasoning", "summary": [], "content": [_part(block)]}
    if block.kind == "text":
        return {**head, "type": "message", "role": "assistant", "content": [_part(block)]}
    call = {"call_id": f"call_{block.key}", "name": block.name, "arguments": block.text}
    return {**head, "type": "function_call", **call}
