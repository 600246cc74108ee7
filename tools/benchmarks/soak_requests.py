"""Requests of mixed kinds for a service that is soaked: what each API is asked, and which status it has to give."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "MAX_ANSWERS", "TEMPLATE", "lag_at", "mixed_request", "starved_seconds"]

TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
"""A chat template, for models that have none."""

KINDS = ("chat", "logprobs", "echo", "embeddings", "responses", "messages", "count", "long", "bad")
_TEXTS = MAX_ANSWERS = 16  # of one request
_LONG_CHARACTERS = 60_000
_OK, _REFUSED = 200, 400


def mixed_request(
    kind: str, rng: random.Random, *, model: str, longest: int, new_tokens: int
) -> tuple[str, dict[str, Any], int]:
    """A request of ``kind``: its path, its body and the status of its answer.

    Args:
        kind: One of ``KINDS``.
        rng: Makes the texts.
        model: The model's name.
        longest: Maximum of characters of a prompt, except for that which is too long.
        new_tokens: Maximum of tokens of an answer.
    """

    def text(characters: int) -> str:
        return "".join(chr(rng.randrange(32, 127)) for _ in range(characters))

    prompt = text(rng.randrange(1, longest - 2))
    count = rng.randrange(1, new_tokens + 1)
    said = {"messages": [{"role": "user", "content": prompt}]}
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "chat": ("chat/completions", {**said, "max_tokens": count}),
        "logprobs": (
            "chat/completions",
            {**said, "max_tokens": count, "logprobs": True, "top_logprobs": 20},
        ),
        "echo": (
            "completions",
            {"prompt": text(longest), "max_tokens": 1, "echo": True, "logprobs": 20},
        ),
        "embeddings": ("embeddings", {"input": [text(longest) for _ in range(_TEXTS)]}),
        "responses": ("responses", {"input": prompt, "max_output_tokens": count}),
        "messages": ("messages", {**said, "max_tokens": count}),
        "count": ("messages/count_tokens", said),
        # A page of another book: to be refused after it has been read and tokenized.
        "long": ("completions", {"prompt": text(_LONG_CHARACTERS), "max_tokens": 1}),
        "bad": ("chat/completions", {**said, "temperature": "hot"}),
    }
    path, body = made[kind]
    if kind not in {"embeddings", "count", "long", "bad"}:
        body |= {"temperature": 0, "stream": rng.random() < 0.5}  # noqa: PLR2004
    return f"/v1/{path}", body | {"model": model}, _REFUSED if kind in {"long", "bad"} else _OK


def lag_at(metrics: str, share: float) -> float:
    """The bound in seconds below which ``share`` of the loop's lags are, by the service's metrics."""
    buckets: Sequence[tuple[float, float]] = [
        (float(line.split('"')[1]), float(line.split()[-1]))
        for line in metrics.splitlines()
        if line.startswith("layerstream_loop_lag_seconds_bucket")
    ]
    total = buckets[-1][1]
    return next(bound for bound, count in buckets if count >= share * total)


def starved_seconds(pid: int) -> float:
    """Time for which the process's main thread, which runs the event loop, could run and had no processor."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9
