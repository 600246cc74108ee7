"""Measures the cost of a decoder block besides matrix products: Python and kernel launches, and attention."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from layerstream.pipeline.machine.measurement import Rate
from layerstream.stages.devices.protocol import Device

__all__ = ["measure_blocks"]

# Each rate is measured with at least so many samples, for at least so long: shorter measurements are too noisy.
_MIN_SAMPLES = 5
_MIN_SECONDS = 0.05
# A block so small that only the number of its operations counts.
_HIDDEN_SIZE, _HEADS, _KV_HEADS, _HEAD_SIZE = 64, 4, 2, 16
_BLOCKS_PER_SAMPLE = 20
# Of weights that a processor multiplies with between the Python of two blocks: they push it out of the caches of a core.
_WEIGHT_BYTES, _WEIGHT_COLUMNS = 16 << 20, 2048
# Attention in prompts and over KV caches that are long enough for its time to matter.
_PROMPT_TOKENS, _ATTENTION_HEADS, _ATTENTION_HEAD_SIZE = 1024, 8, 128
_STEPS_PER_SAMPLE = 4


def measure_blocks(device: Device, *, dtype: str) -> Mapping[str, Rate]:
    """Measure small decoder blocks, and attention.

    Args:
        device: Where computation runs.
        dtype: torch's name of the dtype of the model's weights.

    Returns:
        Rates by the names of Hardware's fields.

    Raises:
        RuntimeError: The device cannot compute in ``dtype``.
    """
    options = {"dtype": getattr(torch, dtype), "device": device.torch_device}
    with torch.no_grad():
        found = {**_block_rates(device, options), **_attention_rates(device, options)}
    device.trim()
    return found


def _block_rates(device: Device, options: Mapping[str, Any]) -> dict[str, Rate]:
    block = _Block().to(**options)
    state = torch.ones((1, 1, _HIDDEN_SIZE), **options)
    angles = torch.ones((1, 1, _HEAD_SIZE), **options)
    cached = torch.ones((1, _KV_HEADS, 64, _HEAD_SIZE), **options)

    if not device.reads_host_images:

        def compute() -> None:
            for _ in range(_BLOCKS_PER_SAMPLE):
                block(state, angles, cached)

        return {"blocks_per_second": _measure(device, compute, _BLOCKS_PER_SAMPLE)}
    weights = torch.ones(_WEIGHT_BYTES // options["dtype"].itemsize, **options)
    weights = weights.view(-1, _WEIGHT_COLUMNS)
    inputs = torch.ones((1, _WEIGHT_COLUMNS), **options)

    def one_block() -> float:
        functional.linear(inputs, weights)
        began = time.perf_counter()
        block(state, angles, cached)
        return time.perf_counter() - began

    one_block()  # selects and loads kernels
    samples: list[float] = []
    deadline = time.perf_counter() + _MIN_SECONDS
    while len(samples) < _MIN_SAMPLES or time.perf_counter() < deadline:
        samples.append(1 / one_block())
    return {"blocks_per_second": Rate.from_samples(samples)}


def _attention_rates(device: Device, options: Mapping[str, Any]) -> dict[str, Rate]:
    heads = (1, _ATTENTION_HEADS, _PROMPT_TOKENS, _ATTENTION_HEAD_SIZE)
    query, key, value = (torch.rand(heads, **options).sub_(0.5) for _ in range(3))
    token = query[:, :, :1]
    cache = key

    def prompt() -> None:
        functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    def steps() -> None:
        for _ in range(_STEPS_PER_SAMPLE):
            functional.scaled_dot_product_attention(token, key, value)

    def grow() -> None:
        # As transformers' DynamicCache does. Each result is larger than the one freed before, so malloc takes fresh pages.
        nonlocal cache
        for _ in range(_STEPS_PER_SAMPLE):
            cache = torch.cat((cache, token), dim=-2)

    # Without leaving out what the causal mask excludes, as in the prediction.
    operations = 4 * _PROMPT_TOKENS * _ATTENTION_HEADS * _ATTENTION_HEAD_SIZE
    return {
        "attention_flops_per_second": _measure(device, prompt, _PROMPT_TOKENS * operations),
        "step_attention_flops_per_second": _measure(device, steps, _STEPS_PER_SAMPLE * operations),
        "kv_growth_bytes_per_second": _measure(device, grow, _STEPS_PER_SAMPLE * key.nbytes),
    }


def _measure(device: Device, work: Callable[[], None], amount: int) -> Rate:
    work()  # selects and loads kernels
    samples: list[float] = []
    deadline = time.perf_counter() + _MIN_SECONDS
    while len(samples) < _MIN_SAMPLES or time.perf_counter() < deadline:
        device.record().synchronize()
        began = time.perf_counter()
        work()
        device.record().synchronize()
        samples.append(amount / (time.perf_counter() - began))
    return Rate.from_samples(samples)


class _Block(nn.Module):
    """A usual decoder block: two norms, grouped attention with rotary embeddings and a cache, a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        kv, inner = _KV_HEADS * _HEAD_SIZE, 2 * _HIDDEN_SIZE
        self.query, self.output = (
            nn.Linear(_HIDDEN_SIZE, _HIDDEN_SIZE, bias=False) for _ in range(2)
        )
        self.key, self.value = (nn.Linear(_HIDDEN_SIZE, kv, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(_HIDDEN_SIZE, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, _HIDDEN_SIZE, bias=False)
        self.norms = nn.ParameterList(torch.ones(_HIDDEN_SIZE) for _ in range(2))

    def forward(
        self, state: torch.Tensor, angles: torch.Tensor, cached: torch.Tensor
    ) -> torch.Tensor:
        """Compute one token."""
        normed = _rms_norm(state, self.norms[0])
        heads = [
            matrix(normed).unflatten(-1, (-1, _HEAD_SIZE)).transpose(1, 2)
            for matrix in (self.query, self.key, self.value)
        ]
        query, key = _rotate(heads[0], angles), _rotate(heads[1], angles)
        key, value = torch.cat((cached, key), 2), torch.cat((cached, heads[2]), 2)
        attended = functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        state = state + self.output(attended.transpose(1, 2).flatten(2))
        normed = _rms_norm(state, self.norms[1])
        inner = functional.silu(self.gate(normed)) * self.up(normed)
        out: torch.Tensor = state + self.down(inner)
        return out


def _rms_norm(state: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = state.float()
    scale: torch.Tensor = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * (wide * scale).to(state.dtype)


def _rotate(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    half = heads.shape[-1] // 2
    turned = torch.cat((-heads[..., half:], heads[..., :half]), dim=-1)
    return heads * angles + turned * angles
