"""Measures what a decoder block takes besides products with its matrices: Python and launches, and attention."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from layerstream.pipeline.machine.measurement import Rate
from layerstream.stages.devices.protocol import Device

__all__ = ["measure_blocks"]

# Of each rate: at least so many samples, for at least so long. Shorter ones would show what else runs at the moment.
_SAMPLES = 5
_SECONDS = 0.05
# Of a block so small that only the number of its operations counts.
_HIDDEN, _HEADS, _KV_HEADS, _HEAD = 64, 4, 2, 16
_BLOCKS = 20
# Of attention, in prompts and over caches for which its time matters.
_TOKENS, _ATTENTION_HEADS, _ATTENTION_HEAD = 1024, 8, 128
_STEPS = 4


def measure_blocks(device: Device, *, dtype: str) -> Mapping[str, Rate]:
    """Rates of running small blocks, and of attention, by the names of Hardware's fields.

    Args:
        device: Where computation runs.
        dtype: Of the model's weights, by torch's name.

    Raises:
        RuntimeError: The device cannot compute in ``dtype``.
    """
    options = {"dtype": getattr(torch, dtype), "device": device.torch_device}
    with torch.no_grad():
        found = {**_blocks(device, options), **_attention(device, options)}
    device.trim()
    return found


def _blocks(device: Device, options: Mapping[str, Any]) -> dict[str, Rate]:
    block = _Block().to(**options)
    state = torch.ones((1, 1, _HIDDEN), **options)
    angles = torch.ones((1, 1, _HEAD), **options)
    cached = torch.ones((1, _KV_HEADS, 64, _HEAD), **options)

    def compute() -> None:
        for _ in range(_BLOCKS):
            block(state, angles, cached)

    return {"blocks_per_second": _rate(device, compute, _BLOCKS)}


def _attention(device: Device, options: Mapping[str, Any]) -> dict[str, Rate]:
    heads = (1, _ATTENTION_HEADS, _TOKENS, _ATTENTION_HEAD)
    query, key, value = (torch.rand(heads, **options).sub_(0.5) for _ in range(3))
    one = query[:, :, :1]
    grown = key

    def prompt() -> None:
        functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    def steps() -> None:
        for _ in range(_STEPS):
            functional.scaled_dot_product_attention(one, key, value)

    def grow() -> None:
        # As transformers' DynamicCache does. Each is larger than the one that was freed, so that malloc takes fresh pages.
        nonlocal grown
        for _ in range(_STEPS):
            grown = torch.cat((grown, one), dim=-2)

    # Counted without regard to causality, as in the prediction.
    operations = 4 * _TOKENS * _ATTENTION_HEADS * _ATTENTION_HEAD
    return {
        "attention_flops_per_second": _rate(device, prompt, _TOKENS * operations),
        "step_attention_flops_per_second": _rate(device, steps, _STEPS * operations),
        "kv_growth_bytes_per_second": _rate(device, grow, _STEPS * key.nbytes),
    }


def _rate(device: Device, work: Callable[[], None], amount: int) -> Rate:
    work()  # chooses and loads kernels
    samples: list[float] = []
    ends = time.perf_counter() + _SECONDS
    while len(samples) < _SAMPLES or time.perf_counter() < ends:
        device.record().synchronize()
        began = time.perf_counter()
        work()
        device.record().synchronize()
        samples.append(amount / (time.perf_counter() - began))
    return Rate.of(samples)


class _Block(nn.Module):
    """A decoder block with the usual operations: two norms, rotated grouped attention with a cache, a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        kv, inner = _KV_HEADS * _HEAD, 2 * _HIDDEN
        self.query, self.output = (nn.Linear(_HIDDEN, _HIDDEN, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(_HIDDEN, kv, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(_HIDDEN, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, _HIDDEN, bias=False)
        self.norms = nn.ParameterList(torch.ones(_HIDDEN) for _ in range(2))

    def forward(
        self, state: torch.Tensor, angles: torch.Tensor, cached: torch.Tensor
    ) -> torch.Tensor:
        """Compute one token."""
        normed = _normed(state, self.norms[0])
        heads = [
            matrix(normed).unflatten(-1, (-1, _HEAD)).transpose(1, 2)
            for matrix in (self.query, self.key, self.value)
        ]
        query, key = _rotated(heads[0], angles), _rotated(heads[1], angles)
        key, value = torch.cat((cached, key), 2), torch.cat((cached, heads[2]), 2)
        attended = functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        state = state + self.output(attended.transpose(1, 2).flatten(2))
        normed = _normed(state, self.norms[1])
        inner = functional.silu(self.gate(normed)) * self.up(normed)
        out: torch.Tensor = state + self.down(inner)
        return out


def _normed(state: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = state.float()
    scale: torch.Tensor = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * (wide * scale).to(state.dtype)


def _rotated(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    half = heads.shape[-1] // 2
    turned = torch.cat((-heads[..., half:], heads[..., :half]), dim=-1)
    return heads * angles + turned * angles
