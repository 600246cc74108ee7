"""From the prompts of a request to token ids, and whether they fit the model."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from layerstream.tools.serving.errors import STOPPED, ApiError
from layerstream.tools.serving.protocol import ChatRequest, CompletionRequest, Message

__all__ = ["Prompts", "context_tokens"]

T = TypeVar("T")


def context_tokens(config: Any) -> int | None:
    """The most tokens, prompt and answer together, that a model with this config has positions for."""
    config = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    found = (getattr(config, name, None) for name in names)
    return next((number for number in found if isinstance(number, int) and number > 0), None)


class Prompts:
    """Turns requests into token ids.

    Args:
        tokenizer: The model's, of transformers.
        chat_template: Instead of the tokenizer's own.
        context: The most tokens of prompt and answer together, or None.
        vocabulary: Number of tokens that the model knows.
        new_tokens: Limit of a chat's answer if the request has none.
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
        # A long prompt takes a second: not on the event loop. One thread, because transformers changes a
        # tokenizer's settings while it uses it, and several would compete with the loop for the interpreter.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="layerstream-prompts")

    def close(self) -> None:
        """End the thread. Requests that still wait for it get an error that the server stops."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def of(self, asked: ChatRequest | CompletionRequest) -> list[list[int]]:
        """The token ids of each prompt.

        Raises:
            ApiError: There is no prompt, or it has tokens that the model does not know.
        """
        if isinstance(asked, ChatRequest):
            name, found = "messages", [await self.in_thread(self._chat, asked.messages)]
        else:
            name, found = "prompt", await self.in_thread(self._completion, asked.prompt)
        if not found or not all(found):
            raise ApiError(400, f"'{name}' must have at least one token.", param=name)
        return found

    def new_tokens(self, asked: ChatRequest | CompletionRequest, prompt: Sequence[int]) -> int:
        """How many tokens may follow ``prompt``.

        Raises:
            ApiError: More are asked for than the model has positions for.
        """
        chat = isinstance(asked, ChatRequest)
        # 16 is the default of OpenAI's text completions.
        wanted = asked.asked_tokens or (self._new_tokens if chat else 16)
        if self._context is None:
            return wanted
        if asked.asked_tokens is None:
            wanted = min(wanted, max(1, self._context - len(prompt)))
        if len(prompt) + wanted > self._context:
            raise ApiError(
                400,
                f"This model's maximum context length is {self._context} tokens. However, you requested "
                f"{len(prompt) + wanted} tokens ({len(prompt)} in the {'messages' if chat else 'prompt'}, "
                f"{wanted} in the completion). Please reduce them.",
                param="messages" if chat else "prompt",
                code="context_length_exceeded",
            )
        return wanted

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Call ``function`` in the thread for all prompts, and return its result.

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

    def _completion(self, prompt: str | list[Any]) -> list[list[int]]:
        one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
        prompts: list[Any] = [prompt] if one else list(prompt)
        return [
            self._ids(each) if isinstance(each, str) else self._checked(each) for each in prompts
        ]

    def _chat(self, messages: Sequence[Message]) -> list[int]:
        if self._chat_template is None and self._tokenizer.chat_template is None:
            raise ApiError(
                400,
                "This model has no chat template; ask /v1/completions, or start the server with "
                "--chat-template FILE.",
                param="messages",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [_turn(message) for message in messages],
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
        wrong = next((token for token in ids if not 0 <= token < self._vocabulary), None)
        if wrong is not None:
            raise ApiError(
                400,
                f"Token {wrong} is none of the model's: they are 0 to {self._vocabulary - 1}.",
                param="prompt",
            )
        return ids


def _turn(message: Message) -> Mapping[str, str]:
    """A message as chat templates know them: "developer" is OpenAI's new word for "system"."""
    role = "system" if message.role == "developer" else message.role
    parts = message.content
    content = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
    return {"role": role, "content": content} | ({"name": message.name} if message.name else {})
