"""The settings of a service."""

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Names, defaults and limits of one service.

    Attributes:
        model_name: the model's name for clients.
        api_key: required for ``/v1/*``; None: anyone may use it.
        chat_template: instead of the tokenizer's own.
        new_tokens: limit of a chat's answer if the request has none.
        max_answers: running or waiting at any time; requests for more are refused.
        max_body_bytes: of one request.
    """

    model_name: str
    api_key: str | None
    chat_template: str | None
    new_tokens: int
    max_answers: int
    max_body_bytes: int
