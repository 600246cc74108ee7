"""How tokens are sampled for a request."""

from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from layerstream.tools.serving.protocol import ChatRequest, CompletionRequest

__all__ = ["sampling_options"]

# The values that transformers takes for "not set" in greedy decoding; it warns of others.
_GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}

# Below that, only the likeliest token would be drawn, and divided scores might be infinite.
_COLDEST = 1e-6


def sampling_options(
    asked: ChatRequest | CompletionRequest,
    defaults: Any,
    *,
    device: str,
    number: int,
    prompt_tokens: int,
) -> dict[str, Any]:
    """Options of ``generate`` for answer ``number`` to a prompt of ``prompt_tokens`` tokens.

    Parameters that the request does not set come from ``defaults``, the model's generation config, if that is one for
    sampling; otherwise they are OpenAI's, whose temperature is 1.
    """
    sampled = bool(defaults.do_sample)

    def first(said: float | None, default: float | None, otherwise: float) -> float:
        if said is not None:
            return said
        return default if sampled and default is not None else otherwise

    options: dict[str, Any] = {"num_beams": 1}
    if asked.presence_penalty or asked.frequency_penalty:
        options["logits_processor"] = LogitsProcessorList(
            [_Penalties(asked, prompt_tokens=prompt_tokens)]
        )
    temperature = first(asked.temperature, defaults.temperature, 1.0)
    if temperature < _COLDEST:
        return options | _GREEDY
    return options | {
        "do_sample": True,
        "temperature": temperature,
        "top_p": first(asked.top_p, defaults.top_p, 1.0),
        "top_k": int(first(None, defaults.top_k, 0)),
        "generator": _generator(None if asked.seed is None else asked.seed + number, device),
    }


def _generator(seed: int | None, device: str) -> torch.Generator:
    """A generator for one answer, so that a seed is reproducible whatever else is sampled at the same time."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed)


class _Penalties(LogitsProcessor):
    """Makes tokens that are in the answer already less likely, by OpenAI's formula.

    score - frequency_penalty · (how often it came) - presence_penalty · (whether it came)
    """

    def __init__(self, asked: ChatRequest | CompletionRequest, *, prompt_tokens: int) -> None:
        self._frequency = asked.frequency_penalty
        self._presence = asked.presence_penalty
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        answer = input_ids[:, self._prompt_tokens :]
        counts = torch.zeros_like(scores)
        counts.scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)
