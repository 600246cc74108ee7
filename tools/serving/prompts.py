"""Turns the prompts of requests into token ids, and checks that they fit the model."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jinja2 import TemplateSyntaxError

from layerstream.stages.errors import ModelError
from layerstream.tools.serving.errors import STOPPED, ApiError
from layerstream.tools.serving.protocol import ChatRequest, CompletionRequest, Message

__all__ = ["Prompts", "check_template", "context_tokens"]

T = TypeVar("T")


def context_tokens(config: Any) -> int | None:
    """The maximum number of tokens, prompt and answer together, of a model with this config; None if unknown."""
    config = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    found = (getattr(config, name, None) for name in names)
    return next((number for number in found if isinstance(number, int) and number > 0), None)


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
        context: Maximum of tokens of prompt and answer together, or None.
        vocabulary: Number of tokens in the model's vocabulary.
        new_tokens: Limit for a chat's answer if the request sets none.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None,
        context: int | None,
        vocabulary: int,
        new_tokens: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._context = context
        self._vocabulary = vocabulary
        self._new_tokens = new_tokens
        self._closed = False
        # A long prompt takes a second, which would block the event loop. One thread, since transformers changes the
        # tokenizer's settings during a call, and several threads would compete with the loop for the interpreter.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="layerstream-prompts")

    def close(self) -> None:
        """End the thread. Requests that still wait for it get an error that the server is shutting down."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def token_ids(self, request: ChatRequest | CompletionRequest) -> list[list[int]]:
        """Tokenize each prompt of a request.

        Raises:
            ApiError: There is no prompt, or it has tokens that are not in the vocabulary.
        """
        if isinstance(request, ChatRequest):
            name, prompts = (
                "messages",
                [await self.in_thread(self._tokenize_chat, request.messages)],
            )
        else:
            name, prompts = (
                "prompt",
                await self.in_thread(self._tokenize_completion, request.prompt),
            )
        if not prompts or not all(prompts):
            raise ApiError(400, f"'{name}' must have at least one token.", param=name)
        return prompts

    def new_tokens(self, request: ChatRequest | CompletionRequest, prompt: Sequence[int]) -> int:
        """The maximum number of tokens after ``prompt``.

        Raises:
            ApiError: The request exceeds the model's context.
        """
        chat = isinstance(request, ChatRequest)
        # 16 is the default of OpenAI's text completions.
        count = request.max_new_tokens or (self._new_tokens if chat else 16)
        if self._context is None:
            return count
        if request.max_new_tokens is None:
            count = min(count, max(1, self._context - len(prompt)))
        if len(prompt) + count > self._context:
            raise ApiError(
                400,
                f"This model's maximum context length is {self._context} tokens. However, you requested "
                f"{len(prompt) + count} tokens ({len(prompt)} in the {'messages' if chat else 'prompt'}, "
                f"{count} in the completion). Please reduce them.",
                param="messages" if chat else "prompt",
                code="context_length_exceeded",
            )
        return count

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
            self._ids(each) if isinstance(each, str) else self._checked(each) for each in prompts
        ]

    def _tokenize_chat(self, messages: Sequence[Message]) -> list[int]:
        if self._chat_template is None and self._tokenizer.chat_template is None:
            raise ApiError(
                400,
                "This model has no chat template; ask /v1/completions, or start the server with "
                "--chat-template FILE.",
                param="messages",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [_template_message(message) for message in messages],
                chat_template=self._chat_template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except Exception as error:  # templates raise errors of any kind to refuse messages
            raise ApiError(
                400, f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return self._ids(text, special=False)  # the template has added them

    def _ids(self, text: str, *, special: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return self._checked(ids)

    def _checked(self, ids: list[int]) -> list[int]:
        unknown = next((token for token in ids if not 0 <= token < self._vocabulary), None)
        if unknown is not None:
            raise ApiError(
                400,
                f"Token {unknown} is none of the model's: they are 0 to {self._vocabulary - 1}.",
                param="prompt",
            )
        return ids


def _template_message(message: Message) -> Mapping[str, str]:
    """Convert a message for chat templates: "developer" is OpenAI's new word for "system"."""
    role = "system" if message.role == "developer" else message.role
    parts = message.content
    content = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
    return {"role": role, "content": content} | ({"name": message.name} if message.name else {})
