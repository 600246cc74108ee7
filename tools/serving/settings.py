"""The settings of a service."""

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Names, defaults and limits of one service.

    Attributes:
        model_name: The model's name for clients.
        api_key: Required for ``/v1/*``; None: anyone may use it.
        chat_template: Instead of the tokenizer's own.
        new_tokens: Limit of a chat's answer if the request has none.
        max_answers: Running or waiting at any time; requests for more are refused.
        max_body_bytes: Of one request.
    """

    model_name: str
    api_key: str | None
    chat_template: str | None
    new_tokens: int
    max_answers: int
    max_body_bytes: int
