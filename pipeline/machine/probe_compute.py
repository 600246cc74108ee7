"""Measures how fast a device computes with weights, and how fast bytes are copied to it."""

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.layers import LayerKind, group_layers
from layerstream.pipeline.machine.measurement import Rate
from layerstream.stages.devices.cpu import CpuDevice
from layerstream.stages.devices.protocol import Device
from layerstream.stages.memory import HostMemory
from layerstream.stages.text import format_bytes

__all__ = ["TOKENS", "block_shapes", "main_dtype", "measure_compute", "measure_copies"]

logger = logging.getLogger(__name__)

# A decoding step, a few sequences at once, short and long prompts. In between, the planner interpolates.
TOKENS = (1, 4, 16, 64, 256, 1024)
# For all sizes together. Larger sizes are left out if even one product would take longer.
_SECONDS = 0.8
# Of consecutive products, so that waiting for the device is negligible.
_SAMPLE_SECONDS = 0.004
_LEAST_SAMPLES = 3
_LEAST_BYTES, _MOST_BYTES = 64 << 20, 256 << 20
# Sizes of copies. The largest one counts; the others show in a log from which size on copies are efficient.
_COPY_BYTES = (1 << 20, 4 << 20, 16 << 20, 64 << 20)
_COPY_SAMPLES = 5
# To a GPU, all blocks this many times: once takes a millisecond, which is little compared with starting up.
_COPY_TIMES = 4
_MATRIX = 2  # dimensions
_MOST_MATRICES = 64
_FLOATS = ("float64", "float32", "float16", "bfloat16")


def main_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of most weights; bfloat16 if they are quantised, since they are computed with in that."""
    nbytes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        nbytes[tensor.dtype] += tensor.nbytes
    name, _ = nbytes.most_common(1)[0]
    return name if name in _FLOATS else "bfloat16"


def block_shapes(checkpoint: Checkpoint) -> tuple[tuple[int, int], ...]:
    """The shapes of the matrices of a typical block, or else of all layers; if there are many, distinct ones."""
    layers = group_layers(checkpoint)
    blocks = [layer for layer in layers if layer.kind is LayerKind.BLOCK]
    chosen = blocks[len(blocks) // 2 : len(blocks) // 2 + 1] or layers
    shapes = [checkpoint.tensors[name].shape for layer in chosen for name in layer.tensors]
    matrices = [
        (shape[0], shape[1]) for shape in shapes if len(shape) == _MATRIX and min(shape) > 1
    ]
    if len(matrices) > _MOST_MATRICES:  # experts
        matrices = list(dict.fromkeys(matrices))
    return tuple(matrices)


def measure_compute(
    device: Device, *, shapes: Sequence[tuple[int, int]], dtype: str
) -> Mapping[str, Rate]:
    """Measure consecutive products with matrices of ``shapes``, none of them in a processor cache.

    Returns:
        Weight bytes per second, by the number of tokens in decimal; only for sizes within the time limit.

    Raises:
        LayerstreamError, RuntimeError: The device does not have the memory, or cannot compute in ``dtype``.
    """
    if not shapes:
        return {}
    memory = device.device_memory(_working_bytes(device))
    weights = memory.view(getattr(torch, dtype))
    with torch.inference_mode():
        # Not zeros: with those a GPU needs less power, and runs faster than with weights.
        row = torch.rand(1 << 16, device=device.torch_device).sub_(0.5).to(weights.dtype)
        weights.view(-1, row.numel()).copy_(row.expand(weights.numel() // row.numel(), -1))
        products = _Products(device, weights, shapes)
        found, began = {}, time.perf_counter()
        for number, tokens in enumerate(TOKENS):
            share = (_SECONDS - (time.perf_counter() - began)) / (len(TOKENS) - number)
            rate = products.rate(tokens, seconds=share)
            if rate is None:
                break
            found[str(tokens)] = rate
    del weights, memory, row, products
    device.trim()
    return found


class _Products:
    """Products with one matrix after another, which are views of memory that is larger than the caches."""

    def __init__(
        self, device: Device, weights: torch.Tensor, shapes: Sequence[tuple[int, int]]
    ) -> None:
        self._device = device
        self._matrices = cycle(_cut(weights, shapes))
        self._seconds_per_token = 0.0  # of one product with the last size

    def rate(self, tokens: int, *, seconds: float) -> Rate | None:
        """Bytes of weights per second with ``tokens`` rows; None if ``seconds`` are too short."""
        if self._seconds_per_token * tokens * _LEAST_SAMPLES > 2 * seconds:
            return None
        ends = time.perf_counter() + seconds
        samples: list[float] = []
        count, best = 1, math.inf
        self._time(tokens, count)  # the first one of a size selects and loads kernels
        while len(samples) < _LEAST_SAMPLES or time.perf_counter() < ends:
            took, nbytes = self._time(tokens, count)
            if took < _SAMPLE_SECONDS / 2 and not samples:
                count *= 2
                continue
            samples.append(nbytes / took)
            best = min(best, took / count)
        self._seconds_per_token = best / tokens
        return Rate.of(samples)

    def _time(self, tokens: int, count: int) -> tuple[float, int]:
        matrices = [next(self._matrices) for _ in range(count)]
        inputs = {
            width: torch.full(
                (tokens, width), 0.01, dtype=matrices[0].dtype, device=self._device.torch_device
            )
            for width in {matrix.shape[1] for matrix in matrices}
        }
        self._device.record().synchronize()
        began = time.perf_counter()
        for matrix in matrices:
            torch.nn.functional.linear(inputs[matrix.shape[1]], matrix)
        self._device.record().synchronize()
        return time.perf_counter() - began, sum(matrix.nbytes for matrix in matrices)


def _cut(weights: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Matrices that fill ``weights``, with ``shapes`` in turn; those that are too large lose rows."""
    found, at = [], 0
    for rows, width in cycle(shapes):
        most = weights.numel() // 4 // width
        size = max(1, min(rows, most)) * width
        if at + size > weights.numel():
            break
        found.append(weights[at : at + size].view(-1, width))
        at += size
    return found


def measure_copies(device: Device) -> Mapping[str, Rate]:
    """Measure copies from host to host, and to a device with its own memory, from page-locked and ordinary memory.

    Returns:
        Bytes per second of the largest block, by the names of Hardware's fields.
    """
    size = _COPY_BYTES[-1]
    ordinary = HostMemory(size)
    target = HostMemory(size)
    try:
        ordinary.tensor.zero_()
        target.tensor.zero_()
        found = {
            "host_copy_bytes_per_second": _copies(CpuDevice(), target.tensor, ordinary.tensor, size)
        }
        target.close()
        if not device.reads_host_images:
            found |= _to_device(device, ordinary)
    finally:
        target.close()
        ordinary.close()
    return found


def _to_device(device: Device, ordinary: HostMemory) -> Mapping[str, Rate]:
    size = ordinary.nbytes
    target = device.device_memory(size)
    pinned = device.host_memory(size)
    try:
        found = {}
        for name, source in (("h2d", pinned), ("pageable_h2d", ordinary)):
            table = {each: _copies(device, target, source.tensor, each) for each in _COPY_BYTES}
            found[f"{name}_bytes_per_second"] = table[size]
            logger.info(
                "%s to %s: %s",
                name,
                device.torch_device,
                ", ".join(
                    f"{format_bytes(rate.median)}/s in blocks of {format_bytes(each)}"
                    for each, rate in table.items()
                ),
            )
    finally:
        device.release_host_memory(pinned)
        del target
        device.trim()
    return found


def _copies(device: Device, target: torch.Tensor, source: torch.Tensor, nbytes: int) -> Rate:
    blocks = [
        (target[at : at + nbytes], source[at : at + nbytes])
        for at in range(0, source.numel(), nbytes)
    ]
    if not device.reads_host_images:
        blocks *= _COPY_TIMES
    moved = sum(copied.numel() for copied, _ in blocks)
    samples = []
    for _ in range(_COPY_SAMPLES + 1):
        began = time.perf_counter()
        device.copy(blocks, after=()).synchronize()
        samples.append(moved / (time.perf_counter() - began))
    return Rate.of(samples[1:])  # the first one includes one-time setup


def _working_bytes(device: Device) -> int:
    """Twice the last cache of the processor; a GPU's caches are smaller than what its memory spares."""
    if not device.reads_host_images:
        free = device.free_bytes() or 0
        return max(_LEAST_BYTES, min(_MOST_BYTES, free // 8)) >> 20 << 20
    return min(max(_LEAST_BYTES, 2 * _cache_bytes()), _MOST_BYTES) >> 20 << 20


def _cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache of the processor; 0 if the system does not say."""
    sizes = [0]
    for file in folder.glob("index*/size"):
        try:
            sizes.append(int(file.read_text().strip().removesuffix("K")) << 10)
        except (OSError, ValueError):
            continue
    return max(sizes)
