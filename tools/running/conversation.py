"""A conversation: its messages, and the tokens that a model's chat template makes of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerstream.stages.errors import ModelError

__all__ = ["Conversation", "chat_token_ids"]

Message = dict[str, str]


def chat_token_ids(
    tokenizer: Any | None, messages: Sequence[Message], *, path: Path, template: str | None = None
) -> list[int]:
    """The token ids of ``messages`` and of what begins the answer, by the chat template.

    Args:
        tokenizer: The tokenizer of the model, from transformers; None if it has none.
        messages: The conversation so far.
        path: The model's, for messages of errors.
        template: Replaces the tokenizer's own template.

    Raises:
        ModelError: There is no template, or it refuses the messages.
    """
    if tokenizer is None:
        raise ModelError(f"{path} has no tokenizer, which a chat needs to read and write text.")
    if template is None and tokenizer.chat_template is None:
        raise ModelError(
            f"{path} has no chat template, so it is no model to talk to; give one with `chat --chat-template FILE`, "
            "or let it go on from a text with `generate --prompt`."
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # templates raise errors of any kind to refuse messages
        raise ModelError(f"The chat template of {path} refuses this: {error}") from error
    # The template has added the special tokens.
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ModelError(f"The chat template of {path} makes no tokens of this.")
    return ids


class Conversation:
    """What was said so far.

    Args:
        tokenizer: The model's tokenizer, from transformers.
        path: The model's, for messages of errors.
        template: Replaces the tokenizer's own template.
        system: What the model is told before all else; None for nothing.
    """

    def __init__(
        self, tokenizer: Any, *, path: Path, template: str | None, system: str | None
    ) -> None:
        self._tokenizer = tokenizer
        self._path = path
        self._template = template
        self._turns: list[Message] = []
        self.system = system

    @property
    def messages(self) -> list[Message]:
        """All messages, the system's first."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self._turns]

    def reset(self) -> None:
        """Forget what was said; what the system says stays."""
        self._turns.clear()

    def prompt(self, text: str) -> list[int]:
        """The token ids of the conversation if the user goes on with ``text``.

        Raises:
            ModelError: There is no template, or it refuses the messages.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        return chat_token_ids(self._tokenizer, messages, path=self._path, template=self._template)

    def add(self, text: str, answer: str) -> None:
        """The user has said ``text``, and the model ``answer``."""
        self._turns += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ]
