"""Measures how fast a device multiplies with weights, for passes of several numbers of tokens."""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import torch

from layerstream.pipeline.checkpoint.checkpoint import Checkpoint
from layerstream.pipeline.checkpoint.formats.format import TensorInfo
from layerstream.pipeline.checkpoint.layers import LayerKind, group_layers
from layerstream.pipeline.checkpoint.packed_form import packed_form
from layerstream.pipeline.machine.measurement import Rate
from layerstream.stages.devices.protocol import Device

__all__ = ["TOKENS", "block_shapes", "compute_bytes", "main_dtype", "measure_compute"]

# A decoding step, a few sequences at once, short and long prompts. The planner interpolates between them.
TOKENS = (1, 4, 16, 64, 256, 1024)
# For all numbers of tokens together. Larger ones are left out if even one product would take longer.
_MAX_SECONDS = 0.8
# A sample is a run of consecutive products, so long that waiting for the device is negligible.
_SAMPLE_SECONDS = 0.004
_MIN_SAMPLES = 3
_MIN_BYTES, _MAX_BYTES = 64 << 20, 512 << 20
_MATRIX_DIMENSIONS = 2
_MAX_MATRICES = 64
_UNPACKED_BYTES = 2
# What libraries take to multiply: packed matrices, compiled kernels.
_LIBRARY_BYTES = 24 << 20
_FLOATS = ("float64", "float32", "float16", "bfloat16")


def main_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype of most weights; float32 or bfloat16 if they are quantised, since they are unpacked to that.

    GGUF's blocks are unpacked to float32, all others to bfloat16.
    """
    nbytes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        nbytes["float32" if tensor.encoding else tensor.dtype] += tensor.nbytes
    name, _ = nbytes.most_common(1)[0]
    return name if name in _FLOATS else "bfloat16"


def block_shapes(checkpoint: Checkpoint) -> tuple[tuple[int, int], ...]:
    """Return the matrix shapes of a typical block, or of all layers if there is none; if many, each shape once."""
    layers = group_layers(checkpoint)
    blocks = [layer for layer in layers if layer.kind is LayerKind.BLOCK]
    typical = blocks[len(blocks) // 2 : len(blocks) // 2 + 1] or layers
    shapes = [
        _plain_shape(checkpoint, checkpoint.tensors[name])
        for layer in typical
        for name in layer.tensors
    ]
    matrices = [
        (shape[0], shape[1])
        for shape in shapes
        if len(shape) == _MATRIX_DIMENSIONS and min(shape) > 1
    ]
    if len(matrices) > _MAX_MATRICES:  # experts
        matrices = list(dict.fromkeys(matrices))
    return tuple(matrices)


def _plain_shape(checkpoint: Checkpoint, info: TensorInfo) -> tuple[int, ...]:
    """The shape of what a tensor is unpacked to; none for scales."""
    form = packed_form(checkpoint, info)
    if form is None or info.encoding is not None:
        return info.logical_shape
    rows = info.shape[0] if info.shape else 0
    return (rows, form.plain_bytes // _UNPACKED_BYTES // rows) if rows and form.plain_bytes else ()


def compute_bytes(
    device: Device, *, shapes: Sequence[tuple[int, int]], dtype: str, available_bytes: int
) -> int:
    """Host memory that ``measure_compute`` takes at most, if there are ``available_bytes``."""
    if not device.reads_host_images or not shapes:
        return 0
    # Inputs of each width, and the results of a product and of the one before.
    columns = sum({width for _, width in shapes}) + 2 * max(rows for rows, _ in shapes)
    item_bytes: int = getattr(torch, dtype).itemsize
    products = TOKENS[-1] * columns * item_bytes
    return _weight_bytes(device, available_bytes) + products + _LIBRARY_BYTES


def measure_compute(
    device: Device, *, shapes: Sequence[tuple[int, int]], dtype: str, available_bytes: int
) -> Mapping[str, Rate]:
    """Measure consecutive products with matrices of ``shapes`` that are not in a processor cache.

    Args:
        device: Where computation runs.
        shapes: Rows and columns of each matrix.
        dtype: torch's name of the dtype of the model's weights.
        available_bytes: Host memory that there is, of which the matrices take a quarter at most, or 64 MiB.

    Returns:
        Weight bytes per second, by the number of tokens in decimal; only those within the time limit.

    Raises:
        LayerstreamError, RuntimeError: The device does not have the memory, or cannot compute in ``dtype``.
    """
    if not shapes:
        return {}
    memory = device.device_memory(_weight_bytes(device, available_bytes))
    weights = memory.view(getattr(torch, dtype))
    with torch.inference_mode():
        # Not zeros: with those a GPU uses less power, and runs faster than with real weights.
        row = torch.rand(1 << 16, device=device.torch_device).sub_(0.5).to(weights.dtype)
        weights.view(-1, row.numel()).copy_(row.expand(weights.numel() // row.numel(), -1))
        products = _MatrixProducts(device, weights, shapes)
        found, began = {}, time.perf_counter()
        for number, tokens in enumerate(TOKENS):
            share = (_MAX_SECONDS - (time.perf_counter() - began)) / (len(TOKENS) - number)
            rate = products.rate(tokens, seconds=share)
            if rate is None:
                break
            found[str(tokens)] = rate
    del weights, memory, row, products
    device.trim()
    return found


class _MatrixProducts:
    """Products with one matrix after another, which are views of memory larger than the processor caches."""

    def __init__(
        self, device: Device, weights: torch.Tensor, shapes: Sequence[tuple[int, int]]
    ) -> None:
        self._device = device
        self._matrices = cycle(_matrix_views(weights, shapes))
        self._seconds_per_token = 0.0  # of one product, with the last number of tokens

    def rate(self, tokens: int, *, seconds: float) -> Rate | None:
        """Return weight bytes per second with ``tokens`` rows; None if ``seconds`` are too short."""
        if self._seconds_per_token * tokens * _MIN_SAMPLES > 2 * seconds:
            return None
        deadline = time.perf_counter() + seconds
        samples: list[float] = []
        count, best = 1, math.inf
        self._time(tokens, count)  # the first product of a size selects and loads kernels
        while len(samples) < _MIN_SAMPLES or time.perf_counter() < deadline:
            took, nbytes = self._time(tokens, count)
            if took < _SAMPLE_SECONDS / 2 and not samples:
                count *= 2
                continue
            samples.append(nbytes / took)
            best = min(best, took / count)
        self._seconds_per_token = best / tokens
        return Rate.from_samples(samples)

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


def _matrix_views(weights: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Return matrices that fill ``weights``, with ``shapes`` in turn; those that are too large lose rows."""
    found, at = [], 0
    for rows, width in cycle(shapes):
        most = weights.numel() // 4 // width
        size = max(1, min(rows, most)) * width
        if at + size > weights.numel():
            break
        found.append(weights[at : at + size].view(-1, width))
        at += size
    return found


def _weight_bytes(device: Device, available_bytes: int) -> int:
    """Return twice the last cache of the processor, or enough to exceed the caches of a GPU; a small share of what there is."""
    if not device.reads_host_images:
        free = device.free_bytes() or 0
        return max(_MIN_BYTES, min(_MAX_BYTES, free // 8)) >> 20 << 20
    most = min(_MAX_BYTES, available_bytes // 4)
    return max(_MIN_BYTES, min(2 * _processor_cache_bytes(), most)) >> 20 << 20


def _processor_cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the bytes of the largest cache of the processor; 0 if the system does not report them."""
    sizes = [0]
    for file in folder.glob("index*/size"):
        try:
            sizes.append(int(file.read_text().strip().removesuffix("K")) << 10)
        except (OSError, ValueError):
            continue
    return max(sizes)
