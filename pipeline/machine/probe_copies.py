"""Measures how fast bytes are copied within host memory, and from host memory to a device."""

import logging
import time
from collections.abc import Mapping

import torch

from layerstream.pipeline.machine.measurement import Rate
from layerstream.stages.devices.cpu import CpuDevice
from layerstream.stages.devices.protocol import Device
from layerstream.stages.memory import HostMemory
from layerstream.stages.text import format_bytes

__all__ = ["COPIES_BYTES", "measure_copies"]

logger = logging.getLogger(__name__)

# The largest size is used; the log shows all of them, to see from which size on copies are efficient.
_COPY_BYTES = (1 << 20, 4 << 20, 16 << 20, 64 << 20)
COPIES_BYTES = 2 * _COPY_BYTES[-1]
"""Host memory that measuring takes."""
_SAMPLES = 5
# One sample to a GPU copies all blocks this many times: once takes a millisecond, and startup would dominate.
_DEVICE_REPETITIONS = 4


def measure_copies(device: Device) -> Mapping[str, Rate]:
    """Measure copies from host to host and, from page-locked and ordinary memory, to a device with its own memory.

    Returns:
        Bytes per second in the largest blocks, by the names of Hardware's fields.
    """
    size = _COPY_BYTES[-1]
    ordinary = HostMemory(size)
    target = HostMemory(size)
    try:
        ordinary.tensor.zero_()
        target.tensor.zero_()
        found = {
            "host_copy_bytes_per_second": _measure_rate(
                CpuDevice(), target.tensor, ordinary.tensor, size
            )
        }
        target.close()
        if not device.reads_host_images:
            found |= _measure_copies_to_device(device, ordinary)
    finally:
        target.close()
        ordinary.close()
    return found


def _measure_copies_to_device(device: Device, ordinary: HostMemory) -> Mapping[str, Rate]:
    size = ordinary.nbytes
    target = device.device_memory(size)
    page_locked = device.host_memory(size)
    try:
        found = {}
        for name, source in (("h2d", page_locked), ("pageable_h2d", ordinary)):
            rates = {
                copy_bytes: _measure_rate(device, target, source.tensor, copy_bytes)
                for copy_bytes in _COPY_BYTES
            }
            found[f"{name}_bytes_per_second"] = rates[size]
            logger.info(
                "%s to %s: %s",
                name,
                device.torch_device,
                ", ".join(
                    f"{format_bytes(rate.median)}/s in blocks of {format_bytes(copy_bytes)}"
                    for copy_bytes, rate in rates.items()
                ),
            )
    finally:
        device.release_host_memory(page_locked)
        del target
        device.trim()
    return found


def _measure_rate(device: Device, target: torch.Tensor, source: torch.Tensor, nbytes: int) -> Rate:
    blocks = [
        (target[at : at + nbytes], source[at : at + nbytes])
        for at in range(0, source.numel(), nbytes)
    ]
    if not device.reads_host_images:
        blocks *= _DEVICE_REPETITIONS
    copied_bytes = sum(copied.numel() for copied, _ in blocks)
    samples = []
    for _ in range(_SAMPLES + 1):
        began = time.perf_counter()
        device.copy(blocks, after=()).synchronize()
        samples.append(copied_bytes / (time.perf_counter() - began))
    return Rate.from_samples(samples[1:])  # the first one includes one-time setup
