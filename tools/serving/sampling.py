"""Sampling parameters of a request as options of transformers' ``generate``."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessor

from layerstream.tools.serving.protocol import GenerationRequest

__all__ = ["end_tokens", "logits_processors", "sampling_options"]

# In greedy decoding transformers treats these values as "not set"; it warns about others.
_GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}

# Below this, only the most likely token would be sampled, and divided scores might be infinite.
_MIN_TEMPERATURE = 1e-6


def sampling_options(
    request: GenerationRequest, defaults: Any, *, device: str, number: int
) -> dict[str, Any]:
    """Options of ``generate`` for answer ``number`` to a prompt.

    Parameters that the request does not set come from ``defaults``, the model's generation config, if it enables
    sampling; otherwise from OpenAI's defaults, with a temperature of 1.
    """
    use_defaults = bool(defaults.do_sample)

    def choose(requested: float | None, default: float | None, otherwise: float) -> float:
        if requested is not None:
            return requested
        return default if use_defaults and default is not None else otherwise

    options: dict[str, Any] = {"num_beams": 1}
    if request.repetition_penalty is not None:
        options["repetition_penalty"] = request.repetition_penalty
    if request.min_tokens:
        options["min_new_tokens"] = request.min_tokens
    temperature = choose(request.temperature, defaults.temperature, 1.0)
    if temperature < _MIN_TEMPERATURE:
        return options | _GREEDY
    options |= {
        "do_sample": True,
        "temperature": temperature,
        "top_p": choose(request.top_p, defaults.top_p, 1.0),
        "top_k": max(int(choose(request.top_k, defaults.top_k, 0)), 0),
        "generator": _generator(None if request.seed is None else request.seed + number, device),
    }
    return options if request.min_p is None else options | {"min_p": request.min_p}


def end_tokens(request: GenerationRequest, defaults: Any) -> frozenset[int]:
    """The tokens that end a text."""
    eos = defaults.eos_token_id
    own = {eos} if isinstance(eos, int) else set(eos or ())
    return frozenset(request.stop_token_ids) | (set() if request.ignore_eos else own)


def logits_processors(request: GenerationRequest, *, prompt_tokens: int) -> list[LogitsProcessor]:
    """What changes the scores of tokens besides transformers' own options."""
    made: list[LogitsProcessor] = []
    if request.presence_penalty or request.frequency_penalty:
        made.append(_Penalties(request, prompt_tokens=prompt_tokens))
    if request.biases:
        made.append(_Biases(request.biases))
    return made


def _generator(seed: int | None, device: str) -> torch.Generator:
    """Make a generator for one answer: a seed is reproducible whatever other requests sample at the same time."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed)


class _Penalties(LogitsProcessor):
    """Makes tokens that the answer already has less likely, by OpenAI's formula.

    score - frequency_penalty · (number of occurrences) - presence_penalty · (1 if it occurs)
    """

    def __init__(self, request: GenerationRequest, *, prompt_tokens: int) -> None:
        self._frequency = request.frequency_penalty
        self._presence = request.presence_penalty
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        answer = input_ids[:, self._prompt_tokens :]
        counts = torch.zeros_like(scores)
        counts.scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class _Biases(LogitsProcessor):
    """Adds a number to the scores of some tokens."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._tokens, self._biases = list(biases), list(biases.values())

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        del input_ids
        biases = torch.tensor(self._biases, dtype=scores.dtype, device=scores.device)
        scores = scores.clone()
        scores[:, self._tokens] += biases
        return scores
