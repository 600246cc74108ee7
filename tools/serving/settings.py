"""What a service shows, and what it lets in."""

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of one service.

    Attributes:
        model_name: by which clients ask for the model.
        api_key: that ``/v1/*`` wants; None: anyone may ask.
        chat_template: instead of the tokenizer's own.
        new_tokens: how many a chat's answer has at most where the client does not say.
        max_answers: under way or waiting at any time; more are turned away.
        max_body_bytes: of one request.
    """

    model_name: str
    api_key: str | None
    chat_template: str | None
    new_tokens: int
    max_answers: int
    max_body_bytes: int
