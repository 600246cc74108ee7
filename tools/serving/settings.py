"""The settings of a service."""

from dataclasses import dataclass
from typing import Any

from layerstream.tools.running.speculation import Speculation
from layerstream.tools.serving.embeddings import Pooling

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Names, defaults and limits of one service."""

    model_name: str
    """The model's name for clients."""
    adapters: tuple[str, ...] = ()
    """Names of the model's adapters, by which clients ask for the model with one of them."""
    api_key: str | None
    """Required for ``/v1/*``; None for no key."""
    chat_template: str | None
    """Replaces the tokenizer's own template."""
    concurrent: int
    """Requests whose memory is reserved."""
    new_tokens: int
    """The tokens of an answer whose memory is reserved for each of them."""
    max_answers: int
    """Maximum of answers that run or wait; requests for more are refused."""
    max_body_bytes: int
    """Maximum size of a request's body."""
    pooling: Pooling
    """How hidden states become embeddings."""
    keep_alive_seconds: float = 10.0
    """The longest time in which nothing is sent to a client that waits for a streamed answer."""
    stall_seconds: float = 600.0
    """After so long without movement, requests are reported as stalled."""
    response_template: dict[str, Any] | None = None
    """Replaces the model's own."""
    speculation: Speculation | None = None
    """How tokens are guessed; None for one token in each sweep."""
    page: bool = True
    """Serve the page at ``/``."""
    strict: bool = False
    """Refuse fields that are unknown, instead of ignoring them."""
    hosts: frozenset[str] | None = None
    """Names by which clients may address the service; None for any."""
    origins: frozenset[str] = frozenset()
    """Origins whose pages may use the service; "*" is any."""
