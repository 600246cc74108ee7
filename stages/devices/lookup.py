"""Devices by name."""

import torch

from layerstream.stages.devices.cpu import CpuDevice
from layerstream.stages.devices.cuda import CudaDevice
from layerstream.stages.errors import DeviceError

__all__ = ["missing_device", "open_device"]


def open_device(name: str) -> CpuDevice | CudaDevice:
    """The device called ``name``: "auto" (CUDA where there is one, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        DeviceError: This machine has no such device.
    """
    torch_device = _torch_device(name)
    return CpuDevice() if torch_device.type == "cpu" else CudaDevice(torch_device)


def missing_device(name: str) -> str | None:
    """The full name of a device that this machine lacks, such as "cuda:0"; None for one that it has.

    Raises:
        DeviceError: There is no such kind of device.
    """
    torch_device = _torch_device(name)
    index = torch_device.index or 0
    if torch_device.type == "cpu" or index < torch.cuda.device_count():
        return None
    return f"cuda:{index}"


def _torch_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch_device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"{name!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if torch_device.type not in {"cpu", "cuda"}:
        raise DeviceError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return torch_device
