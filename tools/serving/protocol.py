"""The parameters of requests to generate text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from layerstream.tools.serving.errors import ApiError
from layerstream.tools.serving.messages import MAX_PARTS, Message, RequestModel

__all__ = ["AnyRequest", "ChatRequest", "CompletionRequest", "GenerationRequest"]

# Each answer counts against the server's limit; OpenAI's limit is 128.
MAX_CHOICES = 8
# More than clients need; longer lists would take long to check.
_MAX_ITEMS = 2048
# Each new token is compared with the beginnings of stop strings.
_MAX_STOP = 1000
_MAX_STOPS = 64
_MAX_BIASES = 1024
_MAX_LOGPROBS = 20
_MAX_TOOLS = 128

_INT64 = 1 << 63

Item = TypeVar("Item")
# Only the first wrong item is reported: describing a megabyte of them would take seconds.
_Listed = Annotated[list[Item], Field(fail_fast=True, max_length=_MAX_ITEMS)]
_Tokens = Annotated[list[int], Field(fail_fast=True)]  # limited by the model's context
_Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_TokenName = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
_Tag = Annotated[str | None, Field(description="a string")]  # no effect on the answer


class ToolFunction(RequestModel):
    """A function that a model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def without_effect(self) -> Iterable[str]:
        """Arguments follow the schema as far as the model does; agents ask for more by default."""
        return ["strict"] if self.strict else []


class Tool(RequestModel):
    """A tool that a model may use."""

    type: Literal["function"]
    function: ToolFunction

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it."""
        parameters = self.function.parameters or {"type": "object", "properties": {}}
        function = {"name": self.function.name, "description": self.function.description or ""}
        return {"type": self.type, "function": function | {"parameters": parameters}}


class ToolName(RequestModel):
    """The name of a function."""

    name: str


class ChosenTool(RequestModel):
    """The only tool that a model may call, and has to."""

    type: Literal["function"]
    function: ToolName


class StreamOptions(RequestModel):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    # Padding that hides lengths from eavesdroppers, not implemented.
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(RequestModel):
    """Parameters of all requests to generate. Errors quote a field's description."""

    model: str = Field(description="the name of a model")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description=f"a whole number from 1 to {MAX_CHOICES}")
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    top_p: float | None = Field(None, ge=0, le=1, description="a number from 0 to 1")
    top_k: int | None = Field(None, ge=-1, description="a whole number, with 0 or -1 for all")
    min_p: float | None = Field(None, ge=0, le=1, description="a number from 0 to 1")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="a number up to 10")
    presence_penalty: float = Field(0, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: float = Field(0, ge=-2, le=2, description="a number from -2 to 2")
    logit_bias: Annotated[dict[_TokenName, _Bias], Field(max_length=_MAX_BIASES)] = Field(
        {},
        description=f"an object of up to {_MAX_BIASES} token ids with numbers from -100 to 100",
    )
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64, description="a whole number of 64 bits")
    stop: _Stop | Annotated[list[_Stop], Field(fail_fast=True, max_length=_MAX_STOPS)] = Field(
        [],
        description=f"a string or a list of up to {_MAX_STOPS}, of 1 to {_MAX_STOP} characters each",
    )
    stop_token_ids: Annotated[list[int], Field(max_length=_MAX_STOPS)] = Field(
        [], description=f"a list of up to {_MAX_STOPS} token ids"
    )
    ignore_eos: bool = Field(default=False, description="true or false")
    speculate: bool = Field(default=True, description="true or false")
    min_tokens: int = Field(0, ge=0, description="a whole number from 0")
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

    @property
    def logprob_count(self) -> int | None:
        """How many likely tokens to name beside each one, with their log probabilities; None for no log probabilities."""
        raise NotImplementedError

    @property
    def biases(self) -> Mapping[int, float]:
        """What is added to the scores of tokens."""
        return {int(token): bias for token, bias in self.logit_bias.items()}

    def check(self) -> None:
        """Raise an ApiError if parameters contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400,
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
                param="stream_options",
            )


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    prompt: str | _Listed[str] | _Tokens | _Listed[_Tokens] = Field(
        union_mode="left_to_right",
        description=(
            f"a string, a list of up to {_MAX_ITEMS} strings, a list of token ids, or a list of such lists"
        ),
    )
    echo: bool = Field(default=False, description="true or false")
    logprobs: Annotated[int, Field(ge=0, le=_MAX_LOGPROBS)] | Literal[False] | None = Field(
        None, description=f"a whole number from 0 to {_MAX_LOGPROBS}"
    )
    max_tokens: int | None = Field(None, ge=0, description="a whole number from 0")

    @property
    def answers(self) -> int:
        """The number of answers to generate, over all prompts."""
        single = isinstance(self.prompt, str) or isinstance(next(iter(self.prompt), 0), int)
        return self.n if single else self.n * len(self.prompt)

    @property
    def logprob_count(self) -> int | None:
        """How many likely tokens to name beside each one, with their log probabilities; None for no log probabilities."""
        return None if self.logprobs is False else self.logprobs


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: _Listed[Message] = Field(
        min_length=1,
        description=(
            f"a list of up to {_MAX_ITEMS} messages, each with a role (system, developer, user, assistant or "
            f"tool) and a content (a string, or up to {MAX_PARTS} parts of type text: images and audio are not "
            "supported)"
        ),
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="a whole number from 1")
    logprobs: bool = Field(default=False, description="true or false")
    top_logprobs: int = Field(
        0, ge=0, le=_MAX_LOGPROBS, description=f"a whole number from 0 to {_MAX_LOGPROBS}"
    )
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=_MAX_TOOLS)] = Field(
        [], description=f"a list of up to {_MAX_TOOLS} functions with names"
    )
    tool_choice: Literal["auto", "none", "required"] | ChosenTool = Field(
        "auto", description='"auto", "none", "required", or an object that names a function'
    )
    parallel_tool_calls: bool = Field(default=True, description="true or false")
    reasoning_effort: str | None = Field(None, description="a string")
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="an object of further arguments for the chat template"
    )

    @property
    def max_new_tokens(self) -> int | None:
        """The maximum number of new tokens; None if the request sets none."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """How many likely tokens to name beside each one, with their log probabilities; None for no log probabilities."""
        return self.top_logprobs if self.logprobs else None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is told of, as chat templates take them."""
        if self.tool_choice == "none":
            return []
        chosen = (
            self.tool_choice.function.name if isinstance(self.tool_choice, ChosenTool) else None
        )
        return [tool.for_template() for tool in self.tools if chosen in (None, tool.function.name)]

    @property
    def must_call(self) -> bool:
        """Whether the answer has to begin with a call of a tool."""
        return self.tool_choice not in ("auto", "none")

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
        if self.must_call and not self.offered_tools:
            raise ApiError(
                400,
                "'tool_choice' asks for a call of a tool that is not in 'tools'.",
                param="tool_choice",
                code="invalid_value",
            )
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")


AnyRequest = TypeVar("AnyRequest", bound=RequestModel)
