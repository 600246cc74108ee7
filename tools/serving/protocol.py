"""The parameters of requests: each of OpenAI's is supported, or refused by name."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from layerstream.tools.serving.errors import ApiError

__all__ = ["UNSUPPORTED", "AnyRequest", "ChatRequest", "CompletionRequest", "Message"]

# Each answer counts against the server's limit; OpenAI's limit is 128.
MAX_CHOICES = 8
# More than clients need; longer lists would take long to check.
_MAX_ITEMS = 2048
_MAX_PARTS = 128
# Each new token is compared with the beginnings of stop strings, on the event loop.
_MAX_STOP = 1000

_INT64 = 1 << 63

# OpenAI's parameters that are not implemented, with their values that have no effect; null never has an effect.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Fields without effect that clients send back with an earlier answer.
_EMPTY_IN_MESSAGES: Mapping[str, Sequence[Any]] = {"annotations": [], "tool_calls": []}


Item = TypeVar("Item")
# Only the first wrong item is reported: describing a megabyte of them would take seconds.
_Listed = Annotated[list[Item], Field(fail_fast=True, max_length=_MAX_ITEMS)]
_Tokens = Annotated[list[int], Field(fail_fast=True)]  # limited by the model's context
_Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP)]
_Tag = Annotated[str | None, Field(description="a string")]  # no effect on the answer


class _StrictModel(BaseModel):
    """Base of all objects in a request: no unknown fields, no conversions, no infinite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_StrictModel):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    # Padding that hides lengths from eavesdroppers, not implemented.
    include_obfuscation: Literal[False] | None = None


class _Generation(_StrictModel):
    """Parameters of both kinds of requests. Errors quote a field's description."""

    model: str = Field(description="the name of a model")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description=f"a whole number from 1 to {MAX_CHOICES}")
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    top_p: float | None = Field(None, ge=0, le=1, description="a number from 0 to 1")
    presence_penalty: float = Field(0, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: float = Field(0, ge=-2, le=2, description="a number from -2 to 2")
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64, description="a whole number of 64 bits")
    stop: _Stop | Annotated[list[_Stop], Field(fail_fast=True, max_length=4)] = Field(
        [], description=f"a string or a list of up to four, of 1 to {_MAX_STOP} characters each"
    )
    max_tokens: int | None = Field(None, ge=1, description="a whole number from 1")
    stream: bool = Field(default=False, description="true or false")
    stream_options: StreamOptions | None = Field(
        None, description='an object such as {"include_usage": true}'
    )
    user: _Tag = None
    safety_identifier: _Tag = None
    prompt_cache_key: _Tag = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = Field(
        None, description="an object of up to 16 strings"
    )

    @property
    def stops(self) -> Sequence[str]:
        """The strings that end the text."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def answers(self) -> int:
        """The number of answers to generate."""
        return self.n

    @property
    def max_new_tokens(self) -> int | None:
        """The maximum number of new tokens; None if the request sets none."""
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

    prompt: str | _Listed[str] | _Tokens | _Listed[_Tokens] = Field(
        union_mode="left_to_right",
        description=(
            f"a string, a list of up to {_MAX_ITEMS} strings, a list of token ids, or a list of such lists"
        ),
    )

    @property
    def answers(self) -> int:
        """The number of answers to generate, over all prompts."""
        single = isinstance(self.prompt, str) or isinstance(next(iter(self.prompt), 0), int)
        return self.n if single else self.n * len(self.prompt)


class TextPart(_StrictModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(_StrictModel):
    """One message of a chat. As in the request itself, null means that a field is not set.

    The official client sends answers back with all their fields, such as ``"refusal": null``.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=_MAX_PARTS)]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_fields(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        empty = _EMPTY_IN_MESSAGES
        return {
            name: value
            for name, value in message.items()
            if value is not None and not (name in empty and value == empty[name])
        }


class ChatRequest(_Generation):
    """``POST /v1/chat/completions``."""

    messages: _Listed[Message] = Field(
        min_length=1,
        description=(
            f"a list of up to {_MAX_ITEMS} messages, each with a role (system, developer, user or assistant) "
            f"and a content (a string, or up to {_MAX_PARTS} parts of type text: images and audio are not "
            "supported)"
        ),
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="a whole number from 1")

    @property
    def max_new_tokens(self) -> int | None:
        """The maximum number of new tokens; None if the request sets none."""
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
