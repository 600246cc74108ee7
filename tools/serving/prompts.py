"""Turns the prompts of requests into token ids, and checks that they fit the model."""

import asyncio
import inspect
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jinja2 import TemplateSyntaxError

from layerstream.stages.errors import ModelError
from layerstream.tools.serving.answer_parser import call_opening
from layerstream.tools.serving.embeddings import EmbeddingRequest
from layerstream.tools.serving.errors import STOPPED, ApiError
from layerstream.tools.serving.messages import template_message
from layerstream.tools.serving.protocol import ChatRequest, CompletionRequest

__all__ = ["Prompts", "check_template"]

T = TypeVar("T")


def check_template(tokenizer: Any, template: str | None) -> None:
    """Check that the chat template, if there is one, compiles.

    Args:
        tokenizer: The model's tokenizer, from transformers.
        template: Replaces the tokenizer's own template.

    Raises:
        ModelError: It has an error of syntax.
    """
    if template is None and tokenizer.chat_template is None:
        return
    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], chat_template=template, tokenize=False
        )
    except TemplateSyntaxError as error:
        whose = "The model's" if template is None else "This"
        raise ModelError(
            f"{whose} chat template does not compile, in line {error.lineno}: {error.message}. Give another one with "
            "--chat-template FILE."
        ) from error
    except Exception:  # noqa: BLE001, S110 - a template may refuse any messages
        pass


class Prompts:
    """Turns requests into token ids.

    Args:
        tokenizer: The model's tokenizer, from transformers.
        chat_template: Replaces the tokenizer's own template.
        response_template: Tells tool calls from text; None if the model has none.
        vocabulary: Number of tokens in the model's vocabulary.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None,
        response_template: Any | None,
        vocabulary: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._response_template = response_template
        self._vocabulary = vocabulary
        self._closed = False
        # A long prompt takes a second, which would block the event loop. One thread, since transformers changes the
        # tokenizer's settings during a call, and several threads would compete with the loop for the interpreter.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="layerstream-prompts")

    def close(self) -> None:
        """End the thread. Requests that still wait for it get an error that the server is shutting down."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def token_ids(
        self, request: ChatRequest | CompletionRequest | EmbeddingRequest
    ) -> list[list[int]]:
        """Tokenize each prompt of a request.

        Raises:
            ApiError: There is no prompt, or it has tokens that are not in the vocabulary.
        """
        if isinstance(request, ChatRequest):
            name, prompts = (
                "messages",
                [await self.in_thread(self._tokenize_chat, request)],
            )
        else:
            name, prompts = (
                "prompt" if isinstance(request, CompletionRequest) else "input",
                await self.in_thread(self._tokenize_completion, request.prompt),
            )
        if not prompts or not all(prompts):
            raise ApiError(400, f"'{name}' must have at least one token.", param=name)
        return prompts

    def check_tokens(self, tokens: list[int], param: str = "logit_bias") -> list[int]:
        """Return ``tokens``; raises an ApiError if any is not in the vocabulary."""
        unknown = next((token for token in tokens if not 0 <= token < self._vocabulary), None)
        if unknown is not None:
            raise ApiError(
                400,
                f"Token {unknown} is none of the model's: they are 0 to {self._vocabulary - 1}.",
                param=param,
            )
        return tokens

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Call ``function`` in the thread for prompts, and return its result.

        Raises:
            ApiError: The server is shutting down.
        """
        if self._closed:
            raise ApiError(503, STOPPED)
        future = self._thread.submit(function, *args)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if self._closed and future.cancelled():
                raise ApiError(503, STOPPED) from None
            raise

    def _tokenize_completion(self, prompt: str | list[Any]) -> list[list[int]]:
        single = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
        prompts: list[Any] = [prompt] if single else list(prompt)
        return [
            self._ids(each) if isinstance(each, str) else self.check_tokens(each, "prompt")
            for each in prompts
        ]

    def _tokenize_chat(self, request: ChatRequest) -> list[int]:
        if self._chat_template is None and self._tokenizer.chat_template is None:
            raise ApiError(
                400,
                "This model has no chat template; ask /v1/completions, or start the server with "
                "--chat-template FILE.",
                param="messages",
            )
        more = self._template_arguments(request)
        if tools := request.offered_tools:
            if not self._template_takes("tools", tools):
                raise _not_supported("tools", "are not known to this model's chat template.")
            if self._response_template is None:
                raise _not_supported(
                    "tools",
                    "need a response template, which tells calls from text, and this model has none; start the "
                    "server with --response-template FILE.",
                )
        try:
            text = self._tokenizer.apply_chat_template(
                [template_message(message) for message in request.messages],
                chat_template=self._chat_template,
                add_generation_prompt=True,
                tokenize=False,
                tools=tools or None,
                **more,
            )
        except Exception as error:  # templates raise errors of any kind to refuse messages
            raise ApiError(
                400, f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        if request.must_call:
            opening = call_opening(self._response_template, text)
            if opening is None:
                raise _not_supported(
                    "tool_choice",
                    "can be auto or none: the response template tells no mark of a call.",
                )
            text += opening
        return self._ids(text, special=False)  # the template has added them

    def _template_arguments(self, request: ChatRequest) -> dict[str, Any]:
        """What a request has for the chat template besides messages and tools."""
        reserved = inspect.signature(self._tokenizer.apply_chat_template).parameters
        for name in request.chat_template_kwargs.keys() & reserved.keys():
            raise ApiError(
                400,
                f"'{name}' is not an argument that a chat template takes from a request.",
                param=f"chat_template_kwargs.{name}",
            )
        more = dict(request.chat_template_kwargs)
        if request.reasoning_effort is not None and self._template_takes("reasoning_effort"):
            more["reasoning_effort"] = request.reasoning_effort
        elif request.reasoning_effort not in (None, "none"):
            raise _not_supported("reasoning_effort", "is not known to this model's chat template.")
        return more

    def _template_takes(self, name: str, tools: Any = None) -> bool:
        """Whether the chat template uses variable ``name``."""
        template = self._tokenizer.get_chat_template(self._chat_template, tools)
        return re.search(rf"\b{name}\b", template) is not None

    def _ids(self, text: str, *, special: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return self.check_tokens(ids, "prompt")


def _not_supported(name: str, why: str) -> ApiError:
    return ApiError(400, f"'{name}' {why}", param=name, code="unsupported_parameter")
