"""How fast a device computes with weights, and how fast bytes are copied to it."""

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import torch

from layerstream.pipeline.checkpoint import Checkpoint
from layerstream.pipeline.figures import Rate
from layerstream.pipeline.layers import LayerKind, group_layers
from layerstream.stages.devices import CpuDevice, Device
from layerstream.stages.memory import HostMemory
from layerstream.stages.units import format_bytes

__all__ = ["TOKENS", "block_shapes", "main_dtype", "measure_compute", "measure_copies"]

logger = logging.getLogger(__name__)

# A decoding step, a few sequences at once, short and long prompts. In between, the planner interpolates.
TOKENS = (1, 4, 16, 64, 256, 1024)
# For all sizes together. The larger ones are left out where even one product would take longer.
_SECONDS = 0.8
# Of products behind one another, so that waiting for a device is small beside it.
_SAMPLE_SECONDS = 0.004
_LEAST_SAMPLES = 3
_LEAST_BYTES, _MOST_BYTES = 64 << 20, 256 << 20
# Blocks of copies. The largest speaks; the others show in a log from which size on a copy is worth its call.
_COPY_BYTES = (1 << 20, 4 << 20, 16 << 20, 64 << 20)
_COPY_SAMPLES = 5
# To a GPU, all blocks so many times: once takes a millisecond, which is not long beside beginning and waking up.
_COPY_TIMES = 4
_MATRIX = 2  # dimensions
_MOST_MATRICES = 64
_FLOATS = ("float64", "float32", "float16", "bfloat16")


def main_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of most of the weights; bfloat16 where they are quantised, as they are computed with then."""
    nbytes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        nbytes[tensor.dtype] += tensor.nbytes
    name, _ = nbytes.most_common(1)[0]
    return name if name in _FLOATS else "bfloat16"


def block_shapes(checkpoint: Checkpoint) -> tuple[tuple[int, int], ...]:
    """The shapes of the matrices of a typical block, or else of all layers; of very many, equal ones once."""
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
    """Products with matrices of ``shapes`` one after another, none of them in a cache.

    Returns:
        Weight bytes per second, by the number of tokens in decimal; only the sizes that the time allowed.

    Raises:
        LayerstreamError, RuntimeError: the device has not the memory, or cannot compute in ``dtype``.
    """
    if not shapes:
        return {}
    memory = device.device_memory(_working_bytes(device))
    weights = memory.view(getattr(torch, dtype))
    with torch.inference_mode():
        # Ordinary numbers: zeros draw less power and let a GPU run faster than weights do.
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
    """Products with one matrix after another, cut out of memory that is larger than the caches."""

    def __init__(
        self, device: Device, weights: torch.Tensor, shapes: Sequence[tuple[int, int]]
    ) -> None:
        self._device = device
        self._matrices = cycle(_cut(weights, shapes))
        self._seconds_per_token = 0.0  # of one product of the last size

    def rate(self, tokens: int, *, seconds: float) -> Rate | None:
        """Bytes of weights per second with ``tokens`` rows; None where ``seconds`` are too short."""
        if self._seconds_per_token * tokens * _LEAST_SAMPLES > 2 * seconds:
            return None
        ends = time.perf_counter() + seconds
        samples: list[float] = []
        count, best = 1, math.inf
        self._time(tokens, count)  # the first one of a size chooses and loads its kernels
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
    """Matrices that fill ``weights``, with ``shapes`` in turn; those too large for it lose rows."""
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
    """Copies from host to host, and to a device with memory of its own: from page-locked memory, and from ordinary one.

    Returns:
        Bytes per second by the names of Hardware's fields, of the largest block.
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
    return Rate.of(samples[1:])  # the first one also pays for what is set up but once


def _working_bytes(device: Device) -> int:
    """Twice the last cache of the processor; a GPU's caches are smaller than what its memory spares."""
    if not device.reads_host_images:
        free = device.free_bytes() or 0
        return max(_LEAST_BYTES, min(_MOST_BYTES, free // 8)) >> 20 << 20
    return min(max(_LEAST_BYTES, 2 * _cache_bytes()), _MOST_BYTES) >> 20 << 20


def _cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache of the processor; 0 where the system does not tell."""
    sizes = [0]
    for file in folder.glob("index*/size"):
        try:
            sizes.append(int(file.read_text().strip().removesuffix("K")) << 10)
        except (OSError, ValueError):
            continue
    return max(sizes)
