"""The messages of a chat, as clients send them and as chat templates take them."""

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["MAX_PARTS", "Message", "RequestModel", "TextPart", "ToolCall", "template_message"]

MAX_PARTS = 128
_MAX_CALLS = 128


class RequestModel(BaseModel):
    """Base of all objects in a request: no conversions, no infinite numbers. Unknown fields are found by the reader."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    def check(self) -> None:
        """Raise an ApiError if parameters contradict each other."""

    def without_effect(self) -> Iterable[str]:
        """The names of fields whose values are taken, since clients send them always, but change nothing."""
        return ()


class TextPart(RequestModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(RequestModel):
    """The function of a tool call."""

    name: str
    arguments: str


class ToolCall(RequestModel):
    """A call that an earlier answer made."""

    id: str | None = None
    index: int | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(RequestModel):
    """One message of a chat. As in the request itself, null means that a field is not set.

    Clients send answers back with all their fields, such as ``"refusal": null``.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_PARTS)] = ""
    name: str | None = None
    id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=_MAX_CALLS)] = []
    tool_call_id: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] = []

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        if message.get("role") not in {"assistant", "tool"} and message.get("content") is None:
            return {**message, "content": 0}  # no content at all: an error that names it
        return {name: value for name, value in message.items() if value is not None}


def template_message(message: Message) -> Mapping[str, Any]:
    """Convert a message for chat templates: "developer" is OpenAI's new word for "system"."""
    parts = message.content
    made: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": parts if isinstance(parts, str) else "\n".join(part.text for part in parts),
    }
    if not made["content"] and message.refusal:
        made["content"] = message.refusal
    if message.tool_calls:
        made["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    optional = {
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content or message.reasoning,
    }
    return made | {name: value for name, value in optional.items() if value is not None}


def _template_call(call: ToolCall) -> Mapping[str, Any]:
    """Convert a call for chat templates, which take arguments as an object."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError:
        arguments = call.function.arguments
    made = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return made if call.id is None else made | {"id": call.id}
