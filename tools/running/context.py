"""The context of a model, by its config."""

from collections.abc import Mapping
from typing import Any

__all__ = ["context_in"]


def context_in(config: Mapping[str, Any]) -> int | None:
    """The maximum number of tokens, prompt and answer together, by a model's config.json; None if it does not tell."""
    config = config.get("text_config") or config
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    found = (config.get(name) for name in names)
    return next((number for number in found if isinstance(number, int) and number > 0), None)
