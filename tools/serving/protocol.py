"""What a request may ask for: OpenAI's parameters, each of them honoured, or refused by name."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import ClientDisconnect, Request

from layerstream.tools.serving.errors import ApiError

__all__ = ["ChatRequest", "CompletionRequest", "Message", "read_request"]

# A batch in one request takes places from everybody else's; OpenAI's own limit is 128.
MAX_CHOICES = 8

_INT64 = 1 << 63

# Parameters of OpenAI's that are not built, with the values that ask for nothing.
_NOT_BUILT: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (),
    "verbosity": (),
    "web_search_options": (),
}


Item = TypeVar("Item")
# The first wrong item is all that is told: a megabyte of them would hold the event loop for seconds.
_Listed = Annotated[list[Item], Field(fail_fast=True)]


class _Part(BaseModel):
    """Everything in a request: nothing unknown, nothing converted, nothing infinite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Part):
    """Of a streamed answer."""

    include_usage: bool = False


class _Generation(_Part):
    """What both kinds of requests have. A description is what an error says is wanted."""

    model: str = Field(description="the name of a model")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description=f"a whole number from 1 to {MAX_CHOICES}")
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    top_p: float | None = Field(None, ge=0, le=1, description="a number from 0 to 1")
    presence_penalty: float = Field(0, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: float = Field(0, ge=-2, le=2, description="a number from -2 to 2")
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64, description="a whole number of 64 bits")
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)]
    ) = Field([], description="a string or a list of up to four, none of them empty")
    max_tokens: int | None = Field(None, ge=1, description="a whole number from 1")
    stream: bool = Field(default=False, description="true or false")
    stream_options: StreamOptions | None = Field(
        None, description='an object such as {"include_usage": true}'
    )
    user: str | None = Field(None, description="a string")  # a tag: it changes no answer

    @property
    def stops(self) -> Sequence[str]:
        """The strings that end the text."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def answers(self) -> int:
        """How many texts are wanted."""
        return self.n

    @property
    def asked_tokens(self) -> int | None:
        """The most tokens that are wanted; None: not said."""
        return self.max_tokens

    def check(self) -> None:
        """Raise an ApiError if parameters contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400,
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
                param="stream_options",
            )


class CompletionRequest(_Generation):
    """``POST /v1/completions``."""

    prompt: str | _Listed[str] | _Listed[int] | _Listed[_Listed[int]] = Field(
        union_mode="left_to_right",
        description="a string, a list of strings, a list of token ids, or a list of such lists",
    )

    @property
    def answers(self) -> int:
        """How many texts are wanted: for each prompt, so many."""
        one = isinstance(self.prompt, str) or all(isinstance(each, int) for each in self.prompt)
        return self.n if one else self.n * len(self.prompt)


class TextPart(_Part):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Part):
    """One turn of a chat. As in the request itself, what is null in it was not said.

    The official client sends an answer of ours back with all that was in it, ``"refusal": null`` too.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | _Listed[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _said(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        return {name: value for name, value in message.items() if value is not None}


class ChatRequest(_Generation):
    """``POST /v1/chat/completions``."""

    messages: _Listed[Message] = Field(
        min_length=1,
        description=(
            "a list of messages, each with a role (system, developer, user or assistant) and a content "
            "(a string, or parts of type text: images and audio are not supported)"
        ),
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="a whole number from 1")

    @property
    def asked_tokens(self) -> int | None:
        """The most tokens that are wanted; None: not said."""
        return self.max_completion_tokens or self.max_tokens

    def check(self) -> None:
        """Raise an ApiError if parameters contradict each other."""
        super().check()
        if self.max_completion_tokens and self.max_tokens not in (None, self.max_completion_tokens):
            raise ApiError(
                400,
                "'max_tokens' is the old name of 'max_completion_tokens': give one of them.",
                param="max_completion_tokens",
                code="invalid_value",
            )


AnyRequest = TypeVar("AnyRequest", bound=_Generation)


async def read_request(request: Request, kind: type[AnyRequest], *, max_bytes: int) -> AnyRequest:
    """The body of ``request``.

    Raises:
        ApiError: it is too long, not JSON, or asks for what is not there.
    """
    body = _decoded(await _body(request, max_bytes=max_bytes))
    for name in _NOT_BUILT.keys() & body.keys():
        value = body.pop(name)
        if not any(value == each and type(value) is type(each) for each in _NOT_BUILT[name]):
            raise ApiError(
                400,
                f"Unsupported parameter: '{name}' is not supported by this server.",
                param=name,
                code="unsupported_parameter",
            )
    try:
        asked = kind.model_validate(body)
    except ValidationError as error:
        raise _refusal(error, body, kind) from None
    asked.check()
    return asked


async def _body(request: Request, *, max_bytes: int) -> bytes:
    body = bytearray()
    nbytes = 0
    try:
        async for chunk in request.stream():
            nbytes += len(chunk)
            if nbytes <= max_bytes:
                body += chunk
            else:
                # Read on for a while: a client whose upload breaks off does not get to see the answer.
                body.clear()
                if nbytes > 8 * max_bytes:
                    break
    except ClientDisconnect:
        raise ApiError(499, "The client has left.") from None  # for the log: nobody is there
    if nbytes > max_bytes:
        raise ApiError(
            413,
            f"The request's body is longer than the {max_bytes} bytes that this server takes.",
            code="request_too_large",
        )
    return bytes(body)


def _decoded(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``; what is null in it was not said."""
    try:
        decoded = json.loads(body)
        if b"\\u" in body:
            json.dumps(decoded, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400, f"We could not parse the JSON body of your request: {error}", code="invalid_json"
        ) from None
    if not isinstance(decoded, dict):
        raise ApiError(400, "The body of a request must be a JSON object.", code="invalid_json")
    return {name: value for name, value in decoded.items() if value is not None}


def _refusal(error: ValidationError, body: Mapping[str, Any], kind: type[BaseModel]) -> ApiError:
    """The first thing that is wrong with ``body``, in words."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = str(first["loc"][0])
    path = _path(first["loc"], body)
    if first["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"Unrecognized request argument supplied: {path}",
            param=path,
            code="unknown_parameter",
        )
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return ApiError(
            400,
            f"Missing required parameter: '{name}'.",
            param=name,
            code="missing_required_parameter",
        )
    wanted = kind.model_fields[name].description
    return ApiError(
        400,
        f"Invalid value for '{path}': {name} must be {wanted}.",
        param=path,
        code="invalid_value",
    )


def _path(location: Sequence[int | str], body: Any) -> str:
    """Where in ``body`` an error is, such as messages[0].role; the names of a union's types are no part of it."""
    path, here = "", body
    for part in location:
        if isinstance(part, str) and isinstance(here, dict) and part in here:
            path += f".{part}" if path else part
        elif isinstance(part, int) and isinstance(here, list) and part < len(here):
            path += f"[{part}]"
        else:
            continue
        here = here[part]
    return path or str(location[0])
