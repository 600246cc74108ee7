"""The settings of a service."""

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Names, defaults and limits of one service."""

    model_name: str
    """The model's name for clients."""
    api_key: str | None
    """Required for ``/v1/*``; None for no key."""
    chat_template: str | None
    """Replaces the tokenizer's own template."""
    new_tokens: int
    """Limit for a chat's answer if the request sets none."""
    max_answers: int
    """Maximum of answers that run or wait; requests for more are refused."""
    max_body_bytes: int
    """Maximum size of a request's body."""
    keep_alive_seconds: float = 10.0
    """The longest time in which nothing is sent to a client that waits for a streamed answer."""
    hosts: frozenset[str] | None = None
    """Names by which clients may address the service; None for any."""
    origins: frozenset[str] = frozenset()
    """Origins whose pages may use the service; "*" is any."""
